"""From finished runs to a comparison: rows side by side, with their spread over seeds and paired differences.

All of it is read from the results folders alone. Accuracies are of the last round, on the clients' own test data,
before local training unless a figure's name says otherwise. It is shown by
``tables.py`` and ``page.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.experiments.file import (
    Chosen,
    Condition,
    Experiment,
    PlannedRun,
    is_finished,
    plan_runs,
    plan_trials,
    read_summary,
    settings_words,
)
from cafe_flwr.results.run import number, numbers

EQUAL_MACS = "macs_at_equal_accuracy"


# --- arithmetic ------------------------------------------------------------------------------------------------------


class Statistic(NamedTuple):
    """Mean over seeds, standard deviation (n − 1 in the denominator; NaN for one seed), and number of seeds."""

    mean: float
    std: float
    seeds: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / math.sqrt(self.seeds) if self.seeds else math.nan


def statistic(values: Iterable[float]) -> Statistic:
    """Statistic of the values that are not NaN.

    Examples
    --------
    >>> statistic([1.0, 3.0, math.nan])
    Statistic(mean=2.0, std=1.4142135623730951, seeds=2)
    >>> statistic([1.0])
    Statistic(mean=1.0, std=nan, seeds=1)
    """
    known = [value for value in values if not math.isnan(value)]
    mean = float(np.mean(known)) if known else math.nan
    return Statistic(mean, float(np.std(known, ddof=1)) if len(known) > 1 else math.nan, len(known))


def paired_difference(row: Mapping[int, float], reference: Mapping[int, float]) -> Statistic:
    """Statistic of row − reference over the seeds that both have: positive where the row is higher.

    Examples
    --------
    >>> paired_difference({0: 0.75, 1: 0.5, 2: 0.5}, {0: 0.5, 1: 0.5})
    Statistic(mean=0.125, std=0.1767766952966369, seeds=2)
    """
    return statistic(row[seed] - reference[seed] for seed in row if seed in reference)


def macs_to_reach(target: float, accuracy: Sequence[float], macs: Sequence[float]) -> float | None:
    """The fewest MACs at which a curve is at least as accurate as ``target``; None if it never is.

    Parameters
    ----------
    target
        Accuracy.
    accuracy, macs
        Points of the curve, one per threshold.

    Examples
    --------
    >>> macs_to_reach(0.6, [0.5, 0.6, 0.7], [0.2, 0.4, 1.0])
    0.4
    """
    return min((cost for reached, cost in zip(accuracy, macs, strict=True) if reached >= target), default=None)


# --- what a run has to say -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes
    ----------
    figures
        Numbers by name; NaN for what was not recorded.
    curve
        Accuracy and share of the full network's MACs, by threshold; of all clients' test examples together.
    data, participants
        What must be the same for all rows: examples and classes of every client; clients of every round.
    left_out
        Client rounds whose work was not used.
    """

    figures: dict[str, float]
    curve: tuple[list[float], list[float]]
    data: list[Any]
    participants: list[Any]
    left_out: int

    @property
    def full_accuracy(self) -> float:
        """Accuracy of the last exit as the curve counts it: the point where nothing leaves early."""
        return self.curve[0][-1] if self.curve[0] else math.nan


def read_finished(run: PlannedRun) -> Finished:
    """Read a finished run from its folder."""
    summary = read_summary(run) or {}
    macs = [number(value) for value in summary.get("macs_per_exit") or [math.nan]]
    exits, curve = len(macs), summary.get("curve") or {}
    points = len(curve.get("macs") or [])
    lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    figures = {"accuracy": number(summary.get("accuracy"))}
    figures |= _each_exit("accuracy_exit_{}", summary.get("accuracy_per_exit"), exits)
    for key in ("accuracy_ensemble", "accuracy_worst_tenth", "accuracy_after_training", "accuracy_adapted"):
        figures[key] = number(summary.get(key))
    figures["accuracy_last_five"] = number((summary.get("last_five") or {}).get("accuracy"))
    figures |= _each_exit("accuracy_after_training_exit_{}", summary.get("accuracy_per_exit_after_training"), exits)
    figures["accuracy_macs_area"] = number(summary.get("accuracy_macs_area"))
    figures["macs_reduction_at_equal_accuracy"] = number(summary.get("macs_reduction_at_equal_accuracy"))
    ways = [number(summary.get(f"bytes_{way}_per_client_round")) for way in ("up", "down")]
    figures |= {"bytes_up_per_client_round": ways[0], "bytes_down_per_client_round": ways[1]}
    figures |= {"bytes_per_client_round": sum(ways), "seconds": number(summary.get("seconds"))}
    figures["local_steps_per_client"] = number(summary.get("local_steps_per_client"))
    return Finished(
        figures,
        (numbers(curve.get("accuracy"), points), [cost / macs[-1] for cost in numbers(curve.get("macs"), points)]),
        [[c.get(key) for key in ("client", "train", "calibration", "test", "classes")] for c in summary["clients"]],
        [line["participants"] for line in lines],
        sum(len(line.get("left_out") or {}) for line in lines),
    )


def _each_exit(name: str, values: object, exits: int) -> dict[str, float]:
    return {name.format(k): value for k, value in enumerate(numbers(values, exits), start=1)}


