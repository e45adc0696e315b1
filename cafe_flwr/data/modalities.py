"""Clients of several modalities on one data set: what some see as images, others see row by row.

Any modalities can meet in a federation of one's own (docs/modalities.md); these two are those of the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cafe_flwr.data.options import MODALITIES

if TYPE_CHECKING:
    from cafe_flwr.data.split import ClientData, Split

IMAGE, ROWS = MODALITIES


def rows_shape(image_shape: Sequence[int]) -> tuple[int, int]:
    """Shape of the sequence that an image (channels, height, width) becomes: (channels · width, height).

    Examples
    --------
    >>> rows_shape((1, 16, 20))
    (20, 16)
    """
    channels, height, width = image_shape
    return channels * width, height


def in_rows(data: ClientData) -> ClientData:
    """A client's images as sequences: at step t the pixels of row t."""
    train, calibration, test = (_in_rows(split) for split in (data.train, data.calibration, data.test))
    return replace(data, train=train, calibration=calibration, test=test)


def _in_rows(split: Split) -> Split:
    n, channels, height, width = split.x.shape
    x = split.x.permute(0, 1, 3, 2).reshape(n, channels * width, height)
    return type(split)(x, split.y, split.source)
