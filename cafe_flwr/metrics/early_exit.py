"""Leaving at the first exit that is sure enough: what is right, and where it left, by threshold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Max-prob thresholds at which dynamic inference is counted; the last one is never reached: all exits run.
THRESHOLDS = np.append(np.linspace(0.0, 1.0, 101), np.inf)


class DynamicCounts(NamedTuple):
    """Counts of examples at every threshold of ``THRESHOLDS``; they add up over clients.

    Attributes
    ----------
    left
        (thresholds, m): leave at each exit.
    correct
        (thresholds,): classified correctly at the exit they leave by.
    changed
        (thresholds,): right there and wrong at the last exit, or the other way round.
    """

    left: NDArray[np.int64]
    correct: NDArray[np.int64]
    changed: NDArray[np.int64]


def dynamic_counts(logits: Tensor, y: Tensor) -> DynamicCounts:
    """How dynamic inference would go at every threshold: leave at the first exit with max-prob ≥ θ.

    Parameters
    ----------
    logits
        (m, N, C).
    y
        Labels, (N,).
    """
    confidence, label = (t.numpy() for t in logits.softmax(dim=2).max(dim=2))
    right = label == y.numpy()
    m = len(confidence)
    passes = confidence[None] >= THRESHOLDS[:, None, None]
    passes[:, -1] = True
    exits = passes.argmax(axis=1)  # (thresholds, N): the first exit that passes
    left = (exits[:, :, None] == np.arange(m)).sum(axis=1)
    outcome = np.take_along_axis(right, exits, axis=0)
    changed = (outcome != right[-1]).sum(axis=1)
    return DynamicCounts(left.astype(np.int64), outcome.sum(axis=1, dtype=np.int64), changed.astype(np.int64))
