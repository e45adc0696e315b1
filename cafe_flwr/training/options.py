"""What local training is: steps, batches, optimiser and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OPTIMIZERS = ("sgd", "adamw")


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
        Of the optimiser; only SGD has a momentum.
    max_grad_norm
        Gradients are scaled down to this norm; 0 leaves them as they are.
    optimizer
        ``"sgd"`` or ``"adamw"``.
    keep_momentum
        Whether what the optimiser remembers (SGD's momentum, AdamW's running means) stays with the client from round
        to round; else it starts at rest in every round.
    """

    batch_size: int = 16
    steps: int = 6
    epochs: int = 0
    learning_rate: float = 0.3
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    optimizer: str = "sgd"
    keep_momentum: bool = False

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("steps", 1), ("epochs", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be greater than 0, got {self.learning_rate}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum is of sgd, {self.optimizer} has none: set it to 0, got {self.momentum}")
        if self.keep_momentum and self.optimizer == "sgd" and not self.momentum:
            raise ValueError(
                "keep_momentum has nothing to keep, as sgd with momentum 0 has none: raise momentum (0.9 is usual), "
                "or leave keep_momentum off"
            )

    def num_draws(self, num_examples: int) -> int:
        """Examples drawn in a round by a client with ``num_examples`` of them."""
        if self.epochs:
            return self.epochs * num_examples
        return self.steps * min(self.batch_size, num_examples)

    def new_optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser, as it starts."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)


DEFAULT_BUDGET = LocalBudget(learning_rate=0.15, momentum=0.9)
"""How clients train unless told otherwise; chosen for the default job on validation data (docs/evidence.md)."""


def learning_rate_at(
    base: float, server_round: int, num_rounds: int, schedule: str = "cosine", decay: float = 1.0
) -> float:
    """The learning rate of a round t = 1, …, T.

    ``"cosine"``: constant until round T/2, while exits still join, then a cosine down to (almost) 0 in round T.
    ``"exponential"``: base · decay^(t−1), which begins at the base and shrinks by a factor a round.

    Examples
    --------
    >>> [round(learning_rate_at(1.0, t, 8), 2) for t in range(1, 9)]
    [1.0, 1.0, 1.0, 1.0, 0.9, 0.65, 0.35, 0.1]
    >>> [round(learning_rate_at(1.0, t, 8, "exponential", 0.9), 2) for t in range(1, 9)]
    [1.0, 0.9, 0.81, 0.73, 0.66, 0.59, 0.53, 0.48]
    """
    if schedule == "exponential":
        return base * decay ** (server_round - 1)
    half = num_rounds / 2
    progress = max(0.0, (server_round - half) / (num_rounds - half + 1))
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))
