"""Local training: the loop, its options and its losses."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

if TYPE_CHECKING:
    from cafe_flwr.training.loop import LoopOptions as LoopOptions
    from cafe_flwr.training.loop import Outcome as Outcome
    from cafe_flwr.training.loop import batches as batches
    from cafe_flwr.training.loop import frozen as frozen
    from cafe_flwr.training.loop import pull as pull
    from cafe_flwr.training.loop import snapshot as snapshot
    from cafe_flwr.training.loop import train as train
    from cafe_flwr.training.options import DEFAULT_BUDGET as DEFAULT_BUDGET
    from cafe_flwr.training.options import OPTIMIZERS as OPTIMIZERS
    from cafe_flwr.training.options import LocalBudget as LocalBudget
    from cafe_flwr.training.options import learning_rate_at as learning_rate_at

__getattr__ = lazily(
    __name__,
    {
        "cafe_flwr.training.loop": "LoopOptions Outcome batches frozen pull snapshot train",
        "cafe_flwr.training.options": "DEFAULT_BUDGET OPTIMIZERS LocalBudget learning_rate_at",
    },
)
