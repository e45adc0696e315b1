"""Methods of federated learning, one file each, both halves."""

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

__all__ = [
    "METHODS",
    "CafeDistillMethod",
    "ClientRecord",
    "Conclusion",
    "LocalResult",
    "LocalTask",
    "Method",
    "RoundPlan",
    "ServerRound",
    "joined_plans",
    "setting",
    "settings_of",
]

__getattr__ = lazily(
    __name__,
    {
        "METHODS": "cafe_flwr.methods.registry",
        "CafeDistillMethod": "cafe_flwr.methods.cafedistill",
        "ClientRecord": "cafe_flwr.methods.server",
        "Conclusion": "cafe_flwr.methods.server",
        "LocalResult": "cafe_flwr.methods.client",
        "LocalTask": "cafe_flwr.methods.client",
        "Method": "cafe_flwr.methods.base",
        "RoundPlan": "cafe_flwr.methods.server",
        "ServerRound": "cafe_flwr.methods.server",
        "joined_plans": "cafe_flwr.methods.server",
        "setting": "cafe_flwr.core.options",
        "settings_of": "cafe_flwr.methods.base",
    },
)
