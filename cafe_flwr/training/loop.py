"""The local loop: mini-batches, one optimiser, one loss. What the loss is, is the method's business."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cafe_flwr.data.federation import Split
from cafe_flwr.networks.placement import device_of, gradient_scaler, moved
from cafe_flwr.networks.preprocessing import Augmentation
from cafe_flwr.training.optimizer_state import given_back, taken

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
    passes = max(1, -(-num_draws // num_examples))
    order = np.concatenate([rng.permutation(num_examples) for _ in range(passes)])[:num_draws]
    for start in range(0, num_draws, size):
        yield order[start : start + size]


class Outcome(NamedTuple):
    """Of local training: mean loss over the steps (NaN without any), and the number of steps."""

    loss: float
    steps: int


def train(
    network: nn.Module,
    data: Split,
    loss: Callable[[Tensor, Tensor], Tensor],
    budget: LocalBudget,
    rng: np.random.Generator,
    *,
    only: Sequence[str] = (),
    also: Sequence[Tensor] = (),
    adjust: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    part: tuple[int, int] = (0, 1),
    times: int = 1,
    augment: Augmentation | None = None,
    kept: dict[str, Tensor] | None = None,
) -> Outcome:
    """Run one round of local training in place, where the network is: mini-batches are brought there.

    Parameters of exits that the loss does not touch get no gradient and do not change, weight decay included.

    Parameters
    ----------
    network
        Its parameters that require gradients are trained.
    data
        Training split, on any device.
    loss
        (x, y) → scalar.
    budget
        Steps, batch size and optimiser settings.
    rng
        Order of the examples, then their augmentation.
    only
        Names of the parameters to train; the others are frozen. All if empty.
    also
        Parameters to train that are not the network's.
    adjust
        Called after every backward pass, to change the gradients.
    after_step
        Called after every step, for example to average the network over steps.
    part
        (i, n): take the i-th of n nearly equal parts of the round's mini-batches; where there are too few to share,
        every part takes all.
    times
        Rounds' worth of mini-batches.
    augment
        Varies the inputs of every mini-batch.
    kept
        What the optimiser remembers (:mod:`cafe_flwr.training.optimizer_state`) when it starts; afterwards what it
        remembers then. None: it starts at rest.
    """
    network.train()
    device, scaler = device_of(network), gradient_scaler(network)
    todo = list(batches(len(data), budget.batch_size, times * budget.num_draws(len(data)), rng))
    i, n = part
    if len(todo) < n:
        todo *= n  # a single mini-batch cannot be shared: every part takes it
    todo = todo[len(todo) * i // n : len(todo) * (i + 1) // n]
    with frozen(network, only):
        named: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
        named.update({f"also.{i}": p for i, p in enumerate(also)})
        parameters = list(named.values())
        optimizer = budget.new_optimizer(parameters)
        if kept is not None:
            given_back(optimizer, list(named), kept)
        losses = []
        for positions in todo:
            index = torch.from_numpy(positions)
            x, y = moved(data.x[index], device), moved(data.y[index], device)
            if augment is not None:
                x = augment(x, rng)
            optimizer.zero_grad(set_to_none=True)
            value = loss(x, y)
            if scaler is None:
                value.backward()
            else:
                scaler.scale(value).backward()
                scaler.unscale_(optimizer)
            if adjust is not None:
                adjust()
            if budget.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, budget.max_grad_norm)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)  # not taken where gradients were too large for float16
                scaler.update()
            if after_step is not None:
                after_step()
            losses.append(value.detach())
        optimizer.zero_grad(set_to_none=True)  # as large as the network, and of no use any more
        if kept is not None:
            kept.clear()
            kept.update(taken(optimizer, list(named)))
    mean = torch.stack(losses).mean().item() if losses else math.nan
    return Outcome(mean, len(losses))


@contextmanager
def frozen(network: nn.Module, only: Sequence[str]) -> Iterator[None]:
    """All parameters but those named require no gradient inside; as they were outside."""
    frozen = [p for name, p in network.named_parameters() if only and name not in only and p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
        p.grad = None
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def pull(network: nn.Module, anchor: Mapping[str, Tensor], weight: float) -> Callable[[], None]:
    """Gradient of weight/2 · ‖θ − anchor‖², to be added after every backward pass (``adjust`` of :func:`train`).

    Parameters without a gradient are left alone: what does not train does not move.
    """
    pairs = [(p, anchor[name]) for name, p in network.named_parameters() if name in anchor]

    @torch.no_grad()
    def adjust() -> None:
        moving = [(p, a) for p, a in pairs if p.grad is not None]
        if moving:
            here, there = zip(*moving, strict=True)
            gradients = [p.grad for p in here]
            torch._foreach_add_(gradients, torch._foreach_sub(here, there), alpha=weight)

    return adjust


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's tensors, by name."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
