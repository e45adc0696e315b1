"""Methods of federated learning, one file each, both halves.

Every module of this package is looked through for methods: to add one, add its file (docs/methods.md).
"""

from importlib import import_module
from pkgutil import iter_modules

from cafe_flwr.core.options import setting
from cafe_flwr.methods.base import Method, settings_of
from cafe_flwr.methods.cafedistill import CafeDistillMethod
from cafe_flwr.methods.client import LocalResult, LocalTask
from cafe_flwr.methods.server import ClientRecord, Conclusion, RoundPlan, ServerRound, joined_plans

METHODS: dict[str, type[Method]] = {CafeDistillMethod.name: CafeDistillMethod}
"""Mapping from method name to method."""

for _module in iter_modules(__path__):
    for _value in vars(import_module(f"{__name__}.{_module.name}")).values():
        if isinstance(_value, type) and issubclass(_value, Method) and "name" in vars(_value):
            METHODS[_value.name] = _value

__all__ = [
    "METHODS",
    "CafeDistillMethod",
    "ClientRecord",
    "Conclusion",
    "LocalResult",
    "LocalTask",
    "Method",
    "RoundPlan",
    "ServerRound",
    "joined_plans",
    "setting",
    "settings_of",
]
