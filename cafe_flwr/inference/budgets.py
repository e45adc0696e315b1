"""Thresholds per exit for a budget of MACs or a bound on lost accuracy, chosen on calibration examples only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.inference.policies import PerExit
from cafe_flwr.metrics.curve import cheapest, check_examples
from cafe_flwr.metrics.early_exit import THRESHOLDS, DynamicCounts, counts_at
from cafe_flwr.metrics.selective import confidence_and_correct, scale_logits
from cafe_flwr.metrics.temperature import fit_temperatures

_DECAYS = np.geomspace(1e-3, 1e3, 121)


def for_macs(logits: Tensor, y: Tensor, macs: Sequence[int], budget: float, *, fingerprint: str = "") -> PerExit:
    """Thresholds of the best accuracy whose mean MACs on the calibration examples are within the budget.

    Candidates are the thresholds by which a share q_k ∝ q^k of the examples leaves at exit k, for many q, as in the
    budgeted batch classification of MSDNet (arXiv 1703.09844), and one threshold for all exits. Confidences are
    temperature-scaled first. On other examples of the same distribution the budget is met up to chance.

    Parameters
    ----------
    logits
        Of the calibration examples at all exits, (m, N, C), N ≥ 1, m ≥ 2.
    y
        Their labels, (N,).
    macs
        Of leaving at each exit, (m,) (``cafe_flwr.cost.macs_per_exit``).
    budget
        Share of the full network's MACs, at most 1 and at least that of the first exit.
    fingerprint
        Of the network (``cafe_flwr.personal.fingerprint``): the thresholds are refused by any other.

    Raises
    ------
    ValueError
        If the budget is too small for the first exit, or the examples do not fit.

    Examples
    --------
    >>> import torch
    >>> z = torch.tensor([[[3.0, 0.0], [0.2, 0.0]], [[3.0, 0.0], [0.0, 3.0]]])  # the second example needs exit 2
    >>> thresholds = for_macs(z, torch.tensor([0, 1]), [10, 40], budget=0.7)
    >>> thresholds.leaves(0, z[0] / thresholds.temperatures[0], z[0].argmax(1, keepdim=True))
    tensor([ True, False])
    """
    if not 0 < budget <= 1:
        raise ValueError(f"the budget is a share of the full network's MACs, above 0 and at most 1; got {budget!r}")
    thresholds, counts, temperatures = _candidates(logits, y, macs)
    mean_macs = counts.left @ np.asarray(macs, dtype=np.float64) / len(y)
    within = mean_macs <= budget * macs[-1] * (1 + 1e-9)
    if not within.any():
        raise ValueError(
            f"a budget of {budget:g} is less than the first exit costs: it must be at least {macs[0] / macs[-1]:.4g}"
        )
    accuracy = np.where(within, counts.correct, -1)
    chosen = np.lexsort((mean_macs, -accuracy))[0]
    return PerExit(tuple(thresholds[chosen]), temperatures, fingerprint)


def for_accuracy(
    logits: Tensor, y: Tensor, macs: Sequence[int], loss_allowed: float, *, fingerprint: str = ""
) -> PerExit:
    """Cheapest thresholds that lose no more accuracy against the full network than is allowed.

    Candidates, parameters and errors are those of :func:`for_macs`. The loss counts with one standard error on top, so
    that the choice holds on other examples more often than not. For a guarantee, calibrate with ``guarantee="gap"``
    (:func:`cafe_flwr.risk.calibrate`).

    Parameters
    ----------
    loss_allowed
        Loss of accuracy, 0 or more; 0.01 is one point.

    Examples
    --------
    >>> import torch
    >>> z = torch.tensor([[[3.0, 0.0], [0.2, 0.0]], [[3.0, 0.0], [0.0, 3.0]]])  # as for for_macs
    >>> thresholds = for_accuracy(z, torch.tensor([0, 1]), [10, 40], loss_allowed=0.0)
    >>> thresholds.leaves(0, z[0] / thresholds.temperatures[0], z[0].argmax(1, keepdim=True))
    tensor([ True, False])
    """
    if not 0 <= loss_allowed < 1:
        raise ValueError(
            f"loss_allowed is a loss of accuracy from 0 up (0.01: one point), below 1; got {loss_allowed!r}"
        )
    thresholds, counts, temperatures = _candidates(logits, y, macs)
    chosen = cheapest(counts, counts.left @ np.asarray(macs, dtype=np.float64), loss_allowed)
    return PerExit(tuple(thresholds[chosen]), temperatures, fingerprint)


def exit_shares(decay: float, num_exits: int) -> NDArray[np.float64]:
    """Shares q_k ∝ q^k, (m,), that sum to 1, where q is ``decay``.

    Examples
    --------
    >>> exit_shares(0.5, 3).round(3)
    array([0.571, 0.286, 0.143])
    """
    k = np.arange(num_exits)
    powers = float(decay) ** (k - k[-1] if decay > 1 else k)
    return powers / powers.sum()


def thresholds_for_shares(confidence: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Thresholds (m − 1) by which about these shares (m) of the examples leave, the most confident first.

    After each exit at least the cumulative share of the examples, of confidences (N, m), has left; equal confidences
    leave together. A threshold lies halfway between the last confidence that leaves and the first that stays.

    Examples
    --------
    >>> confidence = np.array([[0.9, 0.9], [0.7, 0.9], [0.6, 0.9], [0.5, 0.9]])
    >>> thresholds_for_shares(confidence, np.array([0.5, 0.5]))
    array([0.65])
    """
    n, m = confidence.shape
    due = np.ceil(np.cumsum(shares) * n - 1e-9).astype(int)  # have left after each exit
    thresholds, there = np.full(m - 1, np.inf), np.arange(n)
    for k in range(m - 1):
        count = due[k] - (n - len(there))
        if count <= 0:
            continue
        ranked = np.sort(confidence[there, k])[::-1]
        last = ranked[count - 1]
        below = ranked[ranked < last]
        thresholds[k] = (last + below[0]) / 2 if len(below) else last
        there = there[confidence[there, k] < thresholds[k]]
        if not len(there):
            break
    return thresholds


def _candidates(
    logits: Tensor, y: Tensor, macs: Sequence[int]
) -> tuple[NDArray[np.float64], DynamicCounts, tuple[float, ...]]:
    """Thresholds to choose from, (U, m − 1), the last of which let nothing leave early; their counts; temperatures."""
    check_examples(logits, y, macs)
    if len(logits) < 2:
        raise ValueError("a network of one exit has no thresholds to choose")
    temperatures = tuple(fit_temperatures(logits, y))
    confidence, correct = confidence_and_correct(scale_logits(logits, temperatures), y)
    m = len(logits)
    by_share = [thresholds_for_shares(confidence, exit_shares(q, m)) for q in _DECAYS]
    thresholds = np.stack([*by_share, *(np.full(m - 1, t) for t in THRESHOLDS)])
    return thresholds, counts_at(confidence, correct, thresholds), temperatures
