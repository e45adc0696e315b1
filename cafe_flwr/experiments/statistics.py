"""Means over seeds with their spread, and differences that are paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Statistic(NamedTuple):
    """Mean over seeds, standard deviation (n − 1 in the denominator; NaN for one seed), and number of seeds."""

    mean: float
    std: float
    seeds: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / math.sqrt(self.seeds) if self.seeds else math.nan


def statistic(values: Iterable[float]) -> Statistic:
    """Statistic of the values that are not NaN.

    Examples
    --------
    >>> statistic([1.0, 3.0, math.nan])
    Statistic(mean=2.0, std=1.4142135623730951, seeds=2)
    >>> statistic([1.0])
    Statistic(mean=1.0, std=nan, seeds=1)
    """
    known = [value for value in values if not math.isnan(value)]
    mean = float(np.mean(known)) if known else math.nan
    return Statistic(mean, float(np.std(known, ddof=1)) if len(known) > 1 else math.nan, len(known))


def paired_difference(row: Mapping[int, float], reference: Mapping[int, float]) -> Statistic:
    """Statistic of row − reference over the seeds that both have: positive where the row is higher.

    Examples
    --------
    >>> paired_difference({0: 0.75, 1: 0.5, 2: 0.5}, {0: 0.5, 1: 0.5})
    Statistic(mean=0.125, std=0.1767766952966369, seeds=2)
    """
    return statistic(row[seed] - reference[seed] for seed in row if seed in reference)
