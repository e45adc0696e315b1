"""Commands that start a run or show one: run, train-central, show, report."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cafe_flwr.cli.common import ResultsDirOption, RunConfigOption, console, errors, fail, overridden
from cafe_flwr.cli.personal import show_calibration

if TYPE_CHECKING:
    from cafe_flwr.settings import Settings

_Results = Annotated[Path, typer.Argument(help="A results folder.")]


def run(
    folder: Annotated[Path, typer.Argument(help="The Flower app.", metavar="APP")] = Path("."),
    run_config: RunConfigOption = None,
    federation_config: Annotated[
        list[str] | None, typer.Option(help="Of the simulation, as for `flwr run`: 'num-supernodes=20 …'.")
    ] = None,
    results_dir: ResultsDirOption = None,
) -> None:
    """Run a federation in Flower's Simulation Engine, show how it went, and say so by the exit code.

    Like `flwr run APP --stream`, with a SuperLink of its own that is stopped at the end, in this Python environment.
    """
    from cafe_flwr.app.launch import private_superlink, run_app, with_resources

    settings, overrides = _settings(folder, overridden(run_config, results_dir))
    _look_at_data(settings)
    results = settings.results
    pairs = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
    try:
        with private_superlink() as env:
            status = run_app(folder, env, pairs, with_resources(settings, federation_config or []))
    except RuntimeError as error:
        fail(error)
    if not status.completed:
        fail(f"the run ended as {status.status}; what it wrote until then is in {results}")
    if settings.mode == "calibrate":
        show_calibration(json.loads((results / "calibration.json").read_text()))
    else:
        show(results)


def train_central(run_config: RunConfigOption = None, results_dir: ResultsDirOption = None) -> None:
    """Train one network on the data of all clients in one place, by SAFE-KD's recipe unless settings say otherwise."""
    from cafe_flwr.app.central import central_settings, run_central
    from cafe_flwr.results.tables import final_table

    overrides = overridden(run_config, results_dir)
    with errors():
        settings = central_settings(overrides)
        run_central(settings, settings.results, progress=True)
    console.print(final_table(settings.results))
    console.print(f"Results: {settings.results}", soft_wrap=True)


def show(folder: _Results) -> None:
    """Print the final table of a run, and where its report is."""
    from cafe_flwr.results.tables import final_table

    with errors():
        console.print(final_table(folder))
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


def report(folder: _Results) -> None:
    """Write the report page of a run again, from its files."""
    from cafe_flwr.app.page import write_page

    with errors():
        console.print(f"Report: {write_page(folder)}", soft_wrap=True)


def _look_at_data(settings: Settings) -> None:
    """Read data that lie on this machine as its nodes will, so that what is wrong with them is told at once."""
    from cafe_flwr.app.parts import federation

    if settings.dataset.startswith("local:") or settings.data.dir:
        with errors():
            federation(settings)


def _settings(folder: Path, overrides: dict[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The settings of the app's manifest with the overrides, and the overrides under today's keys."""
    from cafe_flwr.settings import Settings, todays

    manifest = folder / "pyproject.toml"
    try:
        config = tomllib.loads(manifest.read_text())["tool"]["flwr"]["app"]["config"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        fail(f"{folder} is not a Flower app of cafe-flwr: {manifest} has no [tool.flwr.app.config] ({error!r})")
    with errors():
        config = todays(config)
        asked = todays({**{key: config[key] for key in ("objective",) if key in config}, **overrides})
        chosen = Settings.from_run_config({**config, **asked})
        chosen.check_read()
        return chosen, asked
