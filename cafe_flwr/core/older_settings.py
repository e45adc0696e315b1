"""Settings of earlier versions: their names today, and how to read the settings of a run that was saved then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXT = ("teachers", "peers", "similarity-proxy", "max-staleness", "objective-teacher")
_PRIOR = (
    *("prior", "mu", "pull", "last-weight", "temperature", "selection", "backbone-pull", "match-by", "same-above"),
    *("counts", "count-epsilon"),
)

RENAMED: Mapping[str, str] = {
    **{name: f"cafedistill-text.{name}" for name in _TEXT},
    **{f"plus-{name}": f"cafedistill-prior.{name}" for name in _PRIOR},
}
"""Names of settings in 0.1.0, and their names now."""

PREFIXES: Mapping[str, str] = {
    "cafedistill": "",
    "cafedistill-plus": "plus-",
    "cafedistill-prior": "prior-",
    "cafedistill-text": "text-",
}
"""Prefix of a method's settings before there were tables, where it was not the method's name."""

_OF_OTHERS = frozenset({"mu", "distill-weight", "temperature", "selection", "solver", "plus-distill-weight"})
"""Settings of these two methods whose names belong to another method now; runs of other methods did not read them."""

METHODS_THEN: Mapping[str, str] = {"cafedistill": "cafedistill-text", "cafedistill-plus": "cafedistill-prior"}
"""Names of methods in 0.1.0, and their names now, where the old name means another method today."""


def renamed(key: str) -> str:
    """A sentence about the new name of a renamed setting; empty if it was not renamed.

    Examples
    --------
    >>> renamed("peers").partition(", ")[0]
    "its name is 'cafedistill-text.peers' now: it is of method 'cafedistill-text'"
    """
    if key not in RENAMED:
        return ""
    now = RENAMED[key]
    then, method = next((old, new) for old, new in METHODS_THEN.items() if now.startswith(f"{new}."))
    return f"its name is {now!r} now: it is of method {method!r}, which was called {then!r} until 0.1.0"


def of_saved_run(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a finished run under today's names, with defaults that have changed since made explicit.

    ValueError if the run's method has another name now.
    """
    if not run_config.keys() & RENAMED.keys():
        return dict(run_config)
    method = str(run_config.get("method", "cafedistill"))
    if method in METHODS_THEN:
        raise ValueError(
            f"method = {method!r} in settings of version 0.1.0 or before is {METHODS_THEN[method]!r} now; {method!r} "
            "means another method. Use the version that made the run, or train anew under the name of today"
        )
    kept = {key: value for key, value in run_config.items() if key not in RENAMED and key not in _OF_OTHERS}
    return {"train.classifier-start": "built", **kept}
