"""A network whose shared part has as many tensors and bytes as asked for, and data for one step of it."""

import torch
from torch import Tensor, nn

from cafe_flwr import EarlyExitNetwork
from cafe_flwr.data import ClientData, Split
from cafe_flwr.networks import Exit

FEATURES, CLASSES, EXAMPLES = 8, 4, 16


class Bulk(nn.Module):
    """Passes its input through; its parameters contribute to the output, so they have gradients."""

    def __init__(self, tensors: int, size: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size // tensors) for _ in range(tensors))

    def forward(self, x: Tensor) -> Tensor:
        """The input plus the mean of every tensor, with so small a weight that training is unaffected."""
        return x + 1e-3 * torch.stack([part.mean() for part in self.parts]).mean()


def build(tensors: int, megabytes: float) -> EarlyExitNetwork:
    """Two stages; nearly all of the bytes are in the first."""
    size = int(megabytes * 1e6 / 4)
    return EarlyExitNetwork(
        [Bulk(tensors, size), nn.Identity()], [Exit(nn.Identity(), FEATURES, CLASSES) for _ in range(2)]
    )


def data(client: int) -> ClientData:
    """Sixteen examples for each of training, calibration and test."""
    x = torch.randn(EXAMPLES, FEATURES, generator=torch.Generator().manual_seed(client))
    split = Split(x, torch.arange(EXAMPLES) % CLASSES)
    return ClientData(split, split, split)
