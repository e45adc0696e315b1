"""Read data sets by name, from the Hugging Face hub or from a local copy with the same columns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.data.augmentation import Augmentation
from cafe_flwr.data.folders import Places, files_below
from cafe_flwr.data.labels import fault_in
from cafe_flwr.data.local import column_of, encoded, parquet_rows
from cafe_flwr.data.pictures import alike, as_pixels, read_pictures, scales_of
from cafe_flwr.data.tokenizer import words
from cafe_flwr.networks.preprocessing import SYMMETRIC, Normalisation

TITLE = "title"
"""Column of titles, where a copy of a set has one."""


@dataclass(frozen=True)
class HubSet:
    """What is known of a data set on the hub.

    Attributes
    ----------
    splits
        Splits that are concatenated before they are dealt out to clients.
    inputs, labels
        Names of the columns.
    image_size
        Height and width of its images, which have three colours; 0: it holds texts.
    pixels
        Mean and standard deviation of its training images, by channel.
    augmentation
        Usual augmentation in training.
    title_words
        Mean number of words of a title, if texts begin with one without a mark of its end; 0: they have no titles.
    """

    repository: str
    splits: tuple[str, ...]
    inputs: str
    labels: str
    num_classes: int
    image_size: int = 0
    pixels: Normalisation = SYMMETRIC
    augmentation: Augmentation | None = None
    title_words: int = 0


_CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_TINY = Normalisation((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))

HUB_SETS = {
    "cifar10": HubSet("uoft-cs/cifar10", ("train", "test"), "img", "label", 10, 32, _CIFAR10, Augmentation(4)),
    "cifar100": HubSet("uoft-cs/cifar100", ("train", "test"), "img", "fine_label", 100, 32, _CIFAR100, Augmentation(4)),
    "tiny-imagenet": HubSet(
        "zh-plus/tiny-imagenet", ("train", "valid"), "image", "label", 200, 64, _TINY, Augmentation(8)
    ),
    "ag-news": HubSet("fancyzhx/ag_news", ("train", "test"), "text", "label", 4, title_words=7),
}


@dataclass(frozen=True)
class OpenSet:
    """An opened data set with labels (N,) int64, 0..C−1; pictures are decoded when they are asked for."""

    about: HubSet
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    _rows: Any  # a datasets.Dataset, pictures encoded
    _where: Callable[[int], str]  # place of a row; of −1: the set

    def images(self, rows: NDArray[np.int64]) -> Tensor:
        """Pictures of these rows as pixels, (N, 3, H, W) uint8; ValueError if one is damaged or of another size."""
        size = self.about.image_size
        pixels = np.zeros((len(rows), 3, size, size), dtype=np.uint8)
        pictures = self._rows.select_columns([self.about.inputs])
        for place, row in enumerate(rows.tolist()):
            picture = read_pictures([pictures[row][self.about.inputs]], 0, self._where, [row])
            (image,) = alike(picture, scales_of(picture), channels=3)
            if image.shape[1:] != (size, size):
                raise ValueError(
                    f"{self._where(row)} is {image.shape[2]}×{image.shape[1]} pixels, expected {size}×{size}"
                )
            pixels[place] = as_pixels(image)
        return torch.from_numpy(pixels)

    def texts(self, rows: NDArray[np.int64], part: str = "whole") -> list[str]:
        """Texts of these rows; with part ``"title"`` the column ``title`` or, without one, the first words of the text.

        The hub's AG News joins title and description by a space only. Titles have 7.1 words on average (7,600 test rows
        of the original), so the first 7 words hold 86 % of the titles' words, and 88 % of these are from the title.
        """
        if not len(rows):
            return []
        titled = part == "title" and TITLE in self._rows.column_names
        column = TITLE if titled else self.about.inputs
        texts = list(self._rows.select(rows)[column])
        if wrong := [row for row, text in zip(rows.tolist(), texts, strict=True) if not isinstance(text, str)]:
            raise ValueError(f"{self._where(wrong[0])} has no text in column {column!r}")
        if titled:
            return texts
        return [" ".join(words(text)[: self.about.title_words]) for text in texts] if part == "title" else texts

    def column(self, name: str) -> list[Any]:
        """Values of a column, with class names in place of labels. ValueError if it does not exist."""
        return column_of(self._rows.remove_columns([self.about.inputs]), name, self._where(-1))


def open_set(name: str, data_dir: str = "") -> OpenSet:
    """Open a data set by its name.

    Parameters
    ----------
    name
        One of ``HUB_SETS``.
    data_dir
        Folder with a local copy in ``<data_dir>/<name>``: parquet files with the hub's columns, also in subfolders, or
        the output of ``Dataset.save_to_disk``. Empty: the hub, or the cache of an earlier download.

    Raises
    ------
    ValueError
        If it cannot be had (the message says how to place a local copy), or its columns or labels are not the hub's.
    """
    logging.getLogger("datasets").setLevel(logging.ERROR)
    about = HUB_SETS[name]
    folder = Path(data_dir).expanduser() / name if data_dir else None
    origin = f"dataset = {name!r}" + (f" in {folder}" if folder else "")
    rows, files = _from_folder(folder, name) if folder else (_from_hub(name), [])
    for column in (about.inputs, about.labels):
        if column not in rows.column_names:
            raise ValueError(
                f"{origin} has no column {column!r}; it has {', '.join(rows.column_names)}. Expected are those of "
                f"{about.repository} on the hub: {about.inputs} and {about.labels}"
            )
    where = Places(origin, files)
    labels, class_names = _labels(rows, about, where)
    return OpenSet(about, labels, class_names, encoded(rows, about.inputs), where)


def _from_hub(name: str) -> Any:
    from datasets import load_dataset

    about = HUB_SETS[name]
    try:
        return load_dataset(about.repository, split="+".join(about.splits))
    except Exception as error:  # many kinds, of the network, the hub or the cache
        raise ValueError(
            f"dataset = {name!r} cannot be had from the hub ({type(error).__name__}: {_first_line(error)}). "
            + _how_to_place(name, "<data-dir>")
        ) from error


def _how_to_place(name: str, data_dir: str) -> str:
    copy = f"{data_dir}/{name}"
    return (
        f"To use a local copy: on a machine with a network run 'hf download {HUB_SETS[name].repository} --repo-type "
        f"dataset --local-dir {copy}', bring the folder here, and set data.dir = '{data_dir}' (an absolute path)"
    )


def _from_folder(folder: Path, name: str) -> tuple[Any, list[Path]]:
    """Rows of a copy, and the parquet files that they are of."""
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    advice = _how_to_place(name, str(folder.parent))
    if not folder.is_dir():
        raise ValueError(f"dataset = {name!r}: there is no folder {folder}. {advice}")
    parquet = [file for file in files_below(folder) if file.suffix == ".parquet"]
    parquet.sort(key=lambda file: (_place(file, HUB_SETS[name].splits), file))
    saved = any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json"))
    if not saved and not parquet:
        raise ValueError(f"dataset = {name!r}: {folder} holds no parquet files and no saved data set. {advice}")
    try:
        found = load_from_disk(str(folder)) if saved else parquet_rows(parquet)
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"dataset = {name!r} in {folder} cannot be read ({type(reason).__name__}: {reason}). {advice}"
        ) from error
    if isinstance(found, DatasetDict):
        found = concatenate_datasets([found[split] for split in HUB_SETS[name].splits if split in found])
    return found, [] if saved else parquet


def _place(file: Path, splits: Sequence[str]) -> int:
    """Place of a file's split among the splits, so that a copy's rows have the hub's order."""
    return next((k for k, split in enumerate(splits) if file.name.startswith(split)), len(splits))


def _labels(rows: Any, about: HubSet, where: Places) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    from datasets import ClassLabel

    listed, origin, last = list(rows[about.labels]), where(-1), about.num_classes - 1
    if not listed:
        raise ValueError(f"{origin} has no rows")
    fault = fault_in(listed)
    if fault and fault.missing:
        raise ValueError(
            f"{origin} has {fault.number} rows without a label in column {about.labels!r}, first {where(fault.row)}"
        )
    if fault:
        raise ValueError(
            f"labels of {origin} must be numbers 0..{last}, got {fault.label} in column {about.labels!r}, "
            f"{where(fault.row)}"
        )
    low, high = min(listed), max(listed)
    if low < 0 or high > last:
        withheld = " (-1: the label is withheld)" if low == -1 else ""
        first = next(row for row, label in enumerate(listed) if not 0 <= label <= last)
        raise ValueError(
            f"labels of {origin} are {low}..{high}{withheld}, expected 0..{last} in column {about.labels!r}; first "
            f"{where(first)}"
        )
    feature = rows.features[about.labels]
    named = isinstance(feature, ClassLabel) and feature.num_classes == about.num_classes
    names = feature.names if named else map(str, range(about.num_classes))
    return np.asarray(listed, dtype=np.int64), tuple(names)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
