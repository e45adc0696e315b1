"""Means that leave out NaN, and whole numbers from 1 up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def mean_rows(rows: Iterable[Sequence[float]]) -> list[float]:
    """Column means of the values that are not NaN."""
    return [mean(column) for column in zip(*rows, strict=True)]


def check_counts(**values: Any) -> None:
    """Raise ValueError, naming the argument, unless each value is a whole number from 1 up, or a sequence of such.

    Examples
    --------
    >>> check_counts(width=8, input_shape=(3, 32, 32))
    >>> check_counts(num_classes=0)
    Traceback (most recent call last):
        ...
    ValueError: num_classes must be a whole number from 1 up, not 0
    """
    for name, value in values.items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        for count in value if several else [value]:
            if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
                what = "whole numbers" if several else "a whole number"
                raise ValueError(f"{name} must be {what} from 1 up, not {value!r}")
