"""Methods of federated learning, one file each, both halves."""

from cafe_flwr.methods.base import ClientRecord, LocalResult, LocalTask, Method, RoundPlan, settings_of
from cafe_flwr.methods.cafedistill import CafeDistillMethod

METHODS: dict[str, type[Method]] = {CafeDistillMethod.name: CafeDistillMethod}
"""Mapping from method name to method."""

__all__ = [
    "METHODS",
    "CafeDistillMethod",
    "ClientRecord",
    "LocalResult",
    "LocalTask",
    "Method",
    "RoundPlan",
    "settings_of",
]
