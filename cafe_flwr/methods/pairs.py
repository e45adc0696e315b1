"""Similarities of pairs of clients, from the last round in which both took part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pairs:
    """A symmetric sparse matrix S of similarities; pairs that were never in one round are not stored, and count as 0.

    A pair takes twelve bytes: a round of a thousand clients has half a million pairs, 6 MB.

    Attributes
    ----------
    keys
        (pairs,) int64, ascending: i·2³² + j of the clients i < j.
    values
        (pairs,) float32: S_ij.

    Examples
    --------
    >>> pairs = Pairs().updated([4, 9], np.array([[1.0, -0.5], [-0.5, 1.0]]))
    >>> pairs.among([9, 7, 4])
    array([[ 0. ,  0. , -0.5],
           [ 0. ,  0. ,  0. ],
           [-0.5,  0. ,  0. ]])
    """

    keys: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    values: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.keys)

    def among(self, clients: Sequence[int]) -> NDArray[np.float64]:
        """S of these clients, (n, n), in their order, with 0 on the diagonal."""
        rows, columns, keys = _keys(clients)
        matrix = np.zeros((len(clients), len(clients)))
        if len(self.keys):
            at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            found = np.where(self.keys[at] == keys, self.values[at], 0.0)
            matrix[rows, columns] = matrix[columns, rows] = found
        return matrix

    def updated(self, clients: Sequence[int], similarity: NDArray[np.float64]) -> Pairs:
        """S with the entries of these clients replaced by their new similarities (n, n)."""
        rows, columns, keys = _keys(clients)
        order = np.argsort(keys)  # S may be long: the new keys are inserted, S is not sorted again
        keys, met = keys[order], similarity[rows, columns].astype(np.float32)[order]
        at = np.searchsorted(self.keys, keys)
        new = np.ones(len(keys), dtype=bool)
        inside = at < len(self.keys)
        new[inside] = self.keys[at[inside]] != keys[inside]
        values = self.values.copy()
        values[at[~new]] = met[~new]
        if not new.any():
            return Pairs(self.keys, values)
        return Pairs(np.insert(self.keys, at[new], keys[new]), np.insert(values, at[new], met[new]))


def _keys(clients: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the upper triangle, and the key of every pair in it."""
    ids = np.asarray(clients, dtype=np.int64)
    rows, columns = np.triu_indices(len(ids), 1)
    low, high = np.minimum(ids[rows], ids[columns]), np.maximum(ids[rows], ids[columns])
    return rows, columns, (low << 32) | high
