"""The command line: ``cafe-flwr``."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Personalised federated early-exit networks.")
console = Console()

_PAIR = r"""(\S+?)=('[^']*'|"[^"]*"|\S+)"""  # as Flower reads its run config


@app.callback()
def main() -> None:
    """Personalised federated early-exit networks on Flower."""


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="The Flower app.", metavar="APP")] = Path("."),
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="Settings, as for `flwr run`: 'key=value …'.")
    ] = None,
    federation_config: Annotated[
        list[str] | None, typer.Option(help="Of the simulation, as for `flwr run`: 'num-supernodes=20 …'.")
    ] = None,
    results_dir: Annotated[Path | None, typer.Option(help="Where results go; overrides the setting.")] = None,
) -> None:
    """Run a federation in Flower's Simulation Engine, show how it went, and say so by the exit code.

    Like `flwr run APP --stream`, with a SuperLink of its own that is stopped at the end, in this Python environment.
    """
    from cafe_flwr.launch import private_superlink, run_app

    overrides = _overrides(run_config or [])
    if results_dir is not None:
        overrides["results-dir"] = str(results_dir.expanduser().resolve())
    results = _settings(folder, overrides).results
    pairs = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
    try:
        with private_superlink() as env:
            status = run_app(folder, env, pairs, federation_config or [])
    except RuntimeError as error:
        _fail(str(error))
    if not status.completed:
        _fail(f"the run ended as {status.status}; what it wrote until then is in {results}")
    show(results)


@app.command()
def settings() -> None:
    """List every setting with its default and meaning."""
    from cafe_flwr.settings import Settings

    table = Table("setting", "default", "meaning", box=box.SIMPLE_HEAD)
    for name, field in Settings.model_fields.items():
        table.add_row(name.replace("_", "-"), repr(field.default), (field.description or "").replace("\n", " "))
    console.print(table)


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="A results folder.")]) -> None:
    """Print the final table of a run, and where its report is."""
    from cafe_flwr.report import final_table

    try:
        console.print(final_table(folder))
    except FileNotFoundError as error:
        _fail(str(error))
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A results folder.")]) -> None:
    """Write the report page of a run again, from its files."""
    from cafe_flwr.report import write_report

    try:
        console.print(f"Report: {write_report(folder)}", soft_wrap=True)
    except FileNotFoundError as error:
        _fail(str(error))


def _overrides(run_config: list[str]) -> dict[str, Any]:
    """Settings given on the command line as Flower takes them: pairs like 'key=1 other="x"', or one TOML file."""
    try:
        if len(run_config) == 1 and run_config[0].endswith(".toml"):
            return tomllib.loads(Path(run_config[0]).expanduser().read_text())
        text = " ".join(run_config)
        pairs = re.findall(_PAIR, text)
        if re.sub(_PAIR, "", text).strip():
            raise ValueError(f"{re.sub(_PAIR, '', text).strip()!r} is no pair")
        return tomllib.loads("\n".join(f"{key} = {value}" for key, value in pairs))
    except (OSError, ValueError) as error:
        return _fail(f"--run-config takes 'key=1 other=\"text\"' or one TOML file: {error}")


def _settings(folder: Path, overrides: dict[str, Any]) -> Any:
    """The settings the run will have: those of the app's manifest, overridden."""
    from cafe_flwr.settings import Settings

    manifest = folder / "pyproject.toml"
    try:
        config = tomllib.loads(manifest.read_text())["tool"]["flwr"]["app"]["config"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        _fail(f"{folder} is not a Flower app of cafe-flwr: {manifest} has no [tool.flwr.app.config] ({error!r})")
    try:
        return Settings.from_run_config({**config, **overrides})
    except ValueError as error:
        _fail(str(error))


def _fail(reason: str) -> Any:
    Console(stderr=True).print(f"[bold red]Error:[/] {reason}", soft_wrap=True, highlight=False)
    raise typer.Exit(1)
