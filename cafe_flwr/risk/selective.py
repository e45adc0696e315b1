"""Exit thresholds that keep a risk the user states, with finite-sample guarantees.

Examples are split at random into a proposal fold, whose labels shape a path of thresholds from strict to lax, and a
certification fold, whose labels only decide how far along it one may go. Examples must be independent draws of the same
distribution as those to come; under a shift every guarantee is void.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cafe_flwr.risk.exact_tests import (
    binomial_p_values,
    controlled_position,
    fixed_sequence,
    likeliest_start,
    minimum_trials,
    safe_start,
)
from cafe_flwr.risk.path import ThresholdPath, count_along, histogram, path_from, quantile_edges
from cafe_flwr.risk.report import risk_report
from cafe_flwr.risk.thresholds import (
    BASELINES,
    GUARANTEES,
    ExitThresholds,
    check_known,
    check_level,
    checked_confidence,
    checked_correct,
)


def calibrate(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    risk: float,
    confidence_level: float = 0.9,
    guarantee: str = "selective",
    seed: int = 0,
) -> ExitThresholds:
    """Thresholds that let as many examples leave early as the stated risk α allows.

    ``selective``
        P(wrong | left early) ≤ α with confidence 1 − δ: Learn-then-Test (Angelopoulos et al., arXiv 2110.01052) by
        fixed-sequence testing. Given that A examples left early their errors are exactly Bin(A, risk), so
        P(Bin(A, α) ≤ E) is an exact p-value. The walk starts where the proposal fold says it most likely passes, goes
        on to laxer thresholds and ends before the first p-value above δ: a wrong certificate needs the first position
        of the walk that is too risky to pass, which has probability δ at most, whatever the risk's shape along it.
    ``joint``
        E[1{left early and wrong}] ≤ α, the mean over calibration sets too: conformal risk control (Angelopoulos et al.,
        arXiv 2208.02814), (E + 1)/(n + 1) ≤ α. It needs a loss that grows along the path for every example. With three
        exits or more this one does not (an example may leave right by an earlier exit at a laxer position), so E counts
        those that leave wrong at this or any stricter position of the path, a bound from above that grows.
    ``gap``
        E[error when leaving early − error of the full network] ≤ α with confidence 1 − δ: as ``selective``, with the
        examples that are wrong where they leave and right at the last exit, out of all n. (The difference clipped at 0,
        example by example: it bounds the difference itself.)
    ``quantile``
        A baseline without guarantee: :func:`conformal_thresholds`, as SAFE-KD's code does.

    "Never leave early" is a normal result: all thresholds infinite and ``certified`` false.

    Parameters
    ----------
    confidence
        Of each exit, in [0, 1], (N, m); scaled by temperatures if they will be scaled in use. Fit temperatures on other
        examples (or on the proposal fold, :func:`folds`): those fitted on the certification fold have seen its labels,
        and the guarantee is void.
    correct
        Whether each exit is right, booleans (N, m).
    risk, confidence_level
        α and 1 − δ, both in (0, 1).
    guarantee
        One of the four above.
    seed
        Draws the folds.

    Raises
    ------
    ValueError
        If an argument is out of its range, shapes disagree, or there are fewer examples than
        :func:`required_examples` (even without a single error nothing could be certified).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> confidence = rng.random((2000, 3))
    >>> correct = rng.random((2000, 3)) < 0.5 + confidence / 2
    >>> t = calibrate(confidence, correct, risk=0.1)
    >>> t.certified, t.coverage > 0.2, t.realised_risk < 0.1
    (True, True, True)
    >>> calibrate(confidence[:60], correct[:60], risk=0.01)
    Traceback (most recent call last):
    ...
    ValueError: 60 examples are too few to certify risk 0.01 (selective): at least 344 are needed, or a higher risk
    """
    check_known("guarantee", guarantee, (*GUARANTEES, *BASELINES))
    values = checked_confidence(confidence)
    right = checked_correct(correct, values.shape)
    needed = required_examples(risk, confidence_level, guarantee)
    if len(values) < needed:
        raise ValueError(
            f"{len(values)} examples are too few to certify risk {risk:g} ({guarantee}): at least {needed} are needed, "
            "or a higher risk"
        )
    if guarantee in BASELINES:
        return _baseline(values, right, risk, confidence_level)
    harm = ~right[:, :-1]
    if guarantee == "gap":
        harm &= right[:, -1:]
    proposal, certification = folds(len(values), seed)
    n, delta = len(certification), 1 - confidence_level
    path = _proposed(values[proposal], harm[proposal], n, guarantee, risk, delta)
    counts = count_along(path, values[certification], harm[certification])
    trials = counts.left if guarantee == "selective" else np.full(len(path), n)
    if guarantee == "joint":
        position = controlled_position(counts.ever_harmed, n, risk)
    else:
        position = fixed_sequence(binomial_p_values(counts.harmed, trials, risk), 0, delta)
    return ExitThresholds(
        **path.chosen(position, counts.left, counts.harmed, trials, n),
        guarantee=guarantee,
        risk=float(risk),
        confidence_level=float(confidence_level),
        num_examples=len(values),
    )


def _proposed(
    seen: NDArray[np.floating[Any]],
    harm: NDArray[np.bool_],
    num_examples: int,
    guarantee: str,
    risk: float,
    delta: float,
) -> ThresholdPath:
    """The path from the proposal fold, beginning where a test with so many other examples should start."""
    path = path_from(histogram(quantile_edges(seen), seen, harm))
    guess = count_along(path, seen, harm)
    if guarantee == "joint":
        start = safe_start(guess.harmed, len(seen), num_examples, risk)
    else:
        among = guess.left if guarantee == "selective" else np.full(len(path), len(seen))
        start = likeliest_start(among / len(seen) * num_examples, guess.harmed, among, risk, delta)
    return ThresholdPath(path.thresholds[start:])


def required_examples(risk: float, confidence_level: float = 0.9, guarantee: str = "selective") -> int:
    """Fewest examples from which a guarantee can be certified at all: if all leave early and none is wrong.

    Examples
    --------
    >>> [required_examples(a) for a in (0.01, 0.05, 0.1)], required_examples(0.05, guarantee="joint")
    ([344, 67, 32], 28)
    """
    check_known("guarantee", guarantee, (*GUARANTEES, *BASELINES))
    check_level("confidence_level", confidence_level)
    if guarantee in BASELINES:
        check_level("risk", risk)
        return 1
    certification = minimum_trials(risk, 1 - confidence_level)
    if guarantee == "joint":
        certification = math.ceil(1 / risk) - 1
        certification -= 1 / certification <= risk  # 1 / risk may have been rounded up
        certification += 1 / (certification + 1) > risk
    return 3 * (certification - 1) // 2 + 1  # the fewest of which two thirds, rounded up, are so many


def folds(num_examples: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the proposal fold (a third, rounded down) and of the certification fold, at random."""
    order = np.random.default_rng(seed).permutation(num_examples)
    return order[: num_examples // 3], order[num_examples // 3 :]


def conformal_thresholds(true_probability: ArrayLike, risk: float) -> NDArray[np.float64]:
    """Per exit 1 − q, with q the conformal (1 − α)-quantile of 1 − p(true class): the rule of SAFE-KD's code.

    A baseline for comparison, from p(true class) at every exit, (N, m), N ≥ 1. It does not bound the errors of examples
    that leave: at a weak exit q is large, and everything leaves.

    Examples
    --------
    >>> conformal_thresholds([[0.9, 1.0], [0.8, 1.0], [0.2, 1.0]], risk=0.5)
    array([0.8])
    """
    p = np.sort(np.asarray(true_probability, dtype=np.float64)[:, :-1], axis=0)[::-1]
    rank = min(math.ceil((len(p) + 1) * (1 - risk)), len(p))
    return p[rank - 1]


def _baseline(confidence: Any, right: NDArray[np.bool_], risk: float, confidence_level: float) -> ExitThresholds:
    # Of a wrong prediction only p(true class) ≤ 1 − confidence is known; with two classes that is an equality.
    thresholds = tuple(conformal_thresholds(np.where(right, confidence, 1 - confidence), risk))
    plain = ExitThresholds(thresholds, False, 0.0, "quantile", float(risk), float(confidence_level))
    report = risk_report(plain, confidence, right)
    return replace(plain, coverage=report.coverage, realised_risk=report.selective_risk, num_examples=len(confidence))
