"""Names and errors in words: kebab-case, the nearest known name, pydantic's errors as sentences."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

MAX_NAME = 60
MAX_MESSAGE = 2000
"""Characters of an error message about what a person wrote."""

MAX_TEXT = 500

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 200, 100


def brief(value: Any) -> str:
    """A value of any type and size as a message shows it: its ``repr``, without the middle where it is long.

    Examples
    --------
    >>> brief("digits"), len(brief("x" * 10**6))
    ("'digits'", 200)
    """
    try:
        return shown(_BRIEF.repr(value))
    except ValueError:  # Python does not write such a number
        return f"something of type {type(value).__name__} that is too long to show"


def shown(text: str, longest: int = MAX_TEXT) -> str:
    """A text from elsewhere as a line of at most ``longest`` characters.

    What does not print, such as control and bidirectional characters, is shown as an escape.

    Examples
    --------
    >>> shown("all well\\n\\u202eEND"), shown("x" * 600, 8)
    ('all well\\\\n\\\\u202eEND', 'xxxxxxx…')
    """
    line = text[: longest + 1]
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def check_name(name: str) -> None:
    """Raise ValueError unless a node's name fits into a line of the log."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"a node's name must be at most {MAX_NAME} printable characters, got {name[:80]!r}")


def kebab(name: str) -> str:
    """``num_clients`` → ``num-clients``."""
    return name.replace("_", "-")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name most similar to this one; None if none is similar."""
    return next(iter(difflib.get_close_matches(name[:MAX_NAME], list(known), n=1)), None)


def nearest(name: str, known: Iterable[str], listed: str = "known") -> str:
    """A hint for an unknown name: the known one most similar to it, or all known ones.

    Examples
    --------
    >>> nearest("fedavgg", ["fedavg", "local"]), nearest("x", ["fedavg", "local"], "known methods")
    ("did you mean 'fedavg'?", 'known methods: fedavg, local')
    """
    known = list(known)
    near = closest(name, known)
    return f"did you mean {near!r}?" if near else f"{listed}: {', '.join(known)}"


def place(steps: Iterable[int | str]) -> str:
    """Path to an item of nested lists and mappings: ``rows[2].method``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def in_words(detail: Mapping[str, Any], known: Iterable[str], what: str = "key") -> str:
    """One of pydantic's errors, an item of ``ValidationError.errors()``, as a sentence.

    ``known`` are the names allowed at its place, ``what`` is what such a name is called.

    Examples
    --------
    >>> in_words({"type": "extra_forbidden", "loc": ("sweep", "setings")}, ["seeds", "settings"])
    "sweep: unknown key 'setings'; did you mean 'settings'?"
    """
    if not detail["loc"]:  # an error about several values
        return str(detail["ctx"]["error"])
    *outer, name = detail["loc"]
    where = f"{place(outer)}: " if outer else ""
    if detail["type"] == "extra_forbidden":
        return f"{where}unknown {what} {brief(name)}; {nearest(str(name), known, f'known {what}s')}"
    if detail["type"] == "missing":
        return f"{where}the {what} {name!r} is missing"
    expected = detail["msg"].partition(" should ")[2] or detail["msg"]
    return f"{place(detail['loc'])} should {expected}, got {brief(detail['input'])}"
