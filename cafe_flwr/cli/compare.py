"""The command ``compare``: runs an experiment, shows its progress, and prints its tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cafe_flwr.cli.common import console, errors, with_groups

if TYPE_CHECKING:
    from rich.progress import Progress

    from cafe_flwr.experiments.execution import Event
    from cafe_flwr.experiments.file import Experiment
    from cafe_flwr.experiments.plan import PlannedRun

_SMOKE_ROWS = 300


@dataclass(frozen=True)
class Size:
    """Options for the size of an experiment and the place of its data."""

    smoke: Annotated[
        bool, typer.Option("--smoke", help="At the file's smoke size: minutes, on made-up data, to see that it works.")
    ] = False
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with copies of the hub's data sets; overrides the setting.")
    ] = None


@with_groups
def compare(
    *,
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
    size: Size,
) -> None:
    """Run an experiment and compare its rows: same data, same initial weights, same participants, same steps.

    Finished runs are kept and skipped when the command is given again. A run that fails is reported, and the others go
    on; the exit code is then 1. With --smoke, data sets of the hub are made up unless --data-dir has them.
    """
    from cafe_flwr.experiments.tables import between_markers

    at_once = jobs or os.cpu_count() or 1
    with errors():
        experiment = _read(file, size, only or [])
        if update_markdown is not None:
            between_markers(update_markdown)
        home = results_dir.expanduser().resolve() / experiment.name
        experiment = _checked(experiment, home, made_up=size.smoke)
        if not dry_run:
            home.mkdir(parents=True, exist_ok=True)
            (home / "experiment.yaml").write_bytes(file.read_bytes())
    rows = only or experiment.labels
    if dry_run:
        _list_runs(experiment, home, rows, at_once)
        return
    failures = _run_experiment(experiment, home, rows, at_once)
    _show_comparison(experiment, home, failures, update_markdown)
    if failures:
        raise typer.Exit(1)


@contextmanager
def _stopping() -> Iterator[None]:
    """End the command on Ctrl-C with a sentence on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        Console().print(  # the interruption may have come in the middle of a print on the other one
            "Stopped. Finished runs are kept, and others go on from their last round: give the same command again.",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


def _read(file: Path, size: Size, only: Sequence[str]) -> Experiment:
    """The experiment at the chosen size; ValueError if ``only`` names a row that it does not have."""
    from cafe_flwr.core.text import nearest
    from cafe_flwr.experiments.file import read_experiment, smoke_size, with_data_dir

    experiment = read_experiment(file)
    if size.smoke:
        experiment = smoke_size(experiment)
    if size.data_dir is not None:
        experiment = with_data_dir(experiment, size.data_dir.expanduser().resolve())
    for label in only:
        if label not in experiment.labels:
            raise ValueError(f"--only: no row is called {label!r}; {nearest(label, experiment.labels)}")
    return experiment


def _checked(experiment: Experiment, home: Path, *, made_up: bool) -> Experiment:
    """The experiment, on made-up data if asked for; ValueError unless all runs can start and their folders are free."""
    from cafe_flwr.experiments.folders import check_folders
    from cafe_flwr.experiments.plan import check_experiment

    if made_up:
        experiment = _with_stand_ins(experiment, home)
    check_experiment(experiment, home)
    check_folders(experiment, home)
    return experiment


def _with_stand_ins(experiment: Experiment, home: Path) -> Experiment:
    """The experiment with made-up files, below its folder, in place of data sets from the hub."""
    from cafe_flwr.data.hub import HUB_SETS
    from cafe_flwr.data.stand_ins import write_stand_in
    from cafe_flwr.experiments.file import with_data_dir
    from cafe_flwr.experiments.plan import plan_runs

    planned = [run.settings for run in plan_runs(experiment, home)]
    made, folder = [s.dataset for s in planned if s.dataset in HUB_SETS and not s.data.dir], home / "made-up-data"
    for name in dict.fromkeys(made):
        if not (folder / name).is_dir():
            write_stand_in(folder, name, _SMOKE_ROWS)
        console.print(f"{name}: {_SMOKE_ROWS} made-up rows in {folder / name}", soft_wrap=True, highlight=False)
    return with_data_dir(experiment, folder) if made else experiment


def _run_experiment(experiment: Experiment, home: Path, rows: Sequence[str], jobs: int) -> dict[Path, str]:
    """Run trials, choose settings, run the rows; return the reasons of failed runs, by folder."""
    from cafe_flwr.experiments.plan import plan_runs, plan_trials
    from cafe_flwr.experiments.sweep import choose, read_sweep, write_sweep

    with _stopping():
        failures = _run_all([run for run in plan_trials(experiment, home) if run.row in rows], jobs, "trials")
        sweeps = read_sweep(experiment, home, failures)
        if experiment.sweep:
            write_sweep(home, experiment, sweeps)
        runs = [run for run in plan_runs(experiment, home, choose(sweeps)) if run.row in rows]
        return failures | _run_all(runs, jobs, "runs")


def _run_all(runs: Sequence[PlannedRun], jobs: int, what: str) -> dict[Path, str]:
    """Run what is not finished, under a progress bar; return the reasons of failed runs, by folder."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from cafe_flwr.experiments.execution import execute
    from cafe_flwr.experiments.folders import is_finished

    waiting = [run for run in runs if not is_finished(run)]
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} {what} are finished already")
    if not waiting:
        return {}
    _show_estimate(waiting, jobs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[running]}"),
    )
    with Progress(*columns, console=console) as progress, closing(execute(waiting, jobs)) as events:
        watch = _Watch(progress, waiting, what)
        for event in events:
            watch.note(event)
    return watch.failures


class _Watch:
    """Shows the progress of runs, and keeps the reasons of failed ones, by folder."""

    def __init__(self, progress: Progress, runs: Sequence[PlannedRun], what: str) -> None:
        self.failures: dict[Path, str] = {}
        self._progress = progress
        self._bar = progress.add_task(
            what, total=sum(run.settings.num_server_rounds for run in runs), running="starting"
        )
        self._of = f"{len(runs)} {what}"
        self._running: dict[Path, PlannedRun] = {}
        self._ended = self._rounds = 0  # runs that have ended, and their rounds

    def note(self, event: Event | None) -> None:
        """Show an event, and the rounds that have been done meanwhile."""
        if event and event.ended:
            self._end(event)
        elif event:
            self._running[event.run.folder] = event.run
        running = self._running.values()
        done = self._rounds + sum(min(run.rounds_done, run.settings.num_server_rounds) for run in running)
        names = ", ".join(run.name for run in running)
        self._progress.update(self._bar, completed=done, description=f"{self._ended}/{self._of}", running=names)

    def _end(self, event: Event) -> None:
        from cafe_flwr.experiments.folders import read_summary

        self._ended += 1
        self._rounds += event.run.settings.num_server_rounds
        del self._running[event.run.folder]
        if event.failure:
            self.failures[event.run.folder] = event.failure
            line = f"[red]failed[/]   {event.run.name}: {escape(event.failure)} (log: {event.run.log})"
        else:
            seconds = (read_summary(event.run) or {}).get("seconds", 0.0)
            line = f"finished {event.run.name} ({seconds:.0f} s)"
        self._progress.console.print(line, soft_wrap=True, highlight=False)


def _show_estimate(runs: Sequence[PlannedRun], jobs: int) -> None:
    """Print about how long runs take and how much memory they need, or why there is no estimate."""
    from cafe_flwr.experiments.estimate import estimate

    try:
        line = estimate(runs, jobs).words()
    except (MemoryError, RuntimeError, ValueError) as error:
        line = f"No estimate of time and memory: {error}"
    console.print(escape(line), soft_wrap=True, highlight=False)


def _list_runs(experiment: Experiment, home: Path, rows: Sequence[str], jobs: int) -> None:
    """Print all runs with their state, and about how long the rest takes."""
    from cafe_flwr.experiments.folders import is_finished, read_summary
    from cafe_flwr.experiments.plan import plan_runs, plan_trials
    from cafe_flwr.experiments.sweep import choose, read_sweep
    from cafe_flwr.results.run import duration

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    table.add_column("rounds", justify="right")
    table.add_column("state")
    decided = {run.name: run for run in plan_runs(experiment, home, choose(read_sweep(experiment, home, {})))}
    left, seconds, measured = 0, 0.0, 0
    waiting: list[PlannedRun] = []
    for planned in plan_trials(experiment, home) + plan_runs(experiment, home):
        if planned.row not in rows:
            continue
        run = planned if planned.trial is not None else decided.get(planned.name)
        rounds = planned.settings.num_server_rounds
        to_do, state = rounds, "to do, after the sweep"
        if run and is_finished(run):
            to_do, state = 0, "finished"
            seconds += (read_summary(run) or {}).get("seconds", 0.0)
            measured += rounds
        elif run:
            to_do = max(0, rounds - run.rounds_done)
            state = "to do" if to_do == rounds else f"{run.rounds_done} rounds are done"
        left += to_do
        waiting += [planned] if to_do else []
        table.add_row(planned.name, str(rounds), state)
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
    from cafe_flwr.experiments.page import write_comparison
    from cafe_flwr.experiments.tables import notes, terminal_table, update_markdown

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
