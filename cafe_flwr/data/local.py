"""Read images with labels from a parquet file or a folder on this machine."""

from __future__ import annotations

import glob
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.core.log import logger
from cafe_flwr.data.folders import Places, files_below, pictures_among, suffixes
from cafe_flwr.data.labels import classes_of, composed, without_examples
from cafe_flwr.data.pictures import Pixels, alike, read_pictures, scales_of

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files that add columns to an image folder, by ``file_name``, as Hugging Face's imagefolder reads them."""

IDS = 10
"""Numbers this many times as large as the number of rows are ids, not classes."""


class LocalSet(NamedTuple):
    """A set that has been read.

    ``images``, (N, C, H, W): pixels (uint8) if all images have 8 bits, else float32, −1..1. ``labels``: (N,) int64,
    0..K−1; ``class_names`` in their order. ``column`` gives the values of a column, (N,), by its name; ValueError if it
    does not exist.
    """

    images: Pixels
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    column: Callable[[str], Sequence[Any]]


def read_local(
    path: Path,
    image_size: int,
    image_column: str,
    label_column: str,
    image_range: str = "",
    *,
    channels: int = 0,
    gaps: bool = True,
) -> LocalSet:
    """Read a parquet file, a folder of them, or an image folder.

    Parameters
    ----------
    image_range
        Numbers of black and white, see :func:`cafe_flwr.data.pictures.scales_of`.
    channels
        1 or 3 channels for all images; 0: 3 if any is coloured.
    gaps
        Whether labels that are numbers make a class of every number up to the largest, or of those that occur only.

    Raises
    ------
    ValueError
        If it does not exist, lacks a column or a label, has classes or images that would get lost, labels that are ids,
        an unreadable image, or images of several shapes.
    """
    logging.getLogger("datasets").setLevel(logging.ERROR)
    rows, where = _open(path)
    for column in (image_column, label_column):
        if column not in rows.column_names:
            raise ValueError(
                f"dataset = 'local:{path}' has no column {column!r}; it has {', '.join(rows.column_names)}. "
                "Set image-column and label-column"
            )
    pictures = encoded(rows, image_column).select_columns([image_column])
    labels, names = _classes(rows, label_column, where, gaps)
    read = read_pictures((row[image_column] for row in pictures), image_size, where)
    try:
        images = alike(read, scales_of(read, image_range), channels)
        del read  # floats are held once, as scaled
    except ValueError as error:
        raise ValueError(f"dataset = 'local:{path}', column {image_column!r}: {error}") from None
    if len(shapes := {image.shape for image in images}) != 1:
        raise ValueError(f"images of 'local:{path}' have {len(shapes)} different shapes: set data.image-size")
    others, stacked = rows.remove_columns([image_column]), np.stack(cast(list[Any], images))
    return LocalSet(stacked, labels, names, lambda name: column_of(others, name, f"dataset = 'local:{path}'"))


def encoded(rows: Any, column: str) -> Any:
    """Rows of a ``datasets.Dataset`` with pictures as the bytes or paths of their files; numbers as they are."""
    from datasets import Image, Value

    feature = rows.features[column]
    files = isinstance(feature, Image | dict) or feature in (Value("binary"), Value("large_binary"))
    return rows.cast_column(column, Image(decode=False)) if files else rows


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


def normalised(images: Pixels) -> NDArray[np.float32]:
    """Pixels (uint8) as float32 in −1..1; other images as they are."""
    return (
        images.astype(np.float32) / 127.5 - 1.0 if images.dtype == np.uint8 else images.astype(np.float32, copy=False)
    )


def parquet_rows(files: Sequence[Path]) -> Any:
    """Rows of parquet files, one after the other; whatever signs are in their paths."""
    from datasets import Dataset

    return Dataset.from_parquet([glob.escape(str(file)) for file in files])


