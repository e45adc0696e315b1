"""Bounds on what is received: norms and sizes that no honest sender has are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cafe_flwr.wire.options import Bounds

MAX_NORM = Bounds().max_norm
FEWEST = 3  # of two that differ, it is unknown which one is wrong


def norm(values: NDArray[Any]) -> float:
    """Euclidean norm in float64, whatever the precision of the values.

    Examples
    --------
    >>> norm(np.array([300, 400], dtype=np.float16))  # whose squares float16 does not hold
    500.0
    """
    return float(np.linalg.norm(values.astype(np.float64, copy=False)))


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


def far_longer(values: ArrayLike, max_ratio: float, room: ArrayLike = 1.0) -> list[int]:
    """Positions of ``values`` (n,) beyond ``max_ratio`` (> 1; 0: no bound) times the median; none of fewer than three.

    ``room`` (n,) multiplies the bound of each, see :func:`room_for`.

    Examples
    --------
    >>> far_longer([1.0, 1.2, 0.8, 900.0], 100.0)
    [3]
    >>> far_longer([1.0, 1.2, 0.8, 900.0], 100.0, room=[1, 1, 1, 10])
    []
    """
    found = np.asarray(values, dtype=np.float64)
    typical = np.median(found) if len(found) else 0.0
    if not max_ratio or len(found) < FEWEST or typical == 0:
        return []
    return [int(i) for i in np.flatnonzero(found > max_ratio * typical * np.asarray(room))]


def room_for(examples: ArrayLike) -> NDArray[np.float64]:
    """How much longer than others' what a client sends may be, which has k times the median's ``examples`` (n,): k.

    Such a client counts k times the labels, and takes k times the steps where these are epochs.

    Examples
    --------
    >>> room_for([50, 100, 10, 50]).tolist()
    [1.0, 2.0, 1.0, 1.0]
    """
    sizes = np.asarray(examples, dtype=np.float64)
    return np.maximum(1.0, sizes / np.median(sizes)) if len(sizes) else sizes


def times_median(value: float, median: float) -> str:
    """A value in comparison with a median, in words."""
    return f"{value:.4g}, {value / median:.4g} times the median, {median:.4g}"
