"""The embedded data sets, rendered from scikit-learn's 1,797 handwritten digits (real 8×8 images)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.core.random import rng_for

SPLITS = ("train", "calibration", "test")
IMAGE_SIZE = 16  # height and width of the images
BACKGROUND = (0.0 - 0.3) / 0.4  # an empty pixel

NUM_CLASSES = {"digits": 10, "digit-pairs": 100}


def class_names(dataset: str) -> tuple[str, ...]:
    """Names of the classes: their digits, from left to right."""
    width = 2 if dataset == "digit-pairs" else 1
    return tuple(f"{label:0{width}d}" for label in range(NUM_CLASSES[dataset]))


@lru_cache(maxsize=1)
def _base_digits() -> tuple[Tensor, NDArray[np.int64]]:
    """The 8×8 images, (1797, 1, 8, 8) in 0..1, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0, digits.target.astype(np.int64)


@lru_cache(maxsize=8)
def digit_pools(seed: int) -> dict[str, list[NDArray[np.int64]]]:
    """Base digits that each split may use: disjoint rows of scikit-learn's digits, by split and class."""
    _, target = _base_digits()
    rng = rng_for(seed, 0, -1, "base digits")
    pools: dict[str, list[NDArray[np.int64]]] = {name: [] for name in SPLITS}
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(target == digit))
        cuts = (int(0.6 * len(rows)), int(0.75 * len(rows)))
        for name, part in zip(SPLITS, np.split(rows, cuts), strict=True):
            pools[name].append(part)
    return pools


def render(
    dataset: str, labels: NDArray[np.int64], split: str, seed: int, rng: np.random.Generator
) -> tuple[Tensor, NDArray[np.int64]]:
    """Images for the labels, (N, 1, 16, 16), and the base digits they were made from, (N, digits per image)."""
    if not len(labels):
        return torch.zeros(0, 1, IMAGE_SIZE, IMAGE_SIZE), np.zeros((0, 1), dtype=np.int64)
    pairs = dataset == "digit-pairs"
    digits = np.stack([labels // 10, labels % 10], axis=1) if pairs else labels[:, None]
    pools = digit_pools(seed)[split]
    source = np.array([[rng.choice(pools[d]) for d in row] for row in digits], dtype=np.int64).reshape(digits.shape)
    # Centres in units of half the canvas: a pair stands left and right, a single digit in the middle.
    centres = (-0.5, 0.5) if pairs else (0.0,)
    size = 0.5 if pairs else 0.9
    canvas = torch.zeros(len(labels), 1, IMAGE_SIZE, IMAGE_SIZE)
    for position, centre in enumerate(centres):
        canvas = torch.maximum(canvas, _place(source[:, position], size, (centre, 0.0), rng))
    if pairs:
        # Clutter: a faint piece of some digit anywhere, and noise.
        stray = rng.choice(np.concatenate(pools), size=len(labels))
        corner = rng.uniform(-1.0, 1.0, size=(2, len(labels)))
        canvas = torch.maximum(canvas, 0.5 * _place(stray, 0.4, tuple(torch.from_numpy(corner).float()), rng))
        canvas = canvas + torch.from_numpy(rng.normal(0.0, 0.08, size=canvas.shape)).float()
    return (canvas - 0.3) / 0.4, source


def _place(
    rows: NDArray[np.int64], size: float, centre: tuple[float | Tensor, float | Tensor], rng: np.random.Generator
) -> Tensor:
    """Base digits drawn on empty canvases at about ``centre``, randomly scaled, rotated and shifted."""
    images, _ = _base_digits()
    n = len(rows)

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, size=n)).float()

    angle, scale = draw(-0.14, 0.14), size * draw(0.9, 1.06)
    x, y = centre[0] + draw(-0.05, 0.05), centre[1] + draw(-0.1, 0.1)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # affine_grid wants the map from the canvas back to the digit.
    inverse = torch.stack(
        [torch.stack([cos, sin, -(cos * x + sin * y)], 1), torch.stack([-sin, cos, sin * x - cos * y], 1)], 1
    )
    grid = torch.nn.functional.affine_grid(inverse, [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return torch.nn.functional.grid_sample(images[rows], grid, align_corners=False)
