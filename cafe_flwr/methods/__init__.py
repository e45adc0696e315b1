"""Methods of federated learning, one file each, with its server half and its client half."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

if TYPE_CHECKING:
    from cafe_flwr.core.options import setting as setting
    from cafe_flwr.methods.base import Method as Method
    from cafe_flwr.methods.base import settings_of as settings_of
    from cafe_flwr.methods.cafedistill import CafeDistillMethod as CafeDistillMethod
    from cafe_flwr.methods.client import LocalResult as LocalResult
    from cafe_flwr.methods.client import LocalTask as LocalTask
    from cafe_flwr.methods.registry import METHODS as METHODS
    from cafe_flwr.methods.server import ClientRecord as ClientRecord
    from cafe_flwr.methods.server import Conclusion as Conclusion
    from cafe_flwr.methods.server import RoundPlan as RoundPlan
    from cafe_flwr.methods.server import ServerRound as ServerRound
    from cafe_flwr.methods.server import joined_plans as joined_plans


__getattr__ = lazily(
    __name__,
    {
        "cafe_flwr.core.options": "setting",
        "cafe_flwr.methods.base": "Method settings_of",
        "cafe_flwr.methods.cafedistill": "CafeDistillMethod",
        "cafe_flwr.methods.client": "LocalResult LocalTask",
        "cafe_flwr.methods.registry": "METHODS",
        "cafe_flwr.methods.server": "ClientRecord Conclusion RoundPlan ServerRound joined_plans",
    },
)
