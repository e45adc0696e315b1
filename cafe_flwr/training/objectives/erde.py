"""ERDE (arXiv 2510.04856): learn from a teacher where it is right, stay undecided where it is wrong.

CE(z_k, y) + a·1{T right}·τ²·KL(z_k^T ‖ z_k) − b·1{T wrong}·H(z_k)/ln C,   T: the network averaged over its steps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cafe_flwr.core.options import setting
from cafe_flwr.training.losses import cross_entropies, erde
from cafe_flwr.training.objectives.base import ObjectiveState, TaughtObjective, taught_logits


@dataclass(frozen=True, kw_only=True)
class ERDE(TaughtObjective):
    """The teacher's exit k teaches exit k."""

    name: ClassVar[str] = "erde"

    right: float = setting(1.0, "a of erde: weight of distillation where the teacher is right.", ge=0)
    wrong: float = setting(0.1, "b of erde: weight of the exits' entropy where the teacher is wrong.", ge=0)

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
        """CE, distillation and entropy."""
        x, y = batch
        exits = exits or range(len(logits))
        taught = [teacher] * len(logits) if teacher is not None else taught_logits(state, x, exits, shift)
        weights = {"temperature": self.temperature, "right": self.right, "wrong": self.wrong}
        learn = [erde(z, t, y, **weights) for z, t in zip(logits, taught, strict=True)]
        return cross_entropies(logits, y) + torch.stack(learn)
