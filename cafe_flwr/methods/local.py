"""Local-EE: training without communication, the baseline of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cafe_flwr.methods.base import Method
from cafe_flwr.networks.early_exit import EarlyExitNetwork


@dataclass(frozen=True, kw_only=True)
class Local(Method):
    """Every client trains a network of its own, Σ_k CE(z_k, y)/m."""

    name: ClassVar[str] = "local"

    def shared_names(self, network: EarlyExitNetwork) -> list[str]:
        """Nothing."""
        return []

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """The whole network."""
        return network.kept_names()
