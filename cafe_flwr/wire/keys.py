"""Names of records and keys in messages, and which are reserved."""

from __future__ import annotations

from dataclasses import dataclass

PROTOCOL = 1
FLAT = "flat"
METRICS = "metrics"
WIRES = ("float32", "float16")
PHASES = ("before", "after")  # local training

# Keys of a request's config that a user's config must not have, and prefixes of such keys.
RESERVED_PREFIXES = ("method.", "local.", "privacy.")
RESERVED = frozenset(
    {
        *("protocol", "run", "seed", "digest", "server-round", "num-rounds", "num-clients", "resumable-from"),
        *("clients", "versions", "downloads", "active-exits", "method", "evaluate", "publish", "wire-dtype"),
        *("plain-mean", "apart"),
    }
)


@dataclass(frozen=True)
class Keys:
    """Names of the records in a message, which users of Flower's strategies may choose."""

    arrays: str = "arrays"
    config: str = "config"
    weight: str = "num-examples"
