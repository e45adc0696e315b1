"""What is measured of a network's exits."""

from cafe_flwr.metrics.exits import (
    ECE_BINS,
    THRESHOLDS,
    DynamicCounts,
    ExitMetrics,
    dynamic_counts,
    ensemble_accuracy,
    evaluate,
    exit_features,
    exit_logits,
    exit_metrics,
    fit_temperatures,
    worst_share,
)

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
