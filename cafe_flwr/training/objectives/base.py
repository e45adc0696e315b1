"""What a client minimises at every exit: cross-entropy, or a training recipe with a teacher or an adversary.

    cross-entropy   CE(z_k, y)
    safe-kd         CE(z_k, y) + α·DKD(z_k, z_m^T, y) + β·1{k<m}·τ²·KL(sg z_m ‖ z_k)
    erde            CE(z_k, y) + a·1{T right}·τ²·KL(z_k^T ‖ z_k) − b·1{T wrong}·H(z_k)/ln C
    neo-kd          ½[CE(z_k, y) + CE(z̃_k, y)] + α·NKD_k + β·EOKD_k

T is the exponential moving average of the network over its steps, z̃ are logits on an adversarial input.
Every method of federated learning takes any of them in the place of its cross-entropies (docs/objectives.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cafe_flwr.core.options import check_settings, setting
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.statistics import evaluating
from cafe_flwr.training.losses import (
    consistency,
    cross_entropies,
    decoupled_distillation,
    erde,
    neighbour_distillation,
    orthogonal_distillation,
)
from cafe_flwr.training.objectives.adversarial import adversarial_examples, deal_classes

READS: Mapping[str, tuple[str, ...]] = {
    "cross-entropy": (),
    "safe-kd": ("ema_decay", "objective_teacher", "objective_temperature", "safe_kd_alpha", "safe_kd_beta"),
    "erde": ("ema_decay", "objective_teacher", "objective_temperature", "erde_right", "erde_wrong"),
    "neo-kd": ("neo_kd_alpha", "neo_kd_beta", "adversarial_epsilon", "adversarial_steps"),
}
"""The objectives, and which settings each one reads: those below, and who teaches in cafedistill-text."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What every exit minimises, with its settings; every :class:`cafe_flwr.methods.Method` is one, too.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> network, x, y = ConvNet((1, 16, 16), num_classes=10), torch.zeros(2, 1, 16, 16), torch.tensor([3, 7])
    >>> lesson = Objective(objective="safe-kd").begin(network, np.random.default_rng(0))
    >>> lesson.terms(x, y, network(x)).shape  # one for each exit
    torch.Size([3])
    >>> lesson.after_step()  # the teacher follows the network
    """

    objective: str = setting(
        "cross-entropy", "What a client minimises at every exit, see docs/objectives.md.", choices=tuple(READS)
    )
    ema_decay: float = setting(
        0.999, "Of the EMA teacher of safe-kd and erde, a step; 1: it stays what the client received.", ge=0, le=1
    )
    objective_temperature: float = setting(4.0, "τ of the distillation in safe-kd and erde.", gt=0)
    safe_kd_alpha: float = setting(1.0, "α of safe-kd: weight of decoupled distillation from the teacher.", ge=0)
    safe_kd_beta: float = setting(1.0, "β of safe-kd: weight of the last exit teaching the others.", ge=0)
    erde_right: float = setting(1.0, "a of erde: weight of distillation where the teacher is right.", ge=0)
    erde_wrong: float = setting(0.1, "b of erde: weight of the exits' entropy where the teacher is wrong.", ge=0)
    neo_kd_alpha: float = setting(3.0, "α of neo-kd: weight of neighbour distillation.", ge=0)
    neo_kd_beta: float = setting(1.0, "β of neo-kd: weight of exit-wise orthogonal distillation.", ge=0)
    adversarial_epsilon: float = setting(
        0.03, "ε of neo-kd's attack: largest change of an input value, as a share of the inputs' range.", ge=0
    )
    adversarial_steps: int = setting(
        3, "Gradient steps of neo-kd's attack; each costs a pass through the network.", ge=1
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def is_taught(self) -> bool:
        """Whether a teacher takes part."""
        return "ema_decay" in READS[self.objective]

    def weights(self, num_exits: int) -> list[float]:
        """Weights of the exits' terms where the method has none of its own; they sum to 1.

        1/m; of safe-kd the last exit's is 4/3 of the others', which for m = 3 is the published (.3, .3, .4).

        Examples
        --------
        >>> [round(w, 2) for w in Objective(objective="safe-kd").weights(3)]
        [0.3, 0.3, 0.4]
        """
        if self.objective != "safe-kd":
            return [1.0 / num_exits] * num_exits
        parts = [3.0] * (num_exits - 1) + [4.0]
        return [part / sum(parts) for part in parts]

    def begin(self, network: EarlyExitNetwork, rng: np.random.Generator) -> Lesson:
        """The objective at work in one training, which starts from this network."""
        return Lesson(self, network, rng)


class Lesson:
    """An objective at work in one training: its teacher, and its random numbers.

    Parameters
    ----------
    objective
        Which.
    network
        The one in training. The EMA teacher begins as a copy of it.
    rng
        For adversarial inputs.
    """

    def __init__(self, objective: Objective, network: EarlyExitNetwork, rng: np.random.Generator) -> None:
        self.objective, self.network, self.rng = objective, network, rng
        self._average: AveragedModel | None = None
        if objective.is_taught:
            average = get_ema_multi_avg_fn(objective.ema_decay)
            self._average = AveragedModel(network, multi_avg_fn=average, use_buffers=True).eval()
            self._average.update_parameters(network)  # the first update only copies: from here on, averages
            self._average.requires_grad_(False)

    @property
    def teacher(self) -> EarlyExitNetwork | None:
        """The average of the network over the steps so far, parameters and buffers, in evaluation mode."""
        return None if self._average is None else cast(EarlyExitNetwork, self._average.module)

    def after_step(self) -> None:
        """Let the teacher follow: θ^T ← d·θ^T + (1−d)·θ."""
        if self._average is not None:
            self._average.update_parameters(self.network)

    def terms(
        self,
        x: Tensor,
        y: Tensor,
        logits: Sequence[Tensor],
        *,
        exits: Sequence[int] = (),
        shift: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """The objective of every exit, (m,), not weighted.

        Parameters
        ----------
        x, y
            A batch.
        logits
            Of the network in training, (B, C) for every exit that trains; the last one is the network's last exit.
        exits
            Which exits these are; all if empty.
        shift
            (C,), what the method has added to the logits; it is added to those of teacher and adversary, too.
        teacher
            (B, C): the teacher's logits, in the place of the EMA teacher's.
        """
        exits = exits or range(len(logits))
        match self.objective.objective:
            case "safe-kd":
                return self._safe_kd(x, y, logits, shift, teacher)
            case "erde":
                return self._erde(x, y, logits, exits, shift, teacher)
            case "neo-kd":
                return self._neo_kd(x, y, logits, exits, shift)
        return cross_entropies(logits, y)

    def _safe_kd(
        self, x: Tensor, y: Tensor, logits: Sequence[Tensor], shift: Tensor | None, teacher: Tensor | None
    ) -> Tensor:
        own, tau = self.objective, self.objective.objective_temperature
        terms = cross_entropies(logits, y)
        if own.safe_kd_alpha:
            (taught,) = [teacher] if teacher is not None else self._taught(x, [self.network.num_exits - 1], shift)
            learn = [decoupled_distillation(z, taught, y, temperature=tau) for z in logits]
            terms = terms + own.safe_kd_alpha * torch.stack(learn)
        if own.safe_kd_beta:
            terms = terms + own.safe_kd_beta * consistency(logits, temperature=tau)
        return terms

    def _erde(
        self,
        x: Tensor,
        y: Tensor,
        logits: Sequence[Tensor],
        exits: Sequence[int],
        shift: Tensor | None,
        teacher: Tensor | None,
    ) -> Tensor:
        own = self.objective
        taught = [teacher] * len(logits) if teacher is not None else self._taught(x, exits, shift)
        weights = {"temperature": own.objective_temperature, "right": own.erde_right, "wrong": own.erde_wrong}
        learn = [erde(z, t, y, **weights) for z, t in zip(logits, taught, strict=True)]
        return cross_entropies(logits, y) + torch.stack(learn)

    def _neo_kd(
        self, x: Tensor, y: Tensor, logits: Sequence[Tensor], exits: Sequence[int], shift: Tensor | None
    ) -> Tensor:
        own, network = self.objective, self.network
        x = network.inputs(x)  # an attack changes numbers, not pixels

        def attacked(x: Tensor) -> list[Tensor]:
            return logits_at(network, x, exits, shift)

        with evaluating(network):
            found = adversarial_examples(
                attacked, x, y, epsilon=own.adversarial_epsilon, steps=own.adversarial_steps, rng=self.rng
            )
        adversarial = attacked(found)
        owner = deal_classes(len(y), logits[0].shape[1], len(logits), self.rng).to(y.device)
        return (
            (cross_entropies(logits, y) + cross_entropies(adversarial, y)) / 2
            + own.neo_kd_alpha * neighbour_distillation(adversarial, logits)
            + own.neo_kd_beta * orthogonal_distillation(adversarial, logits, y, owner)
        )

    @torch.no_grad()
    def _taught(self, x: Tensor, exits: Sequence[int], shift: Tensor | None) -> list[Tensor]:
        assert self.teacher is not None
        return logits_at(self.teacher, x, exits, shift)


def exits_at(network: EarlyExitNetwork, x: Tensor, exits: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Features (B, width) and logits (B, C) of some exits, counted from 0; no stage runs that none of them needs."""
    features, logits = [], []
    for k in range(max(exits) + 1):
        x = network.stage(k, x)
        if k in exits:
            f, z = network.exit(k, x)
            features.append(f)
            logits.append(z)
    return features, logits


def logits_at(network: EarlyExitNetwork, x: Tensor, exits: Sequence[int], shift: Tensor | None = None) -> list[Tensor]:
    """Logits (B, C) of some exits, counted from 0, plus ``shift``; no stage runs that none of them needs.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> len(logits_at(ConvNet((1, 16, 16), num_classes=10), torch.zeros(2, 1, 16, 16), [0, 2]))
    2
    """
    logits = exits_at(network, x, exits)[1]
    return logits if shift is None else [z + shift for z in logits]
