"""FedAvg-EE (McMahan et al., arXiv 1602.05629): one network for all, averaged over clients.

server, round t                          client i, round t
  send θ                                   minimise Σ_k CE(z_k, y)/m from θ
  θ ← Σ_i n_i θ_i / Σ_i n_i                send θ_i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cafe_flwr.methods.base import Method
from cafe_flwr.networks.early_exit import EarlyExitNetwork


@dataclass(frozen=True, kw_only=True)
class FedAvg(Method):
    """The whole network is averaged, nothing is personal."""

    name: ClassVar[str] = "fedavg"

    def shared_names(self, network: EarlyExitNetwork) -> list[str]:
        """The whole network."""
        return network.whole_names()

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """Only running statistics of batch norms, if those are personal."""
        return network.statistics_names()
