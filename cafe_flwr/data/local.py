"""Read images with labels from a parquet file or a folder on this machine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

METADATA = ("metadata.csv", "metadata.jsonl")
"""Files that add columns to an image folder, by ``file_name``, as Hugging Face's imagefolder reads them."""


class LocalSet(NamedTuple):
    """A set that has been read.

    ``images``, (N, C, H, W): pixels (uint8) if all images have 8 bits, else float32, about −1..1. ``labels``: (N,)
    int64, 0..K−1; ``class_names`` in their order. ``column`` gives the values of a column, (N,), by its name;
    ValueError if it does not exist.
    """

    images: NDArray[np.uint8] | NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    column: Callable[[str], Sequence[Any]]


def read_local(path: Path, image_size: int, image_column: str, label_column: str) -> LocalSet:
    """Read a parquet file, a folder of them, or an image folder.

    ValueError if it does not exist, lacks a column or a label, or has an unreadable image or images of several shapes.
    """
    logging.getLogger("datasets").setLevel(logging.ERROR)
    from datasets import ClassLabel, Image, Value

    dataset = _open(path)
    for column in (image_column, label_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"dataset = 'local:{path}' has no column {column!r}; it has {', '.join(dataset.column_names)}. "
                "Set image-column and label-column"
            )
    if None in dataset.unique(label_column):
        raise ValueError(f"dataset = 'local:{path}' has rows without a label in column {label_column!r}")
    if dataset.features[label_column] in (Value("string"), Value("large_string")):
        dataset = dataset.class_encode_column(label_column)
    labels = np.asarray(dataset[label_column])
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    elif np.issubdtype(labels.dtype, np.integer) and len(labels) and labels.min() >= 0:
        names = tuple(str(c) for c in range(int(labels.max()) + 1))
    else:
        raise ValueError(f"column {label_column!r} of 'local:{path}' must hold labels 0..C−1 or names of classes")
    if len(labels) == 0 or labels.min() < 0:
        raise ValueError(f"dataset = 'local:{path}' has rows without a label, or no rows")

    if isinstance(dataset.features[image_column], dict) or dataset.features[image_column] == Value("binary"):
        dataset = dataset.cast_column(image_column, Image())  # as the hub's parquet files hold them
    images = _read_images(dataset.select_columns([image_column]), image_column, image_size, f"'local:{path}'")
    rows = dataset.remove_columns([image_column])
    return LocalSet(
        images, labels.astype(np.int64), names, lambda name: column_of(rows, name, f"dataset = 'local:{path}'")
    )


def column_of(rows: Any, name: str, origin: str) -> list[Any]:
    """Values of a column of a ``datasets.Dataset``, with class names in place of labels; ValueError without it."""
    from datasets import ClassLabel

    if name not in rows.column_names:
        raise ValueError(
            f"partition-column = {name!r}: {origin} has no such column; it has {', '.join(rows.column_names)} "
            "beside its inputs"
        )
    values, feature = list(rows[name]), rows.features[name]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.int2str(value) for value in values]
    return values


def normalised(images: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels (uint8) as float32 in −1..1; other images as they are."""
    return (
        images.astype(np.float32) / 127.5 - 1.0 if images.dtype == np.uint8 else images.astype(np.float32, copy=False)
    )


def _open(path: Path) -> Any:
    """Rows of the file or folder, with columns of images and labels if there are any."""
    from datasets import Dataset

    if not path.exists():
        raise ValueError(f"dataset = 'local:{path}': there is no such file or folder on this machine")
    parquet = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"dataset = 'local:{path}': expected a .parquet file or a folder, got a {path.suffix} file")
    described = path.is_dir() and any(next(path.rglob(name), None) for name in METADATA)
    if not parquet and not described and not any(child.is_dir() for child in path.iterdir()):
        raise ValueError(f"dataset = 'local:{path}' has no subfolders: expected one with images per class")
    try:
        if parquet:
            return Dataset.from_parquet([str(file) for file in parquet])
        dataset = _open_folder(path)
    except Exception as error:
        raise ValueError(
            f"dataset = 'local:{path}' cannot be read ({type(error).__name__}: {error}): expected a parquet file, a "
            "folder of parquet files, or a folder with one subfolder of images per class"
        ) from error
    return _with_classes(dataset, path) if described else dataset


def _open_folder(path: Path) -> Any:
    from datasets import load_dataset

    # All files: by default imagefolder takes 'train' or 'test' in a folder's name for a split.
    files = {"train": str(path / "**")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # datasets leaves metadata files to the garbage collector
        return load_dataset("imagefolder", data_files=files, split="train", drop_labels=False)


def _with_classes(dataset: Any, path: Path) -> Any:
    """Add the classes of an image folder with metadata; ValueError if the metadata leaves out images."""
    from datasets import Image
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    files = [Path(row["image"]["path"]) for row in dataset.cast_column("image", Image(decode=False))]
    there = {file for file in path.rglob("*") if file.suffix.lower() in ImageFolder.EXTENSIONS}
    if missing := sorted(there - set(files)):
        raise ValueError(
            f"dataset = 'local:{path}': its metadata names {len(files)} of {len(there)} images, and not "
            f"{missing[0].relative_to(path)}: add a line per image to {' or '.join(METADATA)}, or remove the file"
        )
    if "label" in dataset.column_names or any(file.parent == path for file in files):
        return dataset
    return dataset.add_column("label", [file.parent.name for file in files])


def _read_images(rows: Any, column: str, image_size: int, origin: str) -> NDArray[np.uint8] | NDArray[np.float32]:
    images: list[NDArray[Any]] = []
    for row in range(len(rows)):
        try:
            images.append(_to_pixels(rows[row][column], image_size))
        except Exception as error:
            raise ValueError(f"row {row} of {origin} holds no image that can be read: {error}") from error
    images = alike(images)
    if len({image.dtype for image in images}) > 1:
        images = [normalised(image) for image in images]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images of {origin} have {len(shapes)} different shapes: set data.image-size")
    return np.stack(images)


def alike(images: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Images (C, H, W), grey ones with three channels if there are coloured ones, too."""
    mixed = len({len(image) for image in images}) > 1
    return [np.repeat(image, 3, axis=0) if mixed and len(image) == 1 else image for image in images]


def to_array(image: Any, size: int) -> NDArray[np.float32]:
    """One image as (C, H, W) float32, about −1..1; resized to this height and width unless it is 0."""
    return normalised(_to_pixels(image, size))


def _to_pixels(image: Any, size: int) -> NDArray[np.uint8] | NDArray[np.float32]:
    """One image as (C, H, W): pixels (uint8), or float32, about −1..1, if it has more than 8 bits.

    Grey images that are resized become float32, too, so that they are not rounded again.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    white = 65535.0 if image.mode.startswith("I") else 255.0  # "I" and "I;16" come from 16-bit files
    grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    image = image.convert("L") if image.mode in ("1", "LA") else image if grey else image.convert("RGB")
    if size and image.size != (size, size):
        image = (image.convert("F") if grey else image).resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image) if image.mode in ("L", "RGB") else np.asarray(image.convert("F")) / (white / 2) - 1.0
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.array(pixels, dtype=np.uint8) if image.mode in ("L", "RGB") else np.array(pixels, dtype=np.float32)
