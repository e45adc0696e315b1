"""NEO-KD (NeurIPS 2023): what is learned on an input should hold on adversarial inputs near it, too.

½[CE(z_k, y) + CE(z̃_k, y)] + α·NKD_k + β·EOKD_k,   z̃: logits on the adversarial input
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cafe_flwr.core.options import setting
from cafe_flwr.networks.statistics import evaluating
from cafe_flwr.training.losses import cross_entropies, neighbour_distillation, orthogonal_distillation
from cafe_flwr.training.objectives.adversarial import adversarial_examples, deal_classes
from cafe_flwr.training.objectives.base import Objective, ObjectiveState, logits_at


@dataclass(frozen=True, kw_only=True)
class NeoKD(Objective):
    """Clean outputs of neighbouring exits teach every exit on an adversarial input."""

    name: ClassVar[str] = "neo-kd"

    alpha: float = setting(3.0, "α of neo-kd: weight of neighbour distillation.", ge=0)
    beta: float = setting(1.0, "β of neo-kd: weight of exit-wise orthogonal distillation.", ge=0)
    epsilon: float = setting(
        0.03,
        "ε of neo-kd's attack: largest change of an input value, as a share of the inputs' range.",
        ge=0,
        wire="adversarial_epsilon",
    )
    steps: int = setting(
        3, "Gradient steps of neo-kd's attack; each costs a pass through the network.", ge=1, wire="adversarial_steps"
    )

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
        """Attack the network as it is now, and distil from the clean logits."""
        exits, network, y = exits or range(len(logits)), state.network, batch[1]
        x = network.inputs(batch[0])  # an attack changes numbers, not pixels

        def attacked(x: Tensor) -> list[Tensor]:
            return logits_at(network, x, exits, shift)

        with evaluating(network):
            found = adversarial_examples(attacked, x, y, epsilon=self.epsilon, steps=self.steps, rng=state.rng)
        adversarial = attacked(found)
        owner = deal_classes(len(y), logits[0].shape[1], len(logits), state.rng).to(y.device)
        return (
            (cross_entropies(logits, y) + cross_entropies(adversarial, y)) / 2
            + self.alpha * neighbour_distillation(adversarial, logits)
            + self.beta * orthogonal_distillation(adversarial, logits, y, owner)
        )
