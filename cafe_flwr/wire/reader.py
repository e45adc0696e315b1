"""The one reader of what arrives: a message declares the values of its records, and anything else is refused in words.

A declaration says kind, range and number of the values of a key. No content raises anything but ValueError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cafe_flwr.core.schema import Schema
from cafe_flwr.core.text import MAX_TEXT, shown

MAX_WHOLE = 2**53 - 1
"""Largest count: float64, and with it the columns of tables, does not tell larger ones apart."""
MAX_REAL = 1e39
"""Largest measurement: no float32 is larger, and sums of many are finite in float64."""
MAX_LENGTH = 1_000_000
"""Most values of a list whose length nothing else says."""
MAX_SCHEMA = 16 * 2**20
"""Most characters of a schema."""
MAX_ROUNDING = 1e-6
"""How far a share may lie outside of 0..1, by the rounding of float32."""

_ABSENT = object()
_EACH = {"n": " for every client", "m": " for every exit"}


@dataclass(frozen=True)
class Value:
    """What may stand under a key.

    Attributes
    ----------
    kind
        ``int``, ``float``, ``str`` or ``bool``; a float may come as a whole number.
    low, high
        Range of a number; largest length of a text.
    size
        Empty: one value. Else a list, and lists of one size are equally long; a missing list is empty.
    words
        What it must be.
    nan
        Whether NaN may stand for what was not measured.
    cut
        Whether a text is for people: it may be longer, and is cut and made printable (:func:`shown`).
    default
        Of one value that may be missing.
    """

    kind: type
    words: str
    low: float = 0
    high: float = 0
    size: str = ""
    nan: bool = False
    cut: bool = False
    default: Any = _ABSENT

    def read(self, key: str, given: Any, sizes: dict[str, int], subject: str) -> Any:
        """The value or list of values as declared; ValueError if it is something else."""
        if not self.size:
            return self._checked(key, [given], given)[0]
        length = sizes.setdefault(self.size, min(len(given), MAX_LENGTH) if isinstance(given, list) else 0)
        if not isinstance(given, list) or len(given) != length:
            raise ValueError(f"{subject} need {length} values of {key!r}, got {shown(repr(given))}")
        return self._checked(key, given, given)

    def _checked(self, key: str, values: list[Any], given: Any) -> list[Any]:
        kinds = set(map(type, values))
        if kinds <= ({int, float} if self.kind is float else {self.kind}):
            if self.kind is str:
                if self.cut:
                    return [shown(value, int(self.high)) for value in values]
                if all(len(value) <= self.high and value.isprintable() for value in values):
                    return values
            elif self.kind is bool or self._in_range(values):
                return list(map(float, values)) if self.kind is float and int in kinds else values
        raise ValueError(f"{key!r} must {self.words}{_EACH.get(self.size, '')}, got {shown(repr(given))}")

    def _in_range(self, values: list[Any]) -> bool:
        low, high, nan = self.low, self.high, self.nan
        for value in values:  # noqa: SIM110 (this is faster, and every value of a reply passes here)
            if not (low <= value <= high or (nan and value != value)):
                return False
        return True


def whole(size: str = "", low: int = 0, high: int = MAX_WHOLE, **more: Any) -> Value:
    """A whole number from ``low`` to ``high``."""
    most = "" if high == MAX_WHOLE else f" and at most {high}"
    return Value(int, f"be a whole number (no NaN, no infinity) of at least {low}{most}", low, high, size, **more)


def real(size: str = "", low: float = -MAX_REAL, high: float = MAX_REAL, nan: bool = True) -> Value:
    """A finite number from ``low`` to ``high``; NaN where it was not measured."""
    least = "" if low == -MAX_REAL else f" of at least {low:g}"
    most = "" if high == MAX_REAL else f" and at most {high:g}"
    return Value(float, f"be a number{least}{most} that is not infinite", low, high, size, nan)


def share(size: str = "") -> Value:
    """A number in 0..1; NaN where it was not measured."""
    return Value(float, "lie between 0 and 1", -MAX_ROUNDING, 1 + MAX_ROUNDING, size, nan=True)


def cosine(size: str = "") -> Value:
    """A number in −1..1, with some rounding; NaN where it cannot be measured."""
    return Value(float, "lie between −1 and 1", -1.01, 1.01, size, nan=True)


def token(longest: int = 64, **more: Any) -> Value:
    """A text for programs, of printable characters."""
    return Value(str, f"be a text of at most {longest} printable characters", high=longest, **more)


def words(size: str = "", longest: int = MAX_TEXT) -> Value:
    """A text for people, cut at ``longest`` characters, with escapes for those that do not print."""
    return Value(str, "be a text", high=longest, size=size, cut=True)


def flag(size: str = "", **more: Any) -> Value:
    """True or false."""
    return Value(bool, "be true or false", size=size, **more)


CLIENT = whole("n")
"""Numbers of clients."""


def read(
    record: Mapping[str, Any],
    declared: Mapping[str, Value],
    sizes: Mapping[str, int] | None = None,
    subject: str = "its lists",
) -> dict[str, Any]:
    """The declared values of a record, by key; other keys are ignored.

    Parameters
    ----------
    record, declared
        The record, and what it may hold.
    sizes
        Lengths of lists that are known, by size; others are told by the first list of that size.
    subject
        What is said to need values, in the plural.

    Raises
    ------
    ValueError
        For any other content, naming the key.

    Examples
    --------
    >>> declared = {"clients": CLIENT, "accuracy": share("n")}
    >>> read({"clients": [3, 4], "accuracy": [0.5, 1]}, declared)
    {'clients': [3, 4], 'accuracy': [0.5, 1.0]}
    >>> read({"clients": [3, 4], "accuracy": [0.5, 5.0]}, declared)
    Traceback (most recent call last):
        ...
    ValueError: 'accuracy' must lie between 0 and 1 for every client, got [0.5, 5.0]
    """
    lengths, found = dict(sizes or {}), {}
    for key, value in declared.items():
        given = record.get(key, [] if value.size else value.default)
        if given is _ABSENT:
            raise ValueError(f"{key!r} is missing")
        absent = not value.size and key not in record
        found[key] = given if absent else value.read(key, given, lengths, subject)
    return found


def distinct(numbers: list[int], what: str) -> list[int]:
    """The numbers; ValueError if one is there twice."""
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{what} are named twice: {shown(repr(numbers))}")
    return numbers


def parsed(text: str) -> Any:
    """The value of a JSON text; ValueError if it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {shown(str(error))}") from None


def schema_of(text: str) -> Schema:
    """The schema of a text; ValueError if it is none, of a name twice, or larger than any network."""
    value = parsed(text)
    try:
        entries = tuple((name, tuple(shape)) for name, shape in value)
    except (TypeError, ValueError):
        raise ValueError(f"not a list of [name, shape]: {shown(text)}") from None
    shapes = [shape for _, shape in entries]
    sound = all(type(name) is str and name.isprintable() for name, _ in entries) and all(
        len(shape) <= 32 and all(type(n) is int and 0 <= n <= MAX_WHOLE for n in shape) for shape in shapes
    )
    if not sound or len(dict(entries)) < len(entries) or sum(math.prod(shape) for shape in shapes) > MAX_WHOLE:
        raise ValueError(f"not a schema of different names, with shapes of whole numbers: {shown(text)}")
    return Schema(entries)
