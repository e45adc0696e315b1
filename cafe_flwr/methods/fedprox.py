"""FedProx-EE (Li et al., arXiv 1812.06127): FedAvg whose clients stay near the network they received.

client i, round t: minimise Σ_k CE(z_k, y)/m + μ/2 · ‖θ − θ^t‖²
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cafe_flwr.core.options import setting
from cafe_flwr.methods.client import LocalResult, LocalTask
from cafe_flwr.methods.fedavg import FedAvg
from cafe_flwr.training.loop import pull, snapshot


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term."""

    name: ClassVar[str] = "fedprox"

    mu: float = setting(0.01, "Weight μ of the proximal term.", ge=0)

    def train(self, task: LocalTask) -> LocalResult:
        """Train with a pull towards the network received."""
        towards_received = pull(task.network, snapshot(task.network), self.mu)
        return LocalResult(task.run(lambda x, y: self.loss(task, x, y), adjust=towards_received))
