"""A folder of several files that is there whole or not at all."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A draft to write to, which becomes the folder at the end, in place of what was there.

    After an error the folder is as it was. A process that is killed may leave a hidden folder beside it.

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
    """Refuse to replace anything but a folder of the same kind: its manifest names its kind and all its files.

    Parameters
    ----------
    folder
        New, empty, or with a manifest.
    manifest
        Name of that JSON file; it has the keys ``format``, which must be ``kind``, and ``files``.

    Raises
    ------
    ValueError
        If something would be lost that was not written with the manifest.

    Examples
    --------
    >>> check_replaceable(Path("not/there/yet"), "manifest.json", "cafe-flwr-export")
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
