"""Opening a run's results folder before the first round: a new one, or one to resume from."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from cafe_flwr.core.files import sweep, to_json, versions_in, write_atomically
from cafe_flwr.core.log import logger
from cafe_flwr.results.history import History
from cafe_flwr.server.checkpoints import Checkpoints, ServerState


class Results(NamedTuple):
    """An opened results folder: its path, the state to resume from, and the lock that keeps other runs out."""

    folder: Path
    state: ServerState | None
    lock: IO[str]


def open_results(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    read: Callable[[dict[str, Any]], Mapping[str, Any]],
    free: Collection[str],
) -> Results:
    """Open the run's results folder.

    An earlier run of the same name is not overwritten: it is moved aside to ``<name>.1``, ``<name>.2``, …
    With the setting ``resume`` its folder is used, and its last checkpoint returned.

    Parameters
    ----------
    folder, settings
        Of the run; all settings, in kebab-case.
    read
        Translates the settings of a saved run to today's, with defaults for those that it lacks.
    free
        Settings that may differ when a run is resumed, because they change none of its numbers.

    Raises
    ------
    ValueError
        If the folder cannot be written, holds something else or a run in progress, or there is nothing to resume.
    """
    try:
        state = None
        if settings["resume"]:
            state = _resumable(folder, settings, read, free)
        elif not is_bare(folder):
            _move_aside(folder)
        lock = _lock(folder)
        for place in (folder, folder / "checkpoint"):
            sweep(place)
        write_atomically(folder / "settings.json", to_json(settings, indent=2))
    except OSError as error:
        raise ValueError(f"cannot write results to {folder}: {error}. Set results-dir to a folder you own") from error
    logger.info("Results: %s", folder)
    return Results(folder, state, lock)


def is_bare(folder: Path) -> bool:
    """Whether a folder is missing, empty, or was left by a run that ended before it wrote its settings."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return all(name == ".lock" or name.startswith(".settings.json.") for name in names)


def _lock(folder: Path) -> IO[str]:
    """Lock the folder until the file is closed or the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115 (open as long as the run)
    try:
        import fcntl
    except ImportError:  # not on Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another run is still writing to {folder}: stop it (`flwr ls`, `flwr stop`) or choose another name"
        ) from None
    return file


def _resumable(
    folder: Path,
    settings: Mapping[str, Any],
    read: Callable[[dict[str, Any]], Mapping[str, Any]],
    free: Collection[str],
) -> ServerState:
    """The last checkpoint of the run, if it was a run of these settings and the records until then are whole."""
    place = folder / "checkpoint"
    state = Checkpoints(place).load()
    if state is None:
        there = ", all are damaged: bring the folder back from a copy, or start a new run" if versions_in(place) else ""
        raise ValueError(f"resume = true, but there is no checkpoint in {place}{there}")
    try:
        before = dict(json.loads((folder / "settings.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot resume {folder}: its settings.json cannot be read ({error})") from error
    try:
        was = read(before)
    except ValueError as error:
        raise ValueError(f"cannot resume {folder}: {error}") from None
    changed = [
        f"{key} was {was[key]!r}, now {value!r}"
        for key, value in settings.items()
        if key not in free and was[key] != value
    ]
    if changed:
        raise ValueError(f"cannot resume {folder} with other settings: {'; '.join(changed)}")
    History(folder).until(state.round)
    return state


def _move_aside(folder: Path) -> None:
    if not (folder / "settings.json").exists():
        raise ValueError(f"{folder} exists and is not a run of cafe-flwr: choose another name or results-dir")
    _lock(folder).close()  # not while a run writes there
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    logger.info("The earlier run of this name is now %s", aside)
