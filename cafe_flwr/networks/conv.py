"""The paper's ConvNet: three convolutional blocks, an exit after each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cafe_flwr.networks.base import EarlyExitNetwork, Exit
from cafe_flwr.networks.checks import IMAGE_NORMS, check_images, check_norm, narrow

_CELLS = 4  # an exit sees its block's output as at most 4×4 cells, so that left and right stay apart


class ConvNet(EarlyExitNetwork):
    """Blocks of 3×3 convolution, norm, ReLU and 2×2 max pooling, with an exit after each.

    The projection of an exit is average pooling, a linear layer and a layer norm; without the norm, summed exit losses
    need a learning rate several times smaller. The published ConvNet has three blocks; their widths are not published
    (docs/method.md).

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
        check_norm(norm, IMAGE_NORMS)
        if norm == "group" and any(width % 4 for width in widths):
            raise ValueError(f"widths must be multiples of 4 for the group norm, got {', '.join(map(str, widths))}")
        in_channels, *size = input_shape
        if len(size) != 2 or min(size) < 2 ** len(widths):
            raise ValueError(
                f"images must be at least {2 ** len(widths)} pixels high and wide for {len(widths)} blocks, "
                f"got an input of shape {tuple(input_shape)}"
            )
        channels = [in_channels, *widths]
        stages, exits = [], []
        for k, width in enumerate(widths):
            stages.append(
                nn.Sequential(
                    nn.Conv2d(channels[k], width, 3, padding=1, bias=False),
                    nn.GroupNorm(4, width) if norm == "group" else nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                )
            )
            cells = min(_CELLS, min(size) >> (k + 1))
            projection = nn.Sequential(
                nn.AdaptiveAvgPool2d(cells),
                nn.Flatten(),
                nn.Linear(cells * cells * width, features),
                nn.LayerNorm(features),
            )
            exits.append(Exit(projection, features, num_classes))
        super().__init__(stages, exits)
        self._built = (tuple(input_shape), num_classes, tuple(widths), features, norm)
        self.in_channels = in_channels

    def at_width(self, share: float) -> ConvNet:
        """With about this share of every block's channels; multiples of 4 stay multiples of 4."""
        shape, classes, widths, features, norm = self._built
        return ConvNet(shape, classes, [narrow(width, share, 4) for width in widths], features, norm)

    def check_inputs(self, x: Tensor) -> None:
        """Raise ValueError if these are not images of its channels."""
        check_images(x, self.in_channels)
