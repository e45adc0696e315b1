"""The answer with the weights that a run starts from."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from cafe_flwr.wire.bounds import MAX_NORM, check_norm
from cafe_flwr.wire.codec import read_flat
from cafe_flwr.wire.keys import FLAT, Keys


def initial_content(flat: NDArray[np.float32], keys: Keys) -> RecordDict:
    """The shared part (size,) as a Flower record."""
    return RecordDict({keys.arrays: ArrayRecord({FLAT: Array(flat)})})


def initial_from(message: Message, keys: Keys, size: int) -> NDArray[np.float32]:
    """The shared part (size,) of a node's answer; ValueError for another size, NaN, infinity or an absurd norm."""
    flat = read_flat(message, keys.arrays, "float32")
    if len(flat) != size:
        raise ValueError(f"its array has {len(flat)} values, expected {size}")
    check_norm(flat, MAX_NORM, "the shared part that it gives")
    return flat
