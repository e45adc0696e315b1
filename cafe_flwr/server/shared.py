"""The shared parameters of the federation: by name, as in Flower's results, and flat, as in messages."""

from __future__ import annotations

import secrets

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType
from flwr.serverapp import Grid
from numpy.typing import NDArray

from cafe_flwr.core.log import logger
from cafe_flwr.core.schema import Schema
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.directory import Directory, last_line
from cafe_flwr.wire.bounds import MAX_NORM, check_norm
from cafe_flwr.wire.codec import read_flat
from cafe_flwr.wire.describe import NodeInfo


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


def ask_initial(grid: Grid, directory: Directory, timeout: float, wire: str = "float32") -> ArrayRecord:
    """Ask a node for the shared parameters that the seed gives.

    The first client's node is asked first; where its answer cannot be used, or the parameters cannot travel as
    ``wire``, the next ones are: one, two, four, … at a time. RuntimeError, with all reasons, if no answer can be used.
    """
    first_client = {node: clients[0] for node, clients in directory.by_node(list(directory.hosts)).items()}
    nodes, at_once, reasons = list(first_client), 1, []
    while nodes:
        asked, nodes, at_once = nodes[:at_once], nodes[at_once:], 2 * at_once
        messages = [directory.request_to(node, f"{MessageType.QUERY}.initial") for node in asked]
        replies = {r.metadata.reply_to_message_id: r for r in grid.send_and_receive(messages, timeout=timeout)}
        for node, message in zip(asked, messages, strict=True):
            try:
                flat = _initial(replies.get(message.metadata.message_id), directory, wire)
            except Exception as error:  # whatever a node may send: another one is asked
                reason = f"the node of {directory.label(first_client[node])} gave no initial parameters: {error}"
                logger.warning("%s", reason)
                reasons.append(reason)
            else:
                return by_name(directory.reference.shared, flat)
    raise RuntimeError("\n  ".join(reasons))


def _initial(reply: Message | None, directory: Directory, wire: str) -> NDArray[np.float32]:
    """The shared parameters of a reply, flat; ValueError if they cannot be used."""
    if reply is None:
        raise ValueError("no reply")
    if reply.has_error():
        raise ValueError(last_line(reply.error.reason))
    schema, flat = directory.reference.shared, read_flat(reply, directory.keys.arrays, "float32")
    if len(flat) != schema.size:
        raise ValueError(f"its array has {len(flat)} values, expected {schema.size}")
    check_norm(flat, MAX_NORM, "the shared part that it gives")
    if wire == "float16":
        schema.check_half(flat, "the shared part")
    return flat
