"""Personalised federated learning of early-exit networks on Flower."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cafe_flwr.client.app import make_client_app as make_client_app
    from cafe_flwr.networks.attach import attach_exits as attach_exits
    from cafe_flwr.networks.early_exit import EarlyExitNetwork as EarlyExitNetwork
    from cafe_flwr.server.cafedistill import CafeDistill as CafeDistill

__all__ = ["CafeDistill", "EarlyExitNetwork", "__version__", "attach_exits", "make_client_app"]

__getattr__ = lazily(
    __name__,
    {
        "cafe_flwr.client.app": "make_client_app",
        "cafe_flwr.networks.attach": "attach_exits",
        "cafe_flwr.networks.early_exit": "EarlyExitNetwork",
        "cafe_flwr.server.cafedistill": "CafeDistill",
    },
)
