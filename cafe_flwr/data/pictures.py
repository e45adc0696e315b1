"""Read pictures: the one reader of training, prediction, conversion and clients' own data.

Files, their bytes, Pillow's images and arrays of numbers become (C, H, W): turned upright as their EXIF orientation
says; palettes and CMYK as colours; transparency left out, so that the colours beneath it count; black and white, and
grey, with one channel. 8 bits stay pixels (uint8). All else becomes float32 in −1..1, from black to white: 16 bits by
their type, floats and other integers by the range of the numbers of all pictures of a set, where that tells it.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.float32]
Scales = Mapping[str, tuple[float, float]]
"""Numbers of black and white, by the kind of a picture's numbers."""

_LUMA = np.array([299, 587, 114], dtype=np.float64)  # per mille; ITU-R 601, as in pillow


class Picture(NamedTuple):
    """A picture that has been read: (C, H, W) with its own numbers.

    ``kind`` is what its numbers are: "8 bits", "16 bits", "floats" or "integers"; ``low`` and ``high`` are the smallest
    and the largest before it was resized.
    """

    values: Pixels
    kind: str
    low: float
    high: float


def read_picture(source: Any, size: int = 0) -> Picture:
    """Read one picture; resized to this height and width unless it is 0.

    Parameters
    ----------
    source
        A path, the bytes of a file, both as ``datasets`` keeps them (``{"bytes": …, "path": …}``), a Pillow image, or
        numbers: (H, W), (H, W, C) or (C, H, W), with 1 or 3 channels, or 2 or 4 of which the last is transparency.

    Raises
    ------
    ValueError
        If it cannot be read, is of another shape, or holds NaN or infinite numbers.
    """
    if isinstance(source, os.PathLike | bytes | dict) or hasattr(source, "getexif"):
        try:
            values, kind = _of_image(_opened(source))
        except Exception as error:  # of many kinds, of a library per format
            raise ValueError(_reason(error)) from error
    else:
        values, kind = _of_numbers(source)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all():
        raise ValueError("it holds NaN or infinite numbers")
    if size and values.shape[:2] != (size, size):
        rounded = values.dtype == np.uint8 and values.shape[-1] == 3 and not (kind == "integers" and high <= 1)
        values = _resized(values, size) if rounded else _resized(values.astype(np.float32), size)
    if values.dtype != np.uint8:
        values = values.astype(np.float32, copy=False)
    return Picture(np.ascontiguousarray(values.transpose(2, 0, 1)), kind, low, high)


def read_pictures(
    sources: Iterable[Any], size: int, where: Callable[[int], str], rows: Iterable[int] | None = None
) -> list[Picture]:
    """Read pictures; ValueError with the place of the first that cannot be read, such as "row 3 of …"."""
    pictures = []
    for row, source in zip(rows or itertools.count(), sources, strict=False):
        try:
            pictures.append(read_picture(source, size))
        except ValueError as error:
            name = source.get("path") if isinstance(source, dict) and source.get("bytes") else None
            told = f" ({os.path.basename(name)})" if name else ""
            raise ValueError(f"{where(row)}{told} holds no image that can be read: {error}") from error
    return pictures


def scales_of(pictures: Sequence[Picture], image_range: str = "", known: Scales | None = None) -> dict[str, Any]:
    """Numbers of black and white of every kind in these pictures.

    Parameters
    ----------
    image_range
        Of numbers that are not of 8 bits, such as ``"0..4095"``; empty: as their type and their range tell.
    known
        Scales of pictures before these, which must hold for these too.

    Raises
    ------
    ValueError
        If the numbers do not tell it, or are outside the range.

    Examples
    --------
    >>> scales_of([read_picture([[0.0, 0.5]]), read_picture([[0.25, 1.0]])])
    {'floats': (0.0, 1.0)}
    """
    scales = dict(known or {})
    for kind in dict.fromkeys(picture.kind for picture in pictures):
        low = min(picture.low for picture in pictures if picture.kind == kind)
        high = max(picture.high for picture in pictures if picture.kind == kind)
        given = _given(image_range) if image_range and kind != "8 bits" else scales.get(kind)
        found = given or _told(kind, low, high)
        if found is None:
            raise ValueError(
                f"pictures of {kind} with numbers {low:g}..{high:g}: which number is black and which is white cannot "
                "be told. Set data.image-range (image_range in Python), such as '0..1', '-1..1', '0..255', '0..4095' "
                "or '0..65535'"
            )
        if not found[0] <= low <= high <= found[1]:
            raise ValueError(
                f"pictures of {kind} with numbers {low:g}..{high:g} do not fit the range {found[0]:g}..{found[1]:g} "
                f"{'that is set' if image_range else 'of those before'}: set data.image-range (image_range in Python) "
                "to that of all pictures"
            )
        scales[kind] = found
    return scales


