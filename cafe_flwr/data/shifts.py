"""Make clients differ: shifted class priors in the test split, and rotated images."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.data import digits


def check_shifts(dataset: str, num_clients: int, label_groups: int, validation_share: float, test_shift: float) -> None:
    """Raise ValueError, naming the setting, if these shifts are not possible."""
    if not 0 <= label_groups <= num_clients:
        raise ValueError(
            f"data.label-groups must be from 0 (every client has its own labels) to num-clients = {num_clients}, "
            f"got {label_groups}: lower data.label-groups or raise num-clients"
        )
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation-share must be 0 (none) or more and less than 1, got {validation_share}")
    if not 0 <= test_shift <= 1:
        raise ValueError(f"test-shift must be from 0 (none) to 1 (all test labels redrawn), got {test_shift}")
    if test_shift and dataset not in digits.NUM_CLASSES:
        known = " and ".join(map(repr, digits.NUM_CLASSES))
        raise ValueError(f"data.test-shift is for {known}, not {dataset!r}: set it to 0")


def check_rotations(rotations: int, shape: tuple[int, ...]) -> None:
    """Raise ValueError if inputs of this shape cannot be rotated so."""
    if rotations < 1:
        raise ValueError(f"rotations must be at least 1 (images as they are), got {rotations}")
    if rotations > 1 and len(shape) != 3:
        raise ValueError(f"data.rotations needs images (channels, height, width), got inputs {shape}: set it to 1")
    if rotations % 4 == 0 and shape[1] != shape[2]:
        raise ValueError(
            f"rotations = {rotations} has quarter turns, which need square images, got {shape[1]}×{shape[2]}: "
            "set data.image-size, or choose rotations that 4 does not divide"
        )


def shift_labels(
    labels: NDArray[np.int64], train_labels: NDArray[np.int64], share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Labels, a random share of which is redrawn uniformly from the training labels' classes.

    Examples
    --------
    >>> shift_labels(np.array([5, 5, 5, 5]), np.array([0, 0, 0, 1]), 0.5, np.random.default_rng(0))
    array([0, 5, 0, 5])
    """
    redrawn = rng.permutation(len(labels))[: round(share * len(labels))]
    if not len(redrawn):
        return labels
    if not len(train_labels):
        raise ValueError(
            "test-shift draws from the classes of a client's training split, and one has no examples there"
        )
    shifted = labels.copy()
    shifted[redrawn] = rng.choice(np.unique(train_labels), size=len(redrawn))
    return shifted


def rotate(x: Tensor, turn: int, turns: int, background: float | None = None) -> Tensor:
    """Images (N, C, H, W) rotated counter-clockwise by ``turn`` of ``turns`` equal parts of a full turn.

    Multiples of 90° only move pixels. Other angles are interpolated bilinearly, with ``background`` beyond the edges,
    by default each image's minimum.

    Examples
    --------
    >>> rotate(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 1, 4).tolist()
    [[[[2.0, 4.0], [1.0, 3.0]]]]
    """
    quarters, rest = divmod(4 * turn, turns)
    if not rest:
        return torch.rot90(x, quarters, (-2, -1)).contiguous() if quarters % 4 else x
    angle, aspect = 2 * math.pi * turn / turns, x.shape[-1] / x.shape[-2]
    cos, sin = math.cos(angle), math.sin(angle)
    # affine_grid takes the map from the rotated image back to the given one, in units of half the image.
    pixels, x = x.dtype == torch.uint8, x if x.is_floating_point() else x.float()
    inverse = torch.tensor([[[cos, -sin / aspect, 0.0], [sin * aspect, cos, 0.0]]], dtype=x.dtype)
    grid = torch.nn.functional.affine_grid(inverse, [1, *x.shape[1:]], align_corners=False)
    fill = x.amin((1, 2, 3), keepdim=True) if background is None else background
    # Beyond the edges grid_sample takes 0, so the background is shifted to 0.
    moved = torch.nn.functional.grid_sample(x - fill, grid.expand(len(x), -1, -1, -1), align_corners=False)
    turned = moved + fill
    return turned.round().clamp(0, 255).to(torch.uint8) if pixels else turned
