"""Reads from a finished run's results folder what a comparison needs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cafe_flwr.experiments.folders import read_summary
from cafe_flwr.experiments.plan import PlannedRun
from cafe_flwr.metrics.curve import CostCurve
from cafe_flwr.results.run import number, numbers


@dataclass(frozen=True)
class Finished:
    """A finished run: its figures, and records that must be the same for all rows."""

    figures: dict[str, float]  # by name; NaN for what was not recorded
    curve: CostCurve  # MACs as shares of the full network's, of all clients' test examples together
    data: list[Any]  # examples and classes of every client
    participants: list[Any]  # clients of every round
    left_out: int  # client rounds whose work was not used

    @property
    def full_accuracy(self) -> float:
        """Accuracy of the last exit as the curve counts it: the point where nothing leaves early."""
        return float(self.curve.accuracy[-1]) if len(self.curve.accuracy) else math.nan


def read_finished(run: PlannedRun) -> Finished:
    """Read a finished run from its folder."""
    summary = read_summary(run) or {}
    macs = [number(value) for value in summary.get("macs_per_exit") or [math.nan]]
    exits, curve = len(macs), summary.get("curve") or {}
    points = len(curve.get("macs") or [])
    threshold, accuracy, cost = (np.array(numbers(curve.get(key), points)) for key in ("threshold", "accuracy", "macs"))
    lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_bytes().splitlines()]
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
        CostCurve(threshold, accuracy, cost / macs[-1]),
        [[c.get(key) for key in ("client", "train", "calibration", "test", "classes")] for c in summary["clients"]],
        [line["participants"] for line in lines],
        sum(len(line.get("left_out") or {}) for line in lines),
    )


def _each_exit(name: str, values: object, exits: int) -> dict[str, float]:
    return {name.format(k): value for k, value in enumerate(numbers(values, exits), start=1)}
