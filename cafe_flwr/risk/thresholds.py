"""Confidence thresholds at which examples leave a network early, with the claim that holds for them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cafe_flwr.metrics.early_exit import first_exit

GUARANTEES = ("selective", "joint", "gap")  # of one learner
FEDERATED = ("mixture", "every-mixture")  # of clients calibrated together (pooled.py)
BASELINES = ("quantile",)  # thresholds without any claim


@dataclass(frozen=True)
class ExitThresholds:
    """Leave at the first exit whose confidence reaches its threshold; the last exit keeps whoever is left.

    Attributes
    ----------
    thresholds
        Of the first m − 1 exits; infinite = never leave there.
    certified
        Whether the claim of ``guarantee`` holds. Without it all thresholds are infinite, except those of a baseline.
    coverage
        Share of the certification examples that left early.
    guarantee
        One of ``GUARANTEES`` or ``FEDERATED``, or of ``BASELINES``, which claim nothing.
    risk
        α, the share of errors asked for.
    confidence_level
        1 − δ, how surely; ``joint`` and ``mixture`` speak of a mean and have no use for it.
    realised_risk
        The guarantee's own risk, counted on the certification examples; 0 where nobody left.
    num_examples
        Examples given, of which the certification examples are a part.
    temperatures
        Per exit (m), by which logits must be divided before their confidence is compared; empty = 1 everywhere.
    fingerprint
        Of the network they were made for (``cafe_flwr.personal.fingerprint``); empty = unknown.

    Raises
    ------
    ValueError
        If a value is invalid.

    Examples
    --------
    >>> t = ExitThresholds((0.8, float("inf")), certified=True, coverage=0.5, guarantee="selective", risk=0.05)
    >>> t.leave([[0.9, 0.9, 0.9], [0.7, 0.9, 0.9]])
    array([0, 2])
    >>> ExitThresholds.from_dict(t.to_dict()) == t
    True
    """

    thresholds: tuple[float, ...]
    certified: bool
    coverage: float
    guarantee: str
    risk: float
    confidence_level: float = 0.9
    realised_risk: float = 0.0
    num_examples: int = 0
    temperatures: tuple[float, ...] = ()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(float(t) for t in self.thresholds))
        object.__setattr__(self, "temperatures", checked_temperatures(self.temperatures, self.num_exits))
        check_known("guarantee", self.guarantee, (*GUARANTEES, *FEDERATED, *BASELINES))
        check_level("risk", self.risk)
        check_level("confidence_level", self.confidence_level)
        if not self.thresholds or any(math.isnan(t) or t < 0 for t in self.thresholds):
            raise ValueError(f"thresholds are numbers from 0 up, one for each exit but the last, not {self.thresholds}")
        if self.certified and self.guarantee in BASELINES:
            raise ValueError(f"the {self.guarantee} baseline guarantees nothing, so nothing can be certified by it")

    @property
    def num_exits(self) -> int:
        """m, the last exit included."""
        return len(self.thresholds) + 1

    def leave(self, confidence: ArrayLike) -> NDArray[np.int64]:
        """Exit at which each example leaves, (N,), from the confidences (N, m) of all exits."""
        return first_exit(checked_confidence(confidence, self.num_exits), self.thresholds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no infinity: ``null`` = never leave there."""
        return {**asdict(self), **plain_values(self.thresholds, self.temperatures)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExitThresholds:
        """Read what :meth:`to_dict` wrote; ValueError if a value is missing, unknown or invalid."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"thresholds must have exactly the values {', '.join(sorted(names))}; missing: "
                f"{', '.join(sorted(names - set(values))) or 'none'}, unknown: "
                f"{', '.join(sorted(set(values) - names)) or 'none'}"
            )
        try:
            thresholds = tuple(math.inf if t is None else float(t) for t in values["thresholds"])
            return cls(**{**values, "thresholds": thresholds, "temperatures": tuple(values["temperatures"])})
        except TypeError as error:
            raise ValueError(f"thresholds with a value that is none of its kind: {error}") from None

    def describe(self) -> str:
        """One sentence for people: what is claimed, how surely, and what it was seen to do."""
        seen = f"{self.coverage:.1%} left early, realised risk {self.realised_risk:.2%}, {self.num_examples:,} examples"
        if self.guarantee in BASELINES:
            return f"Per-exit conformal quantile at {self.risk:g}: no guarantee; {seen}."
        if not self.certified:
            return (
                f"Nothing could be certified at risk {self.risk:g} ({self.guarantee}) from {self.num_examples:,} "
                "examples: no example leaves early, the last exit answers always."
            )
        surely, share = f"With confidence {self.confidence_level:.4g}", f"at most {self.risk:.4g}"
        claim = {
            "selective": f"{surely}, {share} of the examples that leave early are wrong",
            "joint": f"On average over calibration sets, {share} of all examples leave early and wrong",
            "gap": f"{surely}, leaving early adds {share} to the full network's share of errors",
            "mixture": f"On average over calibration sets and over the clients calibrated together, weighted by their "
            f"examples + 1, {share} of all examples leave early and wrong; nothing is claimed of one client alone",
            "every-mixture": f"{surely}, {share} of the examples that leave early are wrong at each of the clients "
            "certified together, and so in every mixture of them",
        }[self.guarantee]
        return f"{claim}, as long as the data stay as they were; {seen}."


def plain_values(thresholds: Sequence[float], temperatures: Sequence[float]) -> dict[str, list[Any]]:
    """Thresholds and temperatures for JSON, which knows no infinity: ``None`` = never leave there."""
    return {"thresholds": [t if math.isfinite(t) else None for t in thresholds], "temperatures": list(temperatures)}


def checked_temperatures(temperatures: Sequence[float], num_exits: int) -> tuple[float, ...]:
    """One positive number for each exit, or none at all; ValueError otherwise."""
    values = tuple(float(t) for t in temperatures)
    if values and (len(values) != num_exits or not all(0 < t < math.inf for t in values)):
        raise ValueError(
            f"temperatures are {num_exits} positive numbers, one for each exit, or none at all; not {values}"
        )
    return values


def check_known(what: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that is not known, hinting at the nearest."""
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
        raise ValueError(f"unknown {what} {name!r}: known are {', '.join(known)}; the nearest is {close[0]!r}")


def check_level(name: str, value: float) -> None:
    """Raise ValueError unless a value is a number strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, not {value!r}")


def checked_confidence(confidence: ArrayLike, num_exits: int | None = None) -> NDArray[np.floating[Any]]:
    """Confidences as an array (N, m); ValueError unless they are numbers in [0, 1] of two or more exits."""
    values = np.asarray(confidence)
    if values.dtype.kind not in "fiu":
        raise ValueError(f"confidences must be numbers, not of type {values.dtype}")
    values = values if values.dtype.kind == "f" else values.astype(np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"confidences must be (examples, exits) with two exits or more, not of shape {values.shape}")
    if num_exits is not None and values.shape[1] != num_exits:
        raise ValueError(f"confidences of {values.shape[1]} exits were given for a network of {num_exits} exits")
    if len(values) and not (values.min() >= 0 and values.max() <= 1):  # false for NaN as well
        bad = ~((values >= 0) & (values <= 1))
        row, k = np.argwhere(bad)[0]
        raise ValueError(
            f"confidences must lie in [0, 1]: {bad.sum()} do not, the first is {values[row, k]} (example {row}, exit "
            f"{k + 1}); give probabilities, not logits"
        )
    return values


def checked_correct(correct: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Whether each exit is right, as booleans of the confidences' shape; ValueError if they are not."""
    values = np.asarray(correct)
    if values.shape != shape:
        raise ValueError(f"correct has shape {values.shape} and confidence {shape}: they must agree")
    if values.dtype != np.bool_:
        raise ValueError(f"correct must be booleans (label == truth), not of type {values.dtype}")
    return values
