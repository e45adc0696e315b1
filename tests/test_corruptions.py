"""Corrupted images: what each kind does, how strongly, and that nothing else changes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from cafe_flwr.data import load_federation
from cafe_flwr.data.corruptions import CORRUPTIONS, corrupt, value_range

RANGE = (-1.0, 3.0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return load_federation("digits", 4, examples_per_client=30).load(0).train.x


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def between(n: int = 6, channels: int = 3, height: int = 10, width: int = 14) -> Tensor:
    """Images with values well inside the range, so that clipping does not come into play."""
    return torch.from_numpy(rng(1).uniform(0.5, 1.5, size=(n, channels, height, width))).float()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_harm_grows_with_severity_and_zero_is_identity(name: str, images: Tensor) -> None:
    before = images.clone()
    harm = [(corrupt(images, name, severity, rng()) - images).square().mean().item() for severity in range(6)]
    assert harm[0] == 0.0
    assert all(low < high for low, high in pairwise(harm)), harm
    assert torch.equal(images, before), "the given images must stay as they are"
    same = corrupt(images, name, 0, rng())
    same += 1.0
    assert torch.equal(images, before), "severity 0 gives a copy"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_type_and_range_are_kept(name: str) -> None:
    x = between() * 4 - 2
    worse = corrupt(x, name, 5, rng(), values=RANGE)
    assert worse.shape == x.shape
    assert worse.dtype == torch.float32
    low, high = x.amin((1, 2, 3)).clamp(max=RANGE[0]), x.amax((1, 2, 3)).clamp(min=RANGE[1])
    assert (worse.amin((1, 2, 3)) >= low).all()
    assert (worse.amax((1, 2, 3)) <= high).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alone(name: str) -> None:
    """Which other images are in the batch does not matter (noise is drawn for the images in their order)."""
    x = between()
    together, alone = (corrupt(part, name, 3, rng(), values=RANGE) for part in (x, x[:2]))
    torch.testing.assert_close(together[:2], alone)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strength_follows_the_value_range(name: str) -> None:
    """Data in another unit are corrupted alike: corrupt(a·x + b) = a·corrupt(x) + b, if the range moves along."""
    x = between()
    moved = corrupt(5 * x - 2, name, 4, rng(), values=(5 * RANGE[0] - 2, 5 * RANGE[1] - 2))
    torch.testing.assert_close(moved, 5 * corrupt(x, name, 4, rng(), values=RANGE) - 2, atol=1e-5, rtol=1e-5)


def test_noise_is_seeded_and_as_strong_as_stated() -> None:
    x = between(n=40)
    a, again, other = (corrupt(x, "noise", 3, rng(seed), values=RANGE) for seed in (0, 0, 1))
    assert torch.equal(a, again)
    assert not torch.equal(a, other)
    assert (a - x).std().item() == pytest.approx(0.08 * 4.0, rel=0.03)
    assert (a - x).mean().item() == pytest.approx(0.0, abs=0.01)


def test_brightness_and_contrast_by_hand() -> None:
    x = between()
    torch.testing.assert_close(corrupt(x, "brightness", 2, rng(), values=RANGE), x + 0.1 * 4.0)
    flat = corrupt(x, "contrast", 5, rng(), values=RANGE)
    torch.testing.assert_close(flat.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(flat.std((2, 3)), 0.15 * x.std((2, 3)))


def test_blur_spreads_a_point_and_keeps_its_mass() -> None:
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 10] = 1.0
    blurred = corrupt(x, "blur", 5, rng(), values=(0, 1))[0, 0]
    assert blurred.sum().item() == pytest.approx(1.0, abs=1e-4)
    offsets = torch.arange(21.0) - 10
    assert (blurred.sum(0) * offsets**2).sum().item() == pytest.approx(1.0, abs=0.02)  # σ = 1 pixel
    wide = torch.zeros(1, 1, 64, 64)
    wide[0, 0, 32, 32] = 1.0
    spread = corrupt(wide, "blur", 5, rng(), values=(0, 1))[0, 0].sum(0)
    assert (spread * (torch.arange(64.0) - 32) ** 2).sum().item() == pytest.approx(4.0, abs=0.05)  # twice 32 pixels


def test_pixelate_averages_boxes() -> None:
    """A 4×8 image at 0.65 becomes 2×5 and comes back: with 2 rows for 4, rows are averaged in pairs."""
    x = torch.arange(32.0).reshape(1, 1, 4, 8)
    back = corrupt(x, "pixelate", 5, rng(), values=(0, 31))[0, 0]
    torch.testing.assert_close(back[0], back[1])
    torch.testing.assert_close(back[2], back[3])
    assert back.mean().item() == pytest.approx(15.5)
    # First of 5 boxes: 8/5 pixels wide, columns 0 and 0.6 of 1: (0 + 0.6)/1.6 = 0.375, and 4 more for the row pair.
    assert back[0, 0].item() == pytest.approx(4.375)


def test_value_range_leaves_out_the_tails() -> None:
    x = torch.cat([torch.full((1, 1, 1, 10), 99.0), torch.linspace(0, 1, 9990).reshape(1, 1, 999, 10)], dim=2)
    low, high = value_range(x)
    assert (low, high) == pytest.approx((0.005, 0.996), abs=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "fog"}, "noise, blur, contrast, brightness, pixelate, got 'fog'"),
        ({"severity": 6}, "severity must be 1, 2, 3, 4 or 5"),
        ({"severity": -1}, "severity must be 1, 2, 3, 4 or 5"),
        ({"x": torch.zeros(3, 7)}, "need float32 images"),
        ({"x": torch.zeros(1, 1, 4, 4, dtype=torch.float64)}, "need float32 images"),
        ({"values": (1.0, 1.0)}, "low < high"),
        ({"x": torch.zeros(1, 1, 4, 4), "values": None}, "no value range"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"x": between(), "name": "noise", "severity": 3, "values": RANGE}
    given |= change
    with pytest.raises(ValueError, match=message):
        corrupt(given["x"], given["name"], given["severity"], rng(), values=given["values"])  # type: ignore[arg-type]


def test_no_images_stay_none() -> None:
    assert corrupt(torch.zeros(0, 1, 4, 4), "blur", 3, rng()).shape == (0, 1, 4, 4)
