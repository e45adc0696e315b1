"""The methods by name, found in the modules of this package: to add one, add its file (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from cafe_flwr import methods
from cafe_flwr.methods.base import Method
from cafe_flwr.methods.cafedistill import CafeDistillMethod
from cafe_flwr.training.objectives.registry import all_flat_fields, objective_from

METHODS: dict[str, type[Method]] = {CafeDistillMethod.name: CafeDistillMethod}
"""Classes of methods by name."""


def method_from(name: str, settings: Mapping[str, Any]) -> Method:
    """The method with these settings, as :func:`cafe_flwr.methods.base.settings_of` gives them.

    Examples
    --------
    >>> method_from("ditto", {"objective": "safe-kd", "safe_kd_alpha": 0.5, "erde_right": 2.0, "pull": 0.3}).objective
    SafeKD(ema_decay=0.999, temperature=4.0, alpha=0.5, beta=1.0)
    """
    flat = {"objective", *all_flat_fields()}
    own = {key: value for key, value in settings.items() if key not in flat}
    return METHODS[name](objective=objective_from(settings), **own)


def _find() -> None:
    for module in iter_modules(methods.__path__, f"{methods.__name__}."):
        if module.name != __name__:
            for value in vars(import_module(module.name)).values():
                if isinstance(value, type) and issubclass(value, Method) and "name" in vars(value):
                    METHODS[value.name] = value


_find()
