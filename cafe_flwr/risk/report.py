"""What exit thresholds do to labelled examples: realised risks, coverage, accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cafe_flwr.risk.thresholds import ExitThresholds, checked_correct


@dataclass(frozen=True)
class RiskReport:
    """What thresholds do to given examples; shares of them all unless said otherwise.

    Attributes
    ----------
    selective_risk
        Wrong among those that left early; 0 if nobody did.
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
    """Realised risks of thresholds on labelled examples, other ones than those they were calibrated on.

    Parameters
    ----------
    thresholds
        To be judged.
    confidence, correct
        (N, m) as for ``cafe_flwr.risk.calibrate``, N ≥ 1.

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
    last = thresholds.num_exits - 1
    outcome = right[np.arange(len(exits)), exits]
    early, full = exits < last, right[:, last]
    wrong = int((early & ~outcome).sum())
    return RiskReport(
        selective_risk=wrong / max(int(early.sum()), 1),
        joint_risk=wrong / len(exits),
        gap=float((full.sum() - outcome.sum()) / len(exits)),
        new_errors=float((full & ~outcome).sum() / len(exits)),
        coverage=float(early.mean()),
        accuracy=float(outcome.mean()),
        exit_shares=tuple(float(s) for s in np.bincount(exits, minlength=last + 1) / len(exits)),
    )
