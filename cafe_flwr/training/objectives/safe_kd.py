"""SAFE-KD (arXiv 2602.03043): a teacher teaches by decoupled distillation, and the last exit teaches the others.

CE(z_k, y) + α·DKD(z_k, z_m^T, y) + β·1{k<m}·τ²·KL(sg z_m ‖ z_k),   T: the network averaged over its steps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cafe_flwr.core.options import setting
from cafe_flwr.training.losses import consistency, cross_entropies, decoupled_distillation
from cafe_flwr.training.objectives.base import ObjectiveState, TaughtObjective, taught_logits


@dataclass(frozen=True, kw_only=True)
class SafeKD(TaughtObjective):
    """Decoupled distillation from the teacher's last exit.

    Examples
    --------
    >>> import numpy as np
    >>> from cafe_flwr.networks import ConvNet
    >>> network, x, y = ConvNet((1, 16, 16), num_classes=10), torch.zeros(2, 1, 16, 16), torch.tensor([3, 7])
    >>> objective = SafeKD(alpha=0.5)
    >>> state = objective.init(network, np.random.default_rng(0))
    >>> objective.losses(state, (x, y), network(x)).shape  # one for each exit
    torch.Size([3])
    >>> state.update()  # the teacher follows the network
    """

    name: ClassVar[str] = "safe-kd"

    alpha: float = setting(1.0, "α of safe-kd: weight of decoupled distillation from the teacher.", ge=0)
    beta: float = setting(1.0, "β of safe-kd: weight of the last exit teaching the others.", ge=0)

    def exit_weights(self, num_exits: int) -> list[float]:
        """The last exit's weight is 4/3 of the others', which for m = 3 is the published (.3, .3, .4).

        Examples
        --------
        >>> [round(w, 2) for w in SafeKD().exit_weights(3)]
        [0.3, 0.3, 0.4]
        """
        parts = [3.0] * (num_exits - 1) + [4.0]
        return [part / sum(parts) for part in parts]

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
        """CE, and distillation from the last exits of the teacher and of the network itself."""
        x, y = batch
        terms = cross_entropies(logits, y)
        if self.alpha:
            last = state.network.num_exits - 1
            (taught,) = [teacher] if teacher is not None else taught_logits(state, x, [last], shift)
            learn = [decoupled_distillation(z, taught, y, temperature=self.temperature) for z in logits]
            terms = terms + self.alpha * torch.stack(learn)
        if self.beta:
            terms = terms + self.beta * consistency(logits, temperature=self.temperature)
        return terms
