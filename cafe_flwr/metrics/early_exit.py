"""Dynamic inference: examples leave at the first exit whose confidence reaches a threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

# Thresholds of the highest class probability; no example reaches the last one, so all exits run.
THRESHOLDS = np.append(np.linspace(0.0, 1.0, 101), np.inf)


class DynamicCounts(NamedTuple):
    """Counts of examples at every threshold of ``THRESHOLDS``; they add up over clients.

    ``left``, (thresholds, m): examples that leave at each exit. ``correct``, (thresholds,): right where they leave.
    ``changed``, (thresholds,): right there and wrong at the last exit, or the other way round.
    """

    left: NDArray[np.int64]
    correct: NDArray[np.int64]
    changed: NDArray[np.int64]


def first_exit(confidence: NDArray[np.floating[Any]], thresholds: ArrayLike) -> NDArray[np.int64]:
    """The exit each example leaves at, (…, N), 0..m−1: the first whose threshold is reached, or the last.

    Parameters
    ----------
    confidence
        (N, m). NaN reaches no threshold.
    thresholds
        Of the first m − 1 exits, (m − 1,), or one for all; with further axes in front for several at once, (…, m − 1).
        They are compared in double precision.

    Examples
    --------
    >>> confidence = np.array([[0.9, 0.3, 0.5], [0.4, 0.7, 0.5]])
    >>> first_exit(confidence, [0.6, 0.6]), first_exit(confidence, 0.8)
    (array([0, 1]), array([0, 2]))
    """
    wanted = np.atleast_1d(np.asarray(thresholds, dtype=np.float64))[..., None, :]
    passes = np.ones((*wanted.shape[:-2], *confidence.shape), dtype=bool)
    passes[..., :-1] = confidence[:, :-1] >= wanted
    return passes.argmax(axis=-1)


def dynamic_counts(logits: Tensor, y: Tensor) -> DynamicCounts:
    """Counts for every threshold of ``THRESHOLDS``, from logits (m, N, C) and labels (N,)."""
    confidence, label = logits.softmax(dim=2).max(dim=2)
    return counts_at(confidence.T.numpy(), (label == y).T.numpy(), THRESHOLDS[:, None])


def counts_at(
    confidence: NDArray[np.floating[Any]], correct: NDArray[np.bool_], thresholds: NDArray[np.float64]
) -> DynamicCounts:
    """Counts at thresholds (U, m − 1), from confidences (N, m) and whether each exit is right (N, m)."""
    exits = first_exit(confidence, thresholds)  # (U, N)
    outcome = correct[np.arange(len(correct)), exits]
    left = np.stack([(exits == k).sum(axis=1) for k in range(correct.shape[1])], axis=1)
    changed = (outcome != correct[:, -1]).sum(axis=1)
    return DynamicCounts(*(counts.astype(np.int64) for counts in (left, outcome.sum(axis=1), changed)))
