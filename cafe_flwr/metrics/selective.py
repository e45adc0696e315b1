"""Risk and coverage of examples that leave early, and calibration of confidences.

Functions of confidences (N, m) and of whether each exit is right (N, m), for N examples and m exits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cafe_flwr.metrics.clients import worst_share
from cafe_flwr.metrics.early_exit import THRESHOLDS, first_exit
from cafe_flwr.metrics.exits import ECE_BINS

LOWER_IS_WORSE = frozenset({"accuracy", "accuracy_full", "coverage", "macs_reduction"})
VOID = "guarantee void under shift"
POOLED = "exploratory: pooled over clients, no guarantee for a single client"
OWN = "for each certified client, on inputs like those of its calibration split"
RISK_OF = {"selective": "selective_risk", "joint": "joint_risk", "gap": "gap"}  # the measure that a guarantee bounds
_POINTS = 200  # at most, of a thinned curve


def scale_logits(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Logits (m, N, C) divided by the temperature of their exit.

    Examples
    --------
    >>> scale_logits(torch.ones(2, 1, 2), [1.0, 2.0]).tolist()
    [[[1.0, 1.0]], [[0.5, 0.5]]]
    """
    return logits / torch.tensor(temperatures, dtype=logits.dtype)[:, None, None]


def confidence_and_correct(logits: Tensor, y: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Highest class probability, and whether that class is right, (N, m) each, from logits (m, N, C) and labels (N,).

    Examples
    --------
    >>> confidence_and_correct(torch.zeros(1, 1, 4), torch.tensor([0]))
    (array([[0.25]]), array([[ True]]))
    """
    confidence, label = logits.softmax(dim=2).max(dim=2)
    return confidence.double().T.numpy(), (label == y).T.numpy()


@dataclass(frozen=True)
class Outcome:
    """Counts of examples by how they fared at the exit they left by; they add up over clients.

    ``left``, (m,): examples that leave at each exit. ``early_wrong``: wrong ones among those that leave before the last
    exit. ``correct``, ``full_correct``: right ones at the exit they leave by, and at the last exit.

    Examples
    --------
    >>> Outcome.of(np.array([0, 0, 1, 1]), np.array([[1, 1], [0, 1], [0, 1], [0, 0]], dtype=bool)).measures([10, 40])[
    ...     "selective_risk"
    ... ]
    0.5
    """

    left: tuple[int, ...]
    early_wrong: int
    correct: int
    full_correct: int

    @classmethod
    def of(cls, exits: NDArray[np.int64], correct: NDArray[np.bool_]) -> Outcome:
        """Counts of examples that leave at ``exits`` (N,), 0..m−1, given which exits are right (N, m)."""
        n, m = correct.shape
        right = correct[np.arange(n), exits]
        wrong_early = int((~right & (exits < m - 1)).sum())
        left = np.bincount(exits, minlength=m)
        return cls(tuple(map(int, left)), wrong_early, int(right.sum()), int(correct[:, -1].sum()))

    @classmethod
    def total(cls, outcomes: Iterable[Outcome]) -> Outcome:
        """Sum over one or more clients."""
        parts = list(outcomes)
        left = tuple(sum(counts) for counts in zip(*(part.left for part in parts), strict=True))
        wrong, right, full = (
            sum(getattr(p, name) for p in parts) for name in ("early_wrong", "correct", "full_correct")
        )
        return cls(left, wrong, right, full)

    def measures(self, macs: Sequence[float]) -> dict[str, float]:
        """Shares of the examples, NaN without any.

        ``coverage``: left early; ``selective_risk``: wrong among those; ``joint_risk``: left early and wrong; ``gap``:
        accuracy lost against the last exit; ``macs``: mean cost, given the cost of leaving at each exit.
        """
        n, early = sum(self.left), sum(self.left[:-1])

        def share(count: float, of: int = n) -> float:
            return count / of if of else float("nan")

        cost = share(sum(c * k for c, k in zip(macs, self.left, strict=True)))
        return {
            "coverage": share(early),
            "selective_risk": share(self.early_wrong, early),
            "joint_risk": share(self.early_wrong),
            "gap": share(self.full_correct - self.correct),
            "accuracy": share(self.correct),
            "accuracy_full": share(self.full_correct),
            "macs": cost,
            "macs_reduction": 1 - cost / macs[-1],
        }

    def shares(self) -> list[float]:
        """Share of the examples that leave at each exit, NaN without any."""
        n = sum(self.left)
        return [count / n if n else float("nan") for count in self.left]


class Curve(NamedTuple):
    """Risk against coverage, in rising order of coverage: (points,) each."""

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]

    @property
    def area(self) -> float:
        """Mean risk over the examples, taken in the order of their confidence; NaN without any."""
        return float((np.diff(self.coverage, prepend=0.0) * self.risk).sum()) if len(self.risk) else float("nan")

    def thinned(self) -> Curve:
        """At most 200 of its points, including both ends."""
        keep = np.unique(np.linspace(0, len(self.risk) - 1, _POINTS).round().astype(int)[: len(self.risk) * _POINTS])
        return Curve(self.coverage[keep], self.risk[keep])


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> Curve:
    """Share of errors among the most confident share of the examples (Geifman & El-Yaniv, arXiv 1705.08500).

    Both arguments are (N,), of one exit. Examples of equal confidence enter together.

    Examples
    --------
    >>> risk_coverage([0.9, 0.8, 0.8, 0.1], [True, False, True, False])
    Curve(coverage=array([0.25, 0.75, 1.  ]), risk=array([0.        , 0.33333333, 0.5       ]))
    """
    values, wrong = np.asarray(confidence, dtype=np.float64), ~np.asarray(correct, dtype=bool)
    order = np.argsort(-values, kind="stable")
    ranked, errors = values[order], np.cumsum(wrong[order])
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.zeros(0, dtype=np.int64)
    return Curve((ends + 1) / max(len(ranked), 1), errors[ends] / (ends + 1))


def leaving_curve(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> Curve:
    """Risk against coverage of the dynamic network: one threshold for all exits, from strict to lax.

    Coverage is the share of the examples, (N, m), that leave before the last exit, risk the share of errors among them.
    Of several thresholds with the same coverage, the strictest counts.

    Examples
    --------
    >>> leaving_curve(np.array([[0.95, 1.0], [0.5, 1.0]]), np.array([[True, True], [False, True]]))
    Curve(coverage=array([0.5, 1. ]), risk=array([0. , 0.5]))
    """
    points: dict[float, float] = {}
    for exits in first_exit(confidence, THRESHOLDS[::-1, None]):
        measures = Outcome.of(exits, correct).measures([1.0] * correct.shape[1])
        if measures["coverage"] > 0:
            points.setdefault(measures["coverage"], measures["selective_risk"])
    return Curve(np.array([*points]), np.array([*points.values()]))


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = ECE_BINS) -> list[dict[str, float]]:
    """Mean confidence, accuracy and share of one exit's examples, (N,), for every non-empty bin of confidence.

    Examples
    --------
    >>> reliability([0.9, 0.7, 0.2], [True, False, False], bins=2)
    [{'confidence': 0.2, 'accuracy': 0.0, 'share': 0.333...}, {'confidence': 0.8, 'accuracy': 0.5, 'share': 0.666...}]
    """
    stated, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool)
    place = np.minimum((stated * bins).astype(np.int64), bins - 1)
    members = [place == b for b in np.unique(place)]
    return [
        {"confidence": float(stated[i].mean()), "accuracy": float(right[i].mean()), "share": float(i.mean())}
        for i in members
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """ECE from the bins of :func:`reliability`, NaN without any.

    Examples
    --------
    >>> round(calibration_error(reliability([0.9, 0.7, 0.2], [True, False, False], bins=2)), 3)
    0.267
    """
    return sum(b["share"] * abs(b["accuracy"] - b["confidence"]) for b in bins) if bins else float("nan")


def over_clients(values: ArrayLike, weights: ArrayLike, measure: str) -> dict[str, Any]:
    """Mean, n-weighted mean, standard deviation and worst tenth over clients; clients with NaN are left out.

    ``values`` are one measure of each client, ``weights`` its numbers of examples. The name of the measure decides
    whether low or high values are worst.

    Examples
    --------
    >>> over_clients([0.5, 1.0], [30, 10], "accuracy")
    {'mean': 0.75, 'weighted_mean': 0.625, 'std': 0.25, 'worst_tenth': 0.5, 'clients': 2}
    """
    measured = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(measured)
    seen, examples = measured[known], np.asarray(weights, dtype=np.float64)[known]
    if not len(seen):
        return {**dict.fromkeys(("mean", "weighted_mean", "std", "worst_tenth"), float("nan")), "clients": 0}
    sign = 1.0 if measure in LOWER_IS_WORSE else -1.0
    return {
        "mean": float(seen.mean()),
        "weighted_mean": float(seen @ examples / examples.sum()),
        "std": float(seen.std()),
        "worst_tenth": sign * worst_share(sign * seen),
        "clients": len(seen),
    }
