"""The state of the results folders of an experiment's runs: finished, resumable, new, or holding something else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from cafe_flwr.experiments.file import Experiment
from cafe_flwr.experiments.plan import PlannedRun, plan_runs, plan_trials
from cafe_flwr.results.folder import is_bare
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.settings import FREE_ON_RESUME, Settings, todays

State = Literal["finished", "resumable", "new"]


def state_of(run: PlannedRun, undecided: Iterable[str] = ()) -> State:
    """How far a run is, judged by its folder.

    Settings that the run does not read, or that are still ``undecided``, are not compared. Raises ValueError if the
    folder holds anything but (a part of) this run.
    """
    if not run.folder.is_dir() or is_bare(run.folder):
        return "new"
    advice = "choose another name for the experiment, or another --results-dir"
    try:
        before = json.loads((run.folder / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{run.folder} is in the way, it is not a run of cafe-flwr ({error}): {advice}") from None
    wanted = run.settings.to_run_config()
    was = {**Settings().to_run_config(), **todays(before)}
    ignored = FREE_ON_RESUME.union(run.settings.not_read())
    differing = [key for key, value in wanted.items() if key not in ignored and was[key] != value]
    if changed := [key for key in differing if key not in {*undecided}]:
        details = "; ".join(f"{key} was {was[key]!r}, now {wanted[key]!r}" for key in changed)
        raise ValueError(f"row {run.row!r}: {run.folder} is the result of another experiment ({details}): {advice}")
    if read_summary(run):
        return "finished"
    return "resumable" if not differing and Checkpoints(run.folder / "checkpoint").load() else "new"


def is_finished(run: PlannedRun) -> bool:
    """Whether the run is finished; raises as :func:`state_of`."""
    return state_of(run) == "finished"


def read_summary(run: PlannedRun) -> dict[str, Any] | None:
    """Contents of ``summary.json``, None if it cannot be read."""
    try:
        return dict(json.loads((run.folder / "summary.json").read_text()))
    except (OSError, ValueError):
        return None


def check_folders(experiment: Experiment, folder: Path) -> None:
    """Raise ValueError with a line for every row whose folders are neither free nor hold its own runs."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is in the way, it is no folder")
    problems: dict[str, str] = {}
    for run in plan_trials(experiment, folder) + plan_runs(experiment, folder):
        swept = {key for trial in experiment.trials(run.row) for key in trial} if run.trial is None else set()
        if swept:  # rounds left after fine-tuning may follow from it
            swept.add("num-server-rounds")
        try:
            state_of(run, swept)
        except ValueError as error:
            problems.setdefault(run.row, str(error))
    if problems:
        raise ValueError("\n".join(problems.values()))
