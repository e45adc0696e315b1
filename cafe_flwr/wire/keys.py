"""Names in messages: records, keys and what is reserved."""

from __future__ import annotations

from dataclasses import dataclass

PROTOCOL = 1
FLAT = "flat"
METRICS = "metrics"
WIRES = ("float32", "float16")
PHASES = ("before", "after")  # local training

# Keys of a request's config that a user's own must leave alone, as all that begin with one of these words.
RESERVED_PREFIXES = ("method.", "local.", "privacy.")
RESERVED = frozenset(
    {
        *("protocol", "run", "seed", "digest", "server-round", "num-rounds", "num-clients", "resumable-from"),
        *("clients", "versions", "downloads", "active-exits", "method", "evaluate", "publish", "wire-dtype"),
        "plain-mean",
    }
)


@dataclass(frozen=True)
class Keys:
    """Names of the records in a message, as Flower's strategies let users choose them."""

    arrays: str = "arrays"
    config: str = "config"
    weight: str = "num-examples"