def _classes(rows: Any, column: str, where: Places, gaps: bool) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels and names of the classes."""
    from datasets import ClassLabel

    feature, listed = rows.features[column], list(rows[column])
    if not listed:
        raise ValueError(f"dataset = {where(-1)} has no rows")
    labels, names = classes_of(listed, feature.names if isinstance(feature, ClassLabel) else None, column, where)
    largest = int(labels.max())
    if names is None and not gaps:
        found, labels = np.unique(labels, return_inverse=True)
        names = tuple(map(str, found.tolist()))
    elif names is None:
        if largest >= IDS * len(labels):
            raise ValueError(
                f"column {column!r} of {where(-1)} holds numbers up to {max(listed)} for {len(labels)} rows (first "
                f"{where(int(labels.argmax()))}): these are ids. Number the classes 0..C−1, or give their names as text"
            )
        names = tuple(map(str, range(largest + 1)))
    elif largest >= len(names):
        raise ValueError(f"column {column!r} of {where(-1)} has {len(names)} classes, and a label {largest}")
    if gaps and (empty := without_examples(labels, names)):
        logger.warning("%s, column %r: %s", where(-1), column, empty)
    return labels.astype(np.int64), composed(names, where(-1))


def _open(path: Path) -> tuple[Any, Places]:
    """Rows of the file or folder, with columns of images and labels if there are any; and the names of their places."""
    if not path.exists():
        raise ValueError(f"dataset = 'local:{path}': there is no such file or folder on this machine")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"dataset = 'local:{path}': expected a .parquet file or a folder, got a {path.suffix} file")
    with _readable(path):
        files = files_below(path) if path.is_dir() else [path]
    parquet = [file for file in files if file.suffix == ".parquet" and file.name not in METADATA]
    pictures, described = pictures_among(files), [file for file in files if file.name in METADATA]
    read = parquet or [*pictures, *described]
    if left := sorted(set(files) - set(read)):
        logger.warning("%d files in 'local:%s' are left out: %s", len(left), path, suffixes(left))
    if parquet:
        with _readable(path):
            return parquet_rows(parquet), Places(f"'local:{path}'", parquet)
    rows = _described(path, pictures, described) if described else _by_folders(path, pictures)
    return rows, Places(f"'local:{path}'", file_of=lambda row: os.path.relpath(rows[row]["image"]["path"], path))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what libraries raise into a ValueError that says what was expected."""
    try:
        yield
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"dataset = 'local:{path}' cannot be read ({type(reason).__name__}: {reason}): expected a parquet file, a "
            "folder of parquet files, or a folder with one subfolder of images per class"
        ) from error


def _by_folders(path: Path, pictures: Sequence[Path]) -> Any:
    """Rows of an image folder with a subfolder per class."""
    from datasets import ClassLabel, Dataset, Features, Image

    places = [picture.relative_to(path).parts for picture in pictures]
    if not any(len(place) > 1 for place in places):
        raise ValueError(f"dataset = 'local:{path}' has no subfolders with images: expected one with images per class")
    if odd := ["/".join(place) for place in places if len(place) != 2]:
        raise ValueError(
            f"dataset = 'local:{path}': {len(odd)} of its {len(places)} images do not lie in a subfolder of their "
            f"class, such as {odd[0]}: expected <class>/<image>. Move them, or name the folder with the class folders"
        )
    names = sorted({name for name, _ in places})
    there = [child.name for child in sorted(path.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    if empty := [name for name in there if name not in names]:
        logger.warning("folders of 'local:%s' without an image are no classes: %s", path, ", ".join(map(repr, empty)))
    number = {name: k for k, name in enumerate(names)}
    columns = {"image": [str(picture) for picture in pictures], "label": [number[name] for name, _ in places]}
    return Dataset.from_dict(columns, Features({"image": Image(decode=False), "label": ClassLabel(names=names)}))


def _described(path: Path, pictures: Sequence[Path], metadata: Sequence[Path]) -> Any:
    """Rows of an image folder with metadata; ValueError unless these name every image once."""
    from datasets import Image, load_dataset

    with warnings.catch_warnings(), _readable(path):
        warnings.simplefilter("ignore", ResourceWarning)  # datasets leaves metadata files to the garbage collector
        named = [glob.escape(str(file)) for file in metadata]
        rows = load_dataset("imagefolder", data_files={"train": named}, split="train", drop_labels=False)
        rows = rows.cast_column("image", Image(decode=False))
    files = [Path(image["path"]) for image in rows["image"]]
    if missing := sorted(set(pictures) - set(files)):
        raise ValueError(
            f"dataset = 'local:{path}': its metadata names {len(set(files))} of {len(pictures)} images, and not "
            f"{missing[0].relative_to(path)}: add a line per image to {metadata[0].name}, or remove the file"
        )
    twice = [file for file, count in Counter(files).items() if count > 1]
    if wrong := [*twice, *(file for file in files if not file.is_file())]:
        raise ValueError(
            f"dataset = 'local:{path}': its metadata has {len(files)} lines for {len(pictures)} images; "
            f"{os.path.relpath(wrong[0], path)} is {'named twice' if twice else 'not there'}"
        )
    if "label" in rows.column_names or any(file.parent == path for file in files):
        return rows
    return rows.add_column("label", [file.parent.name for file in files])
