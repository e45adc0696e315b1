"""Commands of a node after the run, without the server: ``cafe-flwr node …`` and ``cafe-flwr join``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cafe_flwr.cli.common import console, errors, with_groups
from cafe_flwr.cli.personal import Claim, Evaluating, Exporting, FoldsSeed

if TYPE_CHECKING:
    from cafe_flwr.app.source import NodeNetwork

node = typer.Typer(no_args_is_help=True, help="Evaluate, calibrate or export a client's network on its own node.")

_State = Annotated[Path | None, typer.Option("--state-dir", help="State folder of the node, as in its node-config.")]
_Client = Annotated[int | None, typer.Option(help="Whose network; needed where the folder has several.")]


@dataclass(frozen=True)
class Own:
    """Options for the place of the client's data, and for a ClientApp of one's own."""

    data: Annotated[
        Path | None,
        typer.Option("--data", help="The client's data, if it is not where the run found it.", metavar="PATH"),
    ] = None
    app: Annotated[
        str | None, typer.Option(help="ClientApp of a project of your own, 'module:app', made by make_client_app.")
    ] = None
    node_config: Annotated[
        list[str] | None,
        typer.Option(
            "--node-config", help="An entry of the node-config for your own app, 'key=value'; may be repeated."
        ),
    ] = None

    def parts(self) -> Any:
        """Parts of the client's own app; None for the package's own."""
        if self.app is None:
            return None
        from cafe_flwr.app.source import parts_of

        return parts_of(self.app)

    def entries(self) -> dict[str, Any]:
        """Entries of the node-config; a value that is not TOML is taken as text."""
        entries: dict[str, Any] = {}
        for pair in self.node_config or []:
            key, equals, value = pair.partition("=")
            if not key or not equals:
                raise ValueError(f"--node-config takes 'key=value', got {pair!r}")
            try:
                entries[key] = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError:
                entries[key] = value
        return entries


@node.command()
@with_groups
def evaluate(*, state_dir: _State = None, client: _Client = None, own: Own, options: Evaluating) -> None:
    """Accuracy, calibration, risk and coverage of the client's network, also under corrupted inputs."""
    with _network(state_dir, client, own) as network:
        options.evaluate(network)
        console.print(f"Evaluation: {network.output('evaluation.json')}", soft_wrap=True)


@node.command()
@with_groups
def calibrate(*, state_dir: _State = None, client: _Client = None, own: Own, claim: Claim, seed: FoldsSeed = 0) -> None:
    """Find thresholds from the client's own calibration data alone; they replace those of an earlier calibration."""
    from cafe_flwr.personal.calibration import thresholds_file

    with _network(state_dir, client, own) as network:
        claim.calibrate(network, seed=seed)
        console.print(f"Thresholds: {thresholds_file(network.networks, network.client)}", soft_wrap=True)


@node.command()
@with_groups
def export(
    *,
    state_dir: _State = None,
    client: _Client = None,
    own: Own,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write; by default exported/client-<client> in the state folder.")
    ] = None,
    options: Exporting,
) -> None:
    """Write the client's network as one graph per stage with its exit, for devices that have onnxruntime and numpy."""
    with _network(state_dir, client, own) as network:
        options.export(network, network.client, to or network.networks / "exported" / f"client-{network.client}")


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
    teachers = package.metadata["teachers"]
    console.print(
        f"It holds the shared part and the mean of {teachers} heads."
        if teachers
        else "It holds the shared part, and no head."
    )
    console.print(f"Package: {path}", soft_wrap=True)


@with_groups
def join(
    *,
    package: Annotated[Path, typer.Argument(help="What the server's join-package has written.", metavar="PACKAGE")],
    client: Annotated[int, typer.Option(help="A number that no client of the federation has.")],
    state_dir: _State = None,
    own: Own,
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
            parts=own.parts(),
            data_dir=own.data,
            node_config=own.entries(),
        )
    console.print(f"Accuracy of the exits before training: {_accuracies(joined.start.accuracy)}", highlight=False)
    console.print(
        f"and after {joined.report.local_steps} steps: {_accuracies(joined.report.exits.accuracy)} "
        f"({joined.report.test_examples} test examples)",
        highlight=False,
    )
    console.print(f"Network: {folder / f'client-{client}.safetensors'}", soft_wrap=True)


@contextmanager
def _network(state_dir: Path | None, client: int | None, own: Own) -> Iterator[NodeNetwork]:
    """The network that the options name; errors are shown as sentences."""
    from cafe_flwr.app.source import NodeNetwork, only_client

    with errors():
        folder = _state_folder(state_dir)
        whose = only_client(folder) if client is None else client
        yield NodeNetwork(folder, whose, own.parts(), own.data, own.entries())


def _state_folder(chosen: Path | None) -> Path:
    if chosen is not None:
        return chosen.expanduser().resolve()
    from platformdirs import user_state_path

    return user_state_path("cafe-flwr")


def _accuracies(values: list[float]) -> str:
    return escape(" ".join(f"{a:.3f}" for a in values))
