"""Locks between processes: one at a time writes, and who is refused learns who has it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_POLL_SECONDS = 0.1


class InUse(RuntimeError):
    """Another process has the lock."""


def hold(path: Path, what: str, seconds: float = 0.0) -> IO[str]:
    """Take a lock file, until what is returned is closed or the process ends, however that ends.

    The lock belongs to the open file. The file stays, with the number of the process that had it last. Where the system
    has no such locks (Windows), nobody is kept out. On network file systems locks hold as far as those pass them on.

    Parameters
    ----------
    path
        The lock file; made with its folder if it is not there.
    what
        What is locked, for the error.
    seconds
        How long to wait for another process.

    Raises
    ------
    InUse
        If another process still has it, with that process's number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 (open as long as the lock is held)
    deadline = time.monotonic() + seconds
    while not _locks(file):
        if time.monotonic() >= deadline:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            waited = f", also after {seconds:g} s" if seconds else ""
            raise InUse(f"{what} is in use by another process (pid {holder}){waited}")
        time.sleep(_POLL_SECONDS)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


@contextmanager
def locked(path: Path, what: str, seconds: float = 0.0) -> Iterator[None]:
    """:func:`hold` a lock file inside.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder) / "a.lock", "the state"):
    ...     int((Path(folder) / "a.lock").read_text()) == os.getpid()
    True
    """
    with hold(path, what, seconds):
        yield


def _locks(file: IO[str]) -> bool:
    """Whether the file is locked for this process now."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
