"""The keys of a node's node-config, which no server can change.

=============  =========================================================================================
``clients``    Numbers of the clients it hosts, ``"3"`` or ``"3,7"``; else Flower's ``partition-id`` counts
``data-dir``   Folder of its clients' own data, for runs with ``dataset = "local"``
``state-dir``  Folder of its clients' personal state
``device``     Where its clients compute, such as ``"cuda:1"`` or ``"cpu"``, whatever the run's settings say
``max-exit``   The deepest exit that its clients can hold, such as ``2``; else all (docs/unequal-clients.md)
``max-width``  The share of the width of all layers that they can hold, such as ``0.5``; else all
``name``       What people call the node; it stands beside the clients' numbers in logs and records
=============  =========================================================================================

Bounds on requests: :mod:`cafe_flwr.client.node_bounds`; demands on privacy: :mod:`cafe_flwr.client.privacy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cafe_flwr.client.node_bounds import NodeBounds
from cafe_flwr.core.text import check_name

NodeConfig = Mapping[str, Any]


def is_device(node: NodeConfig) -> bool:
    """Whether the node has keys of its own; nodes of a simulation only have their place in it."""
    own = {"clients", "data-dir", "state-dir", "device", "max-exit", "max-width", "name"}
    return "num-partitions" not in node or bool(node.keys() & own)


def hosted(node: NodeConfig, num_clients: int | None) -> list[int]:
    """Clients the node hosts, by its ``clients`` or by its place in a simulation; ValueError if these name none.

    Examples
    --------
    >>> hosted({"clients": "7,3"}, None), hosted({"partition-id": 1, "num-partitions": 2}, 5)
    ([3, 7], [1, 3])
    """
    if "clients" in node:
        try:
            clients = sorted({int(c) for c in str(node["clients"]).split(",")})
        except ValueError:
            clients = [-1]
        if clients[0] < 0:
            raise ValueError(f"node-config clients must be numbers like '3' or '3,7', got {node['clients']!r}")
        return clients
    if "partition-id" not in node:
        raise ValueError("this node's node-config names no clients: give clients=<number> or partition-id=<number>")
    partition = int(node["partition-id"])
    if num_clients is None:
        return [partition]
    num_clients = NodeBounds.of(node).check_clients(num_clients)
    return hosted_clients(partition, int(node.get("num-partitions", num_clients)), num_clients)


def max_exit(node: NodeConfig) -> int | None:
    """The deepest exit that the node's clients can hold, None if not given; ValueError if it is no whole number ≥ 1.

    Examples
    --------
    >>> max_exit({"max-exit": 2}), max_exit({})
    (2, None)
    """
    if "max-exit" not in node:
        return None
    try:
        depth = int(str(node["max-exit"]))
    except ValueError:
        depth = 0
    if depth < 1:
        raise ValueError(
            f"node-config max-exit must be the number of an exit, 1 or more, got {node['max-exit']!r}: leave it out "
            "where clients hold the whole network"
        )
    return depth


def max_width(node: NodeConfig) -> float:
    """The share of the width that the node's clients can hold, 1 if not given; ValueError if it is not in (0, 1]."""
    try:
        width = float(str(node.get("max-width", 1.0)))
    except ValueError:
        width = 0.0
    if not 0 < width <= 1:
        raise ValueError(
            f"node-config max-width must be a share of the width, above 0 and at most 1, got {node['max-width']!r}"
        )
    return width


def is_limited(node: NodeConfig) -> bool:
    """Whether the node limits what its clients can hold."""
    return "max-exit" in node or "max-width" in node


def name_of(node: NodeConfig) -> str:
    """Name of the node, empty if it has none; ValueError if it cannot stand in a log."""
    name = str(node.get("name", ""))
    check_name(name)
    return name


def data_folder(node: NodeConfig, client: int, clients: list[int]) -> Path:
    """Folder (or parquet file) of a client's own data.

    ``client-<number>`` in ``data-dir``, or ``data-dir`` itself if the node hosts one client and has no such folder.
    ValueError if neither exists.
    """
    text = str(node.get("data-dir", ""))
    if not text:
        raise ValueError(
            "this node has no data: the run asks for the clients' own (dataset = 'local'), and its node-config names "
            "no data-dir"
        )
    folder = Path(text).expanduser()
    if not folder.is_absolute():
        raise ValueError(f"node-config data-dir must be an absolute path or start with '~', got {text!r}")
    if not folder.exists():
        raise ValueError(f"node-config data-dir = {text!r}: there is no such file or folder on this node")
    for own in (folder / f"client-{client}", folder / f"client-{client}.parquet"):
        if own.exists():
            return own
    if len(clients) > 1:
        raise ValueError(
            f"node-config data-dir = {text!r} has no client-{client}: a node of several clients needs a folder "
            "client-<number>, or a file client-<number>.parquet, for each"
        )
    return folder


def hosted_clients(partition: int, num_partitions: int, num_clients: int) -> list[int]:
    """Clients that simulated node ``partition`` of ``num_partitions`` hosts: p, p+P, p+2P, …

    Examples
    --------
    >>> hosted_clients(1, 2, 5)
    [1, 3]
    >>> hosted_clients(4, 8, 3)
    []
    """
    if not 0 <= partition < num_partitions:
        raise ValueError(
            f"partition-id must be in 0..{num_partitions - 1} (num-partitions is {num_partitions}), got {partition}"
        )
    return list(range(partition, num_clients, num_partitions))
