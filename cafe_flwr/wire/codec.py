"""Values in records and back: what all kinds of messages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from numpy.typing import NDArray

from cafe_flwr.core.text import kebab
from cafe_flwr.training.options import LocalBudget
from cafe_flwr.wire.keys import FLAT, PROTOCOL, Keys
from cafe_flwr.wire.options import Privacy


def budget_config(budget: LocalBudget) -> dict[str, Any]:
    """``local.…``; that momentum is kept is said only where it is."""
    names = [f.name for f in fields(LocalBudget) if f.name != "keep_momentum" or budget.keep_momentum]
    return {f"local.{kebab(name)}": getattr(budget, name) for name in names}


def method_config(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A method and its settings, as every message to a node carries them."""
    return {"method": name, **{f"method.{kebab(key)}": value for key, value in settings.items()}}


def failed(failures: Mapping[int, str]) -> dict[str, Any]:
    """Clients that failed and why, as replies carry them."""
    return filled({"failed-clients": list(failures), "failures": list(failures.values())})


def failures_of(config: Mapping[str, Any]) -> dict[int, str]:
    """What :func:`failed` wrote."""
    return dict(zip(ints_of(config, "failed-clients"), map(str, config.get("failures", [])), strict=True))


def noted(notes: Mapping[int, str]) -> dict[str, Any]:
    """What is unusual about clients, as replies carry it."""
    return filled({"noted-clients": list(notes), "notes": list(notes.values())})


def notes_of(config: Mapping[str, Any]) -> dict[int, str]:
    """What :func:`noted` wrote."""
    return dict(zip(ints_of(config, "noted-clients"), map(str, config.get("notes", [])), strict=True))


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """Without empty lists: Flower's records cannot count their bytes. A list that is not there is empty."""
    return {key: value for key, value in values.items() if value != []}


_T = TypeVar("_T")


def of_client(values: _T | Mapping[int, _T], client: int) -> _T:
    """What holds for a client, of values by client or one for all; ValueError if nothing does.

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
    """Clients that a request is for, or a reply reports."""
    return ints_of(record_of(message, keys.config, ConfigRecord), "clients")


def check_server(config: Mapping[str, Any]) -> None:
    """ValueError, on the node, if the server's message follows another version of the contract (docs/messages.md)."""
    if config.get("protocol") != PROTOCOL:
        raise ValueError(f"the server speaks message protocol {config.get('protocol')}, this node {PROTOCOL}")


def record_of(message: Message, key: str, kind: type[Any]) -> Any:
    """A record of a message; ValueError, with those found, if it is not there."""
    record = message.content.get(key)
    if not isinstance(record, kind):
        found = ", ".join(map(repr, message.content)) or "nothing"
        raise ValueError(f"needs a {kind.__name__} named {key!r}, found {found}")
    return record


def narrowed(values: NDArray[Any], wire: str) -> NDArray[Any]:
    """Values as they travel; ValueError if they are too large for it."""
    with np.errstate(over="ignore"):
        narrow = values.astype(wire, copy=False)
    beyond = np.isinf(narrow) & np.isfinite(values)
    if beyond.any():
        raise ValueError(
            f"{int(beyond.sum())} values are too large to travel as {wire}, the largest {np.abs(values).max():.4g}: "
            'set federation.wire-dtype = "float32"'
        )
    return np.asarray(narrow)


def privacy_config(privacy: Privacy) -> dict[str, Any]:
    """The entries ``privacy.*`` of a request."""
    return {f"privacy.{kebab(name)}": value for name, value in vars(privacy).items()}


def read_flat(message: Message, key: str, wire: str) -> NDArray[Any]:
    """The one flat array of a record; ValueError if it is another."""
    record = record_of(message, key, ArrayRecord)
    if list(record) != [FLAT]:
        raise ValueError(f"needs exactly one array, {FLAT!r}, found {', '.join(map(repr, record)) or 'none'}")
    flat = record[FLAT].numpy()
    if flat.ndim != 1 or flat.dtype != np.dtype(wire):
        raise ValueError(f"its array must be flat {wire}, got {flat.dtype} of shape {flat.shape}")
    return np.asarray(flat)


def ints_of(config: Mapping[str, Any], key: str) -> list[int]:
    """A list of whole numbers, empty if it is not there."""
    return [int(v) for v in config.get(key, [])]


def round_of(config: Mapping[str, Any]) -> int:
    """Number of the round that a message belongs to."""
    return int(config["server-round"])


def prefixed(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Values whose key begins with the prefix, under Python names: ``method.distill-weight`` → ``distill_weight``."""
    return {k.removeprefix(prefix).replace("-", "_"): v for k, v in config.items() if k.startswith(prefix)}
