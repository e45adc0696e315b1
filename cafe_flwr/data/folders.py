"""Find the files of a data set in a folder: what lies there, whatever the names of the folders above it are."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

_NO_DATA = ("__MACOSX", "__pycache__")


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, in the order of their paths.

    Links are followed. Hidden files and folders, whose names begin with a dot, are left out, as ``datasets`` does.
    """
    return [Path(path) for path in sorted(_walk(str(folder), frozenset()))]


def pictures_among(files: Iterable[Path]) -> list[Path]:
    """The files whose suffix is of a format that Pillow reads."""
    from PIL import Image

    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [file for file in files if file.suffix.lower() in known - {".h5", ".hdf"}]


def suffixes(files: Iterable[Path]) -> str:
    """How many files of which suffix there are.

    Examples
    --------
    >>> suffixes([Path("a.txt"), Path("b.heic"), Path("c.txt")])
    '.txt (2), .heic (1)'
    """
    counts = Counter(file.suffix or file.name for file in files)
    return ", ".join(f"{suffix} ({count})" for suffix, count in counts.most_common(10))


class Places:
    """Names a row of a set for people: its number, the set, and the file that holds it."""

    def __init__(self, origin: str, files: Sequence[Path] = (), file_of: Callable[[int], str] | None = None) -> None:
        self._origin, self._files, self._file_of, self._ends = origin, files, file_of, [0]

    def __call__(self, row: int) -> str:
        """Place of a row; −1: the whole set."""
        if row < 0:
            return self._origin
        file = self._file_of(row) if self._file_of else self._in_files(row) if len(self._files) > 1 else ""
        return f"row {row} of {self._origin}" + f" ({file})" * bool(file)

    def _in_files(self, row: int) -> str:
        if len(self._ends) == 1:
            from pyarrow.parquet import read_metadata  # type: ignore[import-untyped]

            self._ends = list(accumulate((read_metadata(file).num_rows for file in self._files), initial=0))
        place = bisect_right(self._ends, row) - 1
        return f"{self._files[place].name}, row {row - self._ends[place]}"


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _NO_DATA:
                continue
            if entry.is_dir():
                yield from _walk(entry.path, above | {here})
            else:
                yield entry.path
