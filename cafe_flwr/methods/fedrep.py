"""FedRep-EE (Collins et al., arXiv 2102.07078): classifiers train first, then the backbone.

client i, round t
  1. minimise Σ_k CE(z_k, y)/m over own classifiers, the backbone frozen
  2. minimise the same over the backbone, the classifiers frozen
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cafe_flwr.methods.base import Method, phase
from cafe_flwr.methods.client import LocalResult, LocalTask


@dataclass(frozen=True, kw_only=True)
class FedRep(Method):
    """A shared backbone and personal classifiers, trained in turn."""

    name: ClassVar[str] = "fedrep"
    phases: ClassVar[int] = 2

    def train(self, task: LocalTask) -> LocalResult:
        """Train the classifiers, then the backbone."""

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return self.loss(task, x, y)

        network = task.network
        task.run(loss, only=network.classifier_names(), part=phase(self, 0))
        return LocalResult(task.run(loss, only=network.shared_names(), part=phase(self, 1)))
