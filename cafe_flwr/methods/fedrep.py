"""FedRep-EE (Collins et al., arXiv 2102.07078): classifiers train first, then the backbone.

client i, round t
  1. minimise Σ_k CE(z_k, y)/m over own classifiers, the backbone frozen
  2. minimise the same over the backbone, the classifiers frozen
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from cafe_flwr.methods.base import Method, phase
from cafe_flwr.methods.client import LocalResult, LocalTask


@dataclass(frozen=True, kw_only=True)
class FedRep(Method):
    """A shared backbone and personal classifiers, trained in turn."""

    name: ClassVar[str] = "fedrep"
    phases: ClassVar[int] = 2

    def train(self, task: LocalTask) -> LocalResult:
        """Train the classifiers, then the backbone."""

        network, loss = task.network, partial(self.loss, task)
        task.run(loss, only=network.classifier_names(), part=phase(self, 0))
        return LocalResult(task.run(loss, only=network.shared_names(), part=phase(self, 1)))
