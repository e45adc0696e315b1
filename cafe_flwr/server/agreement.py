"""What the nodes of a run agree on: network and method as most of them describe it, so that none speaks for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from cafe_flwr.core.log import logger
from cafe_flwr.wire.capacity import ClientSpec
from cafe_flwr.wire.describe import NodeInfo

Own = Callable[[], NodeInfo] | None
"""Describes the network as the server builds it."""


class Agreement:
    """What all nodes of a run must say of network and method (``reference``), and of kinds of clients (``kinds``).

    Until it ``stands`` it is what most of the nodes present say. ``own`` describes the network as the server builds
    it; it is called where nodes disagree.
    """

    def __init__(self, own: Own = None) -> None:
        self.reference: NodeInfo
        self.kinds: dict[str, ClientSpec] = {}
        self.stands = False
        self._build_own = own
        self._digest, self._known = "", dict[str, ClientSpec]()

    def expect(self, digest: str, kinds: Mapping[str, ClientSpec]) -> None:
        """Prefer nodes with the fingerprint of a run that is resumed; its kinds of clients are known."""
        self._digest, self._known = digest, dict(kinds)
        self.kinds = {**kinds, **self.kinds}

    def update(self, infos: Sequence[NodeInfo]) -> None:
        """Take what most of the nodes present say, or what the server knows itself; no change if it stands already."""
        serving = sorted((info for info in infos if info.clients), key=lambda info: min(info.clients))
        if self.stands or not serving:
            return
        disagree = len(set(map(_network, serving))) > 1
        self.reference = of_most(serving, self._own if disagree else None, self._digest)
        agreeing = [info for info in infos if info.clients and _network(info) == _network(self.reference)]
        self.kinds = {**self._known, **kinds_of_most(agreeing), **self._known}

    @cached_property
    def _own(self) -> NodeInfo | None:
        try:
            return self._build_own() if self._build_own else None
        except Exception as error:
            logger.warning("Nodes disagree, and the server cannot build the network itself (%s): most decide", error)
            return None

    def difference(self, info: NodeInfo) -> str:
        """How a node differs from the others, empty if it does not."""
        if info.clients and _network(info) != _network(self.reference):
            return "its network or method differs from that of the other nodes"
        for kind in kinds_of(info):
            if not kind.like(self.kinds.get(kind.name, kind)):
                what = f"clients with {kind.name}" if kind.name else "clients with the whole network"
                return f"what it says of {what} differs from what other nodes say"
        return ""

    def learn(self, info: NodeInfo) -> None:
        """Take up kinds of clients that were not known, or whose MACs were not."""
        for kind in kinds_of(info):
            if not any(self.kinds.setdefault(kind.name, kind).macs):
                self.kinds[kind.name] = kind

    @property
    def macs(self) -> Sequence[int]:
        """MACs per exit of the largest network, from any node that knows them: the reference may not."""
        info = self.reference
        known = [list(kind.macs) for kind in self.kinds.values() if kind.num_exits == info.num_exits]
        return max([info.macs, *known], key=lambda macs: macs[-1])


def of_most(infos: Sequence[NodeInfo], own: NodeInfo | None = None, digest: str = "") -> NodeInfo:
    """The description that most nodes share; MACs are those that most of them give.

    That of the server (``own``), or one with the fingerprint of the run that is resumed (``digest``), comes first where
    any node shares it. Of equally many, that of the first node counts.
    """
    votes = Counter(map(_network, infos))
    known = _network(own) if own else None
    most = max(votes, key=lambda network: (network == known, network[0] == digest, votes[network]))
    agreeing = [info for info in infos if _network(info) == most]
    return replace(agreeing[0], macs=list(_macs_of_most(info.macs for info in agreeing)))


def kinds_of_most(infos: Sequence[NodeInfo]) -> dict[str, ClientSpec]:
    """The kinds of clients on these nodes, by name, as most of the nodes that have them describe them."""
    found: dict[str, list[ClientSpec]] = {}
    for info in infos:
        for kind in kinds_of(info):
            found.setdefault(kind.name, []).append(kind)
    return {name: _kind_of_most(kinds) for name, kinds in found.items()}


def kinds_of(info: NodeInfo) -> list[ClientSpec]:
    """The kinds of a node's clients; where all are alike, that with the whole network."""
    return info.kinds or ([info.whole] if info.clients else [])


def _kind_of_most(kinds: Sequence[ClientSpec]) -> ClientSpec:
    votes = Counter(replace(kind, num_parameters=0, macs=()) for kind in kinds)  # as ClientSpec.like compares them
    most = votes.most_common(1)[0][0]
    agreeing = [kind for kind in kinds if kind.like(most)]
    return replace(agreeing[0], macs=tuple(_macs_of_most(kind.macs for kind in agreeing)))


def _network(info: NodeInfo) -> tuple[Any, ...]:
    return info.digest, info.shared, info.upload, info.download, info.num_exits, info.num_parameters


def _macs_of_most(said: Iterable[Sequence[int]]) -> Sequence[int]:
    """The MACs that most give, of those who know them: others say 0."""
    votes = Counter(map(tuple, said))
    return max(votes, key=lambda macs: (any(macs), votes[macs]))
