"""Versions of a client that another has taken the place of, kept until the server confirms a later one.

A round may be repeated, so the server may ask a client to start again from an older version. What the client had since
is set aside and not removed, since only a later request shows that the server has really gone on from the new one.
"""

from __future__ import annotations

import os
from pathlib import Path

from cafe_flwr.core.files import version_path, versions_in

MOST = 3  # as many as a run that is resumed may need; a server that asks again and again does not fill the disk


def set_aside(folder: Path, rounds: list[int]) -> None:
    """Move these versions to ``aside`` in the client's folder.

    Of those of one round the first stays; beyond the first three, they are removed.
    """
    aside = folder / "aside"
    for server_round in sorted(rounds):
        kept = dict(versions_in(aside))
        if server_round in kept or len(kept) >= MOST:
            version_path(folder, server_round).unlink(missing_ok=True)
        else:
            aside.mkdir(parents=True, exist_ok=True)
            os.replace(version_path(folder, server_round), version_path(aside, server_round))


def bring_back(folder: Path, version: int) -> None:
    """Move a version back to its place if the server starts from it, with those before it, where no other took it."""
    kept = dict(versions_in(folder / "aside"))
    if version in kept and not version_path(folder, version).exists():
        for server_round, path in kept.items():
            place = version_path(folder, server_round)
            if server_round <= version and not place.exists():
                os.replace(path, place)


def confirm(folder: Path, version: int) -> None:
    """Remove versions that were set aside for this one, or before it: the server goes on from it."""
    aside = folder / "aside"
    for server_round, path in versions_in(aside):
        if server_round <= version:
            path.unlink()
    if aside.is_dir() and not any(aside.iterdir()):
        aside.rmdir()
