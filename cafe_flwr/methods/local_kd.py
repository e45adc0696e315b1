"""LocalKD-EE: FedPer-EE in which a client's own last exit teaches its other exits.

    client i, round t: minimise CE(z_m, y) + Σ_{k<m} [ CE(z_k, y) + λ τ² KL(softmax(z_m/τ) ‖ softmax(z_k/τ)) ]

It is cafedistill-text with every client as its own teacher and all exits active from round 1: the baseline for teachers
from other clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cafe_flwr.core.options import setting
from cafe_flwr.methods.base import Method
from cafe_flwr.methods.client import LocalTask
from cafe_flwr.training.losses import distillation


@dataclass(frozen=True, kw_only=True)
class LocalKD(Method):
    """FedPer with distillation from the client's own last exit."""

    name: ClassVar[str] = "local-kd"
    refuses: ClassVar[Mapping[str, str]] = {"distill": "it distils already"}

    distill_weight: float = setting(1.0, "Weight λ of distillation.", ge=0)
    temperature: float = setting(3.0, "Temperature τ of distillation.", gt=0)

    def loss(self, task: LocalTask, x: Tensor, y: Tensor) -> Tensor:
        """Sum over exits of cross-entropy and distillation."""
        logits = task.network(x)
        total = self.exits_loss(task, x, y, logits, [1.0] * len(logits))
        for student in logits[:-1]:
            total = total + self.distill_weight * distillation(student, logits[-1], self.temperature)
        return total
