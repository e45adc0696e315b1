"""Losses of early-exit training: as functions of tensors."""

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

    Both are logits, (B, C); no gradient flows into the teacher. The factor τ² keeps the size of the gradients
    independent of the temperature τ > 0.

    Examples
    --------
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> round(distillation(z, z, temperature=3.0).item(), 6)
    0.0
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def self_distillation(logits: Sequence[Tensor], *, temperature: float = 3.0, last_weight: float = 0.3) -> Tensor:
    """Divergence of each exit from all exits together, (m,): τ² · KL( q ‖ softmax(z_k/τ) ) · weight_k.

    The teacher q is the mean of the exits' softmax(z_k/τ), and not trained (docs/method.md). Logits are (B, C) for each
    exit; ``last_weight`` is the weight of the last exit, which has the least to learn, the others' is 1.

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

    b = (p_y, 1 − p_y) is the probability of the label, p̂_c = p_c/(1 − p_y), c ≠ y, the distribution over the other
    classes; both at temperature τ > 0. Plain distillation weighs the second by the teacher's 1 − p_y, so that it
    vanishes where the teacher is confident. 1 − p_y is not computed as a difference: the loss is exact for p_y near 1.

    Student and teacher are logits, (B, C), C ≥ 2; the teacher is not trained. With C = 2 only the first term is left.
    Labels y are (B,). a and b' (``target_weight``, ``others_weight``) are 1 and 1 in SAFE-KD, 1 and 8 in the original.

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
    """Divergence of each exit from the last, (m,): τ²·KL( softmax(sg z_m/τ) ‖ softmax(z_k/τ) ), 0 for k = m.

    SAFE-KD's deep-to-shallow term (arXiv 2602.03043). Logits are (B, C) for each exit; the last one is not trained.

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

    Added to the cross-entropy, it lets the student follow a teacher that is right and keeps it unsure where the teacher
    is wrong. The KL is at temperature τ > 0, the entropy H at 1. Student and teacher are logits of one exit, (B, C),
    C ≥ 2; the teacher is not trained. Labels y are (B,); a and b are the weights ``right`` and ``wrong``.

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

    The teacher, not trained, is the mean of the softmax outputs on the clean input over the neighbours that exist; the
    student is the exit on the adversarial input. Logits are (B, C) for each exit. Mean over the batch.

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

    Exit k on the adversarial input learns its clean output, which is not trained, restricted to the label and the
    classes that exit k owns and scaled to sum 1. As no two exits own the same class, an attack on one exit carries over
    less to the others. Logits are (B, C) for each exit, labels y (B,); ``owner`` is the exit, 0..m−1, that owns each
    class, (C,), or (B, C) for every example.

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
