"""Robust means of the clients' shared parts, to which every client counts alike, whatever examples it says it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.core.schema import Schema
from cafe_flwr.wire.bounds import norm
from cafe_flwr.wire.slices import positions

_BLOCK = 2**22  # numbers that are sorted at a time


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
    size = min(2**16, max(64, _BLOCK // max(1, len(clients))))
    result = before.copy()

    def block(start: int) -> None:
        stop = min(start + size, len(before))
        rows = np.full((len(clients), stop - start), np.inf, dtype=np.float32)
        for row, (part, values) in zip(rows, clients, strict=True):
            where = places[part]
            if where is None:
                row[:] = values[start:stop]
            else:
                held = where[start:stop] >= 0
                row[held] = values[where[start:stop][held]]
        columns = np.ascontiguousarray(rows.T)
        columns.sort(axis=1)  # what a client does not hold comes last
        alike = all(where is None for where in places.values())
        counts = np.full(stop - start, len(clients)) if alike else np.isfinite(columns).sum(axis=1)
        for count in np.unique(counts[counts > 0]).tolist():
            of_count, out = slice(None) if alike else counts == count, cut(count)
            result[start:stop][of_count] = columns[of_count, out : count - out].mean(axis=1, dtype=np.float64)

    with ThreadPoolExecutor() as pool:  # sorting lets other threads run
        list(pool.map(block, range(0, len(before), size)))
    return result


def clipped(
    clients: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> Iterator[NDArray[np.floating]]:
    """The shared part of each client, with its update scaled down to the median of the updates' norms.

    Norm clipping as in Sun et al. (2019, arXiv 1911.07963), θ ← θ₀ + Δ·min(1, M/‖Δ‖); M is the median, the quantile of
    Andrew et al. (NeurIPS 2021, arXiv 1905.03871) without their noise.

    Parameters
    ----------
    clients
        For each client its shared part as it came back, and as it was sent.

    Examples
    --------
    >>> start = np.float32([1, 1])
    >>> [theta.tolist() for theta in clipped([(start + x, start) for x in np.float32([1, -2, 100])])]
    [[2.0, 2.0], [-1.0, -1.0], [3.0, 3.0]]
    """
    clients = list(clients)
    with ThreadPoolExecutor() as pool:
        lengths = list(pool.map(lambda one: norm(np.subtract(*one, dtype=np.float64)), clients))
    limit = float(np.median(lengths)) if lengths else 0.0
    for (after, sent), length in zip(clients, lengths, strict=True):
        if length <= limit:
            yield after
        else:
            yield sent + np.subtract(after, sent, dtype=np.float64) * (limit / length)


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
