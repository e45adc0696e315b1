"""Summaries over clients."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def worst_share(values: ArrayLike, share: float = 0.1) -> float:
    """Mean over the worst ``share`` of the clients (at least one), NaN left out.

    Examples
    --------
    >>> worst_share([0.9, 0.2, 0.8, float("nan")])
    0.2
    """
    known = np.sort(np.asarray(values, dtype=np.float64))
    known = known[~np.isnan(known)]
    if not len(known):
        return float("nan")
    return float(known[: max(1, round(len(known) * share))].mean())
