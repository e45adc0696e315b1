"""ScaleFL-EE (Ilhan et al., CVPR 2023): FedAvg with larger weights for deeper exits; the last one teaches the others.

    client i, round t: minimise Σ_k a_k [ CE(z_k, y) + 1{t > T/4} · γ τ² KL(softmax(z_m/τ) ‖ softmax(z_k/τ)) ]
    with a_k = 2k/(m(m+1)), τ = 3, γ = 0.05; the last exit has no teacher

As published, clients may hold only the first exits and channels (docs/unequal-clients.md); m and the teacher are then
those of the client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cafe_flwr.core.options import setting
from cafe_flwr.methods.client import LocalTask
from cafe_flwr.methods.fedavg import FedAvg
from cafe_flwr.training.losses import distillation


@dataclass(frozen=True, kw_only=True)
class ScaleFL(FedAvg):
    """FedAvg with exits weighted by depth and distillation from the last one."""

    name: ClassVar[str] = "scalefl"

    gamma: float = setting(0.05, "Weight γ of distillation.", ge=0)
    temperature: float = setting(3.0, "Temperature τ of distillation.", gt=0)
    warmup: float = setting(0.25, "Share of the rounds before distillation begins.", ge=0, le=1)

    def loss(self, task: LocalTask, x: Tensor, y: Tensor) -> Tensor:
        """Weighted cross-entropies; distillation after the warm-up."""
        logits = task.network(x)
        m = len(logits)
        weights = [2 * (k + 1) / (m * (m + 1)) for k in range(m)]
        total = self.exits_loss(task, x, y, logits, weights)
        if task.server_round > self.warmup * task.num_rounds:
            for a, z in zip(weights[:-1], logits[:-1], strict=True):
                total = total + a * self.gamma * distillation(z, logits[-1], self.temperature)
        return total
