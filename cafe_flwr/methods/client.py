"""A client's task in a round, as methods see it, and its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.data.augmentation import Augmentation
from cafe_flwr.data.split import Split
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.training.loop import LoopOptions, train
from cafe_flwr.training.objectives.base import ObjectiveState
from cafe_flwr.training.options import LocalBudget

Tensors = Mapping[str, Tensor]


@dataclass
class LocalTask:
    """One client's work in one round.

    Attributes
    ----------
    network
        Holds what the client starts from; trained in place.
    data
        Training split.
    active
        (m−1,): whether student exit k trains.
    download
        What the server sent to this client alone, by name; may be empty.
    budget
        Steps, batch size and optimiser settings.
    rng
        Gives the client's random generator of this round for a purpose.
    private_rng
        Gives a random generator for a purpose, the same in all rounds, from a secret that never leaves the client's
        disk: for noise and other things that the server must not foresee.
    server_round, num_rounds
        t and T.
    state
        The client's tensors beside the network's (``Method.extra_tensors``), by name; the method replaces entries.
    initial
        Initial weights of the client's network, by name.
    steps, runs
        Gradient steps and calls of :meth:`run` so far.
    objective_state
        State of the objective during a run, once it is used.
    augment
        Augmentation of the inputs of a batch.
    momentum
        The optimiser's momentum of the client's last round, by name, if the budget keeps it; replaced by each run.
    deadline
        When training must be done, in seconds of ``time.monotonic``.
    """

    network: EarlyExitNetwork
    data: Split
    active: Sequence[bool]
    download: Tensors
    budget: LocalBudget
    rng: Callable[[str], np.random.Generator]
    private_rng: Callable[[str], np.random.Generator] = field(default=lambda purpose: np.random.default_rng())
    server_round: int = 1
    num_rounds: int = 1
    state: dict[str, Tensor] = field(default_factory=dict)
    initial: Tensors = field(default_factory=dict)
    steps: int = 0
    objective_state: ObjectiveState | None = None
    augment: Augmentation | None = None
    momentum: dict[str, Tensor] = field(default_factory=dict)
    runs: int = 0
    deadline: float = math.inf

    @property
    def training_exits(self) -> list[int]:
        """The active student exits and the last one, counted from 0."""
        return [*(k for k, active in enumerate(self.active) if active), self.network.num_exits - 1]

    def logits_as_taught(self, features: Tensor) -> Tensor:
        """Logits (B, C) of the last exit's features (B, width) under the classifier received."""
        network = self.network
        logits = F.linear(features, *(self.download[name] for name in network.head_names(network.num_exits - 1)))
        return logits if network.offset is None else logits + network.offset

    def run(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        only: Sequence[str] = (),
        also: Sequence[Tensor] = (),
        adjust: Callable[[], None] | None = None,
        part: tuple[int, int] = (0, 1),
        times: int = 1,
        purpose: str = "batches",
    ) -> float:
        """Train the network on a loss of (x, y), and count the steps.

        The objective is initialised anew: its teacher is the network before the first step. Where momentum is kept, the
        n-th run of a round continues that of the n-th run of the client's last round for this purpose.

        Parameters
        ----------
        loss
            (x, y) → scalar.
        only
            Parameters of the network to train; all if empty.
        also
            Parameters to train that are not the network's.
        adjust
            Called after every backward pass, to change the gradients.
        part
            (i, n): take the i-th of n nearly equal parts of the round's steps.
        times
            Number of rounds whose steps to take.
        purpose
            Of the random generator that draws the mini-batches.

        Returns
        -------
        Mean loss over the steps.
        """
        self.objective_state = None
        of_this = f"{purpose}/{self.runs}/"
        kept = without_prefix(self.momentum, of_this) if self.budget.keep_momentum else None
        options = LoopOptions(only, also, adjust, self._after_step, part, times, self.augment, kept)
        outcome = train(self.network, self.data, loss, self.budget, self.rng(purpose), options)
        self.objective_state = None
        self.runs += 1
        if kept is not None:
            others = {name: t for name, t in self.momentum.items() if not name.startswith(of_this)}
            self.momentum = others | {of_this + name: t for name, t in kept.items()}
        self.steps += outcome.steps
        return outcome.loss

    def _after_step(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError("training took longer than this node allows (max-seconds in its node-config)")
        if self.objective_state is not None:
            self.objective_state.update()


@dataclass(frozen=True)
class LocalResult:
    """A client's mean training loss, and the similarity of each student exit to the last if the method measures it."""

    loss: float
    similarity: list[float] = field(default_factory=list)


def without_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, under the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
