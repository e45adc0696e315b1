"""Personalised federated learning of early-exit networks on Flower."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cafe_flwr.networks import EarlyExitNetwork as EarlyExitNetwork
    from cafe_flwr.networks import attach_exits as attach_exits
    from cafe_flwr.node import make_client_app as make_client_app
    from cafe_flwr.strategy import CafeDistill as CafeDistill

_HOME = {
    "CafeDistill": "cafe_flwr.strategy",
    "EarlyExitNetwork": "cafe_flwr.networks",
    "attach_exits": "cafe_flwr.networks",
    "make_client_app": "cafe_flwr.node",
}

__all__ = ["CafeDistill", "EarlyExitNetwork", "__version__", "attach_exits", "make_client_app"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: a process imports no more than it needs."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
