"""Losses of early-exit training: functions of tensors, nothing else."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
