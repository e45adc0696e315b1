"""Losses of early-exit training: functions of tensors, nothing else."""

from __future__ import annotations

import math
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


def decoupled_distillation(
    student: Tensor,
    teacher: Tensor,
    y: Tensor,
    *,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    others_weight: float = 1.0,
) -> Tensor:
    """τ² · [ a·KL(b^T ‖ b^S) + b'·KL(p̂^T ‖ p̂^S) ], mean over the batch (DKD: Zhao et al., arXiv 2203.08679, Eq. 7).

    b = (p_y, 1 − p_y) says how sure a network is of the label, p̂_c = p_c/(1 − p_y), c ≠ y, how it sees the other
    classes; both at temperature τ. Plain distillation weighs the second by the teacher's 1 − p_y, so that it vanishes
    where the teacher is sure. 1 − p_y is never computed as a difference: the loss is exact for p_y near 1.

    Parameters
    ----------
    student, teacher
        Logits, (B, C) each, C ≥ 2. The teacher is not trained. With C = 2 there is a single other class, and only the
        first term is left.
    y
        Labels, (B,).
    temperature
        τ > 0.
    target_weight, others_weight
        a and b': 1 and 1 in SAFE-KD, 1 and 8 in the original.

    Examples
    --------
    >>> sure, y = torch.tensor([[60.0, 1.0, 0.0]]), torch.tensor([0])
    >>> round(decoupled_distillation(torch.tensor([[60.0, 0.0, 1.0]]), sure, y, temperature=1.0).item(), 4)
    0.4621
    """
    _two_classes(student)
    (own, own_rest, own_others), (taught, taught_rest, taught_others) = (
        _decoupled(z / temperature, y) for z in (student, teacher.detach())
    )
    target = taught.exp() * (taught - own) + taught_rest.exp() * (taught_rest - own_rest)
    others = (taught_others.exp() * (taught_others - own_others)).sum(dim=1)
    return (target_weight * target + others_weight * others).mean() * temperature**2


def _decoupled(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ln p_y (B,), ln(1 − p_y) (B,) and ln p̂ (B, C−1)."""
    others = z[F.one_hot(y, z.shape[1]) == 0].view(len(z), -1)
    of_all, of_others = z.logsumexp(dim=1), others.logsumexp(dim=1)
    return z.gather(1, y[:, None])[:, 0] - of_all, of_others - of_all, others - of_others[:, None]


def _two_classes(z: Tensor) -> None:
    if z.shape[1] < 2:
        raise ValueError(f"this loss needs at least 2 classes, got logits of shape {tuple(z.shape)}")


def consistency(logits: Sequence[Tensor], *, temperature: float = 4.0) -> Tensor:
    """What each exit has still to learn from the last, (m,): τ²·KL( softmax(sg z_m/τ) ‖ softmax(z_k/τ) ), 0 for k = m.

    SAFE-KD's deep-to-shallow term (arXiv 2602.03043); the last exit is not trained by it.

    Parameters
    ----------
    logits
        Of the exits, (B, C) each; the last one teaches.
    temperature
        τ > 0.

    Examples
    --------
    >>> shallow, deep = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> consistency([shallow, deep], temperature=1.0)
    tensor([0.3278, 0.0000])
    """
    *students, last = logits
    return torch.stack([*(distillation(z, last, temperature) for z in students), last.new_zeros(())])


def erde(
    student: Tensor, teacher: Tensor, y: Tensor, *, temperature: float = 4.0, right: float = 1.0, wrong: float = 0.1
) -> Tensor:
    """a·1{teacher right}·τ²·KL(t ‖ s) − b·1{teacher wrong}·H(s)/ln C, mean over the batch (ERDE, arXiv 2510.04856).

    It stands beside the cross-entropy: the student follows a teacher that is right, and is kept unsure where the
    teacher is wrong. The distributions of the KL are at temperature τ, that of the entropy H at 1.

    Parameters
    ----------
    student, teacher
        Logits of one exit, (B, C) each, C ≥ 2. The teacher is not trained.
    y
        Labels, (B,).
    temperature
        τ > 0.
    right, wrong
        Weights a and b.

    Examples
    --------
    >>> unsure, teacher = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    >>> [round(erde(unsure, teacher, torch.tensor([c]), temperature=1.0).item(), 4) for c in (0, 1)]
    [0.3278, -0.1]
    """
    _two_classes(student)
    taught = teacher.detach()
    log_t, log_s = (F.log_softmax(z / temperature, dim=1) for z in (taught, student))
    kl = (log_t.exp() * (log_t - log_s)).sum(dim=1) * temperature**2
    log_p = F.log_softmax(student, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1) / math.log(student.shape[1])
    is_right = taught.argmax(dim=1) == y
    return torch.where(is_right, right * kl, -wrong * entropy).mean()


def neighbour_distillation(adversarial: Sequence[Tensor], clean: Sequence[Tensor]) -> Tensor:
    """NEO-KD's first term (Ham et al., NeurIPS 2023), (m,): KL( mean clean output of exits k−1, k, k+1 ‖ exit k ).

    The teacher is the mean of the softmax outputs on the clean input, over those neighbours that exist; it is not
    trained. The student is the exit on the adversarial input. Mean over the batch.

    Parameters
    ----------
    adversarial, clean
        Logits of the exits on both inputs, (B, C) each.

    Examples
    --------
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> neighbour_distillation([z, 0 * z], [z, z]).abs().round(decimals=4)
    tensor([0.0000, 0.3278])
    """
    p = torch.stack([z.detach() for z in clean]).softmax(dim=2)
    spans = [(max(k - 1, 0), k + 2) for k in range(len(p))]
    return torch.stack([_divergence(p[a:b].mean(dim=0), z) for (a, b), z in zip(spans, adversarial, strict=True)])


def orthogonal_distillation(adversarial: Sequence[Tensor], clean: Sequence[Tensor], y: Tensor, owner: Tensor) -> Tensor:
    """NEO-KD's second term (Ham et al., NeurIPS 2023), (m,): every exit is taught its own part of the other classes.

    Exit k on the adversarial input learns its clean output, of which only the label and the classes it owns are kept,
    scaled to sum 1. As no two exits own a class, an attack that leads one exit astray carries over less to the others.

    Parameters
    ----------
    adversarial, clean
        Logits of the exits on both inputs, (B, C) each. The clean ones are not trained.
    y
        Labels, (B,).
    owner
        Which exit owns a class, 0..m−1: (C,), or (B, C) for every example.

    Examples
    --------
    >>> z, y, owner = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([0]), torch.tensor([0, 0, 1])
    >>> orthogonal_distillation([z, z], [z, z], y, owner)  # KL((½, ½, 0) ‖ (⅓, ⅓, ⅓)) = ln 1.5 at both
    tensor([0.4055, 0.4055])
    """
    is_label = F.one_hot(y, clean[0].shape[1]) == 1
    terms = []
    for k, (z, taught) in enumerate(zip(adversarial, clean, strict=True)):
        kept = taught.detach().masked_fill(~(is_label | (owner == k)), -math.inf)
        terms.append(_divergence(kept.softmax(dim=1), z))
    return torch.stack(terms)


def _divergence(p: Tensor, z: Tensor) -> Tensor:
    """KL( p ‖ softmax(z) ), mean over the batch."""
    return F.kl_div(F.log_softmax(z, dim=1), p, reduction="batchmean")
