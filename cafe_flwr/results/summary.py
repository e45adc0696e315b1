"""The contents of ``summary.json``: the figures of a finished run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cafe_flwr import __version__
from cafe_flwr.methods.server import RoundPlan
from cafe_flwr.metrics.clients import worst_share
from cafe_flwr.metrics.curve import CostCurve, cheapest
from cafe_flwr.metrics.early_exit import THRESHOLDS, DynamicCounts
from cafe_flwr.wire.evaluate import FinalReport

if TYPE_CHECKING:
    from cafe_flwr.server.callbacks import RunInfo

from cafe_flwr.core.numbers import mean, mean_rows

LAST_ROUNDS = 5


def summarise(
    settings: Mapping[str, Any],
    run: RunInfo,
    reports: Sequence[FinalReport],
    rounds: Sequence[Mapping[str, Any]],
    plan: RoundPlan | None,
    seconds: float,
) -> dict[str, Any]:
    """Contents of ``summary.json``.

    Parameters
    ----------
    settings
        In kebab-case: ``name``, ``method``, ``dataset`` and ``seed`` are read.
    run
        The run when it started.
    reports
        Evaluation of every personal network after the last round.
    rounds
        The lines of ``rounds.jsonl``.
    plan
        Of the last round in which anything was mixed, for the teacher weights.
    seconds
        Wall clock.
    """
    evaluated = {f.client for f in reports}
    num_clients = len({*run.clients, *evaluated})
    missing = sorted({*run.clients, *run.kinds} - evaluated)
    accuracy = mean_rows(f.exits.accuracy for f in reports)
    dynamic, curve, exit_shares = _dynamic(reports, {f.client: _macs_of(run, f.client) for f in reports})
    kinds = _kinds(run, reports, plan)
    return {
        **{key: settings[key] for key in ("name", "method", "dataset", "seed")},
        "num_rounds": run.num_rounds,
        "num_clients": num_clients,
        **_accuracies(reports, rounds, accuracy, run.num_rounds),
        "accuracy_macs_area": curve.area,
        **_over_clients([mean(f.exits.accuracy) for f in reports]),
        "ece_per_exit": mean_rows(f.exits.ece for f in reports),
        "loss_per_exit": mean_rows(f.exits.loss for f in reports),
        "num_parameters": run.num_parameters,
        "macs_per_exit": list(run.macs_per_exit),
        "macs_reduction_at_equal_accuracy": dynamic["macs_reduction"],
        "dynamic": dynamic,
        "curve": {**curve.points(), "exit_shares": exit_shares},
        **_bytes(rounds, run.num_parameters),
        "local_steps_per_client": _local_steps(rounds, reports, num_clients),
        "seconds": seconds,
        "teacher_weights": _teacher_weights(plan),
        "clients": [_client(f) for f in reports],
        **({"not_evaluated": missing} if missing else {}),
        **({"kinds": kinds} if len(kinds) > 1 else {}),
        "versions": _versions(),
    }


def _accuracies(
    reports: Sequence[FinalReport], rounds: Sequence[Mapping[str, Any]], accuracy: list[float], num_rounds: int
) -> dict[str, Any]:
    """Means over clients: at the end, over the last rounds, after local training and with the prior re-estimated."""
    after = list(rounds[-1]["accuracy_per_exit_after"]) if rounds else []
    adapted = mean_rows(f.adapted.accuracy for f in reports)
    return {
        "accuracy": mean(accuracy),
        "accuracy_per_exit": accuracy,
        "accuracy_last_exit": accuracy[-1] if accuracy else math.nan,
        "last_five": last_five(rounds, accuracy, num_rounds),
        "accuracy_ensemble": mean(f.ensemble for f in reports),
        "accuracy_after_training": mean(_numbers(after)),
        "accuracy_per_exit_after_training": after,
        "accuracy_adapted": mean(adapted),
        "accuracy_per_exit_adapted": adapted,
    }


def _over_clients(accuracies: Sequence[float]) -> dict[str, float]:
    known = [value for value in accuracies if not math.isnan(value)]
    return {
        "accuracy_std_over_clients": float(np.std(known)) if known else math.nan,
        "accuracy_worst_tenth": worst_share(accuracies),
    }


def _bytes(rounds: Sequence[Mapping[str, Any]], num_parameters: int) -> dict[str, int]:
    messages = sum(len(line["participants"]) for line in rounds) or 1
    sent = {way: round(sum(line[f"bytes_{way}"] for line in rounds) / messages) for way in ("up", "down")}
    return {f"bytes_{way}_per_client_round": count for way, count in (sent | {"fedavg": 4 * num_parameters}).items()}


def _teacher_weights(plan: RoundPlan | None) -> dict[str, Any] | None:
    """Weight of every client in every mixture; None where nothing is mixed."""
    if plan is None or plan.weights is None:
        return None
    return {
        "rows": list(plan.weight_rows),
        "clients": list(plan.weight_columns),
        "weights": plan.weights.round(4).tolist(),
    }


def _client(report: FinalReport) -> dict[str, Any]:
    return {
        "client": report.client,
        "train": report.train_examples,
        "calibration": report.calibration_examples,
        "test": report.test_examples,
        "classes": report.classes,
        "accuracy_per_exit": report.exits.accuracy,
    }


def last_five(rounds: Sequence[Mapping[str, Any]], final: Sequence[float], num_rounds: int) -> dict[str, Any]:
    """Mean accuracy of the clients' networks over the last five rounds after which they were evaluated, or fewer.

    The networks of round t are evaluated before clients train in round t + 1, and those of the last round in the final
    evaluation, ``final``, of all clients (after fine-tuning, where a method does that). The evaluation before round 1,
    of untrained networks, does not count.

    Returns
    -------
    ``accuracy`` (mean over exits), ``accuracy_per_exit``, ``rounds`` (those t) and ``count``.

    Examples
    --------
    >>> rounds = [{"round": t, "accuracy_per_exit": [t / 10, t / 10]} for t in (1, 2, 3)]
    >>> last_five(rounds, [0.4, 0.4], 3)
    {'accuracy': 0.3, 'accuracy_per_exit': [0.3, 0.3], 'rounds': [1, 2, 3], 'count': 3}
    """
    held = [(line["round"] - 1, _numbers(line["accuracy_per_exit"])) for line in rounds if line["round"] > 1]
    held.append((num_rounds, list(final)))
    known = [(after, exits) for after, exits in held if not math.isnan(mean(exits))][-LAST_ROUNDS:]
    return {
        "accuracy": mean(mean(exits) for _, exits in known),
        "accuracy_per_exit": mean_rows(exits for _, exits in known),
        "rounds": [after for after, _ in known],
        "count": len(known),
    }


def _macs_of(run: RunInfo, client: int) -> NDArray[np.float64]:
    """MACs of leaving at each exit, (m,); those of its last exit for exits that the client does not hold."""
    held = run.kinds[client].macs if client in run.kinds else run.macs_per_exit
    return np.pad(np.asarray(held, dtype=np.float64), (0, run.num_exits - len(held)), mode="edge")


def _kinds(run: RunInfo, reports: Sequence[FinalReport], plan: RoundPlan | None) -> list[dict[str, Any]]:
    """Accuracy and cost per kind of network, and the weight of the same kind in the clients' mixtures."""
    found = []
    for kind in {kind.name: kind for kind in run.kinds.values()}.values():
        clients = [client for client, other in run.kinds.items() if other.name == kind.name]
        of_kind = [f for f in reports if f.client in clients]
        accuracy = mean_rows(f.exits.accuracy[: kind.num_exits] for f in of_kind)
        found.append(
            {
                "name": kind.name or f"all {kind.num_exits} exits",
                "clients": clients,
                "num_exits": kind.num_exits,
                "num_parameters": kind.num_parameters,
                "macs_per_exit": list(kind.macs),
                "accuracy": mean(accuracy),
                "accuracy_per_exit": accuracy,
                "bytes_up_per_client_round": 4 * (kind.shared.size + kind.upload.size),
                "weight_of_own_kind": _weight_within(plan, clients),
            }
        )
    return sorted(found, key=lambda line: (line["num_exits"], line["name"]))


