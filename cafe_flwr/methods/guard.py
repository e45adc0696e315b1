"""The plan of a round in which some clients teach others next to nothing (:mod:`cafe_flwr.robustness`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cafe_flwr.methods.base import RoundPlan


@dataclass(frozen=True)
class GuardedPlan(RoundPlan):
    """A plan, and the clients whose weight as teachers was bounded, with the reason.

    Attributes
    ----------
    suspicious
        Reason by client; empty if nothing was bounded.
    """

    suspicious: Mapping[int, str] = field(default_factory=dict)
