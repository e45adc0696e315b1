"""Names in words: kebab-case, the nearest known name, and what may stand in a line of a log."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_NAME = 60


def check_name(name: str) -> None:
    """ValueError unless it can stand in a line of a log."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"a node's name must be at most {MAX_NAME} printable characters, got {name[:80]!r}")


def kebab(name: str) -> str:
    """``num_clients`` → ``num-clients``."""
    return name.replace("_", "-")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like this one, if any is."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
