"""Locks between processes: one at a time writes, and who is refused learns who has it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.1


class InUse(RuntimeError):
    """Another process has the lock."""


@contextmanager
def locked(path: Path, what: str, seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file inside; nobody else does.

    The lock belongs to the open file, so it ends with the process, however that ends. The file stays, with the number
    of the process that had it last. Where the system has no such locks (Windows), nobody is kept out.

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

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder) / "a.lock", "the state"):
    ...     int((Path(folder) / "a.lock").read_text()) == os.getpid()
    True
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with open(path, "a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    waited = f", also after {seconds:g} s" if seconds else ""
                    raise InUse(f"{what} is in use by another process (pid {holder}){waited}") from None
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
