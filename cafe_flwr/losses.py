"""Losses of early-exit training: functions of tensors, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropies(logits: Sequence[Tensor], y: Tensor) -> Tensor:
    """Cross-entropy of every exit, (m,), from logits (B, C) each and labels (B,)."""
    return torch.stack([F.cross_entropy(z, y) for z in logits])


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ² · KL( softmax(teacher/τ) ‖ softmax(student/τ) ), mean over the batch (Hinton et al., arXiv 1503.02531).

    The teacher is not trained: no gradient flows into it.

    Parameters
    ----------
    student, teacher
        Logits, (B, C) each.
    temperature
        τ > 0. The factor τ² keeps the gradients' size independent of τ.

    Examples
    --------
    >>> import torch
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> round(distillation(z, z, temperature=3.0).item(), 6)
    0.0
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def self_distillation(logits: Sequence[Tensor], *, temperature: float = 3.0, last_weight: float = 0.3) -> Tensor:
    """What each exit has still to learn from all exits together, (m,): τ² · KL( q ‖ softmax(z_k/τ) ) · weight_k.

    The teacher q is the mean of the exits' softmax(z_k/τ), not trained (docs/method.md).

    Parameters
    ----------
    logits
        Of the exits, (B, C) each.
    temperature
        τ > 0.
    last_weight
        Weight of the last exit, which has the least to learn; the others' is 1.

    Examples
    --------
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> self_distillation([z, z]).abs().max().item() < 1e-6
    True
    """
    log_p = F.log_softmax(torch.stack(list(logits)) / temperature, dim=2)
    q = log_p.detach().exp().mean(dim=0)
    entropy = torch.xlogy(q, q).sum(dim=1)
    kl = (entropy - (q * log_p).sum(dim=2)).mean(dim=1) * temperature**2
    weights = torch.ones(len(log_p), dtype=kl.dtype, device=kl.device)
    weights[-1] = last_weight
    return kl * weights
