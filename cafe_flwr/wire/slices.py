"""Slices of a federation's shared part that some clients hold, and means over the clients that hold each value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.core.schema import Schema

Weight = float | NDArray[np.float64]
"""One number, or one for every value of a flat array."""

Where = tuple[slice | NDArray[np.int64], ...]
"""Positions in a flat array, piece by piece."""


class SharedSlice:
    """The part of a federation's flat array (``whole``) that some clients hold together: each value once, in its order.

    A client's part may lack tensors, and may have only the first rows, columns, … of a tensor.

    Examples
    --------
    >>> whole = Schema((("a", (1,)), ("b", (2, 2)), ("c", (1,))))
    >>> narrow, deep = Schema((("a", (1,)), ("b", (2, 1)))), Schema(whole.entries[:2])
    >>> view = SharedSlice(whole, [narrow, deep])
    >>> view.take(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    array([1., 2., 3., 4., 5.])
    >>> view.part(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), narrow)
    array([1., 2., 4.])
    >>> view.weight([10, 30])  # the second column of 'b' is held by the second client alone
    array([40., 40., 30., 40., 30.])
    """

    def __init__(self, whole: Schema, parts: Sequence[Schema]) -> None:
        self.whole = whole
        self.parts = parts
        shapes: dict[str, tuple[int, ...]] = {}
        for part in set(parts):
            for name, shape in part.entries:
                shapes[name] = tuple(map(max, shapes.get(name, shape), shape))
        held = Schema(tuple((name, shapes[name]) for name in whole.names if name in shapes))
        self.schema = whole if held == whole else held

    @property
    def size(self) -> int:
        """Number of values."""
        return self.schema.size

    @cached_property
    def alike(self) -> bool:
        """Whether every client holds all of it."""
        return all(part == self.schema for part in self.parts)

    def take(self, flat: NDArray[Any]) -> NDArray[Any]:
        """The slice of the federation's array."""
        return _taken(flat, positions(self.whole, self.schema))

    def part(self, flat: NDArray[Any], part: Schema) -> NDArray[Any]:
        """One client's values of the slice's array."""
        return _taken(flat, positions(self.schema, part))

    def add(self, total: NDArray[Any], part: Schema, values: NDArray[Any] | float) -> None:
        """Add one client's values to the slice's array."""
        _add(total, positions(self.schema, part), values)

    def weight(self, weights: Iterable[float]) -> Weight:
        """Weights of the clients, summed for each value over those that hold it; one number if all hold all."""
        weights = list(weights)
        if self.alike:
            return sum(weights)
        total = np.zeros(self.size)
        for part, weight in zip(self.parts, weights, strict=True):
            self.add(total, part, float(weight))
        return total


def masked_mean(
    before: NDArray[np.float32], sums: Iterable[tuple[SharedSlice, NDArray[np.float64], Weight]]
) -> NDArray[np.float32]:
    """Mean of every value over the clients that hold it; where none took part, it stays as ``before``.

    Parameters
    ----------
    before
        The federation's shared part.
    sums
        For each node: its slice, the sum over its clients of :func:`cafe_flwr.wire.averaging.weighted` values, and the
        weight.

    Examples
    --------
    >>> whole = Schema((("a", (1,)), ("b", (1,)), ("c", (1,))))
    >>> short, long = SharedSlice(whole, [Schema(whole.entries[:1])]), SharedSlice(whole, [Schema(whole.entries[:2])])
    >>> before = np.array([0, 0, 9], dtype=np.float32)
    >>> masked_mean(before, [(short, np.array([10.0]), 10), (long, np.array([90.0, 60.0]), 30)])
    array([2.5, 2. , 9. ], dtype=float32)
    """
    total, weight = np.zeros(len(before)), np.zeros(len(before))
    for view, values, weights in sums:
        where = positions(view.whole, view.schema)
        _add(total, where, values)
        _add(weight, where, weights)
    held = weight > 0
    return np.where(held, total / np.where(held, weight, 1.0), before).astype(np.float32)


def is_part(part: Schema, whole: Schema) -> bool:
    """Whether every tensor of a part is one of the whole, or its first rows, columns, …, in the same order.

    Examples
    --------
    >>> whole = Schema((("a", (4, 2)), ("b", (3,))))
    >>> is_part(Schema((("a", (2, 2)),)), whole), is_part(Schema((("b", (4,)),)), whole)
    (True, False)
    """
    shapes = dict(whole.entries)
    within = all(
        name in shapes
        and len(shape) == len(shapes[name])
        and all(0 <= size <= most for size, most in zip(shape, shapes[name], strict=True))
        for name, shape in part.entries
    )
    return within and part.names == [name for name in whole.names if name in set(part.names)]


@lru_cache(maxsize=64)
def positions(outer: Schema, inner: Schema) -> Where:
    """Where the tensors of a part lie in the flat array of the whole; ValueError if it is none (:func:`is_part`).

    Examples
    --------
    >>> outer = Schema((("a", (1,)), ("b", (2,)), ("c", (4,)), ("d", (2, 3))))
    >>> positions(outer, Schema((("b", (2,)), ("c", (4,)), ("d", (2, 2)))))
    (slice(1, 7, None), array([ 7,  8, 10, 11]))
    """
    if not is_part(inner, outer):
        raise ValueError("a client's shared tensors are not among the federation's, or in another order")
    shapes = dict(inner.entries)
    found: list[slice | NDArray[np.int64]] = []
    start = 0
    for (name, shape), size in zip(outer.entries, outer.sizes, strict=True):
        own = shapes.get(name)
        last = found[-1] if found else None
        if own == shape and isinstance(last, slice) and last.stop == start:
            found[-1] = slice(last.start, start + size)
        elif own == shape:
            found.append(slice(start, start + size))
        elif own is not None:
            grid = np.arange(start, start + size).reshape(shape)
            found.append(grid[tuple(slice(n) for n in own)].ravel())
        start += size
    return tuple(found)


def _taken(flat: NDArray[Any], where: Where) -> NDArray[Any]:
    return flat[where[0]] if len(where) == 1 else np.concatenate([flat[:0], *(flat[piece] for piece in where)])


def _add(total: NDArray[Any], where: Where, values: NDArray[Any] | float) -> None:
    start = 0
    for piece in where:
        size = piece.stop - piece.start if isinstance(piece, slice) else len(piece)
        total[piece] += values if np.isscalar(values) else values[start : start + size]  # type: ignore[index]
        start += size
