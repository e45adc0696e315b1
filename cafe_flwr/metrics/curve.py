"""The accuracy–MACs curve of dynamic inference: which accuracy can be had at which cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.metrics.early_exit import THRESHOLDS, DynamicCounts, dynamic_counts
from cafe_flwr.metrics.selective import scale_logits


@dataclass(frozen=True)
class CostCurve:
    """Accuracy and MACs of dynamic inference with one threshold for all exits, (points,) each, a point per threshold.

    Thresholds rise; the last one is infinite: no example leaves early.
    """

    threshold: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    macs: NDArray[np.float64]

    @classmethod
    def from_counts(cls, counts: DynamicCounts, macs: NDArray[np.float64]) -> CostCurve:
        """The curve from counts of all examples, and their mean MACs at each of ``THRESHOLDS``, (points,).

        Without examples it has no points.
        """
        examples = counts.left[0].sum()
        if not examples:
            return cls(*np.empty((3, 0)))
        return cls(THRESHOLDS.copy(), counts.correct / examples, macs)

    @property
    def pareto(self) -> NDArray[np.bool_]:
        """(points,): whether no other point is as cheap and better, or as good and cheaper."""
        order = np.lexsort((-self.accuracy, self.macs))
        best_before = np.maximum.accumulate(np.concatenate([[-1.0], self.accuracy[order][:-1]]))
        pareto = np.zeros(len(order), dtype=bool)
        pareto[order] = self.accuracy[order] > best_before
        return pareto

    @property
    def area(self) -> float:
        """Area under the curve, see :func:`area_under_curve`."""
        return area_under_curve(self.accuracy.tolist(), self.macs.tolist())

    def accuracy_within(self, share: float) -> float:
        """Best accuracy at no more than this share of the full network's MACs; NaN if no point is so cheap."""
        within = self.accuracy[self.macs <= share * self.macs[-1] * (1 + 1e-12)]
        return float(within.max()) if len(within) else math.nan

    def macs_to_reach(self, accuracy: float) -> float:
        """Least MACs that reach the accuracy; NaN if no point does."""
        enough = self.macs[self.accuracy >= accuracy - 1e-12]
        return float(enough.min()) if len(enough) else math.nan

    def points(self) -> dict[str, list[float]]:
        """Threshold, accuracy and MACs as lists, for JSON."""
        return {key: getattr(self, key).tolist() for key in ("threshold", "accuracy", "macs")}

    def summary(self) -> dict[str, float]:
        """Area, accuracy within 25, 50, 75 and 100 % of the MACs, and the least MACs that lose 1 point at most."""
        within = {f"accuracy_at_{p}": self.accuracy_within(p / 100) for p in (25, 50, 75, 100)}
        return {
            "area": self.area,
            **within,
            "accuracy_full": float(self.accuracy[-1]),
            "macs_full": float(self.macs[-1]),
            "macs_one_point_less": self.macs_to_reach(self.accuracy[-1] - 0.01),
        }


def accuracy_macs_curve(
    logits: Tensor, y: Tensor, macs: Sequence[int], temperatures: Sequence[float] = ()
) -> CostCurve:
    """Accuracy and mean MACs when examples leave at the first exit with max-prob ≥ θ, for θ of ``metrics.THRESHOLDS``.

    Parameters
    ----------
    logits
        Logits of all exits, (m, N, C), N ≥ 1.
    y
        Labels, (N,).
    macs
        MACs of leaving at each exit, (m,).
    temperatures
        Divide the exits' logits, (m,); they are fitted on other examples. None by default.

    Examples
    --------
    >>> import torch
    >>> z = torch.tensor([[[3.0, 0.0], [0.2, 0.0]], [[3.0, 0.0], [0.0, 3.0]]])  # the second example needs exit 2
    >>> curve = accuracy_macs_curve(z, torch.tensor([0, 1]), [10, 40])
    >>> sorted(set(zip(curve.macs.tolist(), curve.accuracy.tolist())))
    [(10.0, 0.5), (25.0, 1.0), (40.0, 1.0)]
    >>> curve.accuracy_within(0.75), curve.macs_to_reach(1.0)
    (1.0, 25.0)
    """
    check_examples(logits, y, macs)
    counts = dynamic_counts(scale_logits(logits, temperatures) if len(temperatures) else logits, y)
    return CostCurve.from_counts(counts, counts.left / len(y) @ np.asarray(macs, dtype=np.float64))


def area_under_curve(accuracy: Sequence[float], macs: Sequence[float]) -> float:
    """Mean, over budgets from the cheapest point's MACs to the full network's, of the best accuracy within the budget.

    Points of the accuracy–MACs curve may come in any order. NaN without any.

    Examples
    --------
    >>> area_under_curve([0.5, 1.0, 0.5], [1.0, 2.0, 3.0])  # rises to 1.0 at 2, and need not fall after
    0.875
    """
    if not len(accuracy):
        return math.nan
    order = np.argsort(macs, kind="stable")
    x = np.asarray(macs, dtype=np.float64)[order]
    y = np.maximum.accumulate(np.asarray(accuracy, dtype=np.float64)[order])
    if x[-1] == x[0]:
        return float(y[-1])
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def cheapest(counts: DynamicCounts, cost: NDArray[np.number[Any]], loss_allowed: float) -> int:
    """Position of the cheapest thresholds that lose no accuracy, or little, even if one standard error is taken off.

    Without that margin the best of many thresholds would be a lucky one, and not hold on other examples.

    Parameters
    ----------
    counts
        Counts of calibration examples; at the last position none leaves early.
    cost
        MACs of all examples together at each of the thresholds.
    loss_allowed
        Accuracy that may be lost against the full network, 0.01 for a point.

    Examples
    --------
    >>> left = np.array([[100, 0], [50, 50], [0, 100]])
    >>> counts = DynamicCounts(left, np.array([60, 90, 90]), np.array([30, 0, 0]))
    >>> cheapest(counts, left @ np.array([10.0, 20.0]), 0.0)
    1
    """
    examples = int(counts.left[0].sum())
    if not examples:
        return len(counts.left) - 1  # without examples never leave early
    gain = counts.correct - counts.correct[-1]
    spread = np.sqrt(np.maximum(counts.changed - gain**2 / examples, 0.0))
    good = gain - spread >= -loss_allowed * examples
    return int(np.where(good, cost, np.inf).argmin())


def check_examples(logits: Tensor, y: Tensor, macs: Sequence[float]) -> None:
    """Raise ValueError unless logits (m, N, C), N ≥ 1, are finite, labels are in 0..C−1 and MACs (m,) rise."""
    if logits.dim() != 3 or not logits.shape[1] or logits.shape[:2] != (len(macs), len(y)):
        raise ValueError(
            f"logits must be (exits, examples, classes) for {len(macs)} exits (as macs has) and {len(y)} labels, with "
            f"one example at least; not {tuple(logits.shape)}"
        )
    if not logits.isfinite().all():
        raise ValueError(f"{int((~logits.isfinite()).sum())} logits are not finite: look for NaN or infinity")
    if not 0 <= int(y.min()) <= int(y.max()) < logits.shape[2]:
        raise ValueError(f"labels must be in 0..{logits.shape[2] - 1}, got {int(y.min())}..{int(y.max())}")
    if not all(0 < a < b for a, b in zip(macs, [*macs[1:], math.inf], strict=True)):
        raise ValueError(f"macs must rise from exit to exit (as macs_per_exit gives them), not {list(macs)}")
