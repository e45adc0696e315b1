"""Train the clients of a node: one after the other here; another trainer may take many at once.

Methods are in a package above this one, so all that is known of a method here is that it trains a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from cafe_flwr.core.random import seeded
from cafe_flwr.data.split import Split
from cafe_flwr.metrics.exits import ExitMetrics, evaluate
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.weights import weights_of
from cafe_flwr.training.loop import check_finite


class Task(Protocol):
    """What a trainer uses of a client's task (``cafe_flwr.methods.LocalTask``)."""

    network: EarlyExitNetwork
    state: dict[str, Tensor]
    momentum: dict[str, Tensor]

    @property
    def rng(self) -> Callable[[str], np.random.Generator]:
        """The client's random generator of this round, for a given purpose."""


T = TypeVar("T", bound=Task)
T_contra = TypeVar("T_contra", bound=Task, contravariant=True)
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Trains(Protocol[T_contra, Result_co]):
    """The client half of a method, as a trainer sees it."""

    def train(self, task: T_contra) -> Result_co:
        """Train the task's network in place."""


class LocalTrainer(Protocol):
    """Trains and measures the clients of a node.

    Attributes
    ----------
    at_once
        How many tasks it takes together; each of them then needs a network of its own.
    """

    at_once: int

    def train(self, method: Trains[T, Result], tasks: Sequence[T]) -> list[Result | Exception]:
        """Train every task in place; gives, for each, its result or the error that it ended with."""

    def evaluate(self, networks: Sequence[EarlyExitNetwork], splits: Sequence[Split]) -> list[ExitMetrics]:
        """Metrics of every network's exits on its split."""


class LoopTrainer:
    """Trains one task after the other: the reference for every other trainer."""

    at_once = 1

    def train(self, method: Trains[T, Result], tasks: Sequence[T]) -> list[Result | Exception]:
        """As :class:`LocalTrainer` says."""
        results: list[Result | Exception] = []
        for task in tasks:
            try:
                results.append(train_task(method, task))
            except Exception as error:
                results.append(error)
        return results

    def evaluate(self, networks: Sequence[EarlyExitNetwork], splits: Sequence[Split]) -> list[ExitMetrics]:
        """As :class:`LocalTrainer` says."""
        return [evaluate(network, split) for network, split in zip(networks, splits, strict=True)]


def train_task(method: Trains[T, Result], task: T) -> Result:
    """Train one task in place, with torch's generator seeded, e.g. for dropout; ValueError for NaN or infinity."""
    with seeded(int(task.rng("torch").integers(2**63))):
        result = method.train(task)
    check_finite({**weights_of(task.network), **task.state, **task.momentum})
    return result
