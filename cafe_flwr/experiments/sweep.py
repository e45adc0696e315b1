"""The trials of a sweep, and the choice of each row's settings from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.experiments.contents import Condition, settings_words
from cafe_flwr.experiments.file import Experiment
from cafe_flwr.experiments.finished import read_finished
from cafe_flwr.experiments.folders import is_finished
from cafe_flwr.experiments.plan import Chosen, PlannedRun, plan_trials


@dataclass(frozen=True)
class RowSweep:
    """The trials of one row under one condition."""

    row: str
    condition: Condition
    trials: list[dict[str, Any]]  # settings of each
    accuracy: list[dict[int, float]]  # on validation data, by trial and seed; NaN for a trial that failed
    failures: list[str]  # reasons
    complete: bool  # whether all trials are over

    @property
    def best(self) -> int | None:
        """Position of the first trial with the highest mean over seeds, failed ones aside; None until all are over."""
        means = [float(np.mean([*by_seed.values()])) if by_seed else math.nan for by_seed in self.accuracy]
        if not self.complete or all(math.isnan(mean) for mean in means):
            return None
        return int(np.nanargmax(means))

    def to_json(self) -> dict[str, Any]:
        """The entry of ``sweep.json``."""
        return {
            "row": self.row,
            "condition": dict(self.condition),
            "trials": [
                {"settings": trial, "accuracy": {str(seed): a for seed, a in by_seed.items()}}
                for trial, by_seed in zip(self.trials, self.accuracy, strict=True)
            ],
            "failures": self.failures,
            "chosen": None if self.best is None else self.trials[self.best],
        }


def read_sweep(experiment: Experiment, folder: Path, failures: Mapping[Path, str]) -> list[RowSweep]:
    """Every row's trials, from their folders; ``failures`` are the reasons of failed runs, by folder."""
    trials: dict[tuple[str, Condition], list[PlannedRun]] = {}
    for run in plan_trials(experiment, folder):
        trials.setdefault((run.row, run.condition), []).append(run)
    sweeps = []
    for (row, condition), runs in trials.items():
        candidates = experiment.trials(row)
        accuracy: list[dict[int, float]] = [{} for _ in candidates]
        reasons, complete = [], True
        for run in runs:
            assert run.trial is not None
            if is_finished(run):
                accuracy[run.trial][run.settings.seed] = read_finished(run).figures["accuracy"]
            elif run.folder in failures:
                accuracy[run.trial][run.settings.seed] = math.nan
                tried = settings_words(candidates[run.trial])
                reasons.append(f"{tried}, seed {run.settings.seed}: {failures[run.folder]} (log: {run.log})")
            else:
                complete = False
        sweeps.append(RowSweep(row, condition, candidates, accuracy, reasons, complete))
    return sweeps


def choose(sweeps: Iterable[RowSweep]) -> Chosen:
    """The settings of every row's best trial; rows whose trials are not over, or all failed, are left out."""
    return {(sweep.row, sweep.condition): sweep.trials[sweep.best] for sweep in sweeps if sweep.best is not None}


def write_sweep(folder: Path, experiment: Experiment, sweeps: Iterable[RowSweep]) -> None:
    """Write ``sweep.json``: all trials with their accuracies, and the chosen ones."""
    assert experiment.sweep is not None
    metadata = {
        "measure": "accuracy on the clients' validation data, mean over exits, clients and seeds; highest is chosen",
        "validation_share": experiment.sweep.validation_share,
        "seeds": experiment.sweep.seeds,
        "settings": experiment.sweep.settings,
        "rows": [sweep.to_json() for sweep in sweeps],
    }
    write_atomically(folder / "sweep.json", to_json(metadata, indent=2))
