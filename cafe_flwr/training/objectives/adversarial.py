"""Adversarial examples, and how NEO-KD deals classes out to exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cafe_flwr.training.losses import cross_entropies


def adversarial_examples(
    logits_of: Callable[[Tensor], Sequence[Tensor]],
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    rng: np.random.Generator,
) -> Tensor:
    """Inputs near x that the exits get wrong: projected gradient ascent on their mean cross-entropy.

    PGD (Madry et al., arXiv 1706.06083) with a random start and sign steps of 2.5·ε/steps within an ε-box around x and
    within the range of the batch, on the mean over exits (max-average attack: Hu et al., arXiv 2002.10025). The
    parameters' gradients stay as they are.

    ``logits_of`` gives logits (B, C) of every exit for inputs like x. ``epsilon`` is the largest change of a value, as
    a share of the range (max − min) of the batch; 8/255 ≈ 0.03 is usual. ``rng`` draws the random start.

    Examples
    --------
    >>> x, y, rng = torch.tensor([[0.0, 1.0]]), torch.tensor([0]), np.random.default_rng(0)
    >>> adversarial_examples(lambda x: [x], x, y, epsilon=0.1, steps=5, rng=rng)
    tensor([[0., 1.]])
    >>> adversarial_examples(lambda x: [x], x, 1 - y, epsilon=0.1, steps=5, rng=rng)
    tensor([[0.1000, 0.9000]])
    """
    low, high = x.min(), x.max()
    size = epsilon * (high - low)
    start = torch.from_numpy(rng.uniform(-1.0, 1.0, size=tuple(x.shape))).to(x)
    found = (x + size * start).clamp(low, high)
    for _ in range(steps):
        found = found.detach().requires_grad_()
        loss = cross_entropies(logits_of(found), y).mean()
        (gradient,) = torch.autograd.grad(loss, found)
        moved = found.detach() + 2.5 * size / steps * gradient.sign()
        found = torch.minimum(torch.maximum(moved, x - size), x + size).clamp(low, high)
    return found.detach()


def deal_classes(batch: int, num_classes: int, num_exits: int, rng: np.random.Generator) -> Tensor:
    """The exit that owns each class, (B, C) in 0..m−1: dealt out at random for every example, as evenly as possible.

    Examples
    --------
    >>> deal_classes(2, 6, 3, np.random.default_rng(0)).sort(dim=1).values
    tensor([[0, 0, 1, 1, 2, 2],
            [0, 0, 1, 1, 2, 2]])
    """
    order = rng.permuted(np.tile(np.arange(num_classes), (batch, 1)), axis=1)
    return torch.from_numpy(order % num_exits)
