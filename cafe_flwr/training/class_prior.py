"""Class shares of a client: the log-prior added to its logits, and how to re-estimate it when they shift."""

from __future__ import annotations

import torch
from torch import Tensor

_SMOOTHING = 0.1  # pseudo-examples of every class, so that none is impossible
_EM_SMOOTHING = 10.0  # pseudo-examples of the old prior, so that a small sample cannot rule classes out


def class_counts(y: Tensor, num_classes: int) -> Tensor:
    """Examples of every class, (C,) float32."""
    return torch.bincount(y, minlength=num_classes).float()


def class_sums(features: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Sums of the features of every class, (m, C, d), from those of the exits, (m, N, d), and labels (N,)."""
    return features.new_zeros(len(features), num_classes, features.shape[2]).index_add_(1, y, features)


def log_prior(counts: Tensor) -> Tensor:
    """log π_c, π_c = (n_c + 0.1) / Σ_c (n_c + 0.1), from counts n (C,): finite even for classes without examples.

    Added to the logits in training and after, it lets the classifier learn what a class looks like and leaves its
    frequency to π (logit adjustment, Menon et al., arXiv 2007.07314).

    Examples
    --------
    >>> log_prior(torch.tensor([1.9, 0.9, 0.0])).exp()
    tensor([0.6452, 0.3226, 0.0323])
    """
    smoothed = counts + _SMOOTHING
    return (smoothed / smoothed.sum()).log()


def em_log_prior(logits: Tensor, prior: Tensor, steps: int = 50) -> Tensor:
    """Log-prior (C,) of unlabelled examples, by expectation maximisation (Saerens et al., Neural Computation 14, 2002).

    ``logits`` (N, C) contain the log-prior of training, ``prior`` (C,), and are calibrated: EM takes their softmax for
    p(y|x). Add the difference of the new log-prior from the old one to the logits. Without examples it is the old one.
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
    """Logits (m, N, C) with their log-prior, (C,), replaced by one that is estimated on these examples, without labels.

    It is the same for all exits, from the mean of their log-probabilities. The logits are first calibrated by
    ``temperatures``, (m, 1, 1).
    """
    mean = (logits / temperatures).log_softmax(dim=2).mean(dim=0)
    return logits / temperatures + (em_log_prior(mean, prior) - prior.log_softmax(0))
