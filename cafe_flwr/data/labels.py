"""Check labels where they are read: each must be a class, and errors say where the first bad one is."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Fault(NamedTuple):
    """The first of the labels that are none: its row, the label in short, whether it is missing, how many are."""

    row: int
    label: str
    missing: bool
    number: int


def plain(value: Any) -> Any:
    """A tensor or array as a number or as nested lists; other values as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def fault_in(labels: Sequence[Any], kind: type = int) -> Fault | None:
    """The first label that is missing (None, NaN or blank); without one the first that is not of this kind."""
    if missing := [row for row, label in enumerate(labels) if _is_missing(label)]:
        return Fault(missing[0], short(labels[missing[0]]), missing=True, number=len(missing))
    wrong = [row for row, label in enumerate(labels) if isinstance(label, bool) or not isinstance(label, kind)]
    return Fault(wrong[0], short(labels[wrong[0]]), missing=False, number=len(wrong)) if wrong else None


def classes_of(labels: Sequence[Any], names: Sequence[str] | None, column: str, where: Callable[[int], str]) -> Any:
    """Labels as (N,) int64 with the names of their classes; None if they are numbers without names.

    Parameters
    ----------
    names
        Names of numbered classes, where the file has them.
    where
        Place of a row, such as ``"row 3 of 'local:set.parquet'"``; that of -1 is the whole set.

    Raises
    ------
    ValueError
        If a label is missing, withheld (−1), or neither a number from 0 up nor a name.
    """
    texts = any(isinstance(label, str) for label in labels)
    fault = fault_in(labels, str if texts else int)
    if fault is None and not texts:
        fault = next((Fault(row, str(y), names is not None, 1) for row, y in enumerate(labels) if y < 0), None)
    if fault and fault.missing:
        raise ValueError(
            f"dataset = {where(-1)} has rows without a label in column {column!r}: {fault.number} of {len(labels)}, "
            f"first {where(fault.row)} ({fault.label})"
        )
    if fault:
        raise ValueError(
            f"column {column!r} of {where(-1)} must hold labels 0..C−1 or names of classes, got {fault.label} in "
            f"{where(fault.row)}"
        )
    if texts:
        found, numbers = np.unique(np.asarray(labels, dtype=object), return_inverse=True)
        return numbers.astype(np.int64), tuple(found)
    return np.asarray([min(label, 2**62) for label in labels], dtype=np.int64), names


def composed(names: Iterable[str], origin: str) -> tuple[str, ...]:
    """Names in Unicode's composed form (NFC); ValueError if two of them are the same but for that."""
    names = tuple(names)
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise ValueError(
                f"classes {other!a} and {name!a} of {origin} look alike ({name}): give one of them another "
                "name, or put their examples together"
            )
    return tuple(unicodedata.normalize("NFC", name) for name in names)


def shown(name: str) -> str:
    """A name in quotes; with escapes beside it if it may look like another."""
    return repr(name) if name.isascii() else f"{name!r} (written {name!a})"


def without_examples(labels: NDArray[np.int64], names: Sequence[str]) -> str:
    """Classes that have no example, in short; empty if all have one.

    Examples
    --------
    >>> without_examples(np.array([1, 2, 6]), "abcdefg")
    "4 of 7 classes have no example: 'a', 'd'..'f'"
    """
    empty = sorted(set(range(len(names))) - set(np.unique(labels).tolist()))
    runs = [[k for _, k in run] for _, run in groupby(enumerate(empty), lambda pair: pair[1] - pair[0])]
    text = ", ".join(repr(names[run[0]]) + f"..{names[run[-1]]!r}" * (len(run) > 1) for run in runs[:10])
    more = f" and {len(runs) - 10} more" * (len(runs) > 10)
    return f"{len(empty)} of {len(names)} classes have no example: {text}{more}" if empty else ""


def _is_missing(label: Any) -> bool:
    if isinstance(label, str):
        return not label.strip()
    return label is None or (isinstance(label, float) and label != label)
