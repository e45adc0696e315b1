"""Settings of local training: steps, batches, optimiser and learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cafe_flwr.core.options import check_settings, option, options_of, section

OPTIMIZERS = ("sgd", "adamw")


@section("train")
@dataclass(frozen=True)
class LocalBudget:
    """How a client trains in one round; docs/settings.md describes every field."""

    batch_size: int = option(16, "Examples per step; a client with fewer takes all it has.", ge=1, sized=True)
    steps: int = option(
        6,
        "Gradient steps of a client in a round; used where local-epochs is 0.",
        key="local-steps",
        ge=1,
        compare="budget",
    )
    epochs: int = option(
        0,
        "Passes over the client's training split in a round; 0: count local-steps instead.",
        key="local-epochs",
        ge=0,
        compare="budget",
    )
    learning_rate: float = option(
        0.3,
        "Learning rate in the first round. It and train.momentum were chosen for the default job on validation data "
        "(docs/evidence.md).",
        key="learning-rate",
        gt=0,
        of_runs=0.15,
    )
    momentum: float = option(0.0, "Momentum of SGD; AdamW has running means instead.", ge=0, lt=1, of_runs=0.9)
    weight_decay: float = option(0.0, "Weight decay of the optimiser.", ge=0)
    max_grad_norm: float = option(0.0, "Scale gradients down to this norm; 0: leave them.", ge=0)
    optimizer: str = option(
        "sgd",
        "Optimiser of local training; 'adamw' needs a far smaller learning-rate, such as 0.0003.",
        choices=OPTIMIZERS,
        sized=True,
    )
    keep_momentum: bool = option(
        False,
        "Keep the optimiser's state (SGD's momentum, AdamW's running means) on the client's disk between rounds; "
        "false: it starts anew in every round.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum is of sgd, {self.optimizer} has none: set it to 0, got {self.momentum}")
        if self.keep_momentum and self.optimizer == "sgd" and not self.momentum:
            raise ValueError(
                "keep_momentum has nothing to keep, as sgd with momentum 0 has none: raise train.momentum, or leave "
                "train.keep-momentum off"
            )

    def num_draws(self, num_examples: int) -> int:
        """Examples drawn in a round by a client with ``num_examples`` of them."""
        if self.epochs:
            return self.epochs * num_examples
        return self.steps * min(self.batch_size, num_examples)


@section("train")
@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes from round to round."""

    learning_rate_schedule: str = option(
        "cosine",
        "'cosine': the learning rate is constant until half of the rounds, then a cosine down to 0. 'exponential': it "
        "is multiplied by learning-rate-decay after every round.",
        choices=("cosine", "exponential"),
    )
    learning_rate_decay: float = option(
        1.0,
        "Factor of the exponential schedule: in round t = 0, 1, … the rate is learning-rate · factor^t; 1: constant.",
        gt=0,
        le=1,
    )

    def __post_init__(self) -> None:
        check_settings(self)


DEFAULT_BUDGET = LocalBudget(**{o.field: o.default for o in options_of(LocalBudget)})
"""How clients train with the default settings of a run."""


def learning_rate_at(
    base: float, server_round: int, num_rounds: int, schedule: str = "cosine", decay: float = 1.0
) -> float:
    """The learning rate of a round t = 1, …, T.

    ``"cosine"``: constant until round T/2, while exits still join, then a cosine down to (almost) 0 in round T.
    ``"exponential"``: base · decay^(t−1), starting at the base.

    Examples
    --------
    >>> [round(learning_rate_at(1.0, t, 8), 2) for t in range(1, 9)]
    [1.0, 1.0, 1.0, 1.0, 0.9, 0.65, 0.35, 0.1]
    >>> [round(learning_rate_at(1.0, t, 8, "exponential", 0.9), 2) for t in range(1, 9)]
    [1.0, 0.9, 0.81, 0.73, 0.66, 0.59, 0.53, 0.48]
    """
    if schedule == "exponential":
        return base * decay ** (server_round - 1)
    half = num_rounds / 2
    progress = max(0.0, (server_round - half) / (num_rounds - half + 1))
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))


def check_training(budget: LocalBudget, schedule: Schedule, num_rounds: int) -> None:
    """Raise ValueError, in the keys of a run's settings, if the learning rate and its schedule do not go together."""
    decay, name = schedule.learning_rate_decay, schedule.learning_rate_schedule
    said = f"train.learning-rate-decay = {decay}"
    if decay != 1 and name != "exponential":
        raise ValueError(
            f"{said} is of train.learning-rate-schedule = 'exponential', got {name!r}: set "
            "train.learning-rate-schedule to 'exponential', or train.learning-rate-decay to 1.0"
        )
    if not learning_rate_at(budget.learning_rate, num_rounds, num_rounds, name, decay):
        raise ValueError(
            f"{said} shrinks the learning rate to 0 within {num_rounds} rounds: choose one nearer to 1, such as 0.99"
        )
