"""Which clients take part in a round."""

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
    """Clients that take part in this round, in ascending order.

    The same seed, round and set of clients give the same sample whatever nodes host them.

    Parameters
    ----------
    available
        Clients that could take part.
    fraction
        Share of them to take, 0..1.
    minimum
        At least so many, as far as there are any.
    """
    clients = sorted(available)
    size = min(len(clients), max(int(round(len(clients) * fraction, 9)), minimum))
    chosen = rng_for(seed, server_round, -1, purpose).permutation(len(clients))[:size]
    return [clients[i] for i in sorted(chosen)]
