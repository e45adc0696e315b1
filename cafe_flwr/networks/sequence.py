"""A network for sequences of vectors, such as the samples of sensors or the rows of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cafe_flwr.networks.base import EarlyExitNetwork, Exit
from cafe_flwr.networks.checks import IMAGE_NORMS, check_norm, narrow

_CELLS = 4  # an exit sees its block's output as at most 4 steps, so that early and late stay apart


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
        check_norm(norm, IMAGE_NORMS)
        if norm == "group" and any(width % 4 for width in widths):
            raise ValueError(f"widths must be multiples of 4 for the group norm, got {', '.join(map(str, widths))}")
        if len(input_shape) != 2 or input_shape[1] < 2 ** len(widths):
            raise ValueError(
                f"sequences must have at least {2 ** len(widths)} steps for {len(widths)} blocks, got an input of "
                f"shape {tuple(input_shape)}"
            )
        in_channels, steps = input_shape
        channels = [in_channels, *widths]
        stages, exits = [], []
        for k, width in enumerate(widths):
            stages.append(
                nn.Sequential(
                    nn.Conv1d(channels[k], width, 3, padding=1, bias=False),
                    nn.GroupNorm(4, width) if norm == "group" else nn.BatchNorm1d(width),
                    nn.ReLU(),
                    nn.MaxPool1d(2),
                )
            )
            cells = min(_CELLS, steps >> (k + 1))
            projection = nn.Sequential(
                nn.AdaptiveAvgPool1d(cells),
                nn.Flatten(),
                nn.Linear(cells * width, features),
                nn.LayerNorm(features),
            )
            exits.append(Exit(projection, features, num_classes))
        super().__init__(stages, exits)
        self._built = (tuple(input_shape), num_classes, tuple(widths), features, norm)
        self.in_channels, self.steps = in_channels, steps

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
