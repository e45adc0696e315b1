"""Local training and its losses."""

from cafe_flwr.training.loop import Outcome, batches, frozen, pull, snapshot, train
from cafe_flwr.training.options import DEFAULT_BUDGET, OPTIMIZERS, LocalBudget, learning_rate_at

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
