"""Clients that are not alike: some hold the first exits only, some have another modality.

A *kind* is what clients of one depth and one modality have in common. The federation's shared part holds every tensor
once; a client of a kind sends, receives and averages those of its kind only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.networks import EarlyExitNetwork
from cafe_flwr.node_config import max_exit
from cafe_flwr.participation import rng_for
from cafe_flwr.schema import Schema

Networks = Mapping[str, EarlyExitNetwork]
"""By modality; the one of ``""`` where there is one only."""

Weight = float | NDArray[np.float64]
"""One number, or one for every value of a flat array."""


@dataclass(frozen=True)
class Kind:
    """What clients of one depth and modality hold.

    Attributes
    ----------
    name
        For people; empty where all clients of the federation are alike.
    num_exits, num_parameters
        Of their network.
    macs
        MACs of inference up to each exit.
    shared
        Their tensors among the federation's shared ones, under its names and in its order.
    upload, download
        What each sends and receives of its own.
    """

    name: str
    num_exits: int
    num_parameters: int
    macs: tuple[int, ...]
    shared: Schema
    upload: Schema
    download: Schema

    def to_json(self) -> str:
        """As a node sends it."""
        return json.dumps({f.name: _plain(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Kind:
        """What :meth:`to_json` wrote; ValueError if it is something else."""
        try:
            values: dict[str, Any] = json.loads(text)
            schemas = {key: Schema.from_json(values[key]) for key in ("shared", "upload", "download")}
            kind = cls(**{**values, "macs": tuple(values["macs"]), **schemas})
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"names a kind of clients that cannot be read: {error}") from None
        numbers = [kind.num_exits, kind.num_parameters, *kind.macs]
        if not isinstance(kind.name, str) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("names a kind of clients with a name that is no text, or with numbers that are none")
        return kind

    def check(self, shared: Schema, num_exits: int) -> None:
        """ValueError if this is no kind of a federation with this shared part, and networks of so many exits."""
        if not 1 <= self.num_exits <= num_exits or len(self.macs) != self.num_exits:
            raise ValueError(
                f"names a kind of clients with {self.num_exits} exits and {len(self.macs)} numbers of MACs, where "
                f"networks have 1 to {num_exits} exits"
            )
        spans(shared, self.shared)

    def like(self, other: Kind) -> bool:
        """Whether clients of both hold and send the same; what it costs, not every node can tell."""
        return (self.num_exits, self.shared, self.upload, self.download) == (
            other.num_exits,
            other.shared,
            other.upload,
            other.download,
        )


def are_unequal(kinds: Iterable[Kind]) -> bool:
    """Whether some clients hold a part only of what others hold."""
    held = [set(kind.shared.entries) for kind in kinds]
    return any(one < other for one in held for other in held)


def networks_of(built: EarlyExitNetwork | Networks) -> Networks:
    """Networks by modality, from what builds them; where there is one only, under no name.

    Raises
    ------
    ValueError
        If there are none, or their classifiers differ in shape: clients of one modality could not teach another's.
    """
    if isinstance(built, EarlyExitNetwork):
        return {"": built}
    if not built or (len(built) > 1 and "" in built) or any("/" in name for name in built):
        raise ValueError(f"networks of modalities need names without '/'; got {list(built) or 'none'}")
    shapes = {name: tuple(n.state_dict()[n.head_names(0)[0]].shape) for name, n in built.items()}
    if len(set(shapes.values())) > 1:
        each = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
        raise ValueError(f"the classifiers of all modalities must have the same (classes, width), got {each}")
    return dict(built) if len(built) > 1 else {"": next(iter(built.values()))}


def start_alike(networks: Networks) -> None:
    """Give all modalities the classifiers of the first, the last exits the last exit's, and so on.

    Classifiers that start alike can be compared: a direction of the features means the same in all of them.
    """
    first, *others = networks.values()
    tensors = first.state_dict()
    for network in others:
        for k in range(1, min(first.num_exits, network.num_exits) + 1):
            pairs = zip(network.head_names(network.num_exits - k), first.head_names(first.num_exits - k), strict=True)
            network.load_state_dict({mine: tensors[theirs] for mine, theirs in pairs}, strict=False)


def _plain(value: Any) -> Any:
    return value.to_json() if isinstance(value, Schema) else value


class View:
    """The part of a federation's flat array that some clients hold together: each tensor once, in its order.

    Parameters
    ----------
    whole
        The federation's shared part.
    parts
        That of each client.

    Examples
    --------
    >>> whole = Schema((("a", (1,)), ("b", (2,)), ("c", (1,))))
    >>> short, long = Schema(whole.entries[:1]), Schema(whole.entries[:2])
    >>> view = View(whole, [short, long])
    >>> view.take(np.array([1.0, 2.0, 3.0, 4.0]))
    array([1., 2., 3.])
    >>> view.part(np.array([1.0, 2.0, 3.0]), short)
    array([1.])
    >>> view.weight([10, 30])  # of 'a' 10 + 30, of 'b' 30
    array([40., 30., 30.])
    """

    def __init__(self, whole: Schema, parts: Sequence[Schema]) -> None:
        self.whole = whole
        self.parts = parts
        names = {name for part in parts for name in part.names}
        self.schema = (
            whole
            if len(names) == len(whole.names)
            else Schema(tuple(entry for entry in whole.entries if entry[0] in names))
        )

    @property
    def size(self) -> int:
        """Number of values."""
        return self.schema.size

    @cached_property
    def alike(self) -> bool:
        """Whether every client holds all of it."""
        return all(part == self.schema for part in self.parts)

    def take(self, flat: NDArray[Any]) -> NDArray[Any]:
        """These values of the federation's array."""
        return _taken(flat, spans(self.whole, self.schema))

    def part(self, flat: NDArray[Any], part: Schema) -> NDArray[Any]:
        """One client's values of this part's array."""
        return _taken(flat, spans(self.schema, part))

    def add(self, total: NDArray[Any], part: Schema, values: NDArray[Any] | float) -> None:
        """Add one client's values to this part's array."""
        _add(total, spans(self.schema, part), values)

    def weight(self, weights: Iterable[float]) -> Weight:
        """Sum of the clients' weights over those that hold a value: a number where all hold all."""
        weights = list(weights)
        if self.alike:
            return sum(weights)
        total = np.zeros(self.size)
        for part, weight in zip(self.parts, weights, strict=True):
            self.add(total, part, float(weight))
        return total


