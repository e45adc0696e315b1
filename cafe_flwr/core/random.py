"""Who takes part, and with which random numbers: everything is keyed by client, never by node id."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def rng_for(seed: int, server_round: int, client: int, purpose: str) -> np.random.Generator:
    """The one random generator for (seed, round, client, purpose).

    Parameters
    ----------
    seed
        Seed of the run.
    server_round
        Round, 0 for what happens before the first one.
    client
        Client (data partition), or -1 for the server.
    purpose
        What the numbers are for, e.g. ``"batches"``. Different purposes never share numbers.

    Examples
    --------
    >>> a = rng_for(0, 3, 7, "batches").integers(1000)
    >>> b = rng_for(0, 3, 7, "batches").integers(1000)
    >>> bool(a == b)
    True
    """
    key = (server_round, client + 1, zlib.crc32(purpose.encode()))
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


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
