"""Compares finished runs: rows side by side, with their spread over seeds and paired differences.

Everything is read from the results folders. Accuracies are of the last round, on the clients' own test data, before
local training unless a figure's name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cafe_flwr.experiments.contents import Condition
from cafe_flwr.experiments.file import Experiment
from cafe_flwr.experiments.finished import Finished, read_finished
from cafe_flwr.experiments.folders import is_finished
from cafe_flwr.experiments.plan import PlannedRun, plan_runs
from cafe_flwr.experiments.statistics import Statistic, paired_difference, statistic
from cafe_flwr.experiments.sweep import RowSweep, choose, read_sweep

EQUAL_MACS = "macs_at_equal_accuracy"


@dataclass(frozen=True)
class RowResult:
    """A row of a table."""

    label: str
    method: str
    runs: dict[int, Finished]  # by seed
    missing: dict[int, str]  # why a seed has no finished run
    trials: int = 0  # from how many its settings were chosen
    chosen: dict[str, Any] = field(default_factory=dict)

    def by_seed(self, figure: str) -> dict[int, float]:
        """A figure, by seed."""
        return {seed: run.figures.get(figure, math.nan) for seed, run in self.runs.items()}

    def of(self, figure: str) -> Statistic:
        """Mean and spread of a figure over the seeds."""
        return statistic(self.by_seed(figure).values())


@dataclass(frozen=True)
class ConditionTable:
    """The rows under one condition, sorted by mean accuracy; rows without a finished run come last."""

    condition: Condition
    rows: list[RowResult]
    reference: str  # label of the row that differences are taken to
    baseline: str | None  # label of the most accurate baseline in published form; None if none has finished
    budget: str  # sentence about the local gradient steps that were measured
    fairness: list[str]  # sentences about what was the same for all rows, and what was not

    @property
    def exits(self) -> int:
        """Largest number of exits."""
        names = {name for row in self.rows for run in row.runs.values() for name in run.figures}
        return sum(name.startswith("accuracy_exit_") for name in names)

    def row(self, label: str) -> RowResult:
        """The row of this label."""
        return next(row for row in self.rows if row.label == label)

    def difference(self, row: RowResult, figure: str = "accuracy") -> Statistic:
        """Row − reference over the seeds that both have."""
        return paired_difference(row.by_seed(figure), self.row(self.reference).by_seed(figure))


@dataclass(frozen=True)
class Comparison:
    """All tables of an experiment."""

    experiment: Experiment
    folder: Path
    tables: list[ConditionTable]
    sweeps: list[RowSweep]

    @property
    def title(self) -> str:
        """Title of the page."""
        return self.experiment.title or self.experiment.name


def compare(experiment: Experiment, folder: Path, failures: Mapping[Path, str] | None = None) -> Comparison:
    """Make the tables of the finished runs in the experiment's folder.

    ``failures`` are the reasons of failed runs, by folder; other unfinished runs count as not run yet.
    """
    failures = failures or {}
    sweeps = read_sweep(experiment, folder, failures)
    chosen = choose(sweeps)
    planned: dict[tuple[str, Condition], dict[int, PlannedRun]] = {}
    for run in plan_runs(experiment, folder, chosen):
        planned.setdefault((run.row, run.condition), {})[run.settings.seed] = run
    tables = []
    for condition in experiment.conditions:
        rows = []
        for row in experiment.rows:
            key = row.name, condition
            trials = len(experiment.trials(row.name))
            result = RowResult(row.name, row.method, {}, {}, trials, dict(chosen.get(key, {})))
            for seed in experiment.seeds:
                _file(result, seed, planned.get(key, {}).get(seed), failures)
            rows.append(result)
        tables.append(make_table(experiment, condition, rows))
    return Comparison(experiment, folder, tables, sweeps)


def _file(result: RowResult, seed: int, run: PlannedRun | None, failures: Mapping[Path, str]) -> None:
    """Put a seed's run among the finished ones, or note why it is missing."""
    if run is not None and is_finished(run):
        result.runs[seed] = read_finished(run)
    elif run is not None and run.folder in failures:
        result.missing[seed] = f"{failures[run.folder]} (log: {run.log})"
    else:
        result.missing[seed] = "not run" if run else "no settings were chosen for it"


def make_table(experiment: Experiment, condition: Condition, rows: list[RowResult]) -> ConditionTable:
    """Sort the rows of a condition, and compare them with the baseline and with each other."""
    means = {row.label: row.of("accuracy").mean for row in rows}
    rows = sorted(rows, key=lambda row: -means[row.label] if math.isfinite(means[row.label]) else math.inf)
    baseline = next((row for row in rows if row.label in experiment.baseline_rows and row.runs), None)
    targets = {seed: run.full_accuracy for seed, run in baseline.runs.items()} if baseline else {}
    for row in rows:
        for seed, run in row.runs.items():
            if seed in targets:
                run.figures[EQUAL_MACS] = run.curve.macs_to_reach(targets[seed])
    return ConditionTable(
        condition,
        rows,
        experiment.reference_row,
        baseline.label if baseline else None,
        budget_line(experiment.budget, rows),
        fairness_lines(rows),
    )


def budget_line(budget: str, rows: Sequence[RowResult]) -> str:
    """The budget that was asked for, and the gradient steps per client that were measured."""
    measured: dict[str, list[str]] = {}
    for row in rows:
        if row.runs:
            counts = {f"{value:g}" for value in row.by_seed("local_steps_per_client").values()}
            steps = " or ".join(sorted(counts)).replace("nan", "an unknown number of")
            measured.setdefault(steps, []).append(row.label)
    if len(measured) < 2:
        return f"{budget}: {next(iter(measured), 'no')} gradient steps per client in every row"
    most = max(measured, key=lambda steps: len(measured[steps]))
    others = "; ".join(f"{', '.join(labels)}: {steps}" for steps, labels in measured.items() if steps != most)
    asked = "equal was asked for, but measured steps differ" if budget == "equal" else budget
    return f"{asked}: {most} gradient steps per client, except {others}"


def fairness_lines(rows: Sequence[RowResult]) -> list[str]:
    """Whether rows had the same clients' data and participants by their records, and how much work was left out."""
    lines = []
    first: dict[int, Finished] = {}
    for row in rows:
        for seed, run in row.runs.items():
            other = first.setdefault(seed, run)
            rounds = min(len(run.participants), len(other.participants))
            same = {
                "the clients' data": run.data == other.data,
                "the participants of a round": run.participants[:rounds] == other.participants[:rounds],
            }
            lines += [
                f"NOT COMPARABLE: {what} of {row.label!r}, seed {seed}, differ from those of other rows"
                for what, is_same in same.items()
                if not is_same
            ]
    lines = lines or ["checked: the same clients' data, and the same participants of every round, in all rows"]
    for row in rows:
        if left_out := sum(run.left_out for run in row.runs.values()):
            lines.append(f"{row.label!r}: the work of {left_out} client rounds was left out (see the runs' reports)")
    return lines
