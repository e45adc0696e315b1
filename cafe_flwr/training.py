"""The local loop: mini-batches, one optimiser, one loss. What the loss is, is the method's business."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cafe_flwr.data import Split


@dataclass(frozen=True)
class LocalBudget:
    """How a client trains in one round.

    Attributes
    ----------
    batch_size
        Examples a step; a client with fewer takes all it has.
    steps
        Gradient steps; used where ``epochs`` is 0.
    epochs
        Passes over the client's training split; 0 to count steps instead.
    learning_rate, momentum, weight_decay
        Of SGD.
    max_grad_norm
        Gradients are scaled down to this norm; 0 leaves them as they are.
    """

    batch_size: int = 16
    steps: int = 6
    epochs: int = 0
    learning_rate: float = 0.3
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("steps", 1), ("epochs", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be greater than 0, got {self.learning_rate}")

    def num_draws(self, num_examples: int) -> int:
        """Examples drawn in a round by a client with ``num_examples`` of them."""
        if self.epochs:
            return self.epochs * num_examples
        return self.steps * min(self.batch_size, num_examples)


def learning_rate_at(base: float, server_round: int, num_rounds: int) -> float:
    """Constant until round T/2, while exits still join, then a cosine down to (almost) 0 in round T.

    Examples
    --------
    >>> [round(learning_rate_at(1.0, t, 8), 2) for t in range(1, 9)]
    [1.0, 1.0, 1.0, 1.0, 0.9, 0.65, 0.35, 0.1]
    """
    half = num_rounds / 2
    progress = max(0.0, (server_round - half) / (num_rounds - half + 1))
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))


def batches(
    num_examples: int, batch_size: int, num_draws: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Positions of mini-batches: ``num_draws`` examples from shuffled passes over the data, cut into batches.

    A batch may reach over the end of a pass; only the last one may be smaller than the others.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> parts = list(batches(6, 4, 12, rng))  # two full passes in three batches
    >>> [len(part) for part in parts], sorted(np.concatenate(parts).tolist())
    ([4, 4, 4], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    """
    if num_examples < 1:
        raise ValueError("no training examples")
    size = min(batch_size, num_examples)
    passes = -(-num_draws // num_examples)
    order = np.concatenate([rng.permutation(num_examples) for _ in range(passes)])[:num_draws]
    for start in range(0, num_draws, size):
        yield order[start : start + size]


def train(
    network: nn.Module,
    data: Split,
    loss: Callable[[Tensor, Tensor], Tensor],
    budget: LocalBudget,
    rng: np.random.Generator,
) -> float:
    """Run one round of local training in place.

    Parameters of exits that the loss does not touch get no gradient and do not change, weight decay included.

    Parameters
    ----------
    network
        Its parameters that require gradients are trained.
    data
        Training split.
    loss
        (x, y) → scalar.
    budget
        Steps, batch size and optimiser settings.
    rng
        Order of the examples.

    Returns
    -------
    Mean loss over the steps.
    """
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, budget.learning_rate, momentum=budget.momentum, weight_decay=budget.weight_decay
    )
    losses = []
    for positions in batches(len(data), budget.batch_size, budget.num_draws(len(data)), rng):
        index = torch.from_numpy(positions)
        optimizer.zero_grad(set_to_none=True)
        value = loss(data.x[index], data.y[index])
        value.backward()
        if budget.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, budget.max_grad_norm)
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses).mean().item()
