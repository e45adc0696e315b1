"""Bounds on a round's replies, in comparison with one another, and the growth of the shared part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.run import StrategyPart
from cafe_flwr.wire.bounds import FEWEST, far_longer, norm, room_for, times_median
from cafe_flwr.wire.train import TrainReply

MOST_GROWTH = 10.0  # of the norm of the shared part since the start; honest runs: up to 1.6
_UNEQUAL_ROOM = 2.0  # for updates of different parts of a network, whose norms are harder to compare
_MOST_ROOM = 10.0  # for an update of many steps, whatever number of examples a client says it has


@dataclass(frozen=True)
class RoundBounds(StrategyPart):
    """Finds replies that no honest client sends, and limits what an unusually long update does to a mean."""

    def apply(self, state: ServerState, replies: Sequence[TrainReply]) -> tuple[list[TrainReply], dict[int, str]]:
        """The replies that can be used, and the clients of the others, with the reason."""
        lengths = np.array([norm(reply.update(self._sent(state, reply))) for reply in replies])
        room = np.full(len(replies), _UNEQUAL_ROOM if len(self.directory.kinds) > 1 else 1.0)
        if self.run.local.epochs:
            room *= np.minimum(_MOST_ROOM, room_for([reply.examples / len(reply.reports) for reply in replies]))
        refused: dict[int, str] = {}
        typical = self._typical(replies, lengths)
        unlike = self._unlike_others(replies, lengths, typical, room)
        for i, reason in (*self._impossible(state, replies, lengths), *unlike):
            refused.setdefault(i, f"its node's reply cannot be used: {reason}")
        long_ratio = 0.0 if self.run.aggregation.robust else self.run.bounds.long_ratio
        long = far_longer(lengths / typical, long_ratio, room)
        good = [
            _limited(reply, self._sent(state, reply), lengths[i], typical[i]) if i in long else reply
            for i, reply in enumerate(replies)
            if i not in refused
        ]
        return good, {report.client: reason for i, reason in refused.items() for report in replies[i].reports}

    def _sent(self, state: ServerState, reply: TrainReply) -> NDArray[np.float32]:
        """What the clients of a reply started from."""
        return self.directory.view([report.client for report in reply.reports]).take(state.shared)

    def _typical(self, replies: Sequence[TrainReply], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
        """The length to compare each update with: the median of those of the same modalities, if there are three.

        Modalities have networks of their own, whose updates may differ in length by any factor.
        """
        names = [self.directory.view([report.client for report in reply.reports]).schema.names for reply in replies]
        groups = [frozenset(name.partition("/")[0] for name in some if "/" in name) for some in names]
        typical = lengths.copy()
        for group in set(groups):
            here = [i for i, other in enumerate(groups) if other == group]
            if len(here) >= FEWEST and (middle := np.median(lengths[here])) > 0:
                typical[here] = middle
        return np.where(typical > 0, typical, 1.0)

    def _impossible(
        self, state: ServerState, replies: Sequence[TrainReply], lengths: NDArray[np.float64]
    ) -> Iterator[tuple[int, str]]:
        """Positions of replies beyond the absolute bound; where the shared part has grown, the reason is that."""
        limit = self.run.bounds.max_norm
        for i, reply in enumerate(replies):
            parts = [("its update", lengths[i])]
            parts += [(f"what client {r.client} sends of its own", norm(r.upload)) for r in reply.reports]
            for what, length in parts:
                if limit and length > limit:
                    cause = f": {grown}" if (grown := growth(state)) else ""
                    yield i, f"{what} has norm {length:.4g}, at most {limit:.4g} is allowed{cause}"

    def _unlike_others(
        self,
        replies: Sequence[TrainReply],
        lengths: NDArray[np.float64],
        typical: NDArray[np.float64],
        room: NDArray[np.float64],
    ) -> Iterator[tuple[int, str]]:
        """Positions of replies with norms, or numbers of examples, far beyond the others'."""
        bounds, reports = self.run.bounds, [(i, report) for i, reply in enumerate(replies) for report in reply.reports]
        sizes, median_size = [report.num_examples for _, report in reports], self._median_examples()
        for i, report in reports:
            if bounds.max_examples_ratio and report.num_examples > bounds.max_examples_ratio * median_size:
                yield (
                    i,
                    f"client {report.client} says it has {report.num_examples} training examples, the median is "
                    f"{median_size:g}; at most {bounds.max_examples_ratio:g} times are allowed (max-examples-ratio)",
                )
        allowed = f"; at most {bounds.max_ratio:g} times are allowed (max-update-ratio)"
        for i in far_longer(lengths / typical, bounds.max_ratio, room):
            yield i, f"its update has norm {times_median(lengths[i], typical[i])}{allowed}"
        uploads = [norm(report.upload) for _, report in reports]
        for j in far_longer(uploads, bounds.max_ratio, room_for(sizes)):
            i, report = reports[j]
            found = times_median(uploads[j], median(uploads))
            yield i, f"what client {report.client} sends of its own has norm {found}{allowed}"

    def _median_examples(self) -> float:
        """Of all clients present, whether they take part in this round or not."""
        hosts, nodes = self.directory.hosts, self.directory.nodes.items()
        pairs = ((node, pair) for node, info in nodes for pair in zip(info.clients, info.num_examples, strict=True))
        return median([size for node, (client, size) in pairs if hosts.get(client) == node] or [1])


def _limited(reply: TrainReply, sent: NDArray[np.float32], length: float, typical: float) -> TrainReply:
    """The reply with an update of median length, and a note that says so."""
    note = f"its update counts as one of median length: its norm is {times_median(length, typical)}"
    notes = {report.client: "; ".join(filter(None, (reply.notes.get(report.client), note))) for report in reply.reports}
    shortened = reply.shortened(sent, typical / length)
    return replace(shortened, notes={**reply.notes, **notes})


def growth(state: ServerState) -> str:
    """What to say of a shared part that has grown beyond use; empty if it has not."""
    now, start = norm(state.shared), state.start_norm
    if not start or now <= MOST_GROWTH * start:
        return ""
    return (
        f"the shared part itself has grown to norm {now:.4g}, {now / start:.3g} times that of the start, so that all "
        "updates are longer, whoever sends them. Earlier rounds' updates, or too high a learning-rate, did this: see "
        "rounds.jsonl, and start again with federation.aggregation = 'median' or a lower learning-rate"
    )
