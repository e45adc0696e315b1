"""Random crops and mirror images for training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Augmentation(NamedTuple):
    """Random crops of an image with a border, and mirror images, as is usual for CIFAR and Tiny-ImageNet.

    The border of ``padding`` pixels has the value 0 (black); the crop has the size of the image. With ``flip``, half of
    the images, at random, are mirrored left to right.

    Examples
    --------
    >>> x = torch.arange(1, 7, dtype=torch.uint8).reshape(1, 1, 2, 3)
    >>> Augmentation(1)(x, np.random.default_rng(3)).tolist()
    [[[[5, 4, 0], [0, 0, 0]]]]
    """

    padding: int
    flip: bool = True

    def __call__(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Images (N, C, H, W) of any type, varied one by one."""
        n, _, height, width = x.shape
        top, left = (torch.from_numpy(rng.integers(2 * self.padding + 1, size=(2, n, 1))).to(x.device)).unbind()
        rows = top + torch.arange(height, device=x.device)
        columns = left + torch.arange(width, device=x.device)
        if self.flip:
            mirrored = torch.from_numpy(rng.random((n, 1)) < 0.5).to(x.device)
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = torch.nn.functional.pad(x, [self.padding] * 4)
        image = torch.arange(n, device=x.device)[:, None, None]
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
