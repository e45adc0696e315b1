"""Early-exit networks."""

from cafe_flwr.networks.attach import attach_exits
from cafe_flwr.networks.conv import ConvNet, SequenceNet
from cafe_flwr.networks.early_exit import EarlyExitNetwork, Exit
from cafe_flwr.networks.published import PublishedConvNet, PublishedResNet18, PublishedTransformer
from cafe_flwr.networks.resnet import ResNet18
from cafe_flwr.networks.statistics import batch_norm_names
from cafe_flwr.networks.transformer import TextTransformer

__all__ = [
    "ConvNet",
    "EarlyExitNetwork",
    "Exit",
    "PublishedConvNet",
    "PublishedResNet18",
    "PublishedTransformer",
    "ResNet18",
    "SequenceNet",
    "TextTransformer",
    "attach_exits",
    "batch_norm_names",
]