def mean_of_holders(
    before: NDArray[np.float32], sums: Iterable[tuple[View, NDArray[np.float64], Weight]]
) -> NDArray[np.float32]:
    """Mean of every value over the clients that hold it; as it was where none of them took part.

    Parameters
    ----------
    before
        The federation's shared part.
    sums
        Of nodes: what part of it they send, weighted sums over their clients (``aggregation.weighted``), and weights.

    Examples
    --------
    >>> whole = Schema((("a", (1,)), ("b", (1,)), ("c", (1,))))
    >>> short, long = View(whole, [Schema(whole.entries[:1])]), View(whole, [Schema(whole.entries[:2])])
    >>> before = np.array([0, 0, 9], dtype=np.float32)
    >>> mean_of_holders(before, [(short, np.array([10.0]), 10), (long, np.array([90.0, 60.0]), 30)])
    array([2.5, 2. , 9. ], dtype=float32)
    """
    total, weight = np.zeros(len(before)), np.zeros(len(before))
    for view, values, weights in sums:
        where = spans(view.whole, view.schema)
        _add(total, where, values)
        _add(weight, where, weights)
    held = weight > 0
    return np.where(held, total / np.where(held, weight, 1.0), before).astype(np.float32)


@lru_cache(maxsize=64)
def spans(outer: Schema, inner: Schema) -> tuple[slice, ...]:
    """Where the tensors of a schema lie in the flat array of one that holds them too, in the same order.

    Raises
    ------
    ValueError
        If a tensor is not there, has another shape, or comes in another order.

    Examples
    --------
    >>> outer = Schema((("a", (1,)), ("b", (2,)), ("c", (4,)), ("d", (1,))))
    >>> spans(outer, Schema((("b", (2,)), ("c", (4,)))))
    (slice(1, 7, None),)
    """
    wanted = set(inner.entries)
    if [entry for entry in outer.entries if entry in wanted] != list(inner.entries):
        raise ValueError("a client's shared tensors are not among the federation's, or in another order")
    found: list[slice] = []
    start = 0
    for entry, size in zip(outer.entries, outer.sizes, strict=True):
        if entry in wanted:
            if found and found[-1].stop == start:
                found[-1] = slice(found[-1].start, start + size)
            else:
                found.append(slice(start, start + size))
        start += size
    return tuple(found)


