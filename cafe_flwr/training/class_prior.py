"""Class shares of a client: the log-prior added to its logits, and how to re-estimate it when they shift."""

from __future__ import annotations

import torch
from torch import Tensor

_SMOOTHING = 0.1  # examples of every class that are imagined, so that no class is impossible
_EM_SMOOTHING = 10.0  # examples that the old prior counts for, so that a small sample cannot rule classes out


def class_counts(y: Tensor, num_classes: int) -> Tensor:
    """Examples of every class, (C,) float32."""
    return torch.bincount(y, minlength=num_classes).float()


def class_sums(features: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Sums of the features of every class, (m, C, d), from those of the exits, (m, N, d), and labels (N,)."""
    return features.new_zeros(len(features), num_classes, features.shape[2]).index_add_(1, y, features)


def log_prior(counts: Tensor) -> Tensor:
    """log π_c, π_c = (n_c + 0.1) / Σ_c (n_c + 0.1): finite also for classes that are not there.

    Added to logits in training and after, it lets the classifier learn what a class looks like and leave to π how
    frequent it is (logit adjustment, Menon et al., arXiv 2007.07314).

    Parameters
    ----------
    counts
        Examples of every class, (C,).

    Examples
    --------
    >>> log_prior(torch.tensor([1.9, 0.9, 0.0])).exp()
    tensor([0.6452, 0.3226, 0.0323])
    """
    smoothed = counts + _SMOOTHING
    return (smoothed / smoothed.sum()).log()


def em_log_prior(logits: Tensor, prior: Tensor, steps: int = 50) -> Tensor:
    """Class shares of unlabelled examples, by expectation maximisation (Saerens et al., Neural Computation 14, 2002).

    Parameters
    ----------
    logits
        (N, C), with the log-prior of training in them, and calibrated: EM takes softmax for p(y|x).
    prior
        That log-prior, (C,).
    steps
        Of EM.

    Returns
    -------
    The new log-prior, (C,): add its difference from the old one to the logits. Without examples, the old one.
    """
    if not len(logits):
        return prior
    prior = prior.log_softmax(0)
    smoothing, new = _EM_SMOOTHING * prior.exp(), prior
    for _ in range(steps):
        expected = (logits + (new - prior)).softmax(dim=1).sum(dim=0)
        new = ((expected + smoothing) / (len(logits) + _EM_SMOOTHING)).log()
    return new


def adapt_to_label_shift(logits: Tensor, temperatures: Tensor, prior: Tensor) -> Tensor:
    """Logits of all exits with the log-prior re-estimated on these examples, whose labels are not needed.

    One prior for all exits, estimated from the mean of their calibrated log-probabilities.

    Parameters
    ----------
    logits
        (m, N, C), with the log-prior in them.
    temperatures
        Of every exit, (m, 1, 1), for calibration.
    prior
        The log-prior, (C,).
    """
    mean = (logits / temperatures).log_softmax(dim=2).mean(dim=0)
    return logits / temperatures + (em_log_prior(mean, prior) - prior.log_softmax(0))
