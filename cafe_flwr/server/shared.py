"""The shared parameters of the federation: by name, as in Flower's results, and flat, as in messages."""

from __future__ import annotations

import secrets
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, MessageType
from flwr.serverapp import Grid
from numpy.typing import NDArray

from cafe_flwr.core.schema import Schema
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.directory import Directory
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.keys import FLAT


def by_name(schema: Schema, flat: NDArray[np.float32]) -> ArrayRecord:
    """Shared parameters by name, as Flower's results hold them."""
    parts = np.split(flat, np.cumsum(schema.sizes)[:-1]) if schema.sizes else []
    return ArrayRecord({n: Array(p.reshape(s)) for (n, s), p in zip(schema.entries, parts, strict=True)})


def flattened(schema: Schema, arrays: ArrayRecord) -> NDArray[np.float32]:
    """Inverse of :func:`by_name`; ignores other arrays. ValueError if parameters are missing or of another shape."""
    missing = [name for name in schema.names if name not in arrays]
    if missing:
        raise ValueError(f"the initial arrays lack shared parameters of the clients' network: {', '.join(missing)}")
    parts = [arrays[name].numpy() for name in schema.names]
    for (name, shape), part in zip(schema.entries, parts, strict=True):
        if part.shape != shape:
            raise ValueError(f"the initial array {name} has shape {part.shape}, the clients' network needs {shape}")
    return np.concatenate([np.zeros(0), *(part.ravel() for part in parts)]).astype(np.float32)


def taken_up(state: ServerState | None, info: NodeInfo, arrays: ArrayRecord) -> ServerState:
    """The server's state (a new one for None) with these shared parameters.

    ValueError if parameters are missing or of another shape, or the state is of another network or method.
    """
    flat = flattened(info.shared, arrays)
    if state is None:
        state = ServerState(secrets.token_hex(8), 0, info.digest, flat)
    state.check(info.digest)
    state.shared = flat
    return state


def ask_initial(grid: Grid, directory: Directory, timeout: float) -> ArrayRecord:
    """Ask the first client's node for the shared parameters that the seed gives; RuntimeError if it fails."""
    first = min(directory.hosts)
    message = directory.request_to(directory.hosts[first], f"{MessageType.QUERY}.initial")
    replies = list(grid.send_and_receive([message], timeout=timeout))
    if not replies or replies[0].has_error():
        reason = replies[0].error.reason if replies else "no reply"
        raise RuntimeError(f"the node of client {first} gave no initial parameters: {reason}")
    flat = cast(ArrayRecord, replies[0].content[directory.keys.arrays])[FLAT].numpy()
    return by_name(directory.reference.shared, flat)
