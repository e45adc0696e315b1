"""Exact tests of a risk along a path of thresholds, and where along it to start them."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrik, betaincinv

from cafe_flwr.risk.thresholds import check_level


def minimum_trials(risk: float, delta: float) -> int:
    """n_min = ⌈ln δ / ln(1 − α)⌉: trials without an error after which a risk above α is rejected at level δ.

    Examples
    --------
    >>> [minimum_trials(a, 0.1) for a in (0.01, 0.05, 0.1)]
    [230, 45, 22]
    """
    check_level("risk", risk)
    check_level("delta", delta)
    exact = math.log(delta) / math.log1p(-risk)
    if not math.isfinite(exact):
        raise ValueError(f"risk {risk!r} is too small: no number of examples is enough")
    n = max(1, round(exact))
    if abs(exact - n) > 8 * sys.float_info.epsilon * n:
        return max(1, math.ceil(exact))
    return n if (1 - risk) ** n <= delta else n + 1  # too near to call: as the test itself computes it


def binomial_p_values(errors: ArrayLike, trials: ArrayLike, risk: float) -> NDArray[np.float64]:
    """P(Bin(trials, α) ≤ errors), the exact p-value of "the risk is α or more"; 1 without trials.

    Examples
    --------
    >>> binomial_p_values([0, 1], [2, 2], 0.5)
    array([0.25, 0.75])
    """
    return np.asarray(bdtr(np.asarray(errors, np.float64), np.asarray(trials, np.int64), risk))


def upper_bounds(errors: ArrayLike, trials: ArrayLike, delta: float) -> NDArray[np.float64]:
    """Clopper–Pearson bounds, which the risk exceeds with probability δ at most; 1 if all trials, or none, are errors.

    It is at most α exactly where :func:`binomial_p_values` for α are at most δ.

    Examples
    --------
    >>> upper_bounds([0, 2], [22, 2], delta=0.1).round(3)
    array([0.099, 1.   ])
    """
    e, n = np.asarray(errors, np.float64), np.asarray(trials, np.float64)
    return np.where(e < n, betaincinv(e + 1, np.maximum(n - e, 1), 1 - delta), 1.0)


def fixed_sequence(p_values: NDArray[np.float64], start: int, delta: float) -> int:
    """Last position from ``start`` on before the first p-value above δ; −1 if the start itself fails."""
    failed = np.flatnonzero(p_values[start:] > delta)
    end = start + (int(failed[0]) if len(failed) else len(p_values) - start) - 1
    return end if end >= start else -1


def controlled_position(ever_harmed: NDArray[np.int64], num_examples: int, risk: float, num_clients: int = 1) -> int:
    """Laxest position with (E + J)/(n + J) ≤ α, for counts that grow along the path; −1 if there is none."""
    passed = (ever_harmed + num_clients) / (num_examples + num_clients) <= risk
    return int(passed.sum()) - 1


def likeliest_start(
    trials: NDArray[np.floating[Any]], harmed: NDArray[Any], among: NDArray[Any], risk: float, delta: float
) -> int:
    """Position of a path whose test, at level δ, most likely passes, judged by other data than those tested.

    At every position, (U,) each: ``trials`` are expected in the test; in the other data, ``harmed`` of ``among``.
    """
    expected = np.floor(np.asarray(trials, np.float64) + 1e-9).astype(np.int64)
    share = np.minimum((harmed + risk / 2) / (among + 0.5), 1.0)  # half an example at risk α against zero counts
    allowed = np.floor(bdtrik(delta, np.maximum(expected, 1), risk))
    allowed = np.where(bdtr(allowed, expected, risk) <= delta, allowed, allowed - 1)
    passes = np.where(allowed >= 0, bdtr(np.maximum(allowed, 0), expected, share), 0.0)
    return int(passes.argmax())


def safe_start(harmed: NDArray[Any], among: int, num_examples: int, risk: float) -> int:
    """Last position whose share of harm in other data is three standard errors below α; 0 if there is none.

    The other data are ``among`` examples, of which ``harmed``, (U,), came to harm; the test has ``num_examples``.
    """
    if not among:
        return 0
    margin = 3 * math.sqrt(risk * (1 - risk) * (1 / among + 1 / num_examples)) + 1 / num_examples
    safe = np.flatnonzero(harmed / among + margin <= risk)
    return int(safe[-1]) if len(safe) else 0
