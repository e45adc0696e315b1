"""Inference that stops at an exit, and the graphs that take it elsewhere."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

if TYPE_CHECKING:
    from cafe_flwr.inference.policies import Entropy as Entropy
    from cafe_flwr.inference.policies import Margin as Margin
    from cafe_flwr.inference.policies import MaxProb as MaxProb
    from cafe_flwr.inference.policies import Patience as Patience
    from cafe_flwr.inference.policies import PerExit as PerExit
    from cafe_flwr.inference.policies import Policy as Policy
    from cafe_flwr.inference.runner import EarlyExitRunner as EarlyExitRunner
    from cafe_flwr.inference.runner import Prediction as Prediction
    from cafe_flwr.risk.thresholds import ExitThresholds as ExitThresholds

__all__ = [
    "EarlyExitRunner",
    "Entropy",
    "ExitThresholds",
    "Margin",
    "MaxProb",
    "Patience",
    "PerExit",
    "Policy",
    "Prediction",
]

__getattr__ = lazily(
    __name__,
    {
        "EarlyExitRunner": "cafe_flwr.inference.runner",
        "Entropy": "cafe_flwr.inference.policies",
        "ExitThresholds": "cafe_flwr.risk.thresholds",
        "Margin": "cafe_flwr.inference.policies",
        "MaxProb": "cafe_flwr.inference.policies",
        "Patience": "cafe_flwr.inference.policies",
        "PerExit": "cafe_flwr.inference.policies",
        "Policy": "cafe_flwr.inference.policies",
        "Prediction": "cafe_flwr.inference.runner",
    },
)
