"""The command line: ``cafe-flwr``."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cafe_flwr.cli import node, personal

if TYPE_CHECKING:
    from cafe_flwr.experiments.file import Experiment, PlannedRun

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Personalised federated early-exit networks.")
console = Console()

_SMOKE_ROWS = 300

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
    from cafe_flwr.app.launch import private_superlink, run_app, with_resources

    overrides = _overrides(run_config or [])
    if results_dir is not None:
        overrides["results-dir"] = str(results_dir.expanduser().resolve())
    settings = _settings(folder, overrides)
    results = settings.results
    pairs = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
    try:
        with private_superlink() as env:
            status = run_app(folder, env, pairs, with_resources(settings, federation_config or []))
    except RuntimeError as error:
        _fail(str(error))
    if not status.completed:
        _fail(f"the run ended as {status.status}; what it wrote until then is in {results}")
    if settings.mode == "calibrate":
        personal.show_calibration(json.loads((results / "calibration.json").read_text()))
    else:
        show(results)


@app.command()
def settings() -> None:
    """List every setting with its default and meaning."""
    from cafe_flwr.settings import Settings

    table = Table("setting", "default", "meaning", box=box.SIMPLE_HEAD)
    names = Settings.keys()
    for name in names:
        field = Settings.model_fields[name.replace("-", "_")]
        table.add_row(name, repr(field.default), (field.description or "").replace("\n", " "))
    console.print(table)


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="A results folder.")]) -> None:
    """Print the final table of a run, and where its report is."""
    from cafe_flwr.results.run import final_table

    try:
        console.print(final_table(folder))
    except FileNotFoundError as error:
        _fail(str(error))
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A results folder.")]) -> None:
    """Write the report page of a run again, from its files."""
    from cafe_flwr.results.run import write_report

    try:
        console.print(f"Report: {write_report(folder)}", soft_wrap=True)
    except FileNotFoundError as error:
        _fail(str(error))


personal.register(app)
node.register(app)


@app.command("train-central")
def train_central(
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="Settings, as for `flwr run`: 'key=value …'.")
    ] = None,
    results_dir: Annotated[Path | None, typer.Option(help="Where results go; overrides the setting.")] = None,
) -> None:
    """Train one network on the data of all clients in one place, by SAFE-KD's recipe unless settings say otherwise."""
    from cafe_flwr.app.central import central_settings, run_central
    from cafe_flwr.results.run import final_table

    overrides = _overrides(run_config or [])
    if results_dir is not None:
        overrides["results-dir"] = str(results_dir.expanduser().resolve())
    try:
        settings = central_settings(overrides)
        run_central(settings, settings.results, progress=True)
    except ValueError as error:
        _fail(escape(str(error)))
    console.print(final_table(settings.results))
    console.print(f"Results: {settings.results}", soft_wrap=True)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="The experiment: methods × settings × seeds, in YAML.", metavar="FILE")],
    results_dir: Annotated[Path, typer.Option(help="Results go to a folder of the experiment's name below.")] = Path(
        "~/cafe-flwr-results"
    ),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; by default as many as there are CPUs.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="Run this row only; may be repeated.")] = None,
    update_markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Put the tables between the two compare markers of this file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and list the runs.")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="At the file's smoke size: minutes, on made-up data, to see that all runs.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with copies of the hub's data sets; overrides the setting.")
    ] = None,
) -> None:
    """Run an experiment and compare its rows: same data, same initial weights, same participants, same steps.

    Finished runs are kept and skipped when the command is given again. A run that fails is reported, and the others go
    on; the exit code is then 1. With --smoke, data sets of the hub are made up unless --data-dir has them.
    """
    from cafe_flwr.experiments.file import (
        check_experiment,
        check_folders,
        nearest,
        read_experiment,
        smoke_size,
        with_data_dir,
    )
    from cafe_flwr.experiments.tables import between_markers

    try:
        experiment = read_experiment(file)
        if smoke:
            experiment = smoke_size(experiment)
        if data_dir is not None:
            experiment = with_data_dir(experiment, data_dir.expanduser().resolve())
        for label in only or []:
            if label not in experiment.labels:
                raise ValueError(f"--only: no row is called {label!r}; {nearest(label, experiment.labels)}")
        if update_markdown is not None:
            between_markers(update_markdown)
        home = results_dir.expanduser().resolve() / experiment.name
        if smoke:
            experiment = _with_stand_ins(experiment, home)
        check_experiment(experiment, home)
        check_folders(experiment, home)
        if not dry_run:
            home.mkdir(parents=True, exist_ok=True)
            (home / "experiment.yaml").write_bytes(file.read_bytes())
    except (ValueError, OSError) as error:
        _fail(escape(str(error)))
    rows = only or experiment.labels
    if dry_run:
        _list_runs(experiment, home, rows, jobs or os.cpu_count() or 1)
        return
    try:
        failures = _run_experiment(experiment, home, rows, jobs or os.cpu_count() or 1)
    except KeyboardInterrupt:
        Console().print(  # the interruption may have come in the middle of a print on the other one
            "Stopped. Finished runs are kept, and others go on from their last round: give the same command again.",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    _show_comparison(experiment, home, failures, update_markdown)
    if failures:
        raise typer.Exit(1)


def _with_stand_ins(experiment: Experiment, home: Path) -> Experiment:
    """The experiment on made-up files, below its folder, in the place of sets that would come from the hub."""
    from cafe_flwr.data.hub import HUB_SETS
    from cafe_flwr.data.stand_ins import write_stand_in
    from cafe_flwr.experiments.file import plan_runs, with_data_dir

    planned = [run.settings for run in plan_runs(experiment, home)]
    made, folder = [s.dataset for s in planned if s.dataset in HUB_SETS and not s.data_dir], home / "made-up-data"
    for name in dict.fromkeys(made):
        if not (folder / name).is_dir():
            write_stand_in(folder, name, _SMOKE_ROWS)
        console.print(f"{name}: {_SMOKE_ROWS} made-up rows in {folder / name}", soft_wrap=True, highlight=False)
    return with_data_dir(experiment, folder) if made else experiment


def _run_experiment(experiment: Experiment, home: Path, rows: Sequence[str], jobs: int) -> dict[Path, str]:
    """Trials, choice, runs; the reasons of those that failed, by folder."""
    from cafe_flwr.experiments.comparison import choose, read_sweep, write_sweep
    from cafe_flwr.experiments.file import plan_runs, plan_trials

    failures = _run_all([run for run in plan_trials(experiment, home) if run.row in rows], jobs, "trials")
    sweeps = read_sweep(experiment, home, failures)
    if experiment.sweep:
        write_sweep(home, experiment, sweeps)
    runs = [run for run in plan_runs(experiment, home, choose(sweeps)) if run.row in rows]
    return failures | _run_all(runs, jobs, "runs")


def _run_all(runs: Sequence[PlannedRun], jobs: int, what: str) -> dict[Path, str]:
    """Run what is not finished, under a progress bar; the reasons of those that failed, by folder."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from cafe_flwr.experiments.execution import execute
    from cafe_flwr.experiments.file import is_finished, read_summary

    waiting = [run for run in runs if not is_finished(run)]
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} {what} are finished already")
    if not waiting:
        return {}
    _show_estimate(waiting, jobs)
    failures: dict[Path, str] = {}
    running: dict[Path, PlannedRun] = {}
    rounds = 0  # of runs that have ended
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[running]}"),
    )
    with Progress(*columns, console=console) as progress, closing(execute(waiting, jobs)) as events:
        total = sum(run.settings.num_server_rounds for run in waiting)
        bar = progress.add_task(what, total=total, running="starting")
        ended = 0
        for event in events:
            if event and event.ended:
                ended += 1
                rounds += event.run.settings.num_server_rounds
                del running[event.run.folder]
                if event.failure:
                    failures[event.run.folder] = event.failure
                    line = f"[red]failed[/]   {event.run.name}: {escape(event.failure)} (log: {event.run.log})"
                else:
                    seconds = (read_summary(event.run) or {}).get("seconds", 0.0)
                    line = f"finished {event.run.name} ({seconds:.0f} s)"
                progress.console.print(line, soft_wrap=True, highlight=False)
            elif event:
                running[event.run.folder] = event.run
            done = rounds + sum(min(run.rounds_done, run.settings.num_server_rounds) for run in running.values())
            names = ", ".join(run.name for run in running.values())
            progress.update(bar, completed=done, description=f"{ended}/{len(waiting)} {what}", running=names)
    return failures


def _show_estimate(runs: Sequence[PlannedRun], jobs: int) -> None:
    """About how long they take and how much memory they need, or why that cannot be said."""
    from cafe_flwr.experiments.estimate import estimate

    try:
        line = estimate(runs, jobs).words()
    except (MemoryError, RuntimeError, ValueError) as error:
        line = f"No estimate of time and memory: {error}"
    console.print(escape(line), soft_wrap=True, highlight=False)


def _list_runs(experiment: Experiment, home: Path, rows: Sequence[str], jobs: int) -> None:
    """What there is to run, what is there already, and about how long the rest takes."""
    from cafe_flwr.experiments.comparison import choose, read_sweep
    from cafe_flwr.experiments.file import is_finished, plan_runs, plan_trials, read_summary
    from cafe_flwr.results.run import duration

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    table.add_column("rounds", justify="right")
    table.add_column("state")
    chosen = choose(read_sweep(experiment, home, {}))
    decided = plan_runs(experiment, home, chosen)
    all_runs = plan_trials(experiment, home) + plan_runs(experiment, home)
    left, seconds, measured = 0, 0.0, 0
    waiting: list[PlannedRun] = []
    for run in (run for run in all_runs if run.row in rows):
        rounds = run.settings.num_server_rounds
        if run.trial is None and run.name not in {other.name for other in decided}:
            state, to_do = "to do, after the sweep", rounds
        elif is_finished(run if run.trial is not None else next(r for r in decided if r.name == run.name)):
            state, to_do = "finished", 0
            seconds += (read_summary(run) or {}).get("seconds", 0.0)
            measured += rounds
        else:
            to_do = max(0, rounds - run.rounds_done)
            state = "to do" if to_do == rounds else f"{run.rounds_done} rounds are done"
        left += to_do
        waiting += [run] if to_do else []
        table.add_row(run.name, str(rounds), state)
    console.print(table)
    if measured and left:
        console.print(f"To do: {left} rounds, about {duration(seconds / measured * left / jobs)} with {jobs} at a time")
    else:
        console.print(f"To do: {left} rounds" + (", no finished run tells how long they take" if left else ""))
    if waiting:
        _show_estimate(waiting, jobs)


def _show_comparison(experiment: Experiment, home: Path, failures: dict[Path, str], markdown: Path | None) -> None:
    """Write the files of the comparison and print its tables."""
    from cafe_flwr.experiments.comparison import compare as make_comparison
    from cafe_flwr.experiments.tables import notes, terminal_table, update_markdown, write_comparison

    comparison = make_comparison(experiment, home, failures)
    page = write_comparison(comparison)
    wide = console if console.is_terminal else Console(width=120)
    for table in comparison.tables:
        wide.print(terminal_table(comparison, table))
        for note in notes(comparison, table):
            wide.print(f"· {escape(note)}", highlight=False)
        wide.print()
    if failures:
        console.print(f"[bold red]{len(failures)} failed[/], see above; the same command tries them once more")
    if markdown is not None:
        update_markdown(markdown, comparison)
        console.print(f"Updated: {markdown}", soft_wrap=True)
    console.print(f"Comparison: {page}", soft_wrap=True)


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
