"""Realised risks, coverage and accuracy of exit thresholds on labelled examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cafe_flwr.metrics.selective import Outcome
from cafe_flwr.risk.thresholds import ExitThresholds, checked_correct


@dataclass(frozen=True)
class RiskReport:
    """Realised risks of thresholds; shares of all given examples unless said otherwise.

    Attributes
    ----------
    selective_risk
        Wrong among those that left early; 0 if none did.
    joint_risk
        Left early and wrong.
    gap
        Error of the dynamic network − error of the full network (may be negative).
    new_errors
        Wrong where they left and right at the last exit: what ``gap`` calibration bounds, never below ``gap``.
    coverage
        Left early.
    accuracy
        Right where they left, the last exit included.
    exit_shares
        Left at each exit (m).
    """

    selective_risk: float
    joint_risk: float
    gap: float
    new_errors: float
    coverage: float
    accuracy: float
    exit_shares: tuple[float, ...]


def risk_report(thresholds: ExitThresholds, confidence: ArrayLike, correct: ArrayLike) -> RiskReport:
    """Realised risks of thresholds on examples (N, m), N ≥ 1, other ones than those they were calibrated on.

    ``confidence`` and ``correct`` are as for :func:`cafe_flwr.risk.calibrate`; errors, too.

    Examples
    --------
    >>> t = ExitThresholds((0.8,), certified=True, coverage=0.5, guarantee="selective", risk=0.05)
    >>> report = risk_report(t, [[0.9, 0.9], [0.7, 0.9]], [[False, True], [False, True]])
    >>> report.selective_risk, report.joint_risk, report.gap, report.exit_shares
    (1.0, 0.5, 0.5, (0.5, 0.5))
    """
    exits = thresholds.leave(confidence)
    if not len(exits):
        raise ValueError("there are no examples to report risks of")
    right = checked_correct(correct, (len(exits), thresholds.num_exits))
    outcome = Outcome.of(exits, right)
    measured = outcome.measures([1.0] * thresholds.num_exits)
    new_errors = right[:, -1] & ~right[np.arange(len(exits)), exits]
    return RiskReport(
        selective_risk=measured["selective_risk"] if measured["coverage"] else 0.0,
        joint_risk=measured["joint_risk"],
        gap=measured["gap"],
        new_errors=float(new_errors.mean()),
        coverage=measured["coverage"],
        accuracy=measured["accuracy"],
        exit_shares=tuple(outcome.shares()),
    )
