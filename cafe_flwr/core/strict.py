"""Pydantic models of what people write by hand, which take no unknown names and convert no types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_snake

from cafe_flwr.core.options import Option
from cafe_flwr.core.text import kebab

MOST = {int: 10**6, float: 1e9}
"""Upper bounds of numbers in a run's settings that declare none: nobody means more."""

STRICT = ConfigDict(
    alias_generator=kebab,
    validate_by_name=True,
    validate_by_alias=True,
    extra="forbid",
    frozen=True,
    strict=True,
    use_attribute_docstrings=True,
    allow_inf_nan=False,
)


def _whole(value: Any) -> Any:
    """Refuse 1.0 and True in a choice among numbers, which pydantic compares by ``==``."""
    if type(value) is not int:
        raise ValueError("it should be a whole number")
    return value


def fields_of(options: Sequence[Option]) -> dict[str, Any]:
    """Options as fields of a pydantic model."""
    bounds = ("ge", "gt", "le", "lt", "pattern", "min_length", "max_length")
    found: dict[str, Any] = {}
    for o in options:
        kind: Any = Literal[o.said["choices"]] if o.said["choices"] else type(o.default)
        if isinstance(o.default, int) and o.said["choices"]:
            kind = Annotated[kind, BeforeValidator(_whole)]
        said = {name: o.said[name] for name in bounds if o.said[name] is not None}
        if not said.keys() & {"le", "lt"} and type(o.default) in MOST and not o.said["choices"]:
            said["le"] = MOST[type(o.default)]
        found[to_snake(o.key.rpartition(".")[2])] = (kind, Field(o.default, description=o.doc, **said))
    return found
