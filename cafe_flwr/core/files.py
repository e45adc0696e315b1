"""Write files and folders completely or not at all, and find damaged ones."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a draft to write to, which replaces the folder at the end.

    After an error the folder is unchanged. A killed process may leave a hidden folder beside it.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with atomic_folder(Path(home) / "new") as draft:
    ...         _ = (draft / "a.txt").write_text("a")
    ...         before = (Path(home) / "new").exists()
    ...     before, [path.name for path in Path(home).rglob("*")]
    (False, ['new', 'a.txt'])
    """
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    earlier = draft.with_name(f"{draft.name}.earlier")
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.exists():
            folder.rename(earlier)
        draft.rename(folder)
    except BaseException:
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        raise
    finally:
        for path in (draft, earlier):
            shutil.rmtree(path, ignore_errors=True)


def check_replaceable(folder: Path, manifest: str, kind: str) -> None:
    """Raise ValueError if replacing the folder would lose files that its manifest does not list.

    ``manifest`` is the name of a JSON file with the keys ``format``, which must be ``kind``, and ``files``. A folder
    that is new or empty needs none.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        earlier = json.loads((folder / manifest).read_text(encoding="utf-8"))
        same, known = earlier["format"] == kind, {manifest, *earlier["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        same, known = False, set()
    if not same:
        raise ValueError(f"{folder} is there and holds other things: choose a folder that is new or empty")
    if other := sorted({path.name for path in folder.iterdir()} - known):
        raise ValueError(
            f"{folder} also holds {', '.join(other)}, which would be lost: move it, or choose another folder"
        )


STATE_VERSION = 1
"""Version of the format in which clients and the server keep their state."""
_VERSION_FILE = re.compile(r"round-(\d+)\.safetensors")


_STALE_SECONDS = 3600.0  # no file takes longer to write; another process may have the number of the one that began it


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file that holds the old content or the new at any moment, even after a crash, never a part.

    What killed processes have left of the same file is removed first.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is in the place of a file, move it away", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def append(path: Path, content: str) -> None:
    """Add to the end of a file, and flush it to disk; after an error, such as a full disk, nothing is added."""
    with _naming(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            rest = memoryview(content.encode())
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def sweep(folder: Path, name: str = "", ending: str = ".tmp") -> None:
    """Remove temporary files ``.<name>.<process><ending>`` that killed processes have left; without a name, any."""
    wanted = re.compile(rf"\.{re.escape(name) or '.+'}\.(\d+){re.escape(ending)}")
    for found in filter(None, map(wanted.fullmatch, os.listdir(folder) if folder.is_dir() else ())):
        path = folder / found[0]
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and (time.time() - path.stat().st_mtime > _STALE_SECONDS or _has_ended(int(found[1]))):
                path.unlink()


def _has_ended(process: int) -> bool:
    if os.name == "nt":  # there, this signal would interrupt the process
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the system's that does not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Flush the folder's list of names to disk; not every system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text with a newline at its end; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def versions_in(folder: Path) -> list[tuple[int, Path]]:
    """(round, file) of the versions in a folder, newest first; ValueError if one of them is a folder."""
    matches = ((_VERSION_FILE.fullmatch(path.name), path) for path in folder.glob("round-*.safetensors"))
    found = sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)
    for _, path in found:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, where a file of this name belongs: move it away")
    return found


class Damaged(Exception):
    """A file is incomplete, or differs from what was written."""


def checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    """CRC-32 of names and bytes: safetensors has no checksum, and a flipped bit would go unnoticed."""
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def version_path(folder: Path, server_round: int) -> Path:
    """File of the version of a round."""
    return folder / f"round-{server_round:06d}.safetensors"
