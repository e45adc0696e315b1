"""Turn a user's own data, a ``datasets.Dataset`` or a torch ``Dataset``, into splits of a client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.core.random import rng_for
from cafe_flwr.data.augmentation import Augmentation
from cafe_flwr.data.local import alike
from cafe_flwr.data.partition import check_shares, stratified_split
from cafe_flwr.data.split import ClientData, Split
from cafe_flwr.data.tokenizer import Tokenizer


def split_from_datasets(
    dataset: Any,
    inputs: str = "image",
    labels: str = "label",
    *,
    image_size: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Split:
    """A split of a ``datasets.Dataset`` with a column of inputs and one of labels 0..C−1.

    Parameters
    ----------
    inputs
        Column of pictures, which become pixels (uint8); of texts, which become tokens; or of lists of numbers.
    image_size
        Resize pictures to this height and width; 0 keeps them as they are.
    tokenizer
        Tokenizer of texts; None: 64 words of 8,192 tokens.

    Raises
    ------
    ValueError
        If a column does not exist, a label is missing or not a number from 0 up, or pictures differ in size.

    Examples
    --------
    >>> from datasets import Dataset
    >>> own = Dataset.from_dict({"text": ["good", "very bad"], "label": [1, 0]})
    >>> split = split_from_datasets(own, "text", tokenizer=Tokenizer(max_tokens=3, vocabulary=100))
    >>> split.x.tolist(), split.y.tolist()
    ([[96, 0, 0], [25, 74, 0]], [1, 0])
    """
    for column in (inputs, labels):
        if column not in dataset.column_names:
            raise ValueError(f"the data set has no column {column!r}; it has {', '.join(dataset.column_names)}")
    values = dataset[inputs][:]
    y = _labels(dataset[labels][:])
    if values and isinstance(values[0], str):
        return Split((tokenizer or Tokenizer())(values), y)
    return Split(_stacked(values, image_size), y)


def split_from_torch(dataset: Any, *, image_size: int = 0) -> Split:
    """A split of a torch ``Dataset`` of known length whose items are (input, label).

    Inputs are tensors, arrays or pictures of one shape (``image_size`` as for :func:`split_from_datasets`). uint8 stays
    (pixels), other whole numbers become int64 (tokens), the rest float32. Every item is read once, so random transforms
    are applied only once: vary images in training instead, ``divide(split, augment=Augmentation(4))``.

    ValueError if an item is not a pair, a label not a number from 0 up, or inputs differ in shape.

    Examples
    --------
    >>> from torch.utils.data import TensorDataset
    >>> split = split_from_torch(TensorDataset(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])))
    >>> split.x.shape, split.y.tolist()
    (torch.Size([4, 3, 8, 8]), [0, 1, 1, 0])
    """
    items = [dataset[row] for row in range(len(dataset))]
    for row, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"item {row} of the data set must be (input, label), got a {type(item).__name__}")
    return Split(_stacked([x for x, _ in items], image_size), _labels([y for _, y in items]))


def divide(
    split: Split, shares: Sequence[float] = (0.6, 0.15, 0.25), seed: int = 0, augment: Augmentation | None = None
) -> ClientData:
    """One client's examples divided into train, calibration and test, with the same label distribution.

    Parameters
    ----------
    shares
        Shares of train, calibration and test; they sum to 1.
    seed
        Seed of the division; it must be the same in every process of a run.
    augment
        How training varies images, such as ``cafe_flwr.data.augmentation.Augmentation(4)``.

    Examples
    --------
    >>> data = divide(Split(torch.zeros(20, 5), torch.arange(20) % 2))
    >>> len(data.train), len(data.calibration), len(data.test)
    (12, 3, 5)
    """
    check_shares(shares)
    rows = stratified_split(split.y.numpy(), shares, rng_for(seed, 0, -1, "divide"))
    train, calibration, test = (split.take(part) for part in rows)
    return ClientData(train, calibration, test, augment)


def _labels(values: Iterable[Any]) -> Tensor:
    listed = [value.item() if isinstance(value, Tensor | np.generic) else value for value in values]
    if missing := sum(value is None for value in listed):
        raise ValueError(f"{missing} of {len(listed)} examples have no label")
    if wrong := [value for value in listed if isinstance(value, bool) or not isinstance(value, int)]:
        raise ValueError(f"labels must be whole numbers from 0 up, got {wrong[0]!r}: number the classes first")
    y = torch.tensor(listed, dtype=torch.int64)
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"labels must be numbers from 0 up, got {int(y.min())}: some labels are missing or withheld")
    return y


def _stacked(values: Sequence[Any], image_size: int) -> Tensor:
    """Inputs in one tensor, (N, …)."""
    arrays = [_array(value, image_size) for value in values]
    if all(map(_is_picture, values)):
        arrays = alike(arrays)
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        some = ", ".join(map(str, sorted(shapes)[:3]))
        raise ValueError(
            f"inputs have {len(shapes)} different shapes ({some}): bring them to one, images by image_size"
        )
    x = torch.from_numpy(np.stack(arrays)) if arrays else torch.zeros(0)
    if x.dtype == torch.uint8:
        return x
    return x.float() if x.is_floating_point() else x.long()


def _array(value: Any, image_size: int) -> NDArray[Any]:
    if not _is_picture(value):
        return value.numpy() if isinstance(value, Tensor) else np.asarray(value)
    picture = value.convert("L" if value.mode in ("1", "L", "LA") else "RGB")
    if image_size:
        picture = picture.resize((image_size, image_size))
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _is_picture(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "mode")
