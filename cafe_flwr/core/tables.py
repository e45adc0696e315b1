"""Convert settings between nested tables and keys with dots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_DEEPEST = 8


def leaves(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(key with dots, value) of every setting in nested tables; ValueError if tables are nested without end.

    Examples
    --------
    >>> dict(leaves({"seed": 1, "federation": {"wait-seconds": 5.0}}))
    {'seed': 1, 'federation.wait-seconds': 5.0}
    """
    if before.count(".") > _DEEPEST:
        raise ValueError(f"{before[:60]}… are tables in tables: settings are in one table, such as train.momentum")
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables from keys with dots; ValueError if one is both a value and a table."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        *tables, name = str(key).split(".")
        place = found
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ValueError(f"{key.rpartition('.')[0]!r} is there as a value and as a table: leave one out")
        if isinstance(place.get(name), dict):
            raise ValueError(f"{key!r} is there as a value and as a table: leave one out")
        place[name] = value
    return found