# --- the sweep -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowSweep:
    """The trials of one row under one condition.

    Attributes
    ----------
    row, condition
        Whose.
    trials
        Settings of every trial.
    accuracy
        Mean over exits and clients on validation data, by trial and seed; NaN for a trial that failed.
    failures
        Reasons.
    complete
        Whether all trials are over.
    """

    row: str
    condition: Condition
    trials: list[dict[str, Any]]
    accuracy: list[dict[int, float]]
    failures: list[str]
    complete: bool

    @property
    def best(self) -> int | None:
        """Position of the trial with the highest mean over seeds, the first of equals; None as long as one is missing.

        A trial that failed with a seed is out.
        """
        means = [float(np.mean([*by_seed.values()])) if by_seed else math.nan for by_seed in self.accuracy]
        if not self.complete or all(math.isnan(mean) for mean in means):
            return None
        return int(np.nanargmax(means))

    def to_json(self) -> dict[str, Any]:
        """For ``sweep.json``."""
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
    """Every row's trials, from their folders.

    Parameters
    ----------
    experiment, folder
        The experiment and its folder.
    failures
        Reasons of the runs that failed, by folder.
    """
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
    """Write ``sweep.json``: all trials with their figures, and what was chosen."""
    assert experiment.sweep is not None
    facts = {
        "measure": "accuracy on the clients' validation data, mean over exits, clients and seeds; highest is chosen",
        "validation_share": experiment.sweep.validation_share,
        "seeds": experiment.sweep.seeds,
        "settings": experiment.sweep.settings,
        "rows": [sweep.to_json() for sweep in sweeps],
    }
    write_atomically(folder / "sweep.json", to_json(facts, indent=2))


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowResult:
    """A row of a table.

    Attributes
    ----------
    label, method
        Of the row.
    runs
        Finished runs by seed.
    missing
        Why a seed has none, by seed.
    trials
        Number of trials that its settings were chosen from.
    chosen
        What was chosen.
    """

    label: str
    method: str
    runs: dict[int, Finished]
    missing: dict[int, str]
    trials: int = 0
    chosen: dict[str, Any] = field(default_factory=dict)

    def by_seed(self, figure: str) -> dict[int, float]:
        """A figure of every seed."""
        return {seed: run.figures.get(figure, math.nan) for seed, run in self.runs.items()}

    def of(self, figure: str) -> Statistic:
        """A figure over seeds."""
        return statistic(self.by_seed(figure).values())


@dataclass(frozen=True)
class ConditionTable:
    """The rows under one condition, best first.

    Attributes
    ----------
    condition
        Values of what is varied.
    rows
        Sorted by mean accuracy; rows without a finished run last.
    reference
        Label of the row that differences are taken to.
    baseline
        Best baseline in published form, by mean accuracy over exits; None if none has finished.
    budget
        Sentence about the local gradient steps that were measured.
    fairness
        Sentences about what was the same for all rows, and what was not.
    """

    condition: Condition
    rows: list[RowResult]
    reference: str
    baseline: str | None
    budget: str
    fairness: list[str]

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
        """Of the page."""
        return self.experiment.title or self.experiment.name


def compare(experiment: Experiment, folder: Path, failures: Mapping[Path, str] | None = None) -> Comparison:
    """Make the tables of what has finished.

    Parameters
    ----------
    experiment, folder
        The experiment and its folder.
    failures
        Reasons of the runs that failed, by folder; other runs that have not finished count as not run yet.
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
            result = RowResult(
                row.name, row.method, {}, {}, len(experiment.trials(row.name)), dict(chosen.get(key, {}))
            )
            for seed in experiment.seeds:
                _file(result, seed, planned.get(key, {}).get(seed), failures)
            rows.append(result)
        tables.append(make_table(experiment, condition, rows))
    return Comparison(experiment, folder, tables, sweeps)


def _file(result: RowResult, seed: int, run: PlannedRun | None, failures: Mapping[Path, str]) -> None:
    """Put a seed's run among the finished, or note why it is not."""
    if run is not None and is_finished(run):
        result.runs[seed] = read_finished(run)
    elif run is not None and run.folder in failures:
        result.missing[seed] = f"{failures[run.folder]} (log: {run.log})"
    else:
        result.missing[seed] = "not run" if run else "no settings were chosen for it"


def make_table(experiment: Experiment, condition: Condition, rows: list[RowResult]) -> ConditionTable:
    """Sort the rows of a condition, and work out what takes more than one of them."""
    means = {row.label: row.of("accuracy").mean for row in rows}
    rows = sorted(rows, key=lambda row: -means[row.label] if math.isfinite(means[row.label]) else math.inf)
    baseline = next((row for row in rows if row.label in experiment.baseline_rows and row.runs), None)
    targets = {seed: run.full_accuracy for seed, run in baseline.runs.items()} if baseline else {}
    for row in rows:
        for seed, run in row.runs.items():
            if seed in targets:
                reached = macs_to_reach(targets[seed], *run.curve)
                run.figures[EQUAL_MACS] = math.nan if reached is None else reached
    return ConditionTable(
        condition,
        rows,
        experiment.reference_row,
        baseline.label if baseline else None,
        budget_line(experiment.budget, rows),
        fairness_lines(rows),
    )


def budget_line(budget: str, rows: Sequence[RowResult]) -> str:
    """What was asked for, and the gradient steps per client that were measured."""
    measured: dict[str, list[str]] = {}
    for row in rows:
        if row.runs:
            counts = {f"{value:g}" for value in row.by_seed("local_steps_per_client").values()}
            measured.setdefault(" or ".join(sorted(counts)).replace("nan", "an unknown number of"), []).append(
                row.label
            )
    if len(measured) < 2:
        return f"{budget}: {next(iter(measured), 'no')} gradient steps per client in every row"
    most = max(measured, key=lambda steps: len(measured[steps]))
    others = "; ".join(f"{', '.join(labels)}: {steps}" for steps, labels in measured.items() if steps != most)
    asked = "equal was asked for, but measured steps differ" if budget == "equal" else budget
    return f"{asked}: {most} gradient steps per client, except {others}"


def fairness_lines(rows: Sequence[RowResult]) -> list[str]:
    """What the records say about clients' data and participants, row against row; and whose work was left out."""
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
