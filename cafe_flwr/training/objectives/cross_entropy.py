"""The plain objective: CE(z_k, y) at every exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cafe_flwr.training.losses import cross_entropies
from cafe_flwr.training.objectives.base import Objective, ObjectiveState


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """Every exit learns the labels."""

    name: ClassVar[str] = "cross-entropy"

    def losses(
        self,
        state: ObjectiveState,
        batch: tuple[Tensor, Tensor],
        logits: Sequence[Tensor],
        *,
        exits: Sequence[int] = (),
        shift: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """CE(z_k, y)."""
        return cross_entropies(logits, batch[1])
