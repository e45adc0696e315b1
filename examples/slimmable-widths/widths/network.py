"""A slimmable ConvNet: "exit k" is the same network at width (k + 1)/m, whose weights are slices of the full ones."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from cafe_flwr.networks import EarlyExitNetwork, Exit


class SlimmableConvNet(EarlyExitNetwork):
    """Widths 1/m, 2/m, …, 1 of one ConvNet for 16×16 images, each with norms, projection and classifier of its own.

    Stages pass the images on; ``exit(k, h)`` computes the whole network at its width. ``channels`` are those at full
    width, multiples of 4m for the group norm.
    """

    def __init__(
        self, in_channels: int, num_classes: int, channels: Sequence[int] = (16, 32), features: int = 24, m: int = 4
    ) -> None:
        widths = [[c * (k + 1) // m for c in channels] for k in range(m)]
        exits = [Exit(_projection(own[-1], features), features, num_classes) for own in widths]
        super().__init__([nn.Identity() for _ in widths], exits)
        pairs = zip([in_channels, *channels], channels, strict=False)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.ModuleList(nn.GroupNorm(4, c) for c in own) for own in widths)

    def exit(self, k: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of the network at width (k + 1)/m, from the images."""
        for convolution, norm in zip(self.convolutions, self.norms[k], strict=True):
            sliced = convolution.weight[: norm.num_channels, : h.shape[1]]
            h = F.max_pool2d(norm(F.conv2d(h, sliced, padding=1)).relu(), 2)
        return super().exit(k, h)


def _projection(channels: int, features: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 4 * 4, features), nn.LayerNorm(features))
