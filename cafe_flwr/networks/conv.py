"""Convolutional blocks with an exit after each, and the same along time for sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cafe_flwr.networks.checks import IMAGE_NORMS, check_images, check_norm, narrow
from cafe_flwr.networks.early_exit import EarlyExitNetwork, Exit

_CELLS = 4  # an exit sees its block's output as at most 4 cells a dimension, so that left and right stay apart

# By the dimensions of the input: convolution, batch norm, maximum and average over cells.
_LAYERS: dict[int, tuple[type[nn.Module], ...]] = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
}


class ConvNet(EarlyExitNetwork):
    """Blocks of 3×3 convolution, norm, ReLU and 2×2 max pooling, with an exit after each.

    The projection of an exit is average pooling, a linear layer and a layer norm; without the norm, summed exit losses
    need a learning rate several times smaller. The authors' own ConvNet is
    :class:`cafe_flwr.networks.PublishedConvNet`.

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
        ``"group"`` (4 groups of channels) or ``"batch"``, with ``statistics`` to say what becomes of the running
        statistics.

    Raises
    ------
    ValueError
        If the images are too small to be halved once per block, or the norm is not known.

    Examples
    --------
    >>> network = ConvNet(input_shape=(1, 16, 16), num_classes=100)
    >>> sum(p.numel() for p in network.parameters())
    25948
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        widths: Sequence[int] = (8, 16, 32),
        features: int = 24,
        norm: str = "group",
    ) -> None:
        _, *size = input_shape
        if len(size) != 2 or min(size) < 2 ** len(widths):
            raise ValueError(
                f"images must be at least {2 ** len(widths)} pixels high and wide for {len(widths)} blocks, "
                f"got an input of shape {tuple(input_shape)}"
            )
        super().__init__(*_blocks(input_shape, num_classes, widths, features, norm))
        self._built = (tuple(input_shape), num_classes, tuple(widths), features, norm)
        self.in_channels = input_shape[0]

    def at_width(self, share: float) -> ConvNet:
        """With about this share of every block's channels; multiples of 4 stay multiples of 4."""
        shape, classes, widths, features, norm = self._built
        return ConvNet(shape, classes, [narrow(width, share, 4) for width in widths], features, norm)

    def check_inputs(self, x: Tensor) -> None:
        """Raise ValueError if these are not images of its channels."""
        check_images(x, self.in_channels)


class SequenceNet(EarlyExitNetwork):
    """Blocks of convolution along time, norm, ReLU and max pooling of pairs of steps, with an exit after each.

    Parameters
    ----------
    input_shape
        (channels, steps) of the sequences.
    num_classes
        C.
    widths
        Channels of the blocks; multiples of 4, for the group norm.
    features
        Feature width at every exit.
    norm
        ``"group"`` (4 groups of channels) or ``"batch"``.

    Raises
    ------
    ValueError
        If the sequences are too short to be halved once per block, or the norm is not known.

    Examples
    --------
    >>> network = SequenceNet((16, 16), num_classes=10)
    >>> [tuple(z.shape) for z in network(torch.zeros(2, 16, 16))]
    [(2, 10), (2, 10), (2, 10)]
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        widths: Sequence[int] = (8, 16, 32),
        features: int = 24,
        norm: str = "group",
    ) -> None:
        if len(input_shape) != 2 or input_shape[1] < 2 ** len(widths):
            raise ValueError(
                f"sequences must have at least {2 ** len(widths)} steps for {len(widths)} blocks, got an input of "
                f"shape {tuple(input_shape)}"
            )
        super().__init__(*_blocks(input_shape, num_classes, widths, features, norm))
        self._built = (tuple(input_shape), num_classes, tuple(widths), features, norm)
        self.in_channels, self.steps = input_shape

    def at_width(self, share: float) -> SequenceNet:
        """With about this share of every block's channels; multiples of 4 stay multiples of 4."""
        shape, classes, widths, features, norm = self._built
        return SequenceNet(shape, classes, [narrow(width, share, 4) for width in widths], features, norm)

    def check_inputs(self, x: Tensor) -> None:
        """Raise ValueError if these are not sequences of its channels and steps."""
        if tuple(x.shape[1:]) != (self.in_channels, self.steps) or x.dtype not in (torch.float32, torch.uint8):
            raise ValueError(
                f"sequences must be (N, {self.in_channels}, {self.steps}), float32; got {x.dtype} of shape "
                f"{tuple(x.shape)}"
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
            average(cells),
            nn.Flatten(),
            nn.Linear(cells ** len(size) * width, features),
            nn.LayerNorm(features),
        )
        exits.append(Exit(projection, features, num_classes))
    return stages, exits