def _taken(flat: NDArray[Any], where: Sequence[slice]) -> NDArray[Any]:
    return flat[where[0]] if len(where) == 1 else np.concatenate([flat[:0], *(flat[span] for span in where)])


def _add(total: NDArray[Any], where: Sequence[slice], values: NDArray[Any] | float) -> None:
    start = 0
    for span in where:
        size = span.stop - span.start
        total[span] += values if np.isscalar(values) else values[start : start + size]  # type: ignore[index]
        start += size


def read_shares(text: str) -> dict[int, float]:
    """Shares of the clients by the number of exits they hold, from ``"1:0.3,2:0.3"``; the others hold all.

    Raises
    ------
    ValueError
        If it is not such a text, a depth is below 1 or named twice, or the shares are not above 0 or exceed 1.

    Examples
    --------
    >>> read_shares("1:0.3, 2:0.5")
    {1: 0.3, 2: 0.5}
    """
    shares: dict[int, float] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        depth_text, _, share_text = pair.partition(":")
        try:
            depth, share = int(depth_text), float(share_text)
        except ValueError:
            raise ValueError(
                f"depth-shares must look like '1:0.3,2:0.3' (exits:share of the clients), got {text!r}"
            ) from None
        if depth < 1:
            raise ValueError(f"depth-shares: a client holds one exit at least, got {depth}")
        if depth in shares:
            raise ValueError(f"depth-shares names {depth} exits twice")
        if not 0 < share <= 1:
            raise ValueError(f"depth-shares: a share lies above 0 and at most at 1, got {share:g} for {depth} exits")
        shares[depth] = share
    if sum(shares.values()) > 1 + 1e-9:
        raise ValueError(f"depth-shares must sum to 1 at most, got {sum(shares.values()):g}")
    return shares


def held_exits(
    client: int,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    num_clients: int | None,
    num_exits: int,
    seed: int,
) -> int:
    """How many exits of a network a client holds: what its node says, else its share in a simulation, else all.

    Raises
    ------
    ValueError
        If that is less than one exit or more than there are.
    """
    depth = max_exit(node_config)
    shares = str(run_config.get("depth-shares", ""))
    if depth is None and shares:
        if num_clients is None:
            raise ValueError("depth-shares is for runs with num-clients: give every node a max-exit in its node-config")
        read = read_shares(shares)
        check_depths(read, num_exits)
        return drawn_depth(client, num_clients, read, num_exits, seed)
    if depth is not None and depth > num_exits:
        raise ValueError(f"node-config max-exit = {depth}, and this network has exits 1 to {num_exits}")
    return num_exits if depth is None else depth


def check_depths(depths: Iterable[int], num_exits: int) -> None:
    """ValueError if a network is not so deep."""
    if deep := [depth for depth in depths if depth > num_exits]:
        raise ValueError(f"depth-shares names {deep[0]} exits, and this network has {num_exits}")


def drawn_depth(client: int, num_clients: int, shares: Mapping[int, float], num_exits: int, seed: int) -> int:
    """How many exits a simulated client holds: clients are dealt to the depths by the seed, all others hold all.

    Examples
    --------
    >>> [drawn_depth(client, 6, {1: 0.5}, 3, seed=0) for client in range(6)]
    [1, 3, 1, 3, 3, 1]
    """
    place = _places(num_clients, seed)[client]
    ends = np.cumsum(list(shares.values())) * num_clients
    return next((depth for depth, end in zip(shares, ends, strict=True) if place < round(end)), num_exits)


@lru_cache(maxsize=4)
def _places(num_clients: int, seed: int) -> list[int]:
    """Places of the clients in the order in which depths are dealt out."""
    return [int(place) for place in np.argsort(rng_for(seed, 0, -1, "depths").permutation(num_clients))]
