"""Counts of a client's examples along a path of thresholds that all clients share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from cafe_flwr.risk.path import Histogram, ThresholdPath, count_along, histogram, path_from
from cafe_flwr.risk.thresholds import checked_confidence, checked_correct

_GRID = np.concatenate([np.linspace(0, 0.475, 20), expit(np.linspace(0, 8, 44))]).astype(np.float32).astype(np.float64)


@dataclass(frozen=True)
class ClientCounts:
    """Counts of the n examples of a client, or of several clients summed up, along a path.

    ``left``, ``wrong`` and ``ever_wrong``, (U,) each: leave early; leave early and wrong; leave early and wrong at this
    or a stricter position.

    Raises ValueError if no path has such counts: not integers, of different lengths, falling, or more than there can
    be.

    Examples
    --------
    >>> path = fixed_path(num_exits=2)
    >>> counts = count([[0.9, 0.9], [0.7, 0.9]], [[True, True], [False, True]], path)
    >>> both = counts + counts
    >>> both.n, both.clients, int(both.left[-1]), int(both.wrong[-1])
    (4, 2, 4, 2)
    """

    n: int
    left: NDArray[np.int64]
    wrong: NDArray[np.int64]
    ever_wrong: NDArray[np.int64]
    clients: int = 1

    def __post_init__(self) -> None:
        arrays = {name: np.asarray(getattr(self, name)) for name in ("left", "wrong", "ever_wrong")}
        for name, array in arrays.items():
            if array.dtype.kind not in "iu" or array.ndim != 1 or array.shape != arrays["left"].shape or not array.size:
                raise ValueError(f"{name} must be integer counts (positions,), as long as the others")
            object.__setattr__(self, name, array.astype(np.int64))
        left, wrong, ever = self.left, self.wrong, self.ever_wrong
        if self.n < 0 or self.clients < 1 or (wrong < 0).any() or (wrong > left).any() or (left > self.n).any():
            raise ValueError(f"counts must satisfy 0 ≤ wrong ≤ left ≤ n = {self.n}")
        if (np.diff(left) < 0).any() or (np.diff(ever) < 0).any() or (ever < wrong).any() or (ever > left).any():
            raise ValueError("left and ever_wrong must grow along the path, and ever_wrong lie between wrong and left")

    def __add__(self, other: ClientCounts) -> ClientCounts:
        if len(self.left) != len(other.left):
            raise ValueError(f"counts along paths of {len(self.left)} and {len(other.left)} positions cannot be added")
        return ClientCounts(
            self.n + other.n,
            self.left + other.left,
            self.wrong + other.wrong,
            self.ever_wrong + other.ever_wrong,
            self.clients + other.clients,
        )


def fixed_path(num_exits: int) -> ThresholdPath:
    """A path that needs no examples: the same threshold at every exit, from 0.9997 down to 0.

    Examples
    --------
    >>> fixed_path(3).thresholds.shape
    (64, 2)
    """
    return ThresholdPath(np.repeat(_GRID[::-1, None], num_exits - 1, axis=1))


def shared_bins(num_exits: int) -> NDArray[np.float64]:
    """Lower ends of the bins of confidence that all clients share, (m − 1, bins); (0, 0) for one exit."""
    return np.tile(_GRID, (num_exits - 1, 1)) if num_exits > 1 else np.zeros((0, 0))


def client_histogram(confidence: ArrayLike, correct: ArrayLike) -> Histogram:
    """A client's examples and errors in bins of confidence that all clients share, for :func:`pooled_path`.

    ``confidence`` and ``correct`` are (N, m), of other examples than those given to :func:`count`.
    """
    values = checked_confidence(confidence)
    right = checked_correct(correct, values.shape)
    return histogram(shared_bins(values.shape[1]), values, ~right[:, :-1])


def pooled_path(histograms: Sequence[Histogram]) -> ThresholdPath:
    """Path of thresholds from the clients' summed histograms; a mostly wrong exit stays closed longest.

    Examples
    --------
    >>> weak_first = client_histogram([[0.9, 0.9, 0.9]] * 50, [[False, True, True]] * 50)
    >>> path = pooled_path([weak_first, weak_first])
    >>> float(path.thresholds[0, 0]), float(path.thresholds[0, 1]) <= 0.9
    (inf, True)
    """
    if not histograms:
        raise ValueError("a pooled path needs the histogram of one client or more")
    edges = histograms[0].edges
    if any(h.edges.shape != edges.shape or (h.edges != edges).any() for h in histograms):
        raise ValueError("histograms of networks with different numbers of exits, or with other bins, cannot be pooled")
    return path_from(Histogram(edges, *(np.sum(c, axis=0) for c in zip(*(h[1:] for h in histograms), strict=True))))


def count(confidence: ArrayLike, correct: ArrayLike, path: ThresholdPath) -> ClientCounts:
    """A client's counts along a path that was fixed without looking at these examples."""
    values = checked_confidence(confidence, path.thresholds.shape[1] + 1)
    right = checked_correct(correct, values.shape)
    return ClientCounts(len(values), *count_along(path, values, ~right[:, :-1]))
