"""FedRoD-EE (Chen & Chao, arXiv 2107.00778): generic classifiers with balanced softmax, and personal ones on top.

    client i, round t: minimise Σ_k [ CE(z_k + log π_i, y) + CE(sg(z_k) + P_i^k sg(φ_k), y) ] / m
    averaged: backbone and generic classifiers z_k;  personal: classifiers P_i^k;  used: z_k + P_i^k φ_k

π_i are the client's class shares, smoothed so that absent classes do not give −∞.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.methods.client import LocalResult, LocalTask, Tensors, without_prefix
from cafe_flwr.methods.fedavg import FedAvg
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.placement import device_of
from cafe_flwr.networks.weights import tied_names
from cafe_flwr.training.class_prior import class_counts, log_prior
from cafe_flwr.training.losses import cross_entropies
from cafe_flwr.training.objectives.base import exits_at

_PERSONAL = "personal."


@dataclass(frozen=True, kw_only=True)
class FedRoD(FedAvg):
    """FedAvg with generic classifiers, and personal classifiers on top."""

    name: ClassVar[str] = "fedrod"
    refuses: ClassVar[Mapping[str, str]] = {"prior": "its balanced softmax holds the client's log-prior already"}

    def extra_tensors(self, network: EarlyExitNetwork) -> dict[str, Tensor]:
        """A personal classifier for every exit; they begin at 0."""
        tensors = network.state_dict()
        return {_PERSONAL + name: torch.zeros_like(tensors[name]) for name in network.classifier_names()}

    def check(self, network: EarlyExitNetwork) -> None:
        """Nothing can be added to a classifier that is also a tensor of the backbone."""
        if tied := network.tied_classifiers():
            raise ValueError(
                f"{self.name} adds to every classifier, and {tied[0]} is also a tensor of the backbone: choose another "
                "method, or untie them"
            )

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """The personal classifiers."""
        return [*super().personal_names(network), *(_PERSONAL + name for name in network.classifier_names())]

    def train(self, task: LocalTask) -> LocalResult:
        """Train backbone, generic classifiers and personal classifiers."""
        network = task.network
        balance = log_prior(class_counts(task.data.y, network.num_classes)).to(device_of(network))
        own = {name: t.clone().requires_grad_() for name, t in task.state.items()}
        tied = tied_names(network)
        by_tensor = {tied.get(name, name): t for name, t in without_prefix(own, _PERSONAL).items()}

        def loss(x: Tensor, y: Tensor) -> Tensor:
            both = []
            features, logits = exits_at(network, x, range(network.num_exits))
            for k, (f, z) in enumerate(zip(features, logits, strict=True)):
                weight, bias = (by_tensor[tied.get(name, name)] for name in network.head_names(k))
                both.append(z.detach() + F.linear(f.detach(), weight, bias))
            generic = [z + balance for z in logits]
            return self.exits_loss(task, x, y, generic, shift=balance) + cross_entropies(both, y).mean()

        result = LocalResult(task.run(loss, also=list(own.values())))
        task.state |= {name: t.detach() for name, t in own.items()}
        return result

    def deploy(self, tensors: Tensors) -> Tensors:
        """The sum of both classifiers."""
        own = without_prefix(tensors, _PERSONAL)
        return {n: t + own[n] if n in own else t for n, t in tensors.items() if not n.startswith(_PERSONAL)}
