"""Corrupt images, to measure accuracy and risk on inputs that differ from those of calibration.

These are five corruptions of ImageNet-C (Hendrycks & Dietterich, arXiv 1903.12261), with the severities of its authors'
CIFAR-10-C, adapted to inputs that need not be RGB in 0..1: strengths are shares of the data's value range, brightness
is added to every channel alike, and lengths in pixels grow with images larger than 32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_TAIL = 0.005  # share of pixels at either end beyond the value range
_SIDE = 32  # pixels of the images that the severities were chosen for


class ValueRange(NamedTuple):
    """Lowest and highest usual pixel value."""

    low: float
    high: float


def value_range(x: Tensor) -> ValueRange:
    """The range of nearly all pixel values of images (N, C, H, W): from the 0.5 % to the 99.5 % quantile.

    Minimum and maximum would depend on noise. ValueError if there are no pixels, or nearly all are the same.

    Examples
    --------
    >>> value_range(torch.linspace(-1.0, 1.0, 1001).reshape(1, 1, 7, 143))
    ValueRange(low=-0.99, high=0.99)
    """
    if not x.numel():
        raise ValueError("no value range without images: give some, or the range (low, high)")
    low, high = (round(float(value), 6) for value in np.quantile(x.numpy(), [_TAIL, 1 - _TAIL]))
    if not low < high:
        raise ValueError(f"nearly all pixels are {low:g}, so there is no value range: give (low, high)")
    return ValueRange(low, high)


def _noise(x: Tensor, strength: float, width: float, rng: np.random.Generator) -> Tensor:
    return x + strength * width * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))


def _blur(x: Tensor, strength: float, width: float, rng: np.random.Generator) -> Tensor:
    from scipy.ndimage import gaussian_filter

    sigma = strength * max(1.0, min(x.shape[-2:]) / _SIDE)
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest"))


def _contrast(x: Tensor, strength: float, width: float, rng: np.random.Generator) -> Tensor:
    mean = x.mean(dim=(-2, -1), keepdim=True)
    return mean + strength * (x - mean)


def _brightness(x: Tensor, strength: float, width: float, rng: np.random.Generator) -> Tensor:
    return x + strength * width


def _pixelate(x: Tensor, strength: float, width: float, rng: np.random.Generator) -> Tensor:
    def there_and_back(size: int) -> Tensor:
        small = max(1, int(size * strength))
        return _resize(small, size) @ _resize(size, small)

    height, across = x.shape[-2:]
    return there_and_back(height) @ x @ there_and_back(across).T


def _resize(size: int, new: int) -> Tensor:
    """Matrix (new, size) that averages over boxes: each row holds the share of each old pixel in its box."""
    edges = torch.arange(new + 1) * (size / new)
    old = torch.arange(size)
    overlap = torch.minimum(edges[1:, None], old + 1) - torch.maximum(edges[:-1, None], old)
    return overlap.clamp(min=0) * (new / size)


class Corruption(NamedTuple):
    """A kind of corruption: strengths for severities 1..5, and a function that returns corrupted images.

    ``apply`` takes images, strength, width of the value range and generator.
    """

    strengths: tuple[float, float, float, float, float]
    apply: Callable[[Tensor, float, float, np.random.Generator], Tensor]


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption((0.04, 0.06, 0.08, 0.09, 0.10), _noise),  # σ as a share of the value range
    "blur": Corruption((0.4, 0.6, 0.7, 0.8, 1.0), _blur),  # σ in pixels of a 32×32 image
    "contrast": Corruption((0.75, 0.5, 0.4, 0.3, 0.15), _contrast),  # share of contrast that is kept
    "brightness": Corruption((0.05, 0.1, 0.15, 0.2, 0.3), _brightness),  # added, as a share of the value range
    "pixelate": Corruption((0.95, 0.9, 0.85, 0.75, 0.65), _pixelate),  # share of the pixels per side that is kept
}


def corrupt(
    x: Tensor, name: str, severity: int, rng: np.random.Generator, *, values: tuple[float, float] | None = None
) -> Tensor:
    """Corrupted copies of images (N, C, H, W) float32; the given ones stay as they are.

    Results are clipped to the value range, or to the image's own range where that is wider.

    Parameters
    ----------
    name
        One of ``CORRUPTIONS``.
    severity
        1 (slight) to 5; 0 leaves the images as they are.
    rng
        Only noise draws from it.
    values
        Value range (low, high) of the data set; by default :func:`value_range` of these images.

    Raises
    ------
    ValueError
        For another name or severity, or if x are not images.

    Examples
    --------
    >>> image = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    >>> corrupt(image, "contrast", 2, np.random.default_rng(0), values=(0, 1)).tolist()
    [[[[0.25, 0.75], [0.25, 0.75]]]]
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}, got {name!r}")
    if severity not in range(6):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5 (0: as it is), got {severity}")
    if x.ndim != 4 or x.dtype != torch.float32:
        raise ValueError(f"corruptions need float32 images (N, C, H, W), got {x.dtype} inputs {tuple(x.shape)}")
    if severity == 0 or not len(x):
        return x.clone()
    low, high = value_range(x) if values is None else values
    if not low < high:
        raise ValueError(f"values must be a range (low, high) with low < high, got ({low:g}, {high:g})")
    kind = CORRUPTIONS[name]
    worse = kind.apply(x, kind.strengths[int(severity) - 1], high - low, rng)
    return worse.clamp(x.amin((1, 2, 3), keepdim=True).clamp(max=low), x.amax((1, 2, 3), keepdim=True).clamp(min=high))
