"""Averages over clients that are the same, bit for bit, whatever node hosts whom."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Products n·θ are rounded to multiples of 2⁻³². Sums of such numbers are exact in float64 up to 2²¹ = 2 million, so
# the order of summation, and with it the grouping of clients on nodes, cannot change a bit. Larger sums have the
# accuracy of float64. The rounding itself, 2⁻³³/n, lies far below the resolution of float32 weights.
_GRID = 2.0**32


def weighted(values: ArrayLike, weight: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """``weight · values`` in float64, rounded to a grid on which sums do not depend on their order.

    Examples
    --------
    >>> a, b, c = (weighted([x], 3) for x in (0.1, 0.2, 0.3))
    >>> bool((a + b) + c == a + (b + c))
    True
    """
    return np.asarray(np.rint(np.asarray(values, dtype=np.float64) * weight * _GRID) / _GRID)


def weighted_mean(sums: Iterable[NDArray[np.float64]], total_weight: float) -> NDArray[np.float32]:
    """Mean in float32 from sums of :func:`weighted` values; ValueError if there are none or the weights sum to 0.

    Examples
    --------
    >>> weighted_mean([weighted([1.0, 4.0], 1), weighted([3.0, 0.0], 3)], total_weight=4)
    array([2.5, 1. ], dtype=float32)
    """
    total = None
    for values in sums:
        total = values.copy() if total is None else np.add(total, values, out=total)
    if total is None or not total_weight > 0:
        raise ValueError("nothing to average: no client sent an update with a positive weight")
    return (total / total_weight).astype(np.float32)
