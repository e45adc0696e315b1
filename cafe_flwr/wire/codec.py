"""Encoding and decoding of values that all kinds of messages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from numpy.typing import NDArray

from cafe_flwr.core.text import kebab, shown
from cafe_flwr.wire.keys import FLAT, PROTOCOL, Keys
from cafe_flwr.wire.reader import CLIENT, distinct, read, words


def entries(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under the keys of a message: ``distill_weight`` of ``method.`` → ``method.distill-weight``."""
    return {f"{prefix}{kebab(name)}": value for name, value in values.items()}


def prefixed(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Inverse of :func:`entries`."""
    return {k.removeprefix(prefix).replace("-", "_"): v for k, v in config.items() if k.startswith(prefix)}


def method_config(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A method and its settings, as every message to a node carries them."""
    return {"method": name, **entries("method.", settings)}


def scalars_of(kind: type[Any]) -> dict[str, type[int] | type[float]]:
    """The int and float fields of a dataclass, with their types."""
    numbers = {"int": int, "float": float}
    return {f.name: numbers[str(f.type)] for f in fields(kind) if f.type in numbers}


def failed(failures: Mapping[int, str]) -> dict[str, Any]:
    """Clients that failed and why, as replies carry them."""
    return filled({"failed-clients": list(failures), "failures": list(failures.values())})


def failures_of(config: Mapping[str, Any]) -> dict[int, str]:
    """Inverse of :func:`failed`; ValueError if it is none."""
    return _by_client(config, "failed-clients", "failures")


def noted(notes: Mapping[int, str]) -> dict[str, Any]:
    """Notes on clients, as replies carry them."""
    return filled({"noted-clients": list(notes), "notes": list(notes.values())})


def notes_of(config: Mapping[str, Any]) -> dict[int, str]:
    """Inverse of :func:`noted`; ValueError if it is none."""
    return _by_client(config, "noted-clients", "notes")


def _by_client(config: Mapping[str, Any], clients: str, texts: str) -> dict[int, str]:
    values = read(config, {clients: CLIENT, texts: _WORDS})
    return dict(zip(distinct(values[clients], clients), values[texts], strict=True))


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """The values without empty lists, whose bytes Flower cannot count; a missing list is read as empty."""
    return {key: value for key, value in values.items() if value != []}


_T = TypeVar("_T")
_WORDS = words("n")
_HEADERS = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}  # of numpy's format, by version


def of_client(values: _T | Mapping[int, _T], client: int) -> _T:
    """The value of a client, from values by client or one for all; ValueError if it has none.

    Examples
    --------
    >>> of_client(3, 7), of_client({7: 2}, 7)
    (3, 2)
    """
    if not isinstance(values, Mapping):
        return values
    if client not in values:
        raise ValueError(f"it names client {client}, which it was not asked for")
    return values[client]


def clients_in(message: Message, keys: Keys) -> list[int]:
    """Clients of a request or a reply; ValueError if they are not different numbers."""
    config = record_of(message, keys.config, ConfigRecord)
    return distinct(read(config, {"clients": CLIENT})["clients"], "clients")


def check_client(config: Mapping[str, Any]) -> None:
    """ValueError, on the server, if a node's reply has another version of the protocol."""
    if (other := config.get("protocol")) != PROTOCOL:
        raise ValueError(f"it speaks message protocol {shown(str(other))}, this server {PROTOCOL}")


def check_server(config: Mapping[str, Any]) -> None:
    """ValueError, on the node, if the server's message has another version of the protocol (docs/messages.md)."""
    if config.get("protocol") != PROTOCOL:
        raise ValueError(
            f"the server speaks message protocol {shown(str(config.get('protocol')))}, this node {PROTOCOL}"
        )


def record_of(message: Message, key: str, kind: type[Any]) -> Any:
    """A record of a message; ValueError, with those found, if it is missing."""
    record = message.content.get(key)
    if not isinstance(record, kind):
        found = ", ".join(map(repr, message.content)) or "nothing"
        raise ValueError(f"needs a {kind.__name__} named {key!r}, found {shown(found)}")
    return record


def narrowed(values: NDArray[Any], wire: str) -> NDArray[Any]:
    """Values in the type ``wire``; ValueError if they are too large for it."""
    with np.errstate(over="ignore"):
        narrow = values.astype(wire, copy=False)
    beyond = np.isinf(narrow) & np.isfinite(values)
    if beyond.any():
        raise ValueError(
            f"{int(beyond.sum())} values are too large to travel as {wire}, the largest {np.abs(values).max():.4g}: "
            'set federation.wire-dtype = "float32"'
        )
    return np.asarray(narrow)


def read_flat(message: Message, key: str, wire: str) -> NDArray[Any]:
    """The only array of a record; ValueError if it is not flat or not of type ``wire``."""
    record = record_of(message, key, ArrayRecord)
    if list(record) != [FLAT]:
        found = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"needs exactly one array, {FLAT!r}, found {shown(found)}")
    data = record[FLAT].data
    file = BytesIO(data)
    try:
        shape, _, dtype = _HEADERS[read_magic(file)](file)
    except Exception as error:  # whatever the bytes are
        raise ValueError(f"its array is not in numpy's format: {shown(str(error))}") from None
    if len(shape) != 1 or dtype != np.dtype(wire):
        raise ValueError(f"its array must be flat {wire}, got {shown(str(dtype))} of shape {shown(str(shape))}")
    if shape[0] * dtype.itemsize != len(data) - file.tell():  # before memory is taken for them
        raise ValueError(f"its array says that it has {shape[0]} values, and has {len(data) - file.tell()} bytes")
    return np.frombuffer(data, dtype, offset=file.tell()).copy()
