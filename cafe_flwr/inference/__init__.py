"""Early-exit inference, and the export of networks as graphs for other runtimes."""

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

__getattr__ = lazily(
    __name__,
    {
        "cafe_flwr.inference.policies": "Entropy Margin MaxProb Patience PerExit Policy",
        "cafe_flwr.inference.runner": "EarlyExitRunner Prediction",
        "cafe_flwr.risk.thresholds": "ExitThresholds",
    },
)
