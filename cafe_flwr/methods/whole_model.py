"""Base class of methods whose clients send whole models and receive mixtures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cafe_flwr.methods.base import Method
from cafe_flwr.methods.client import LocalTask, Tensors, without_prefix
from cafe_flwr.networks.early_exit import EarlyExitNetwork

UPDATE = "update."  # prefix of tensors that are sent as updates since the initial model


@dataclass(frozen=True, kw_only=True)
class WholeModel(Method):
    """Nothing is averaged over all clients: each sends its whole model and may receive a mixture of models.

    Models travel as updates since the initial model, which all clients share: weights that sum to 1 mix models and
    updates alike, and the server can compare updates.
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
        return network.kept_names()

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
        """Store the client's update for the upload."""
        task.state |= updates(task, task.network.whole_names())


def updates(task: LocalTask, names: Sequence[str]) -> dict[str, Tensor]:
    """Updates of these tensors of the client's network since the initial model, under their names in messages."""
    tensors = task.network.state_dict()
    return {UPDATE + name: tensors[name] - task.initial[name] for name in names}


def add_updates(initial: Tensors, received: Tensors) -> dict[str, Tensor]:
    """Initial model plus the updates received, under the names of the network."""
    return {name: initial[name] + update for name, update in without_prefix(received, UPDATE).items()}
