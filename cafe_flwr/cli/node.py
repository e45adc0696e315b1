"""Commands of a node after the run, without the server: ``cafe-flwr node …`` and ``cafe-flwr join``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cafe_flwr.cli.personal import (
    ConfidenceOption,
    CorruptionsOption,
    EvaluationSeedOption,
    FoldsSeedOption,
    Format,
    FormatOption,
    MaxProbOption,
    RiskOption,
    RisksOption,
    bar,
    console,
    errors,
    show_calibration,
    show_export,
)

if TYPE_CHECKING:
    from cafe_flwr.app.source import NodeNetwork

node = typer.Typer(no_args_is_help=True, help="Evaluate, calibrate or export a client's network on its own node.")

_State = Annotated[Path | None, typer.Option("--state-dir", help="State folder of the node, as in its node-config.")]
_Client = Annotated[int | None, typer.Option(help="Whose network; needed where the folder has several.")]
_Data = Annotated[
    Path | None, typer.Option("--data", help="The client's data, if it is not where the run found it.", metavar="PATH")
]
_App = Annotated[
    str | None, typer.Option(help="ClientApp of a project of your own, 'module:app', made by make_client_app.")
]
_NodeConfig = Annotated[
    list[str] | None,
    typer.Option("--node-config", help="An entry of the node-config for your own app, 'key=value'; may be repeated."),
]


@node.command()
def evaluate(
    state_dir: _State = None,
    client: _Client = None,
    data: _Data = None,
    app: _App = None,
    node_config: _NodeConfig = None,
    risk: RisksOption = None,
    corruptions: CorruptionsOption = True,
    seed: EvaluationSeedOption = 0,
) -> None:
    """Accuracy, calibration, risk and coverage of the client's network, also under corrupted inputs."""
    from cafe_flwr.data.corruptions import CORRUPTIONS
    from cafe_flwr.personal.evaluation import RISKS, evaluate_run
    from cafe_flwr.results.inference import evaluation_table

    with _network(state_dir, client, data, app, node_config) as own:
        with bar("evaluating") as progress:
            found = evaluate_run(
                own,
                risks=tuple(risk or RISKS),
                corruptions=tuple(CORRUPTIONS) if corruptions else (),
                seed=seed,
                progress=progress,
            )
        console.print(evaluation_table(found))
        console.print(f"Evaluation: {own.output('evaluation.json')}", soft_wrap=True)


@node.command()
def calibrate(
    state_dir: _State = None,
    client: _Client = None,
    data: _Data = None,
    app: _App = None,
    node_config: _NodeConfig = None,
    risk: RiskOption = 0.05,
    confidence_level: ConfidenceOption = 0.9,
    seed: FoldsSeedOption = 0,
) -> None:
    """Find thresholds from the client's own calibration data alone; they replace those of an earlier calibration."""
    from cafe_flwr.personal.calibration import calibrate_run, thresholds_file
    from cafe_flwr.risk.client_calibration import Request

    with _network(state_dir, client, data, app, node_config) as own:
        with bar("calibrating") as progress:
            found = calibrate_run(own, Request(risk, confidence_level, seed=seed), progress)
        show_calibration(found)
        console.print(f"Thresholds: {thresholds_file(own.networks, own.client)}", soft_wrap=True)


@node.command()
def export(
    state_dir: _State = None,
    client: _Client = None,
    data: _Data = None,
    app: _App = None,
    node_config: _NodeConfig = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write; by default exported/client-<client> in the state folder.")
    ] = None,
    max_prob: MaxProbOption = None,
    format: FormatOption = Format.onnx,
) -> None:
    """Write the client's network as one graph per stage with its exit, for devices that have onnxruntime and numpy."""
    from cafe_flwr.personal.export import export_client

    with _network(state_dir, client, data, app, node_config) as own:
        target = to or own.networks / "exported" / f"client-{own.client}"
        show_export(export_client(own, own.client, target, max_prob=max_prob, format=format.value))


def join_package(
    folder: Annotated[Path, typer.Argument(help="A results folder.", metavar="RESULTS")],
    to: Annotated[Path | None, typer.Option(help="File to write; by default RESULTS/joining.safetensors.")] = None,
    head: Annotated[bool, typer.Option(help="With the mean of the clients' heads.")] = True,
) -> None:
    """On the server, after a run: write what a new client needs to join (`cafe-flwr join`)."""
    from cafe_flwr.app.joining import package_run

    with errors():
        package = package_run(folder, head=head)
        path = to or folder / "joining.safetensors"
        package.save(path)
    teachers = package.facts["teachers"]
    console.print(
        f"It holds the shared part and the mean of {teachers} heads."
        if teachers
        else "It holds the shared part, and no head."
    )
    console.print(f"Package: {path}", soft_wrap=True)


def join(
    package: Annotated[Path, typer.Argument(help="What the server's join-package has written.", metavar="PACKAGE")],
    client: Annotated[int, typer.Option(help="A number that no client of the federation has.")],
    state_dir: _State = None,
    data: _Data = None,
    app: _App = None,
    node_config: _NodeConfig = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the client's training data.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a personal network that is there already.")] = False,
) -> None:
    """Give a new client a personal network from a federation that has ended: no server, a few local epochs."""
    from cafe_flwr.app.joining import join_from
    from cafe_flwr.client.newcomer import EPOCHS, Newcomer
    from cafe_flwr.personal.package import Package

    with errors():
        folder = _state_folder(state_dir)
        joined = join_from(
            Package.load(package),
            Newcomer(client, folder, epochs or EPOCHS, force),
            parts=_parts(app),
            data_dir=data,
            node_config=_entries(node_config),
        )
    console.print(f"Accuracy of the exits before training: {_accuracies(joined.start.accuracy)}", highlight=False)
    console.print(
        f"and after {joined.report.local_steps} steps: {_accuracies(joined.report.exits.accuracy)} "
        f"({joined.report.test_examples} test examples)",
        highlight=False,
    )
    console.print(f"Network: {folder / f'client-{client}.safetensors'}", soft_wrap=True)


@contextmanager
def _network(
    state_dir: Path | None, client: int | None, data: Path | None, app: str | None, node_config: list[str] | None
) -> Iterator[NodeNetwork]:
    """The network the options name; errors are shown as such."""
    from cafe_flwr.app.source import NodeNetwork, only_client

    with errors():
        folder = _state_folder(state_dir)
        whose = only_client(folder) if client is None else client
        yield NodeNetwork(folder, whose, _parts(app), data, _entries(node_config))


def _state_folder(chosen: Path | None) -> Path:
    if chosen is not None:
        return chosen.expanduser().resolve()
    from platformdirs import user_state_path

    return user_state_path("cafe-flwr")


def _parts(app: str | None) -> Any:
    if app is None:
        return None
    from cafe_flwr.app.source import parts_of

    return parts_of(app)


def _entries(pairs: list[str] | None) -> dict[str, Any]:
    """Entries of a node-config, 'key=value' each; a value that is no TOML is taken as it stands."""
    entries: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--node-config takes 'key=value', got {pair!r}")
        try:
            entries[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            entries[key] = value
    return entries


def _accuracies(values: list[float]) -> str:
    return escape(" ".join(f"{a:.3f}" for a in values))


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(node, name="node")
    app.command("join-package")(join_package)
    app.command("join")(join)
