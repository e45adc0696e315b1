"""How much of the network a client holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cafe_flwr.client.node_config import is_limited, max_exit, max_width
from cafe_flwr.core.options import values_of
from cafe_flwr.data.options import Heterogeneity
from cafe_flwr.networks.capacity import Capacity, drawn, read_shares


def held_by(
    client: int,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    num_clients: int | None,
    num_exits: int,
    seed: int,
) -> Capacity:
    """What the node-config says; else the client's share in a simulation; else all.

    ValueError if the number of exits or the width is out of range.
    """
    shares = read_shares(str(values_of(Heterogeneity, run_config).get("depth_shares", "")))
    if is_limited(node_config) or not shares:
        return Capacity(max_exit(node_config) or num_exits, max_width(node_config)).check(
            num_exits, "node-config max-exit"
        )
    if num_clients is None:
        raise ValueError(
            "heterogeneity.depth-shares is for runs with num-clients: give every node a max-exit in its node-config"
        )
    for held in shares:
        held.check(num_exits, "heterogeneity.depth-shares")
    return drawn(client, num_clients, shares, num_exits, seed)
