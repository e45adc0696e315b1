"""Declare each setting once, as a field of a dataclass with its default, meaning, bounds and use.

The fields of :class:`cafe_flwr.settings.Settings`, both manifests, the table in docs/settings.md, what must be equal in
a comparison and what may differ when a run is resumed all follow from these declarations.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, Protocol, TypeVar

from cafe_flwr.core.older_settings import PREFIXES
from cafe_flwr.core.text import brief, kebab

Compare = Literal["all", "row", "budget", "free", "own"]
Declared = TypeVar("Declared")


def option(  # noqa: PLR0913 (everything that a setting can declare)
    default: Any,
    doc: str,
    *,
    key: str = "",
    formerly: str = "",
    wire: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] = (),
    pattern: str | None = None,
    min_length: int | None = None,
    max_length: int | None = None,
    compare: Compare = "row",
    free: bool = False,
    sized: bool = False,
    only: Mapping[str, Sequence[Any]] | None = None,
    of_runs: Any = None,
) -> Any:
    """A setting: a field of a frozen dataclass.

    Parameters
    ----------
    default, doc
        Default value, and meaning as a sentence.
    key
        Name in a run's settings, where it is not ``<table>.<field>``, such as ``learning-rate``, which is in no table.
    formerly
        Key before there were tables, where it was not the name without the table.
    wire
        Settings of objectives only: name in messages, where it is not ``<objective>_<field>``.
    ge, gt, le, lt, choices, pattern, min_length, max_length
        Allowed values.
    compare
        In a comparison: the same in ``"all"`` rows; each ``"row"``'s own; part of the ``"budget"``; ``"free"``, as it
        changes no number; or set by the comparison itself (``"own"``).
    free
        Whether it changes no number and may differ when a run is resumed; always so with ``compare="free"``.
    sized
        Whether the time and memory of a step depend on it.
    only
        When it is read, if not always: other keys, and those of their values with which it is read.
    of_runs
        Default in a run's settings, where it differs from ``default``.

    Examples
    --------
    >>> @section("near")
    ... @dataclass(frozen=True)
    ... class Near:
    ...     pull: float = option(0.1, "Weight of the pull.", ge=0)
    >>> [(o.key, o.formerly, o.default) for o in options_of(Near)]
    [('near.pull', 'pull', 0.1)]
    >>> check_settings(Near(pull=-1.0))
    Traceback (most recent call last):
        ...
    ValueError: pull must be at least 0, got -1.0
    """
    said = {name: value for name, value in locals().items() if name not in ("default", "choices")}
    return field(default=default, metadata={**said, "choices": tuple(choices)})


def in_keys(message: str, declared: type) -> str:
    """A message about fields of a dataclass, with the keys of a run's settings in their place.

    Examples
    --------
    >>> from cafe_flwr.wire.options import Bounds
    >>> in_keys("max_ratio must be greater than 1", Bounds)
    'federation.max-update-ratio must be greater than 1'
    """
    for o in options_of(declared):
        name = re.escape(o.field)
        message = re.sub(rf"\b{name}\b" if "_" in name else rf"^{name}\b", o.key, message)
    return message


setting = option
shared = partial(option, compare="all")
"""A setting that is the same in all rows of a comparison."""


def section(table: str) -> Callable[[type[Declared]], type[Declared]]:
    """Decorator: the table of a run's settings that holds the options of a dataclass."""

    def mark(declared: type[Declared]) -> type[Declared]:
        declared.table = table  # type: ignore[attr-defined]
        return declared

    return mark


@dataclass(frozen=True)
class Option:
    """A declared setting of a run.

    Attributes
    ----------
    field
        Name of the field that declares it.
    key
        Name in a run's settings: ``"federation.fraction-train"``, or ``"seed"`` where it is in no table.
    formerly
        Key before there were tables; empty if it was the same.
    default
        Default in a run's settings.
    said
        Everything that :func:`option` was given.
    """

    field: str
    key: str
    formerly: str
    default: Any
    said: Mapping[str, Any]

    @property
    def table(self) -> str:
        """Table that holds it; empty if none does."""
        return self.key.rpartition(".")[0]

    @property
    def doc(self) -> str:
        """Meaning, as a sentence."""
        return str(self.said["doc"])

    @property
    def compare(self) -> str:
        """Role in a comparison, see :func:`option`."""
        return str(self.said["compare"])

    @property
    def free(self) -> bool:
        """Whether it changes no number."""
        return bool(self.said["free"]) or self.compare == "free"

    @property
    def only(self) -> Mapping[str, Sequence[Any]]:
        """When it is read, see :func:`option`; empty: always."""
        return self.said["only"] or {}


