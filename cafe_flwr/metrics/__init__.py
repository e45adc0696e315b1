"""What is measured of a network's exits."""

from cafe_flwr.metrics.clients import worst_share
from cafe_flwr.metrics.early_exit import THRESHOLDS, DynamicCounts, dynamic_counts
from cafe_flwr.metrics.exits import (
    ECE_BINS,
    ExitMetrics,
    ensemble_accuracy,
    evaluate,
    exit_features,
    exit_logits,
    exit_metrics,
)
from cafe_flwr.metrics.temperature import fit_temperatures

__all__ = [
    "ECE_BINS",
    "THRESHOLDS",
    "DynamicCounts",
    "ExitMetrics",
    "dynamic_counts",
    "ensemble_accuracy",
    "evaluate",
    "exit_features",
    "exit_logits",
    "exit_metrics",
    "fit_temperatures",
    "worst_share",
]
