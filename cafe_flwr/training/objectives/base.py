"""Base of objectives: the loss of every exit of a network, and the teacher that some objectives keep.

An objective is a frozen dataclass of its settings. What changes during training, such as the teacher, is in an
:class:`ObjectiveState`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cafe_flwr.core.options import check_settings, setting
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.statistics import batch_norm_names


@dataclass
class ObjectiveState:
    """State of an objective during one training.

    ``rng`` draws adversarial inputs. ``average`` is the average of ``network`` over its steps, if that is the teacher;
    its buffers but running statistics stay those of the network.
    """

    network: EarlyExitNetwork
    rng: np.random.Generator
    average: AveragedModel | None = None

    @property
    def teacher(self) -> EarlyExitNetwork | None:
        """The average of the network over the steps so far, in evaluation mode."""
        return None if self.average is None else cast(EarlyExitNetwork, self.average.module)

    def update(self) -> None:
        """Update the teacher after a step: θ^T ← d·θ^T + (1−d)·θ."""
        if self.average is not None:
            self.average.update_parameters(self.network)
            statistics = set(batch_norm_names(self.network))
            for (name, own), mean in zip(self.network.named_buffers(), self.average.module.buffers(), strict=True):
                if name not in statistics:
                    mean.copy_(own)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What every exit minimises, with its settings; ``name`` is as in ``objective = "safe-kd"``."""

    name: ClassVar[str]
    is_taught: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self)

    def exit_weights(self, num_exits: int) -> list[float]:
        """Weights of the exits' losses, which sum to 1, for methods without weights of their own."""
        return [1.0 / num_exits] * num_exits

    def init(self, network: EarlyExitNetwork, rng: np.random.Generator) -> ObjectiveState:
        """The state of a training that starts from this network."""
        return ObjectiveState(network, rng)

    @abstractmethod
    def losses(
        self,
        state: ObjectiveState,
        batch: tuple[Tensor, Tensor],
        logits: Sequence[Tensor],
        *,
        exits: Sequence[int] = (),
        shift: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """The loss of every exit, (m,), not weighted.

        Parameters
        ----------
        state
            From :meth:`init`.
        batch
            Inputs and labels (B,).
        logits
            (B, C) of every exit in training; the last one is the network's last exit.
        exits
            Which exits these are; all if empty.
        shift
            (C,), what the method has added to the logits; the teacher's and the adversarial ones get it, too.
        teacher
            Logits (B, C) to use instead of the EMA teacher's.
        """


@dataclass(frozen=True, kw_only=True)
class TaughtObjective(Objective):
    """An objective with a teacher: the exponential moving average of the network over its steps."""

    is_taught: ClassVar[bool] = True

    ema_decay: float = setting(
        0.999,
        "Decay of the EMA teacher of safe-kd and erde per step; 1: it stays as the client received it.",
        ge=0,
        le=1,
        wire="ema_decay",
    )
    temperature: float = setting(4.0, "τ of the distillation in safe-kd and erde.", gt=0, wire="objective_temperature")

    def init(self, network: EarlyExitNetwork, rng: np.random.Generator) -> ObjectiveState:
        """The teacher begins as a copy of the network."""
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay), use_buffers=True).eval()
        average.update_parameters(network)  # the first update copies, later ones average
        average.requires_grad_(False)
        return ObjectiveState(network, rng, average)


@torch.no_grad()
def taught_logits(state: ObjectiveState, x: Tensor, exits: Sequence[int], shift: Tensor | None) -> list[Tensor]:
    """Logits (B, C) of the EMA teacher's exits, counted from 0, plus ``shift``."""
    assert state.teacher is not None
    return logits_at(state.teacher, x, exits, shift)


def exits_at(network: EarlyExitNetwork, x: Tensor, exits: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Features (B, width) and logits (B, C) of some exits, counted from 0; no stage runs that none of them needs."""
    features, logits = [], []
    for k in range(max(exits) + 1):
        x = network.stage(k, x)
        if k in exits:
            f, z = network.exit(k, x)
            features.append(f)
            logits.append(z)
    return features, logits


def logits_at(network: EarlyExitNetwork, x: Tensor, exits: Sequence[int], shift: Tensor | None = None) -> list[Tensor]:
    """Logits (B, C) of some exits, as :func:`exits_at` gives them, plus ``shift``.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> len(logits_at(ConvNet((1, 16, 16), num_classes=10), torch.zeros(2, 1, 16, 16), [0, 2]))
    2
    """
    logits = exits_at(network, x, exits)[1]
    return logits if shift is None else [z + shift for z in logits]
