"""Lock files: one process at a time writes, and the error for the others says which one it is."""

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
    """Take a lock file; it is held until the returned file is closed or the process ends, even by a crash.

    The file stays, with the id of the process that held it last. Windows has no such locks: nobody is kept out. On
    network file systems it depends on whether these support ``flock``.

    Parameters
    ----------
    path
        The lock file; created with its folder if it does not exist.
    what
        Name of what is locked, for the error.
    seconds
        How long to wait for another process.

    Raises
    ------
    InUse
        If another process still holds it; the message gives that process's id.
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
    """Hold a lock file, as :func:`hold` does, in a ``with`` block.

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
