"""Local training and its losses."""

from cafe_flwr.training.loop import (
    DEFAULT_BUDGET,
    OPTIMIZERS,
    LocalBudget,
    Outcome,
    batches,
    frozen,
    learning_rate_at,
    pull,
    snapshot,
    train,
)

__all__ = [
    "DEFAULT_BUDGET",
    "OPTIMIZERS",
    "LocalBudget",
    "Outcome",
    "batches",
    "frozen",
    "learning_rate_at",
    "pull",
    "snapshot",
    "train",
]
