"""ResNet-18 for small images, with an exit after each of its four stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from cafe_flwr.core.numbers import check_counts
from cafe_flwr.networks.checks import ImageNetwork, check_norm, narrow
from cafe_flwr.networks.early_exit import Exit


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels // 2), channels)  # at most 32 groups, with at least two channels each


_NORMS: dict[str, Callable[[int], nn.Module]] = {"group": _group_norm, "batch": nn.BatchNorm2d}


class ResNet18(ImageNetwork):
    """ResNet-18 (He et al., arXiv 1512.03385) from torchvision's blocks, for images of 32×32 or 64×64.

    The stem is the one in use for CIFAR, and for Tiny-ImageNet as well: a 3×3 convolution with stride 1 and no pooling.
    On 64×64 images every map is then twice as high and wide as on 32×32, at four times the MACs; ``stem_stride=2``
    makes them the same size at the same MACs.

    The projection of an exit is global average pooling, a linear layer and a layer norm, as in ``ConvNet``. Weights
    start as torchvision starts them.

    Parameters
    ----------
    input_shape
        (channels, height, width) of the images.
    num_classes
        C.
    features
        Feature width at every exit.
    norm
        ``"group"`` (up to 32 groups of channels, no running statistics to average over clients) or ``"batch"``, as
        published (see ``statistics`` of the network).
    width
        Channels of the first stage; the others have 2, 4 and 8 times as many. 64 is ResNet-18.
    stem_stride
        Stride of the first convolution.

    Raises
    ------
    ValueError
        If the images are too small to be halved three times, or the norm is not known.

    Examples
    --------
    >>> network = ResNet18(input_shape=(3, 32, 32), num_classes=100)
    >>> network.num_exits, round(sum(p.numel() for p in network.parameters()) / 1e6, 2)
    (4, 11.34)
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        features: int = 128,
        norm: Literal["group", "batch"] = "group",
        width: int = 64,
        stem_stride: int = 1,
    ) -> None:
        check_counts(features=features)
        stages = residual_stages(input_shape, norm, width, stem_stride)
        for module in nn.ModuleList(stages).modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        exits = [Exit(_projection(width << k, features), features, num_classes) for k in range(4)]
        super().__init__(stages, exits, input_shape[0])
        self._built = (tuple(input_shape), num_classes, features, norm, width, stem_stride)

    def at_width(self, share: float) -> ResNet18:
        """The network with about this share of the channels of all stages."""
        shape, classes, features, norm, width, stem_stride = self._built
        return ResNet18(shape, classes, features, norm, narrow(width, share, 2), stem_stride)


def residual_stages(
    input_shape: Sequence[int], norm: Literal["group", "batch"] = "batch", width: int = 64, stem_stride: int = 1
) -> list[nn.Module]:
    """The four stages of a ResNet-18 behind the CIFAR stem, with torch's initial weights.

    Parameters and errors are those of :class:`ResNet18`. Stage k, from 0, gives width · 2ᵏ channels.
    """
    check_counts(input_shape=input_shape, width=width, stem_stride=stem_stride)
    channels, *size = input_shape
    if len(size) != 2 or min(size) < 8 * stem_stride:
        raise ValueError(
            f"images must be at least {8 * stem_stride} pixels high and wide, got an input of shape "
            f"{tuple(input_shape)}"
        )
    check_norm(norm, _NORMS)
    if width < 2 or width % 2:
        raise ValueError(f"width must be an even number of channels, got {width}")
    layer = _NORMS[norm]
    stem = [nn.Conv2d(channels, width, 3, stem_stride, padding=1, bias=False), layer(width), nn.ReLU(inplace=True)]
    stages: list[nn.Module] = [nn.Sequential(*stem, *_blocks(width, width, 1, layer))]
    return stages + [nn.Sequential(*_blocks(width << (k - 1), width << k, 2, layer)) for k in (1, 2, 3)]


def _blocks(channels: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> list[nn.Module]:
    """The two residual blocks of a stage."""
    from torchvision.models.resnet import BasicBlock

    shortcut = None
    if stride != 1 or channels != width:
        shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), norm(width))
    return [BasicBlock(channels, width, stride, shortcut, norm_layer=norm), BasicBlock(width, width, norm_layer=norm)]


def _projection(channels: int, features: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, features), nn.LayerNorm(features))
