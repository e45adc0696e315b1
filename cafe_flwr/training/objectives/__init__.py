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

_HOMES = {
    "ERDE": "erde",
    "OBJECTIVES": "registry",
    "CrossEntropy": "cross_entropy",
    "NeoKD": "neo_kd",
    "Objective": "base",
    "ObjectiveState": "base",
    "SafeKD": "safe_kd",
}

__all__ = ["ERDE", "OBJECTIVES", "CrossEntropy", "NeoKD", "Objective", "ObjectiveState", "SafeKD"]

__getattr__ = lazily(__name__, {name: f"{__name__}.{home}" for name, home in _HOMES.items()})
