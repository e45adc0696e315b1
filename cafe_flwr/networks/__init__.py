"""Early-exit networks."""

from cafe_flwr.networks.base import EarlyExitNetwork, Exit
from cafe_flwr.networks.conv import ConvNet

__all__ = ["ConvNet", "EarlyExitNetwork", "Exit"]
