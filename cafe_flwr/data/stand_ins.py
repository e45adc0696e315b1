"""Write stand-ins for the hub's data sets: small made-up files with the same columns, classes and file names.

They are for tests without a network: noise with a trace of the label, on which no result means anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe_flwr.core.files import atomic_folder
from cafe_flwr.data.hub import HUB_SETS

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

TOPICS = ("World", "Sports", "Business", "Sci/Tech")
_WORDS = {
    "World": "minister election troops border treaty",
    "Sports": "coach season goal league striker",
    "Business": "shares profit market quarter merger",
    "Sci/Tech": "software orbit browser chip galaxy",
}
_FOLDERS = {"cifar10": "plain_text", "cifar100": "cifar100"}  # of the parquet files; 'data' for the others


def label_of(name: str, row: int) -> int:
    """Label of a row: the first ten classes in turn, as there are too few rows for a hundred."""
    return row % min(HUB_SETS[name].num_classes, 10)


def picture(name: str, row: int, mode: str = "RGB") -> Image.Image:
    """Noise that differs by row, with a shade that depends on the label."""
    from PIL import Image

    size, rng = HUB_SETS[name].image_size, np.random.default_rng(row)
    shade = 40 * (label_of(name, row) % 5)
    pixels = np.clip(rng.integers(0, 90, (size, size, 3)) + shade, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def text(row: int) -> str:
    """A short piece of news, with the label's words.

    Examples
    --------
    >>> text(1)
    'Goal and goal: report 1 says the league matters.'
    """
    rng = np.random.default_rng(row)
    topic = _WORDS[TOPICS[row % 4]].split()
    return f"{rng.choice(topic).title()} and {rng.choice(topic)}: report {row} says the {rng.choice(topic)} matters."


def rows_of(name: str, start: int, stop: int) -> Dataset:
    """Rows start..stop − 1 of a set, with the hub's columns."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    about, rows = HUB_SETS[name], range(start, stop)
    labels = [label_of(name, row) for row in rows]
    if not about.image_size:
        features = Features({about.inputs: Value("string"), about.labels: ClassLabel(names=list(TOPICS))})
        return Dataset.from_dict({about.inputs: [text(row) for row in rows], about.labels: labels}, features)
    names = [f"class-{c}" for c in range(about.num_classes)]
    columns: dict[str, Any] = {about.inputs: [picture(name, row) for row in rows], about.labels: labels}
    features = Features({about.inputs: Image(), about.labels: ClassLabel(names=names)})
    if name == "cifar100":
        columns["coarse_label"] = [label // 5 for label in labels]
        features["coarse_label"] = ClassLabel(names=[f"coarse-{c}" for c in range(20)])
    return Dataset.from_dict(columns, features)


def write_stand_in(home: Path, name: str, rows: int, *, saved: bool = False) -> Path:
    """Write a set of ``HUB_SETS`` with at least 4 rows to ``home/<name>``, three quarters of them for training.

    Returns ``home``, the value for ``data-dir``. With ``saved`` the set is written by ``DatasetDict.save_to_disk``,
    else as the hub's parquet files. ValueError if the set is unknown, or if the folder exists: real data is never
    overwritten.
    """
    from datasets import DatasetDict

    if name not in HUB_SETS:
        raise ValueError(f"there is no set {name!r}, choose from {', '.join(HUB_SETS)}")
    if rows < 4:
        raise ValueError(f"a set needs 4 rows or more, got {rows}")
    if (home / name).exists():
        raise ValueError(f"{home / name} is there already: remove it, or choose another folder")
    splits, cut = HUB_SETS[name].splits, rows * 3 // 4
    parts = dict(zip(splits, (rows_of(name, 0, cut), rows_of(name, cut, rows)), strict=True))
    with atomic_folder(home / name) as draft:
        if saved:
            DatasetDict(parts).save_to_disk(str(draft))
        else:
            folder = draft / _FOLDERS.get(name, "data")
            folder.mkdir()
            for split, part in parts.items():
                part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return home
