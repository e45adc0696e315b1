"""Random choice of the clients of a round."""

from __future__ import annotations

from collections.abc import Sequence

from cafe_flwr.core.random import rng_for


def sample_clients(
    available: Sequence[int],
    fraction: float,
    minimum: int,
    *,
    seed: int,
    server_round: int,
    purpose: str = "participants",
) -> list[int]:
    """Clients that take part in this round, in ascending order: a share 0..1 of those available, at least ``minimum``.

    The same seed, round and set of clients give the same sample whatever nodes host them.
    """
    clients = sorted(available)
    size = min(len(clients), max(int(round(len(clients) * fraction, 9)), minimum))
    chosen = rng_for(seed, server_round, -1, purpose).permutation(len(clients))[:size]
    return [clients[i] for i in sorted(chosen)]
