"""The local training loop: mini-batches, one optimiser, and the loss that a method gives it."""

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
from torch.nn.modules.batchnorm import _BatchNorm

from cafe_flwr.data.augmentation import Augmentation
from cafe_flwr.data.split import Split
from cafe_flwr.networks.placement import device_of, gradient_scaler, moved
from cafe_flwr.training.optimizer_state import given_back, new_optimizer, taken
from cafe_flwr.training.options import LocalBudget


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
    """Result of local training: mean loss over the steps (NaN without any), and the number of steps."""

    loss: float
    steps: int


@dataclass(frozen=True)
class LoopOptions:
    """What :func:`train` does beyond plain training of all parameters.

    Attributes
    ----------
    only
        Names of the parameters to train; the others are frozen. All if empty.
    also
        Further parameters to train, outside the network.
    adjust
        Called after every backward pass, to change the gradients.
    after_step
        Called after every step, for example to average the network over steps.
    part
        (i, n): take the i-th of n nearly equal parts of the mini-batches; if there are fewer than n, take all.
    times
        Number of rounds whose mini-batches are drawn.
    augment
        Varies the inputs of every mini-batch.
    kept
        The optimiser's state (:mod:`cafe_flwr.training.optimizer_state`) at the start, replaced by its state at the
        end. None: the optimiser starts anew.
    """

    only: Sequence[str] = ()
    also: Sequence[Tensor] = ()
    adjust: Callable[[], None] | None = None
    after_step: Callable[[], None] | None = None
    part: tuple[int, int] = (0, 1)
    times: int = 1
    augment: Augmentation | None = None
    kept: dict[str, Tensor] | None = None


def train(
    network: nn.Module,
    data: Split,
    loss: Callable[[Tensor, Tensor], Tensor],
    budget: LocalBudget,
    rng: np.random.Generator,
    options: LoopOptions | None = None,
) -> Outcome:
    """Train a network in place for one round, on its device; mini-batches of ``data`` are moved there.

    ``loss`` takes inputs and labels and gives a scalar; exits that it does not use do not change, not even by weight
    decay. ``rng`` draws the order of the examples, then their augmentation. A batch norm cannot train on one example:
    in a network with one, a last mini-batch of one example joins the mini-batch before it.
    """
    how = options or LoopOptions()
    network.train()
    device, drawn = device_of(network), batches_of(budget, len(data), rng, how.times)
    if len(drawn) > 1 and len(drawn[-1]) == 1 and any(isinstance(m, _BatchNorm) for m in network.modules()):
        drawn[-2:] = [np.concatenate(drawn[-2:])]
    todo = _share(drawn, how.part)
    with frozen(network, how.only):
        named: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
        named.update({f"also.{i}": p for i, p in enumerate(how.also)})
        optimizer = new_optimizer(budget, list(named.values()))
        if how.kept is not None:
            given_back(optimizer, list(named), how.kept)
        step = _stepper(optimizer, list(named.values()), gradient_scaler(network), budget.max_grad_norm, how.adjust)
        losses = []
        for positions in todo:
            index = torch.from_numpy(positions)
            x, y = moved(data.x[index], device), moved(data.y[index], device)
            if how.augment is not None:
                x = how.augment(x, rng)
            optimizer.zero_grad(set_to_none=True)
            value = loss(x, y)
            step(value)
            if how.after_step is not None:
                how.after_step()
            losses.append(value.detach())
        optimizer.zero_grad(set_to_none=True)  # gradients are as large as the network, and no longer needed
        if how.kept is not None:
            how.kept.clear()
            how.kept.update(taken(optimizer, list(named)))
    mean = torch.stack(losses).mean().item() if losses else math.nan
    return Outcome(mean, len(losses))


def batches_of(
    budget: LocalBudget, num_examples: int, rng: np.random.Generator, times: int = 1
) -> list[NDArray[np.int64]]:
    """Positions of the mini-batches of ``times`` rounds."""
    return list(batches(num_examples, budget.batch_size, times * budget.num_draws(num_examples), rng))


def _share(todo: list[NDArray[np.int64]], part: tuple[int, int]) -> list[NDArray[np.int64]]:
    i, n = part
    if len(todo) < n:
        return todo
    return todo[len(todo) * i // n : len(todo) * (i + 1) // n]


def _stepper(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    scaler: torch.amp.GradScaler | None,
    max_grad_norm: float,
    adjust: Callable[[], None] | None,
) -> Callable[[Tensor], None]:
    """A function that takes one step down a loss."""

    def step(value: Tensor) -> None:
        if scaler is None:
            value.backward()
        else:
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
        if adjust is not None:
            adjust()
        if max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)  # takes no step if gradients were too large for float16
            scaler.update()

    return step


@contextmanager
def frozen(network: nn.Module, only: Sequence[str]) -> Iterator[None]:
    """Freeze all parameters but those named in a ``with`` block; without names, none. Tied ones have several names."""
    wanted = {p for name, p in network.named_parameters(remove_duplicate=False) if not only or name in only}
    frozen = [p for p in network.parameters() if p not in wanted and p.requires_grad]
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

    Parameters without a gradient are left alone.
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


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming up to three tensors, if training has left NaN or infinite values."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"training ended with NaN or infinite values in {', '.join(broken[:3])}: lower learning-rate")
