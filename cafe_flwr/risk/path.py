"""Paths of exit thresholds from strict to lax: built from counts of examples, and counted along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.special import expit, logit

Floats = NDArray[np.floating[Any]]

_BINS = 64
_PRIOR_WEIGHT = 10.0  # examples that the smooth curve of an exit counts for in each bin


@dataclass(frozen=True)
class ThresholdPath:
    """Thresholds (U, m − 1) that fall, exit by exit, from position 0 (strict) to U − 1 (lax).

    Examples
    --------
    >>> path = ThresholdPath(np.array([[0.9, np.inf], [0.8, 0.9]]))
    >>> path.first(np.array([[0.85, 0.95, 1.0]]))
    array([[1, 1]])
    """

    thresholds: NDArray[np.float64]

    def __post_init__(self) -> None:
        t = self.thresholds
        if t.ndim != 2 or not t.size or np.isnan(t).any() or (t[1:] > t[:-1]).any():
            raise ValueError("a path needs thresholds (positions, exits − 1) that never rise along it and are not NaN")

    def __len__(self) -> int:
        return len(self.thresholds)

    def chosen(
        self, position: int, left: NDArray[np.int64], harmed: NDArray[np.int64], trials: NDArray[np.int64], n: int
    ) -> dict[str, Any]:
        """Fields of ``ExitThresholds`` for a position, or for −1: nothing certified, never leave early.

        At every position, ``left`` of n examples leave and ``harmed`` of ``trials`` are wrong.
        """
        found = position >= 0
        return {
            "thresholds": tuple(self.thresholds[position]) if found else (np.inf,) * self.thresholds.shape[1],
            "certified": found,
            "coverage": float(left[position] / max(n, 1)) if found else 0.0,
            "realised_risk": float(harmed[position] / max(trials[position], 1)) if found else 0.0,
        }

    def first(self, confidence: Floats) -> NDArray[np.intp]:
        """First position at which each exit would let an example go, (N, m − 1); U = at none."""
        positions = [
            np.searchsorted(-t, -confidence[:, k].astype(np.float64), side="left")
            for k, t in enumerate(self.thresholds.T)
        ]
        return np.stack(positions, axis=1)


class PathCounts(NamedTuple):
    """Integer counts of examples at every position of a path, (U,) each.

    ``left``: leave early. ``harmed``: leave early and come to harm there (for example, are wrong). ``ever_harmed``:
    come to harm at this or a stricter position. With three exits or more an example can leave wrong by exit 2 at a
    strict position and right by exit 1 at a laxer one, so ``harmed`` may fall along the path; ``ever_harmed`` does not.
    """

    left: NDArray[np.int64]
    harmed: NDArray[np.int64]
    ever_harmed: NDArray[np.int64]


def count_along(path: ThresholdPath, confidence: Floats, harm: NDArray[np.bool_]) -> PathCounts:
    """Count, in one pass over confidences (N, m), what examples do at every position of a path.

    An example leaves at exit k from the position at which exit k lets it go until an earlier exit does. ``harm``, (N,
    m − 1), says whether it comes to harm if it leaves at exit k.
    """
    size = len(path) + 1
    first = path.first(confidence)
    until = np.full(len(first), len(path))
    worst = until.copy()
    harmed = np.zeros(size, dtype=np.int64)
    for k in range(first.shape[1]):
        hit = harm[:, k] & (first[:, k] < until)
        harmed += np.bincount(first[hit, k], minlength=size) - np.bincount(until[hit], minlength=size)
        worst[hit] = np.minimum(worst[hit], first[hit, k])
        np.minimum(until, first[:, k], out=until)
    left = np.bincount(until, minlength=size)
    ever = np.bincount(worst, minlength=size)
    return PathCounts(*(c.cumsum()[:-1].astype(np.int64) for c in (left, harmed, ever)))


class Histogram(NamedTuple):
    """Examples and harm by bin of confidence, for every exit but the last; (m − 1, bins) each.

    ``edges`` are the bins' lower ends, rising from 0; the others count, and add up over clients that share edges.
    """

    edges: NDArray[np.float64]
    examples: NDArray[np.int64]
    harmed: NDArray[np.int64]


def quantile_edges(confidence: Floats) -> NDArray[np.float64]:
    """Lower ends of bins that hold about equally many examples, (m − 1, bins), from confidences (N, m).

    They are rounded to single precision, so that comparisons in single and in double precision agree.
    """
    ordered = np.sort(confidence[:, :-1], axis=0)
    rows = np.arange(_BINS) * len(ordered) // _BINS
    edges = ordered[rows].T.astype(np.float32).astype(np.float64)
    edges[:, 0] = 0.0
    return edges


def histogram(edges: NDArray[np.float64], confidence: Floats, harm: NDArray[np.bool_]) -> Histogram:
    """Count examples and harm by bin."""
    bins = edges.shape[1]
    examples, harmed = [], []
    for k, lower in enumerate(edges):
        index = np.searchsorted(lower, confidence[:, k].astype(np.float64), side="right") - 1
        examples.append(np.bincount(index, minlength=bins))
        harmed.append(np.bincount(index[harm[:, k]], minlength=bins))
    return Histogram(edges, np.stack(examples), np.stack(harmed))


def path_from(counts: Histogram) -> ThresholdPath:
    """Path whose position is a level ρ: leave at exit k where its estimated share of harm is at most ρ.

    The same level at every exit: an exit that is often wrong however sure it is stays closed until the others have been
    used, and an exit that is right is used fully. Per exit the share of harm is a logistic curve of its confidence's
    logit, corrected by the counts of each bin, and made to fall with confidence (isotonic regression). The curve keeps
    shallow exits in use where bins hold few examples: shrinking bins to their exit's mean instead covered 1–7 points
    more, through deeper exits, and saved 1–14 points less of the stages (benchmarks/risk.py's populations).
    """
    smooth = _logistic(counts)
    share = (counts.harmed + _PRIOR_WEIGHT * smooth) / (counts.examples + _PRIOR_WEIGHT)
    weights = counts.examples + 1e-6
    falling = np.stack(
        [isotonic_regression(s, weights=w, increasing=False).x for s, w in zip(share, weights, strict=True)]
    )
    levels = np.unique(falling)
    above = np.stack(
        [len(e) - np.searchsorted(s[::-1], levels, side="right") for s, e in zip(falling, counts.edges, strict=True)]
    )
    padded = np.concatenate([counts.edges, np.full((len(counts.edges), 1), np.inf)], axis=1)
    return ThresholdPath(np.unique(np.take_along_axis(padded, above, axis=1).T, axis=0)[::-1])


def _logistic(counts: Histogram, steps: int = 8) -> NDArray[np.float64]:
    """Share of harm per exit and bin by logistic regression on the logit of the bin's middle, by Newton's method."""
    upper = np.concatenate([counts.edges[:, 1:], np.ones((len(counts.edges), 1))], axis=1)
    x = logit(np.clip((counts.edges + upper) / 2, 1e-4, 1 - 1e-4))
    bins = x.shape[1]
    n, y = counts.examples + 1 / bins, counts.harmed + 0.5 / bins  # half an example of each kind keeps the fit finite
    total = n.sum(axis=1, keepdims=True)
    x = x - (n * x).sum(axis=1, keepdims=True) / total
    x = x / np.sqrt((n * x**2).sum(axis=1, keepdims=True) / total + 1e-12)
    intercept, slope = logit(y.sum(axis=1) / n.sum(axis=1)), np.zeros(len(x))
    for _ in range(steps):
        p = expit(np.clip(intercept[:, None] + slope[:, None] * x, -15, 15))
        w, error = n * p * (1 - p), y - n * p
        a, b, c = w.sum(axis=1) + 1e-3, (w * x).sum(axis=1), (w * x**2).sum(axis=1) + 1.0
        g, h = error.sum(axis=1), (error * x).sum(axis=1) - slope
        det = a * c - b**2
        intercept = intercept + np.clip((c * g - b * h) / det, -2, 2)
        slope = slope + np.clip((a * h - b * g) / det, -2, 2)
    return expit(np.clip(intercept[:, None] + slope[:, None] * x, -15, 15))
