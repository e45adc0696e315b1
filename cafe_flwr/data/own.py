"""Read a client's own data, from the folder that its node names, in the classes of the federation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cafe_flwr.core.random import rng_for
from cafe_flwr.data.labels import composed, shown
from cafe_flwr.data.local import normalised, read_local
from cafe_flwr.data.options import Data
from cafe_flwr.data.partition import stratified_split
from cafe_flwr.data.split import ClientData, Split


def load_own(
    path: Path, client: int, options: Data, *, class_names: Sequence[str], shape: tuple[int, ...], seed: int = 0
) -> ClientData:
    """Read one client's own images and split them into train, calibration and test.

    Parameters
    ----------
    path
        A parquet file, a folder of them, or a folder with one subfolder of images per class.
    client
        Number of the client; the split depends on it and on the seed.
    options
        The federation's columns and shares of the splits.
    class_names
        Classes of the federation, in the order of its labels. The client's classes are matched with them by name.
    shape
        (channels, size, size) that all clients' images are converted to; channels is 1 or 3.

    Raises
    ------
    ValueError
        If the data cannot be read, or has labels that the federation does not know. Names are compared in Unicode's
        composed form (NFC).
    """
    images, labels, names, _ = read_local(
        path, shape[-1], options.image_column, options.label_column, options.image_range, channels=shape[0], gaps=False
    )
    y = _in_the_federation(labels, names, class_names, path)
    x = torch.from_numpy(normalised(images))
    rng = partial(rng_for, seed, 0, client)
    whole = Split(x, torch.from_numpy(y), torch.arange(len(y))[:, None])
    train, calibration, test = (whole.take(rows) for rows in stratified_split(y, options.shares, rng("split")))
    if held := options.validation_share:
        cut = stratified_split(train.y.numpy(), (1 - held, held), rng("validation"))
        train, test = map(train.take, cut)
    return ClientData(train, calibration, test)


def _in_the_federation(
    labels: NDArray[np.int64], names: Sequence[str], class_names: Sequence[str], path: Path
) -> NDArray[np.int64]:
    """Labels of the federation in place of the file's own, by their names."""
    number = {name: k for k, name in enumerate(composed(class_names, "data.class-names"))}
    present = [names[label] for label in np.unique(labels)]
    if unknown := [name for name in present if name not in number]:
        rows = int(np.isin(labels, [names.index(name) for name in unknown]).sum())
        raise ValueError(
            f"its data in {path} has labels the federation does not know: {_some(unknown)} ({rows} of {len(labels)} "
            f"examples); data.class-names has {_some(class_names)}"
        )
    return np.array([number.get(name, -1) for name in names], dtype=np.int64)[labels]


def _some(names: Sequence[str], most: int = 10) -> str:
    text = ", ".join(map(shown, names[:most]))
    return text + f" and {len(names) - most} more" * (len(names) > most)
