"""Convolutional networks for images and for sequences, with an exit after each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from cafe_flwr.core.numbers import check_counts
from cafe_flwr.networks.checks import IMAGE_NORMS, check_images, check_norm, narrow
from cafe_flwr.networks.early_exit import EarlyExitNetwork, Exit

_CELLS = 4  # an exit sees its block's output as at most 4 cells a dimension, so that it can tell left from right

# By the dimensions of the input: convolution, batch norm, maximum and average over cells.
_LAYERS: dict[int, tuple[type[nn.Module], ...]] = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
}


class _Blocks(EarlyExitNetwork):
    """The part that images and sequences share."""

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        widths: Sequence[int] = (8, 16, 32),
        features: int = 24,
        norm: str = "group",
    ) -> None:
        check_counts(input_shape=input_shape, widths=widths, features=features)
        self._check_shape(tuple(input_shape), len(widths))
        super().__init__(*_blocks(input_shape, num_classes, widths, features, norm))
        self.input_shape = tuple(input_shape)
        self._built = (num_classes, tuple(widths), features, norm)

    @staticmethod
    def _check_shape(shape: tuple[int, ...], blocks: int) -> None:
        """ValueError if the input cannot be halved by every block."""
        raise NotImplementedError

    def at_width(self, share: float) -> Self:
        """The network with about this share of every block's channels, in multiples of 4."""
        classes, widths, features, norm = self._built
        return type(self)(self.input_shape, classes, [narrow(width, share, 4) for width in widths], features, norm)


class ConvNet(_Blocks):
    """Blocks of 3×3 convolution, norm, ReLU and 2×2 max pooling, with an exit after each.

    The projection of an exit is average pooling, a linear layer and a layer norm; without the norm, summed exit losses
    need a learning rate several times smaller. :class:`cafe_flwr.networks.PublishedConvNet` is the authors' own.

    Parameters
    ----------
    input_shape
        (channels, height, width) of the images.
    num_classes
        C.
    widths
        Channels of the blocks; multiples of 4, for the group norm.
    features
        Feature width at every exit.
    norm
        ``"group"`` (4 groups of channels) or ``"batch"`` (see ``statistics`` of the network).

    Raises
    ------
    ValueError
        If the images are too small to be halved once per block, or the norm is unknown.

    Examples
    --------
    >>> network = ConvNet(input_shape=(1, 16, 16), num_classes=100)
    >>> sum(p.numel() for p in network.parameters())
    25948
    """

    @staticmethod
    def _check_shape(shape: tuple[int, ...], blocks: int) -> None:
        if len(shape) != 3 or min(shape[1:]) < 2**blocks:
            raise ValueError(
                f"images must be at least {2**blocks} pixels high and wide for {blocks} blocks, got an input of shape "
                f"{shape}"
            )

    def check_inputs(self, x: Tensor) -> None:
        """Raise ValueError if these are not images with its number of channels."""
        check_images(x, self.input_shape[0])


class SequenceNet(_Blocks):
    """Blocks of convolution along time, norm, ReLU and max pooling of pairs of steps, with an exit after each.

    Parameters and errors are those of :class:`ConvNet`; ``input_shape`` is (channels, steps).

    Examples
    --------
    >>> network = SequenceNet((16, 16), num_classes=10)
    >>> [tuple(z.shape) for z in network(torch.zeros(2, 16, 16))]
    [(2, 10), (2, 10), (2, 10)]
    """

    @staticmethod
    def _check_shape(shape: tuple[int, ...], blocks: int) -> None:
        if len(shape) != 2 or shape[1] < 2**blocks:
            raise ValueError(
                f"sequences must have at least {2**blocks} steps for {blocks} blocks, got an input of shape {shape}"
            )

    def check_inputs(self, x: Tensor) -> None:
        """Raise ValueError if these are not sequences with its channels and steps."""
        channels, steps = self.input_shape
        if tuple(x.shape[1:]) != (channels, steps) or x.dtype not in (torch.float32, torch.uint8):
            raise ValueError(
                f"sequences must be (N, {channels}, {steps}), float32; got {x.dtype} of shape {tuple(x.shape)}"
            )


def _blocks(
    input_shape: Sequence[int], num_classes: int, widths: Sequence[int], features: int, norm: str
) -> tuple[list[nn.Module], list[Exit]]:
    """Blocks and exits for inputs of (channels, …)."""
    check_norm(norm, IMAGE_NORMS)
    if norm == "group" and any(width % 4 for width in widths):
        raise ValueError(f"widths must be multiples of 4 for the group norm, got {', '.join(map(str, widths))}")
    in_channels, *size = input_shape
    convolution, batch_norm, maximum, average = _LAYERS[len(size)]
    channels = [in_channels, *widths]
    stages: list[nn.Module] = []
    exits = []
    for k, width in enumerate(widths):
        stages.append(
            nn.Sequential(
                convolution(channels[k], width, 3, padding=1, bias=False),
                nn.GroupNorm(4, width) if norm == "group" else batch_norm(width),
                nn.ReLU(),
                maximum(2),
            )
        )
        cells = min(_CELLS, min(size) >> (k + 1))
        projection = nn.Sequential(
            average(cells), nn.Flatten(), nn.Linear(cells ** len(size) * width, features), nn.LayerNorm(features)
        )
        exits.append(Exit(projection, features, num_classes))
    return stages, exits
