"""Normalise images that are kept as pixels (uint8), in a quarter of the memory of float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Normalisation(NamedTuple):
    """(pixel/255 − mean) / standard deviation, with one value per channel or one for all; by default −1..1.

    Examples
    --------
    >>> Normalisation()(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    tensor([[[[-1.,  1.]]]])
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __call__(self, x: Tensor) -> Tensor:
        """Pixels (N, C, H, W) uint8 as float32."""
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in self)
        return (x.float() / 255 - mean) / std


SYMMETRIC = Normalisation()
