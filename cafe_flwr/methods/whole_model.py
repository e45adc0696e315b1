"""What methods have in common that send whole models and receive mixtures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cafe_flwr.methods.base import Method
from cafe_flwr.methods.client import LocalTask, Tensors, without_prefix
from cafe_flwr.networks.early_exit import EarlyExitNetwork

UPDATE = "update."  # before the names of tensors that are sent as what has changed since the initial model


@dataclass(frozen=True, kw_only=True)
class WholeModel(Method):
    """Nothing is averaged over all: every client sends its whole model and may receive a mixture of models.

    What travels is the update since the initial model, which all clients share: weights that sum to 1 mix models and
    updates alike, and similarities of updates need no further message.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classifier_start == "own":
            raise ValueError(
                f"classifier_start = 'own' is not for {self.name}, which mixes updates since a start that all share. "
                "Set it to zero, common or built"
            )

    def extra_tensors(self, network: EarlyExitNetwork) -> dict[str, Tensor]:
        """The update of every tensor that travels."""
        tensors = network.state_dict()
        return {UPDATE + name: torch.zeros_like(tensors[name]) for name in network.whole_names()}

    def shared_names(self, network: EarlyExitNetwork) -> list[str]:
        """Nothing."""
        return []

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """The whole network."""
        return list(network.state_dict())

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """The client's update since the initial model."""
        return [UPDATE + name for name in network.whole_names()]

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """The mixture of updates made for the client."""
        return self.upload_names(network)

    def mixture(self, task: LocalTask) -> dict[str, Tensor]:
        """The mixture of models that the client received."""
        return add_updates(task.initial, task.download)

    def report(self, task: LocalTask) -> None:
        """Leave the client's update to be sent."""
        task.state |= updates(task, task.network.whole_names())


def updates(task: LocalTask, names: Sequence[str]) -> dict[str, Tensor]:
    """What the client has made of these tensors of its network since the initial model, as they are sent."""
    tensors = task.network.state_dict()
    return {UPDATE + name: tensors[name] - task.initial[name] for name in names}


def add_updates(initial: Tensors, received: Tensors) -> dict[str, Tensor]:
    """Initial model + updates of the tensors received, under the names of the network."""
    return {name: initial[name] + update for name, update in without_prefix(received, UPDATE).items()}
