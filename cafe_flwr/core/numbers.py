"""Means that leave out NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def mean_rows(rows: Iterable[Sequence[float]]) -> list[float]:
    """Column means of the values that are not NaN."""
    return [mean(column) for column in zip(*rows, strict=True)]
