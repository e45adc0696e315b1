"""Find data sets by name, before they are dealt out: their labels, and how to read inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.data import digits, docstrings
from cafe_flwr.data.augmentation import Augmentation
from cafe_flwr.data.hub import HUB_SETS, open_set
from cafe_flwr.data.local import read_local
from cafe_flwr.data.options import Data
from cafe_flwr.data.tokenizer import Tokenizer
from cafe_flwr.networks.preprocessing import SYMMETRIC, Normalisation


class Source(NamedTuple):
    """A data set before it is dealt out."""

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    read: Callable[[NDArray[np.int64]], Tensor] | None = None  # inputs of rows; None: they are rendered
    column: Callable[[str], Sequence[Any]] | None = None  # values of a column; None: it has no columns
    splits: NDArray[np.int64] | None = None  # of rows, 0, 1 or 2, if the set itself has them
    rows: NDArray[np.int64] | None = None  # rows of the whole set, if only some take part
    vocabulary: int = 0
    pixels: Normalisation = SYMMETRIC
    augment: Augmentation | None = None


def source_of(options: Data, num_examples: int, seed: int) -> Source:
    """The data set that the options name; an embedded one has at least ``num_examples``."""
    tokenizer = Tokenizer(options.max_tokens, options.vocabulary, cut=options.long_texts == "cut")
    if options.dataset in digits.NUM_CLASSES:
        return _embedded(options.dataset, num_examples)
    if options.dataset == "docstrings":
        return _docstrings(num_examples, options.shares, seed, tokenizer)
    return _of_the_hub(options, tokenizer) if options.dataset in HUB_SETS else _local(options)


def _embedded(dataset: str, num_examples: int) -> Source:
    """An embedded set of at least ``num_examples``, equally many of every class."""
    names = digits.class_names(dataset)
    labels = np.repeat(np.arange(len(names)), -(-num_examples // len(names)))
    return Source(labels, names, (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE))


def _local(options: Data) -> Source:
    """The set ``"local:<path>"``."""
    kind, _, path = options.dataset.partition(":")
    if kind != "local" or not path:
        known = ", ".join(map(repr, (*digits.NUM_CLASSES, "docstrings", *HUB_SETS)))
        raise ValueError(f"dataset must be {known} or 'local:<path>', got {options.dataset!r}")
    images, labels, names, column = read_local(
        Path(path).expanduser(), options.image_size, options.image_column, options.label_column, options.image_range
    )
    shape = tuple(int(n) for n in images.shape[1:])
    return Source(labels, names, shape, lambda rows: torch.from_numpy(images[rows]), column)


def _docstrings(num_examples: int, shares: tuple[float, float, float], seed: int, tokenizer: Tokenizer) -> Source:
    """The sentences of installed packages."""
    sentences = docstrings.sentences()
    rows, splits = docstrings.draw(num_examples, shares, seed)
    return Source(
        sentences.labels[rows],
        docstrings.PACKAGES,
        (tokenizer.max_tokens,),
        lambda wanted: tokenizer([sentences.texts[row] for row in wanted]),
        splits=splits,
        rows=rows,
        vocabulary=tokenizer.vocabulary,
    )


def _of_the_hub(options: Data, tokenizer: Tokenizer) -> Source:
    """A set of the hub, or a local copy of it."""
    opened = open_set(options.dataset, options.dir)
    about, size = opened.about, opened.about.image_size
    source = Source(opened.labels, opened.class_names, (3, size, size), opened.images, opened.column)
    if not size:
        read, shape = (lambda rows: tokenizer(opened.texts(rows, options.text_part))), (tokenizer.max_tokens,)
        return source._replace(read=read, input_shape=shape, vocabulary=tokenizer.vocabulary)
    augment = about.augmentation if options.augmentation == "usual" else None
    return source._replace(pixels=about.pixels, augment=augment)
