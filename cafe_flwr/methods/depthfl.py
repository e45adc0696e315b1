"""DepthFL-EE (Kim et al., ICLR 2023): FedAvg whose exits all teach one another.

    client i, round t: minimise Σ_k CE(z_k, y)/m + r(t)/(m(m−1)) · Σ_k Σ_{l≠k} KL(softmax(z_l) ‖ softmax(z_k))
    with the ramp r(t) = exp(−5 (1 − min(t, R)/R)²), R = 0.3 T

Clients with only the first exits (docs/unequal-clients.md) have as many terms as exits; every layer is then the plain
mean over the clients that hold it, as published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.core.options import setting
from cafe_flwr.methods.client import LocalTask
from cafe_flwr.methods.fedavg import FedAvg
from cafe_flwr.networks.early_exit import EarlyExitNetwork


@dataclass(frozen=True, kw_only=True)
class DepthFL(FedAvg):
    """FedAvg with mutual distillation between all exits."""

    name: ClassVar[str] = "depthfl"

    ramp: float = setting(0.3, "Share of the rounds over which distillation ramps up.", gt=0, le=1)

    def uniform_weights(self, unequal: bool) -> bool:
        """If some clients hold only a part of the network."""
        return unequal

    def check(self, network: EarlyExitNetwork) -> None:
        """Mutual distillation needs at least two exits."""
        if network.num_exits < 2:
            raise ValueError("depthfl needs a network with at least 2 exits, this one has 1: choose fedavg")

    def loss(self, task: LocalTask, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropies and mutual distillation."""
        logits = task.network(x)
        return self.exits_loss(task, x, y, logits) + self.weight(task) * mutual_divergence(logits) / len(logits)

    def weight(self, task: LocalTask) -> float:
        """The ramp r(t) of this round."""
        end = self.ramp * task.num_rounds
        return math.exp(-5.0 * (1.0 - min(task.server_round, end) / end) ** 2)


def mutual_divergence(logits: list[Tensor]) -> Tensor:
    """Σ_k 1/(m−1) · Σ_{l≠k} KL(softmax(z_l) ‖ softmax(z_k)), teachers z_l not trained, mean over the batch."""
    log_p = F.log_softmax(torch.stack(logits), dim=2)
    teachers = log_p.detach()
    p = teachers.exp()
    # Σ_l KL(p_l ‖ p_k): its l = k term is 0 in value and, at that point, in gradient.
    entropy = (p * teachers).sum(dim=2).sum(dim=0)
    cross = (p.sum(dim=0) * log_p).sum(dim=2)
    return (entropy - cross).mean(dim=1).sum() / max(len(logits) - 1, 1)
