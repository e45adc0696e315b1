"""The data: pictures of six shapes, drawn from a seed, so that nothing needs to be downloaded."""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

NUM_CLASSES = 6  # square, disc, ring, cross, saltire, frame
SPLITS = ("train", "calibration", "test")
SIZES = {"train": 72, "calibration": 24, "test": 60}


class ShapeImages(Dataset[tuple[Tensor, int]]):
    """Noisy pictures (1, 16, 16) of one client, whose shapes are not equally frequent."""

    def __init__(self, client: int, split: str) -> None:
        shares = np.random.default_rng([client, len(SPLITS)]).dirichlet([0.5] * NUM_CLASSES)
        rng = np.random.default_rng([client, SPLITS.index(split)])
        self.labels = rng.choice(NUM_CLASSES, size=SIZES[split], p=shares)
        self.images = [draw(int(label), rng) for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


@cache
def tensors(client: int, split: str) -> tuple[Tensor, Tensor]:
    """All pictures of a split and their labels, (N, 1, 16, 16) and (N,)."""
    x, y = default_collate(list(ShapeImages(client, split)))
    return x, y


def draw(label: int, rng: np.random.Generator) -> Tensor:
    """One picture of a shape, somewhere, of some size, in noise."""
    row, column = np.mgrid[:16, :16] - rng.uniform(5, 10, size=(2, 1, 1))
    radius = rng.uniform(3, 5)
    across, along = np.abs(row), np.abs(column)
    further, nearer, distance = np.maximum(across, along), np.minimum(across, along), np.hypot(row, column)
    inside = (
        further <= radius,
        distance <= radius,
        np.abs(distance - radius) <= 1,
        (nearer <= 1) & (further <= radius),
        (further - nearer <= 1) & (further <= radius),
        np.abs(further - radius) <= 1,
    )[label]
    picture = inside - 0.3 + 0.4 * rng.standard_normal((16, 16))
    return torch.from_numpy(picture[None]).float()
