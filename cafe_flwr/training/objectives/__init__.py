"""What every exit minimises: cross-entropy, or a training recipe with a teacher or an adversary."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

if TYPE_CHECKING:
    from cafe_flwr.training.objectives.base import Objective as Objective
    from cafe_flwr.training.objectives.base import ObjectiveState as ObjectiveState
    from cafe_flwr.training.objectives.cross_entropy import CrossEntropy as CrossEntropy
    from cafe_flwr.training.objectives.erde import ERDE as ERDE
    from cafe_flwr.training.objectives.neo_kd import NeoKD as NeoKD
    from cafe_flwr.training.objectives.registry import OBJECTIVES as OBJECTIVES
    from cafe_flwr.training.objectives.safe_kd import SafeKD as SafeKD

__getattr__ = lazily(
    __name__,
    {
        "cafe_flwr.training.objectives.base": "Objective ObjectiveState",
        "cafe_flwr.training.objectives.cross_entropy": "CrossEntropy",
        "cafe_flwr.training.objectives.erde": "ERDE",
        "cafe_flwr.training.objectives.neo_kd": "NeoKD",
        "cafe_flwr.training.objectives.registry": "OBJECTIVES",
        "cafe_flwr.training.objectives.safe_kd": "SafeKD",
    },
)
