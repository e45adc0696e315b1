"""Bounds on what is received: norms that no honest sender has are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cafe_flwr.wire.options import Bounds

MAX_NORM = Bounds().max_norm
_FEWEST = 3  # of two that differ, it is unknown which one is wrong


def norm(values: NDArray[Any]) -> float:
    """Euclidean norm in float64, whatever the precision of the values.

    Examples
    --------
    >>> norm(np.array([300, 400], dtype=np.float16))  # whose squares float16 does not hold
    500.0
    """
    return float(np.linalg.norm(values.astype(np.float64)))


def check_norm(values: NDArray[Any], limit: float, what: str) -> None:
    """ValueError if the norm is beyond the limit or not finite; a limit of 0 allows every finite norm.

    Examples
    --------
    >>> check_norm(np.array([30.0, 40.0]), 10.0, "its update")
    Traceback (most recent call last):
        ...
    ValueError: its update has norm 50, at most 10 is allowed
    """
    if not np.isfinite(values).all():
        raise ValueError(f"{what} has values that are NaN or infinite")
    if limit and (length := norm(values)) > limit:
        raise ValueError(f"{what} has norm {length:.4g}, at most {limit:.4g} is allowed")


def far_longer(norms: ArrayLike, examples: ArrayLike, max_ratio: float) -> list[int]:
    """Positions of ``norms`` (n,) beyond ``max_ratio`` (> 1; 0: no bound) times the median; none of fewer than three.

    A client with k times the median number of ``examples`` (n,) takes up to k times the steps and counts k times the
    labels, so its norm may be k times as large.

    Examples
    --------
    >>> far_longer([1.0, 1.2, 0.8, 900.0], [50, 50, 50, 50], 100.0)
    [3]
    >>> far_longer([1.0, 1.2, 0.8, 900.0], [50, 50, 50, 5000], 100.0)
    []
    """
    lengths, sizes = np.asarray(norms, dtype=np.float64), np.asarray(examples, dtype=np.float64)
    typical = np.median(lengths) if len(lengths) else 0.0
    if not max_ratio or len(lengths) < _FEWEST or typical == 0:
        return []
    allowed = max_ratio * typical * np.maximum(1.0, sizes / np.median(sizes))
    return [int(i) for i in np.flatnonzero(lengths > allowed)]


def times_median(norms: Sequence[float], position: int) -> str:
    """A norm in comparison with the median of all, in words."""
    typical = float(np.median(norms))
    return f"norm {norms[position]:.4g}, {norms[position] / typical:.4g} times the median of the round, {typical:.4g}"