def _weight_within(plan: RoundPlan | None, clients: Sequence[int]) -> float:
    """Mean weight of these clients in the mixtures made for them; NaN if there were none."""
    if plan is None or plan.weights is None:
        return math.nan
    rows, columns = np.isin(plan.weight_rows, clients), np.isin(plan.weight_columns, clients)
    return mean(plan.weights[np.ix_(rows, columns)].sum(axis=1))


def _dynamic(
    reports: Sequence[FinalReport], macs: Mapping[int, NDArray[np.float64]]
) -> tuple[dict[str, Any], CostCurve, list[list[float]]]:
    """Inference that leaves at the first exit with max-prob ≥ θ, one θ for all clients.

    Every client's exits are temperature-scaled on its own calibration split. θ is chosen on the calibration splits: the
    cheapest whose accuracy exceeds that of the full network by at least one standard error of the difference (without
    this margin the best of many thresholds is best by chance), or else never to leave; and once more with one point of
    accuracy less allowed. Their figures are measured on the test splits.

    Returns
    -------
    Figures of the chosen θ; accuracy against MACs over all θ; and the shares that leave at each exit, (θ, m).
    """
    examples = sum(f.test_examples for f in reports)
    if not examples:
        nothing = {"threshold": None, "accuracy": math.nan, "accuracy_full": math.nan, "macs_reduction": math.nan}
        return {**nothing, "exit_shares": []}, CostCurve(*np.empty((3, 0))), []
    (calibration, cost), (test, test_cost) = (
        (
            DynamicCounts(*(np.sum(counts, axis=0) for counts in zip(*(getattr(f, s) for f in reports), strict=True))),
            np.sum([getattr(f, s).left @ macs[f.client] for f in reports], axis=0),
        )
        for s in ("calibration", "test")
    )
    curve, shares = CostCurve.from_counts(test, test_cost / examples), (test.left / examples).tolist()

    def point(loss_allowed: float) -> dict[str, Any]:
        chosen = cheapest(calibration, cost, loss_allowed)
        return {
            "threshold": float(THRESHOLDS[chosen]) if np.isfinite(THRESHOLDS[chosen]) else None,
            "accuracy": float(curve.accuracy[chosen]),
            "accuracy_full": float(curve.accuracy[-1]),
            "macs_reduction": float(1 - curve.macs[chosen] / curve.macs[-1]),
            "exit_shares": shares[chosen],
        }

    return {**point(0.0), "one_point_less": point(0.01)}, curve, shares


def _local_steps(rounds: Sequence[Mapping[str, Any]], reports: Sequence[FinalReport], num_clients: int) -> float:
    """Gradient steps of a client, mean over all clients, fine-tuning at the end included."""
    in_rounds = sum(line["local_steps"] * (len(line["participants"]) - len(line["left_out"])) for line in rounds)
    return (in_rounds + sum(f.local_steps for f in reports)) / max(num_clients, 1)


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]


def _versions() -> dict[str, str]:
    found = {"cafe-flwr": __version__}
    for package in ("flwr", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
