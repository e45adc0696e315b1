"""The data of a client: splits of inputs and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.data.augmentation import Augmentation


class Split(NamedTuple):
    """Examples of one client for one use.

    Attributes
    ----------
    x
        Inputs, (N, …) float32; or pixels of images, (N, C, H, W) uint8; or tokens of texts, (N, L) int64.
    y
        Labels 0..C−1, (N,) int64.
    source
        Rows of the underlying data set that each example was made from, (N, s) int64, if known.
    """

    x: Tensor
    y: Tensor
    source: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def take(self, positions: NDArray[np.int64]) -> Split:
        """The examples at these positions."""
        rows = torch.from_numpy(positions)
        return Split(self.x[rows], self.y[rows], None if self.source is None else self.source[rows])


@dataclass(frozen=True)
class ClientData:
    """What one client holds: three disjoint splits, all rotated alike.

    Their label distribution is the same, except for ``test`` under a test shift. With a validation share, ``test``
    holds validation examples from the training data, and no split holds test data. ``augment`` says how training
    varies inputs; None: not at all.
    """

    train: Split
    calibration: Split
    test: Split
    augment: Augmentation | None = None
