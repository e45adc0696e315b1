"""What methods have in common that send whole models and receive mixtures of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.methods.base import LocalTask, Method, ServerRound, Tensors
from cafe_flwr.networks import EarlyExitNetwork

_UPDATE = "update."


def all_active(task: ServerRound) -> NDArray[np.bool_]:
    """Every student exit of every participant trains."""
    return np.ones((len(task.participants), task.num_exits - 1), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class WholeModel(Method):
    """Nothing is averaged over all: every client sends its whole model and may receive a mixture of models.

    What travels is the update since the initial model, which all clients share: weights that sum to 1 mix models and
    updates alike, and similarities of updates need no further message.
    """

    def extra_tensors(self, network: EarlyExitNetwork) -> dict[str, Tensor]:
        """The update of every tensor of the network."""
        return {_UPDATE + name: torch.zeros_like(t) for name, t in network.state_dict().items()}

    def shared_names(self, network: EarlyExitNetwork) -> list[str]:
        """Nothing."""
        return []

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """The whole network."""
        return list(network.state_dict())

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """The client's update since the initial model."""
        return [_UPDATE + name for name in network.state_dict()]

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """The mixture of updates made for the client."""
        return self.upload_names(network)

    def mixture(self, task: LocalTask) -> dict[str, Tensor]:
        """The mixture of models that the client received."""
        return add_updates(task.initial, task.download)

    def report(self, task: LocalTask) -> None:
        """Leave the client's update to be sent."""
        for name, tensor in task.network.state_dict().items():
            task.state[_UPDATE + name] = tensor - task.initial[name]


def add_updates(initial: Tensors, updates: Tensors) -> dict[str, Tensor]:
    """Initial model + updates, under the names of the network."""
    return {name: tensor + updates[_UPDATE + name] for name, tensor in initial.items()}
