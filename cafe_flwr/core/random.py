"""Random generators that depend on seed, round, client and purpose, never on node ids."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def rng_for(seed: int, server_round: int, client: int, purpose: str) -> np.random.Generator:
    """The one random generator for (seed, round, client, purpose): different purposes never share numbers.

    Round 0 comes before the first one; client −1 is the server. A purpose is, for example, ``"batches"``.

    Examples
    --------
    >>> a, b = (rng_for(0, 3, 7, "batches").integers(1000) for _ in range(2))
    >>> bool(a == b)
    True
    """
    key = (server_round, client + 1, zlib.crc32(purpose.encode()))
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator in a ``with`` block; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
