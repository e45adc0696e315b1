"""The objectives by name, and the flat names of their settings in messages and settings files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from cafe_flwr.training.objectives.base import Objective
from cafe_flwr.training.objectives.cross_entropy import CrossEntropy
from cafe_flwr.training.objectives.erde import ERDE
from cafe_flwr.training.objectives.neo_kd import NeoKD
from cafe_flwr.training.objectives.safe_kd import SafeKD

OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in (CrossEntropy, SafeKD, ERDE, NeoKD)}
"""Mapping from name to objective."""


def objective_named(given: Objective | str) -> Objective:
    """The objective itself, or the one of this name with default settings.

    Examples
    --------
    >>> objective_named("neo-kd")
    NeoKD(alpha=3.0, beta=1.0, epsilon=0.03, steps=3)
    """
    if isinstance(given, Objective):
        return given
    if given not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {given!r}")
    return OBJECTIVES[given]()


def flat_fields(kind: type[Objective]) -> dict[str, Field[Any]]:
    """The settings of an objective by their flat names: ``safe_kd_alpha``, or what ``setting(wire=…)`` says.

    Examples
    --------
    >>> list(flat_fields(SafeKD))
    ['ema_decay', 'objective_temperature', 'safe_kd_alpha', 'safe_kd_beta']
    """
    prefix = kind.name.replace("-", "_")
    return {f.metadata["wire"] or f"{prefix}_{f.name}": f for f in fields(kind)}


def all_flat_fields() -> dict[str, Field[Any]]:
    """The settings of all objectives by their flat names; settings that two of them read appear once."""
    return {name: f for kind in OBJECTIVES.values() for name, f in flat_fields(kind).items()}


def flat_settings(objective: Objective) -> dict[str, Any]:
    """Name and settings of an objective under flat names, those of the other objectives at their defaults."""
    own = {name: getattr(objective, f.name) for name, f in flat_fields(type(objective)).items()}
    return {"objective": objective.name, **{name: f.default for name, f in all_flat_fields().items()}, **own}


def objective_from(settings: Mapping[str, Any]) -> Objective:
    """The objective that :func:`flat_settings` wrote; other objectives' keys are ignored."""
    objective = objective_named(settings["objective"])
    own = {f.name: settings[name] for name, f in flat_fields(type(objective)).items() if name in settings}
    return type(objective)(**own)
