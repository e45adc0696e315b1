"""FedBABU-EE (Oh et al., arXiv 2106.06042): only the backbone trains in the rounds, under fixed classifiers.

rounds: minimise Σ_k CE(z_k, y)/m over the backbone; classifiers stay at one common initialisation
at the end: every client fine-tunes the whole network on its own data
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cafe_flwr.core.options import setting
from cafe_flwr.methods.base import Method
from cafe_flwr.methods.client import LocalResult, LocalTask
from cafe_flwr.methods.starts import STARTS


@dataclass(frozen=True, kw_only=True)
class FedBABU(Method):
    """Classifiers frozen during rounds, fine-tuning after them."""

    name: ClassVar[str] = "fedbabu"

    classifier_start: str = setting(
        "built", "As for all methods; zeros, which nobody trains, would teach the backbone nothing.", choices=STARTS[1:]
    )
    finetune_rounds: int = setting(
        5, "Fine-tuning at the end, in rounds' worth of local steps (published: 5 epochs).", ge=0
    )

    def train(self, task: LocalTask) -> LocalResult:
        """Train the backbone alone."""
        return LocalResult(task.run(lambda x, y: self.loss(task, x, y), only=task.network.shared_names()))

    def finish(self, task: LocalTask) -> None:
        """Fine-tune the whole network."""
        task.run(lambda x, y: self.loss(task, x, y), purpose="fine-tuning", times=self.finetune_rounds)

    def extra_rounds(self) -> int:
        """Those of fine-tuning."""
        return self.finetune_rounds
