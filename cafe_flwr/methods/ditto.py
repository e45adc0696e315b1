"""Ditto-EE (Li et al., arXiv 2012.04221): a global model by FedAvg, and a personal one that is kept near it.

client i, round t
  1. θ_i: minimise Σ_k CE(z_k, y)/m from θ^t, to be averaged
  2. v_i: minimise Σ_k CE(z_k, y)/m + λ/2 · ‖v_i − θ^t‖² from the last v_i, to be used
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from cafe_flwr.core.options import setting
from cafe_flwr.methods.base import phase
from cafe_flwr.methods.client import LocalResult, LocalTask, Tensors, without_prefix
from cafe_flwr.methods.fedavg import FedAvg
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.training.loop import pull, snapshot

_PERSONAL = "personal."


@dataclass(frozen=True, kw_only=True)
class Ditto(FedAvg):
    """FedAvg, and a full personal model with a proximal term."""

    name: ClassVar[str] = "ditto"
    phases: ClassVar[int] = 2

    pull: float = setting(0.1, "Weight λ of the pull towards the global model.", ge=0)

    def extra_tensors(self, network: EarlyExitNetwork) -> dict[str, Tensor]:
        """The personal model."""
        tensors = network.state_dict()
        return {_PERSONAL + name: tensors[name].clone() for name in network.kept_names()}

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """The personal model, all of it."""
        return [*super().personal_names(network), *(_PERSONAL + name for name in network.kept_names())]

    def train(self, task: LocalTask) -> LocalResult:
        """Train the global model, then the personal one."""
        network, loss = task.network, partial(self.loss, task)
        received = snapshot(network)
        task.run(loss, part=phase(self, 0))
        trained = snapshot(network)
        network.load_state_dict(without_prefix(task.state, _PERSONAL), strict=False)
        towards_global = pull(network, received, self.pull)
        result = LocalResult(task.run(loss, adjust=towards_global, part=phase(self, 1)))
        task.state |= self.extra_tensors(network)
        network.load_state_dict(trained)
        return result

    def deploy(self, tensors: Tensors) -> Tensors:
        """The personal model."""
        return without_prefix(tensors, _PERSONAL)
