"""Which part of a network a client holds: its first exits, narrower layers, or the network of its modality."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cafe_flwr.core.random import rng_for
from cafe_flwr.networks.early_exit import EarlyExitNetwork

Networks = Mapping[str, EarlyExitNetwork]
"""Networks by modality; if there is only one, its name is ``""``."""


def networks_of(built: EarlyExitNetwork | Networks) -> Networks:
    """Networks by modality, from what a builder of networks returned.

    ValueError if there are none, or if their classifiers differ in shape: modalities could not teach each other.
    """
    if isinstance(built, EarlyExitNetwork):
        return {"": built}
    if not built or (len(built) > 1 and "" in built) or any("/" in name for name in built):
        raise ValueError(f"networks of modalities need names without '/'; got {list(built) or 'none'}")
    shapes = {name: [(n.num_classes, width) for width in n.feature_widths] for name, n in built.items()}
    if len(built) > 1 and len({shape for found in shapes.values() for shape in found}) > 1:
        each = ", ".join(f"{name}: {' '.join(map(str, dict.fromkeys(found)))}" for name, found in shapes.items())
        raise ValueError(f"the classifiers of all modalities must have the same (classes, width), got {each}")
    return dict(built) if len(built) > 1 else {"": next(iter(built.values()))}


def start_alike(networks: Networks) -> None:
    """Copy the classifiers of the first modality to the others, counted from the last exit.

    Classifiers that start alike can be compared: a direction in feature space means the same in all of them.
    """
    first, *others = networks.values()
    tensors = first.state_dict()
    for network in others:
        for k in range(1, min(first.num_exits, network.num_exits) + 1):
            pairs = zip(network.head_names(network.num_exits - k), first.head_names(first.num_exits - k), strict=True)
            network.load_state_dict({mine: tensors[theirs] for mine, theirs in pairs}, strict=False)


class Capacity(NamedTuple):
    """How much of a network a client holds: its first exits, and a share of the width of all its layers."""

    exits: int
    width: float = 1.0

    def check(self, num_exits: int, setting: str) -> Capacity:
        """This capacity; ValueError, naming the setting that asks for it, if the network has fewer exits."""
        if self.exits > num_exits:
            raise ValueError(f"{setting} asks for {self.exits} exits, and this network has {num_exits}")
        return self

    def of(self, network: EarlyExitNetwork) -> EarlyExitNetwork:
        """That part of a network."""
        return network.narrowed(self.width).truncated(self.exits)


_SHARES = "'1:0.3,2:0.3' (exits:share of the clients) or '1x0.5:0.3' (exits x share of the width:share of the clients)"


def read_shares(text: str) -> dict[Capacity, float]:
    """Shares of the clients by what they hold, from ``"1:0.3,2x0.5:0.3"``; the others hold all.

    ValueError if the text is of another form, names a part twice, or has a number out of range.

    Examples
    --------
    >>> read_shares("1:0.3, 2x0.75:0.5")
    {Capacity(exits=1, width=1.0): 0.3, Capacity(exits=2, width=0.75): 0.5}
    """
    shares: dict[Capacity, float] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        what, _, share_text = pair.partition(":")
        exits_text, _, width_text = what.partition("x")
        try:
            held, share = Capacity(int(exits_text), float(width_text or 1.0)), float(share_text)
        except ValueError:
            raise ValueError(f"heterogeneity.depth-shares must look like {_SHARES}, got {text!r}") from None
        if held.exits < 1:
            raise ValueError(f"heterogeneity.depth-shares: a client holds one exit at least, got {held.exits}")
        if held in shares:
            raise ValueError(f"heterogeneity.depth-shares names {what} twice")
        if not (0 < share <= 1 and 0 < held.width <= 1):
            raise ValueError(f"heterogeneity.depth-shares: shares lie above 0 and at most at 1, got {pair!r}")
        shares[held] = share
    if sum(shares.values()) > 1 + 1e-9:
        raise ValueError(f"heterogeneity.depth-shares must sum to 1 at most, got {sum(shares.values()):g}")
    return shares


def drawn(client: int, num_clients: int, shares: Mapping[Capacity, float], num_exits: int, seed: int) -> Capacity:
    """What a simulated client holds: the seed decides which clients hold the given parts, all others hold all.

    Examples
    --------
    >>> [drawn(client, 6, {Capacity(1): 0.5}, 3, seed=0).exits for client in range(6)]
    [1, 3, 1, 3, 3, 1]
    """
    place = _places(num_clients, seed)[client]
    ends = np.cumsum(list(shares.values())) * num_clients
    return next((held for held, end in zip(shares, ends, strict=True) if place < round(end)), Capacity(num_exits))


@lru_cache(maxsize=4)
def _places(num_clients: int, seed: int) -> list[int]:
    """Every client's place in the order in which parts are dealt out."""
    return [int(place) for place in np.argsort(rng_for(seed, 0, -1, "depths").permutation(num_clients))]
