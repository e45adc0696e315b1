"""Early-exit networks, and exits for any backbone."""

from cafe_flwr.networks.attach import attach_exits as attach_exits
from cafe_flwr.networks.conv import ConvNet as ConvNet
from cafe_flwr.networks.conv import SequenceNet as SequenceNet
from cafe_flwr.networks.early_exit import EarlyExitNetwork as EarlyExitNetwork
from cafe_flwr.networks.early_exit import Exit as Exit
from cafe_flwr.networks.published import PublishedConvNet as PublishedConvNet
from cafe_flwr.networks.published import PublishedResNet18 as PublishedResNet18
from cafe_flwr.networks.published import PublishedTransformer as PublishedTransformer
from cafe_flwr.networks.resnet import ResNet18 as ResNet18
from cafe_flwr.networks.statistics import batch_norm_names as batch_norm_names
from cafe_flwr.networks.transformer import TextTransformer as TextTransformer
