"""Clients of two modalities on one data set: some see images, others the same images row by row.

These are the modalities of the settings; a user's own federation may have others (docs/modalities.md).
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
    """A client's images as sequences, whose step t holds the pixels of row t."""
    train, calibration, test = (_in_rows(split) for split in (data.train, data.calibration, data.test))
    return replace(data, train=train, calibration=calibration, test=test)


def _in_rows(split: Split) -> Split:
    n, channels, height, width = split.x.shape
    x = split.x.permute(0, 1, 3, 2).reshape(n, channels * width, height)
    return type(split)(x, split.y, split.source)