def options_of(declared: type) -> list[Option]:
    """The options of a dataclass, in order, without fields that :func:`option` did not declare.

    Their table is the one that :func:`section` gives to the class that declares them, or else the class's ``name``, as
    for methods and objectives.
    """
    return [_option_of(declared, f) for f in fields(declared) if "doc" in f.metadata]


def _option_of(declared: type, f: Field[Any]) -> Option:
    said = f.metadata
    owner = next(c for c in declared.__mro__ if f.name in vars(c).get("__annotations__", {}))
    place = vars(owner if vars(owner).keys() & {"table", "name"} else declared)
    prefix = "" if "table" in place else PREFIXES.get(place["name"], f"{place['name']}-")
    table = place["table"] if "table" in place else place["name"]
    key = said["key"] or ".".join(filter(None, (table, kebab(f.name))))
    formerly = said["formerly"] or kebab(said["wire"]) or prefix + key.rpartition(".")[2]
    default = f.default if said["of_runs"] is None else said["of_runs"]
    return Option(f.name, key, "" if formerly == key else formerly, default, said)


def values_of(declared: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dataclass's fields in a run's config, under today's keys or the former ones."""
    keys = ((o.field, key) for o in options_of(declared) for key in (o.formerly, o.key))
    return {name: config[key] for name, key in keys if key and key in config}


class Options(Protocol):
    """The options of a run, by the dataclass that declares them."""

    def of(self, declared: type[Declared], /) -> Declared:
        """The options of a part; ValueError if they are invalid."""


@dataclass(frozen=True)
class RunOptions:
    """The options in a run's config, read on a node: it loads no more than the declarations that it needs.

    The server has checked all settings (:class:`cafe_flwr.settings.Settings`) before a node sees them.

    Examples
    --------
    >>> from cafe_flwr.training.options import LocalBudget
    >>> RunOptions({"local-steps": 4, "learning-rate": 1}).of(LocalBudget).learning_rate
    1.0
    """

    config: Mapping[str, Any]

    def of(self, declared: type[Declared], /) -> Declared:
        """The options of a part, as the dataclass that declares them; ValueError if they are invalid."""
        defaults = {o.field: o.default for o in options_of(declared)}
        values = defaults | values_of(declared, self.config)
        for name, default in defaults.items():
            if isinstance(default, float) and type(values[name]) is int:  # TOML and the command line write 1 for 1.0
                values[name] = float(values[name])
        return declared(**values)


def check_settings(declared: Any) -> None:
    """Raise ValueError, naming every option of this dataclass whose value is of the wrong type or out of bounds."""
    values = ((f, getattr(declared, f.name)) for f in fields(declared) if "doc" in f.metadata)
    if wrong := [f"{f.name} must be {what} got {brief(value)}" for f, value in values if (what := _expected(f, value))]:
        raise ValueError("; ".join(wrong))


_KINDS: Mapping[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
}
_BOUNDS: Sequence[tuple[str, str, Callable[[Any, Any], bool]]] = (
    ("ge", "at least", operator.ge),
    ("gt", "greater than", operator.gt),
    ("le", "at most", operator.le),
    ("lt", "less than", operator.lt),
)


def _expected(f: Field[Any], value: Any) -> str:
    """What a value should be instead; empty if it is valid."""
    said, kind = f.metadata, type(f.default)
    if said["choices"]:
        return "" if value in said["choices"] else f"one of {', '.join(map(str, said['choices']))};"
    wanted, name = _KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        return f"{name},"
    for key, word, holds in _BOUNDS:
        if said[key] is not None and not holds(value, said[key]):
            return f"{word} {said[key]},"
    return "a finite number," if kind is float and not math.isfinite(value) else ""
