"""Send named tensors as one flat array, whose content a schema describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Schema:
    """Names and shapes of tensors that travel as one flat array, in a fixed order.

    A Flower message is slowed down by the number of its tensors, not by their size. As a flat array has no names, and
    heads could be swapped, a schema is agreed on once and its digest is checked in every message.

    Examples
    --------
    >>> schema = Schema((("head.weight", (2, 3)), ("head.bias", (2,))))
    >>> schema.size
    8
    >>> flat = schema.pack({"head.weight": torch.ones(2, 3), "head.bias": torch.zeros(2)})
    >>> schema.unpack(flat)["head.bias"]
    tensor([0., 0.])
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], names: list[str]) -> Schema:
        """Schema of the named tensors, in the order of ``names``."""
        return cls(tuple((name, tuple(tensors[name].shape)) for name in names))

    @cached_property
    def names(self) -> list[str]:
        """Names, in order."""
        return [name for name, _ in self.entries]

    @cached_property
    def sizes(self) -> list[int]:
        """Number of values of every tensor."""
        return [int(np.prod(shape, dtype=np.int64)) for _, shape in self.entries]

    @cached_property
    def size(self) -> int:
        """Number of values in all."""
        return sum(self.sizes)

    def to_json(self) -> str:
        """A list of [name, shape] as JSON."""
        return json.dumps([[name, list(shape)] for name, shape in self.entries], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """The schema that :meth:`to_json` wrote."""
        return cls(tuple((str(name), tuple(int(n) for n in shape)) for name, shape in json.loads(text)))

    def pack(self, tensors: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """One flat float32 array of the schema's tensors; ValueError if one is missing or has another shape."""
        missing = [name for name in self.names if name not in tensors]
        if missing:
            raise ValueError(f"missing tensors: {', '.join(missing)}")
        for name, shape in self.entries:
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}")
        if not self.entries:
            return np.zeros(0, dtype=np.float32)
        return torch.cat([tensors[name].detach().reshape(-1).to("cpu", torch.float32) for name in self.names]).numpy()

    def unpack(self, flat: NDArray[np.floating]) -> dict[str, Tensor]:
        """The named tensors (float32) of a flat array; ValueError for another size or values that are not finite."""
        if flat.shape != (self.size,):
            raise ValueError(f"expected {self.size} values, got an array of shape {flat.shape}")
        if not np.isfinite(flat).all():
            raise ValueError(f"{int((~np.isfinite(flat)).sum())} of {self.size} values are NaN or infinite")
        parts = torch.from_numpy(flat.astype(np.float32)).split(self.sizes)
        return {name: part.reshape(shape) for (name, shape), part in zip(self.entries, parts, strict=True)}

    def check_half(self, flat: NDArray[np.floating], what: str) -> None:
        """Raise ValueError, naming the tensor, if a value of a flat array is beyond the range of float16.

        Examples
        --------
        >>> Schema((("a", (1,)), ("b", (2,)))).check_half(np.array([1.0, 2.0, -1e5]), "the update")
        Traceback (most recent call last):
            ...
        ValueError: the update of b has a value of -100000, beyond float16 (±65504): set wire-dtype = "float32"
        """
        beyond = np.flatnonzero(~(np.abs(flat) <= _HALF_MAX))
        if len(beyond):
            tensor = int(np.searchsorted(np.cumsum(self.sizes), beyond[0], side="right"))
            raise ValueError(
                f"{what} of {self.names[tensor]} has a value of {flat[beyond[0]]:.6g}, beyond float16 "
                f'(±{_HALF_MAX:.0f}): set wire-dtype = "float32"'
            )


def schema_hash(*schemas: Schema) -> str:
    """Fingerprint of schemas, 16 hexadecimal digits: equal if names, shapes and order are.

    Examples
    --------
    >>> schema_hash(Schema((("a", (2,)),))) == schema_hash(Schema((("a", (3,)),)))
    False
    """
    text = "\n".join(schema.to_json() for schema in schemas)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
