"""Exit thresholds with finite-sample guarantees on the errors of examples that leave early."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

if TYPE_CHECKING:
    from cafe_flwr.risk.report import RiskReport as RiskReport
    from cafe_flwr.risk.report import risk_report as risk_report
    from cafe_flwr.risk.selective import calibrate as calibrate
    from cafe_flwr.risk.selective import conformal_thresholds as conformal_thresholds
    from cafe_flwr.risk.selective import folds as folds
    from cafe_flwr.risk.selective import required_examples as required_examples
    from cafe_flwr.risk.thresholds import ExitThresholds as ExitThresholds

__getattr__ = lazily(
    __name__,
    {
        "cafe_flwr.risk.report": "RiskReport risk_report",
        "cafe_flwr.risk.selective": "calibrate conformal_thresholds folds required_examples",
        "cafe_flwr.risk.thresholds": "ExitThresholds",
    },
)
