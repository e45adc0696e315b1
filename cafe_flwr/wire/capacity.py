"""Kinds of clients, for federations where some hold only the first exits, narrower layers or another modality.

A *kind* is the clients of one depth, width and modality. The federation's shared part holds every tensor once; a client
sends, receives and averages only those of its kind (:mod:`cafe_flwr.wire.slices`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from cafe_flwr.core.schema import Schema
from cafe_flwr.core.text import MAX_TEXT, shown
from cafe_flwr.wire.reader import MAX_WHOLE, parsed, schema_of
from cafe_flwr.wire.slices import is_part


@dataclass(frozen=True)
class ClientSpec:
    """What clients of one depth, width and modality hold.

    Attributes
    ----------
    name
        Readable name; empty where all clients of the federation are alike.
    num_exits, num_parameters, macs
        Of their network; MACs of inference up to each exit.
    shared
        Their part of the federation's shared tensors, under its names and in its order.
    upload, download
        What each sends and receives of its own.
    """

    name: str
    num_exits: int
    num_parameters: int
    macs: tuple[int, ...]
    shared: Schema
    upload: Schema
    download: Schema

    def to_json(self) -> str:
        """As a node sends it."""
        return json.dumps({f.name: _plain(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> ClientSpec:
        """Inverse of :meth:`to_json`; ValueError for other texts."""
        try:
            values: dict[str, Any] = parsed(text)
            schemas = {key: schema_of(values[key]) for key in ("upload", "download")}
            shared = Schema.from_json(values["shared"])  # which :meth:`check` compares with the federation's
            kind = cls(**{**values, "macs": tuple(values["macs"]), "shared": shared, **schemas})
        except (TypeError, AttributeError, KeyError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"names a kind of clients that cannot be read: {shown(str(error))}") from None
        numbers = [kind.num_exits, kind.num_parameters, *kind.macs]
        readable = isinstance(kind.name, str) and len(kind.name) <= MAX_TEXT and kind.name.isprintable()
        if not readable or not all(type(number) is int and 0 <= number <= MAX_WHOLE for number in numbers):
            raise ValueError(
                "names a kind of clients whose name is no text, or with numbers that are not whole and at least 0"
            )
        return kind

    def check(self, shared: Schema, num_exits: int) -> None:
        """ValueError if this kind does not fit a federation with this shared part and number of exits."""
        if not 1 <= self.num_exits <= num_exits or len(self.macs) != self.num_exits:
            raise ValueError(
                f"names a kind of clients with {self.num_exits} exits and {len(self.macs)} numbers of MACs, where "
                f"networks have 1 to {num_exits} exits"
            )
        if not is_part(self.shared, shared):
            raise ValueError("names a kind of clients whose shared tensors are not among the federation's")

    def like(self, other: ClientSpec) -> bool:
        """Whether clients of both hold and send the same; MACs are not compared, since not every node knows them."""
        return (self.num_exits, self.shared, self.upload, self.download) == (
            other.num_exits,
            other.shared,
            other.upload,
            other.download,
        )


def are_unequal(kinds: Iterable[ClientSpec]) -> bool:
    """Whether some clients hold only a part of what others hold."""
    held = {kind.shared for kind in kinds}
    return any(one != other and is_part(one, other) for one in held for other in held)


def _plain(value: Any) -> Any:
    return value.to_json() if isinstance(value, Schema) else value
