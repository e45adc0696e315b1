"""Settings that are declared once, as fields of a dataclass: default, meaning and bounds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Sequence[str] = (),
    wire: str = "",
) -> Any:
    """A setting of a method or an objective, declared once: default, meaning and bounds.

    It checks its values by it, and :class:`cafe_flwr.settings.Settings` offers it as a run's setting. ``wire`` is the
    name of an objective's setting in messages and among all settings, where it is not the objective's and its own.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Near:
    ...     pull: float = setting(0.1, "Weight of the pull.", ge=0)
    >>> check_settings(Near(pull=-1.0))
    Traceback (most recent call last):
        ...
    ValueError: pull must be at least 0, got -1.0
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "choices": tuple(choices)}
    return field(default=default, metadata={"doc": doc, "wire": wire, **bounds})


def check_settings(declared: Any) -> None:
    """Raise ValueError, naming the setting, if a value of this dataclass is none of its choices or out of bounds."""
    for f in fields(declared):
        _check(f.name, getattr(declared, f.name), f.metadata)


_BOUNDS: Sequence[tuple[str, str, Callable[[Any, Any], bool]]] = (
    ("ge", "at least", operator.ge),
    ("gt", "greater than", operator.gt),
    ("le", "at most", operator.le),
)


def _check(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if bounds.get("choices") and value not in bounds["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(bounds['choices'])}; got {value!r}")
    for key, word, holds in _BOUNDS:
        if bounds.get(key) is not None and not holds(value, bounds[key]):
            raise ValueError(f"{name} must be {word} {bounds[key]}, got {value!r}")
