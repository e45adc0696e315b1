"""Turn a user's own data, a ``datasets.Dataset`` or a torch ``Dataset``, into splits of a client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.core.log import logger
from cafe_flwr.core.random import rng_for
from cafe_flwr.data.augmentation import Augmentation
from cafe_flwr.data.labels import fault_in, plain
from cafe_flwr.data.local import encoded
from cafe_flwr.data.partition import check_shares, stratified_split
from cafe_flwr.data.pictures import alike, read_pictures, scales_of
from cafe_flwr.data.split import ClientData, Split
from cafe_flwr.data.tokenizer import Tokenizer

_LARGEST = 2**31  # of a label


def split_from_datasets(
    dataset: Any,
    inputs: str = "image",
    labels: str = "label",
    *,
    image_size: int = 0,
    image_range: str = "",
    tokenizer: Tokenizer | None = None,
) -> Split:
    """A split of a ``datasets.Dataset`` with a column of inputs and one of labels 0..C−1.

    Columns are read as they are stored, whatever format or transform is set.

    Parameters
    ----------
    inputs
        Column of pictures, which become pixels (uint8), or float32 in −1..1 if any has more than 8 bits; of texts,
        which become tokens; or of lists of numbers.
    image_size
        Resize pictures to this height and width; 0 keeps them as they are.
    image_range
        Numbers of black and white in pictures of more than 8 bits, see :func:`cafe_flwr.data.pictures.scales_of`.
    tokenizer
        Tokenizer of texts; None: 64 words of 8,192 tokens.

    Raises
    ------
    ValueError
        If a column does not exist, a label is missing or not a number from 0 up, an input is missing, cannot be read or
        holds NaN or infinite numbers, or inputs differ in shape.

    Examples
    --------
    >>> from datasets import Dataset
    >>> own = Dataset.from_dict({"text": ["good", "very bad"], "label": [1, 0]})
    >>> split = split_from_datasets(own, "text", tokenizer=Tokenizer(max_tokens=3, vocabulary=100))
    >>> split.x.tolist(), split.y.tolist()
    ([[96, 0, 0], [25, 74, 0]], [1, 0])
    """
    from datasets import Image

    for column in (inputs, labels):
        if column not in dataset.column_names:
            raise ValueError(f"the data set has no column {column!r}; it has {', '.join(dataset.column_names)}")
    if dataset.format["type"] == "custom":
        logger.warning("the transform of a data set is not applied: its columns are read as they are stored")
    rows = encoded(dataset.with_format(None), inputs)
    values, places = rows[inputs], _place("row", inputs)
    y = _labels(rows[labels], _place("row", labels))
    if any(isinstance(value, str) for value in values):
        if wrong := [row for row, value in enumerate(values) if not isinstance(value, str)]:
            raise ValueError(f"{places(wrong[0])} holds no text, got {values[wrong[0]]!r}")
        return Split((tokenizer or Tokenizer())(values), y)
    if rows.features[inputs] == Image(decode=False):
        return Split(_pictures(values, image_size, image_range, places), y)
    return Split(_stacked(values, places), y)


def split_from_torch(dataset: Any, *, image_size: int = 0, image_range: str = "") -> Split:
    """A split of a torch ``Dataset`` of known length whose items are (input, label).

    Inputs are tensors, arrays or pictures of one shape; pictures, ``image_size`` and ``image_range`` are as for
    :func:`split_from_datasets`. uint8 stays (pixels), other whole numbers become int64 (tokens), the rest float32.
    Every item is read once, so random transforms are applied only once: vary images in training instead,
    ``divide(split, augment=Augmentation(4))``.

    ValueError if an item is not a pair, a label not a number from 0 up, an input unreadable or not finite, or inputs
    differ in shape.

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
    inputs, y = [x for x, _ in items], _labels([y for _, y in items], _place("item"))
    if any(map(_is_picture, inputs)):
        return Split(_pictures(inputs, image_size, image_range, _place("item")), y)
    return Split(_stacked(inputs, _place("item")), y)


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


def _place(what: str, column: str = "") -> Callable[[int], str]:
    """How the place of a value is named: its row and column, or its item."""
    return lambda row: f"{what} {row}" + f" of column {column!r}" * bool(column)


def _labels(values: Iterable[Any], place: Callable[[int], str]) -> Tensor:
    listed = [plain(value) for value in values]
    fault = fault_in(listed)
    if fault and fault.missing and not isinstance(listed[fault.row], str):
        raise ValueError(f"{fault.number} of {len(listed)} examples have no label, first {place(fault.row)}")
    if fault:
        raise ValueError(
            f"labels must be whole numbers from 0 up, got {fault.label}: number the classes first ({place(fault.row)})"
        )
    if listed and min(listed) < 0:
        row = min(range(len(listed)), key=listed.__getitem__)
        raise ValueError(
            f"labels must be numbers from 0 up, got {listed[row]}: some labels are missing or withheld ({place(row)})"
        )
    if listed and max(listed) > _LARGEST:
        row = max(range(len(listed)), key=listed.__getitem__)
        raise ValueError(
            f"labels must be numbers of classes, got {listed[row]} ({place(row)}): number the classes first"
        )
    return torch.tensor(listed, dtype=torch.int64)


def _pictures(values: Iterable[Any], image_size: int, image_range: str, place: Callable[[int], str]) -> Tensor:
    """Pictures in one tensor, (N, C, H, W)."""
    read = read_pictures(values, image_size, place)
    return torch.from_numpy(np.stack(_of_one_shape(alike(read, scales_of(read, image_range)))))


def _stacked(values: Sequence[Any], place: Callable[[int], str]) -> Tensor:
    """Inputs in one tensor, (N, …)."""
    arrays = _of_one_shape([_array(value, place(row)) for row, value in enumerate(values)])
    x = torch.from_numpy(np.stack(arrays)) if arrays else torch.zeros(0)
    if x.dtype == torch.uint8:
        return x
    return x.float() if x.is_floating_point() else x.long()


def _of_one_shape(arrays: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        some = ", ".join(map(str, sorted(shapes)[:3]))
        raise ValueError(
            f"inputs have {len(shapes)} different shapes ({some}): bring them to one, images by image_size"
        )
    return arrays


def _array(value: Any, where: str) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "buif":
        raise ValueError(f"{where} must hold numbers, in lists of one length, got {short(value)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        place = tuple(int(k) for k in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{where} holds {array[place]} at {place}: mend the value, or leave the example out")
    return array


def _is_picture(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "mode")
