"""Robust means of the clients' shared parts, to which every client counts alike, whatever examples it says it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.core.schema import Schema
from cafe_flwr.wire.bounds import norm
from cafe_flwr.wire.slices import positions

_BLOCK = 2**21  # numbers, of all clients, that are combined at a time


def trimmed_mean(
    before: NDArray[np.float32],
    whole: Schema,
    clients: Sequence[tuple[Schema, NDArray[np.float32]]],
    cut: Callable[[int], int],
) -> NDArray[np.float32]:
    """Of every value, the mean over the clients that hold it without the ``cut(n)`` smallest and largest of all n.

    The coordinate-wise trimmed mean of Yin et al. (ICML 2018, arXiv 1803.01498, definition 2), as in Flower's
    FedTrimmedAvg; with ``cut(n) = (n−1)//2`` their coordinate-wise median (definition 1), as in Flower's FedMedian. If
    at most ``cut(n)`` clients lie, every value is between the smallest and the largest of the honest ones.

    Parameters
    ----------
    before
        The federation's shared part (P,); what no client holds stays so.
    whole
        Its schema.
    clients
        For each client the schema of what it holds, and the finite values. The order does not matter.
    cut
        From the number of clients that hold a value; less than half of it.

    Examples
    --------
    >>> whole = Schema((("a", (1,)), ("b", (1,)), ("c", (1,))))
    >>> short, long = Schema(whole.entries[:1]), Schema(whole.entries[:2])
    >>> clients = [(short, np.float32([1])), (long, np.float32([2, 7])), (short, np.float32([-900]))]
    >>> trimmed_mean(np.float32([0, 0, 9]), whole, clients, lambda n: (n - 1) // 2)
    array([1., 7., 9.], dtype=float32)
    """
    places = {part: _inverse(whole, part) for part, _ in clients}
    alike, result = all(where is None for where in places.values()), before.copy()

    def block(start: int, stop: int) -> None:
        columns = np.empty((stop - start, len(clients)), dtype=np.float32)
        if not alike:
            columns.fill(np.inf)  # what a client does not hold comes last
        for i, (part, values) in enumerate(clients):
            held, found = _piece(values, places[part], start, stop)
            columns[held, i] = found
        columns.sort(axis=1)
        counts = np.full(stop - start, len(clients)) if alike else np.isfinite(columns).sum(axis=1)
        for count in np.unique(counts[counts > 0]).tolist():
            of_count, out = slice(None) if alike else counts == count, cut(count)
            result[start:stop][of_count] = columns[of_count, out : count - out].mean(axis=1, dtype=np.float64)

    _in_blocks(block, len(before), len(clients))
    return result


def clipped_mean(
    before: NDArray[np.float32], whole: Schema, clients: Sequence[tuple[Schema, NDArray[np.float32]]]
) -> NDArray[np.float32]:
    """Mean over the clients that hold a value, of updates that are scaled down to the median of their norms.

    Norm clipping as in Sun et al. (2019, arXiv 1911.07963), θ ← θ₀ + mean of Δ·min(1, M/‖Δ‖); M is the median, the
    quantile of Andrew et al. (NeurIPS 2021, arXiv 1905.03871) without their noise. Parameters as of
    :func:`trimmed_mean`; clients are summed up in their order.

    Examples
    --------
    >>> whole, start = Schema((("a", (2,)),)), np.float32([1, 1])
    >>> clipped_mean(start, whole, [(whole, start + x) for x in np.float32([1, -2, 100])])
    array([1.3333334, 1.3333334], dtype=float32)
    """
    places = {part: _inverse(whole, part) for part, _ in clients}
    lengths = [0.0] * len(clients)

    def measure(i: int) -> None:
        part, values = clients[i]
        where = places[part]
        lengths[i] = norm(np.subtract(values, before if where is None else before[where >= 0], dtype=np.float64))

    with ThreadPoolExecutor() as pool:
        list(pool.map(measure, range(len(clients))))
    limit, result = float(np.median(lengths)), before.copy()
    factors = [limit / length if length > limit else 1.0 for length in lengths]

    def block(start: int, stop: int) -> None:
        base, total, counts = before[start:stop].astype(np.float64), np.zeros(stop - start), np.zeros(stop - start)
        for (part, values), factor in zip(clients, factors, strict=True):
            held, found = _piece(values, places[part], start, stop)
            total[held] += factor * (found - base[held])
            counts[held] += 1
        result[start:stop] = base + total / np.maximum(counts, 1)

    _in_blocks(block, len(before), 2**7)
    return result


def _in_blocks(block: Callable[[int, int], None], size: int, clients: int) -> None:
    """Call ``block(start, stop)`` for pieces of an array that fit the processor's cache for so many clients."""
    step = min(2**16, max(64, _BLOCK // max(1, clients)))
    with ThreadPoolExecutor() as pool:  # numpy lets other threads run
        list(pool.map(lambda start: block(start, min(start + step, size)), range(0, size, step)))


def _piece(
    values: NDArray[np.float32], where: NDArray[np.int64] | None, start: int, stop: int
) -> tuple[slice | NDArray[np.bool_], NDArray[np.float32]]:
    """Which values of a block a client holds, and these values."""
    if where is None:
        return slice(None), values[start:stop]
    held = where[start:stop] >= 0
    return held, values[where[start:stop][held]]


def _inverse(whole: Schema, part: Schema) -> NDArray[np.int64] | None:
    """For every value of the whole its place in the part, −1 if it has none; None if the part is the whole."""
    if part == whole:
        return None
    found, start = np.full(whole.size, -1), 0
    for piece in positions(whole, part):
        size = len(found[piece])
        found[piece] = np.arange(start, start + size)
        start += size
    return found