def alike(pictures: Sequence[Picture], scales: Scales, channels: int = 0) -> list[Pixels]:
    """Pictures as (C, H, W) with one dtype and number of channels.

    uint8 if all are pixels of 8 bits, else float32, −1..1; so are grey ones that were resized, which are not rounded
    again. With ``channels`` 0 grey ones get three channels if there are coloured ones, too; with 1 or 3 all have these.
    """
    pixels = all(
        p.values.dtype == np.uint8 and scales[p.kind] == (0, 255) and len(p.values) <= (channels or 3) for p in pictures
    )
    arrays: list[Pixels] = [p.values if pixels else _scaled(p.values, *scales[p.kind]) for p in pictures]
    wanted = channels or max((len(array) for array in arrays), default=0)
    return [_with_channels(array, wanted) for array in arrays]


def as_pixels(images: Pixels) -> NDArray[np.uint8]:
    """Images in −1..1 rounded to pixels; pixels as they are."""
    return np.asarray(images if images.dtype == np.uint8 else np.rint((images + 1) * 127.5), dtype=np.uint8)


def _opened(source: Any) -> Any:
    """A Pillow image, upright."""
    from PIL import ExifTags, Image, ImageOps

    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if source is None:
            raise ValueError("there is none")
    if isinstance(source, bytes):
        source = Image.open(io.BytesIO(source))
    elif not isinstance(source, Image.Image):
        with open(source, "rb") as file:
            source = Image.open(io.BytesIO(file.read()))
    source.load()
    turned = source.getexif().get(ExifTags.Base.Orientation) is not None
    return ImageOps.exif_transpose(source) if turned else source


def _of_image(image: Any) -> tuple[NDArray[Any], str]:
    """(H, W, C), and the kind of its numbers."""
    if image.mode == "F" or image.mode.startswith("I"):  # "I" and "I;16" come from files of 16 bits
        return np.asarray(image)[..., None], "floats" if image.mode == "F" else "16 bits"
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"))[..., None], "8 bits"
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB")), "8 bits"


def _of_numbers(source: Any) -> tuple[NDArray[Any], str]:
    """(H, W, C), and the kind of its numbers."""
    if source is None:
        raise ValueError("there is none")
    try:
        values = np.asarray(source)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"it is no array of numbers ({error})") from error
    if values.dtype.kind not in "buif":
        raise ValueError(f"it holds values that are no numbers, or rows of different lengths ({type(source).__name__})")
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim == 3 and values.shape[-1] > 4 >= len(values):
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or not 1 <= values.shape[-1] <= 4 or not values.size:
        raise ValueError(
            f"it has numbers of shape {values.shape}: expected (height, width), (height, width, channels) or "
            "(channels, height, width), with 1 or 3 channels"
        )
    values = values[..., : values.shape[-1] - (values.shape[-1] + 1) % 2]  # without transparency
    if values.dtype == np.bool_:
        return values * np.uint8(255), "8 bits"
    if values.dtype in (np.uint8, np.uint16):
        return values, "8 bits" if values.dtype == np.uint8 else "16 bits"
    if values.dtype.kind == "f":
        return values.astype(np.float32), "floats"
    fits = values.min() >= 0 and values.max() <= 255
    return values.astype(np.uint8) if fits else values, "integers"


def _resized(values: NDArray[Any], size: int) -> NDArray[Any]:
    """(size, size, C); three colours in uint8 are rounded to pixels, float32 is not."""
    from PIL import Image

    def bilinear(part: NDArray[Any]) -> NDArray[Any]:
        resized = Image.fromarray(np.ascontiguousarray(part)).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(resized)

    if values.dtype == np.uint8:
        return bilinear(values)
    return np.stack([bilinear(part) for part in values.transpose(2, 0, 1)], axis=-1)


def _scaled(values: NDArray[Any], black: float, white: float) -> NDArray[np.float32]:
    values = values.astype(np.float32, copy=False)
    if (black, white) == (-1, 1):
        return values
    return (values - np.float32(black) if black else values) / np.float32((white - black) / 2) - np.float32(1)


def _with_channels(image: Any, channels: int) -> Any:
    """A picture (C, H, W) with 1 or 3 channels; one in −1..1 if its colours are to become grey."""
    if len(image) == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=0)
    return (np.tensordot(_LUMA, image, axes=1)[None] / 1000).astype(np.float32)


def _told(kind: str, low: float, high: float) -> tuple[float, float] | None:
    """Numbers of black and white as the kind and range of the numbers tell them; None if they do not."""
    if low < 0:
        return None
    whites = {
        "8 bits": 255,
        "16 bits": 65535 if high == 0 or 4096 <= high <= 65535 else 0,  # smaller: perhaps 12 bits or 8
        "integers": 255 if high <= 255 and (low, high) != (0, 1) else 0,
        "floats": 1 if high <= 1 else 255 if 16 <= high <= 255 else 0,
    }
    return (0.0, float(whites[kind])) if whites[kind] else None


def _given(image_range: str) -> tuple[float, float]:
    black, _, white = image_range.partition("..")
    try:
        found = float(black), float(white)
    except ValueError:
        found = (0.0, 0.0)
    if not found[0] < found[1]:
        raise ValueError(f"image_range must be like '0..1', '-1..1' or '0..4095', got {image_range!r}")
    return found


def _reason(error: Exception) -> str:
    """What is wrong with a file, without the names of objects and folders that libraries put there."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is damaged, or of a format that Pillow does not know"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
