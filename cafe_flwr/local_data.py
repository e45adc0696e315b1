"""Images with labels from a parquet file or a folder on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_local(
    path: Path, image_size: int, image_column: str, label_column: str
) -> tuple[NDArray[np.float32], NDArray[np.int64], tuple[str, ...]]:
    """Images (N, C, H, W), labels (N,) and class names of a parquet file or an image folder."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    from datasets import ClassLabel, Dataset, Image, Value, load_dataset

    if not path.exists():
        raise ValueError(f"dataset = 'local:{path}': there is no such file or folder on this machine")
    parquet = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"dataset = 'local:{path}': expected a .parquet file or a folder, got a {path.suffix} file")
    if not parquet and not any(child.is_dir() for child in path.iterdir()):
        raise ValueError(f"dataset = 'local:{path}' has no subfolders: expected one with images per class")
    try:
        if parquet:
            dataset = Dataset.from_parquet([str(file) for file in parquet])
        else:
            # All files: left to itself, imagefolder takes 'train' or 'test' in a folder's name for a split.
            files = {"train": str(path / "**")}
            dataset = load_dataset("imagefolder", data_files=files, split="train", drop_labels=False)
    except Exception as error:
        raise ValueError(
            f"dataset = 'local:{path}' cannot be read ({type(error).__name__}: {error}): expected a parquet file, a "
            "folder of parquet files, or a folder with one subfolder of images per class"
        ) from error
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
    images = []
    for row in range(len(dataset)):
        try:
            images.append(_to_array(dataset[row][image_column], image_size))
        except Exception as error:
            raise ValueError(f"row {row} of 'local:{path}' holds no image that can be read: {error}") from error
    if len({len(image) for image in images}) > 1:  # some are grey, some are not
        images = [np.repeat(image, 3, axis=0) if len(image) == 1 else image for image in images]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images of 'local:{path}' have {len(shapes)} different shapes: set image-size")
    return np.stack(images), labels.astype(np.int64), names


def _to_array(image: Any, size: int) -> NDArray[np.float32]:
    """One image as (C, H, W) float32, about −1..1."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    white = 65535.0 if image.mode.startswith("I") else 255.0  # "I" and "I;16" come from 16-bit files
    grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    image = image.convert("L").convert("F") if image.mode in ("1", "LA") else image.convert("F" if grey else "RGB")
    if size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32) / (white / 2) - 1.0
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()
