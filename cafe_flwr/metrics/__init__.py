"""Metrics of a network's exits: accuracy, calibration and cost."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

if TYPE_CHECKING:
    from cafe_flwr.metrics.clients import worst_share as worst_share
    from cafe_flwr.metrics.early_exit import THRESHOLDS as THRESHOLDS
    from cafe_flwr.metrics.early_exit import DynamicCounts as DynamicCounts
    from cafe_flwr.metrics.early_exit import dynamic_counts as dynamic_counts
    from cafe_flwr.metrics.exits import ECE_BINS as ECE_BINS
    from cafe_flwr.metrics.exits import ExitMetrics as ExitMetrics
    from cafe_flwr.metrics.exits import ensemble_accuracy as ensemble_accuracy
    from cafe_flwr.metrics.exits import evaluate as evaluate
    from cafe_flwr.metrics.exits import exit_features as exit_features
    from cafe_flwr.metrics.exits import exit_logits as exit_logits
    from cafe_flwr.metrics.exits import exit_metrics as exit_metrics
    from cafe_flwr.metrics.temperature import fit_temperatures as fit_temperatures

__getattr__ = lazily(
    __name__,
    {
        "cafe_flwr.metrics.clients": "worst_share",
        "cafe_flwr.metrics.early_exit": "THRESHOLDS DynamicCounts dynamic_counts",
        "cafe_flwr.metrics.exits": "ECE_BINS ExitMetrics ensemble_accuracy evaluate "
        "exit_features exit_logits exit_metrics",
        "cafe_flwr.metrics.temperature": "fit_temperatures",
    },
)
