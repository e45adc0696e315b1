"""Reading of replies: which can be used, and which clients are left out, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from flwr.app import Message

from cafe_flwr.core.text import shown
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.directory import last_line
from cafe_flwr.server.requests import PendingRequest
from cafe_flwr.server.run import StrategyPart
from cafe_flwr.wire.bounds import check_norm, far_longer, norm, times_median
from cafe_flwr.wire.capacity import ClientSpec
from cafe_flwr.wire.codec import clients_in
from cafe_flwr.wire.train import Expected, TrainReply


class _Reply(Protocol):
    @property
    def reports(self) -> Sequence[Any]: ...

    @property
    def failures(self) -> Mapping[int, str]: ...

    @property
    def notes(self) -> Mapping[int, str]: ...


R = TypeVar("R", bound=_Reply)


@dataclass(frozen=True)
class Replies(Generic[R]):
    """Usable replies (``good``), in ascending order of clients; and the clients ``left_out``, with the reason."""

    good: Sequence[R]
    left_out: Mapping[int, str]

    @property
    def reports(self) -> list[Any]:
        """The reports of all clients, in ascending order of clients."""
        return sorted((report for reply in self.good for report in reply.reports), key=lambda report: report.client)

    @property
    def notes(self) -> dict[int, str]:
        """Notes of nodes on clients that they report, in ascending order of clients."""
        found = {
            report.client: reply.notes[report.client]
            for reply in self.good
            for report in reply.reports
            if report.client in reply.notes
        }
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class ReplyReader(StrategyPart):
    """Reads training replies, and refuses those that are broken or out of bounds."""

    def read(
        self, state: ServerState, server_round: int, pending: Sequence[PendingRequest], messages: Iterable[Message]
    ) -> Replies[TrainReply]:
        """Replies to the messages of a round."""
        kinds = {client: self.directory.kind(client) for one in pending for client in one.clients}
        replies = sort_out(messages, pending, lambda m: self._train_reply(state, server_round, kinds, m))
        replies = self._within_bounds(state, replies)
        self.directory.note_answers({one.node: one.clients for one in pending}, replies.left_out, server_round)
        return replies

    def _train_reply(
        self, state: ServerState, server_round: int, kinds: Mapping[int, ClientSpec], message: Message
    ) -> TrainReply:
        """Read a reply; ValueError if it cannot be used."""
        run, directory, plain = self.run, self.directory, self.uniform_weights
        reported = clients_in(message, run.keys)
        if unknown := set(reported) - kinds.keys():
            raise ValueError(f"it reports clients {shown(str(sorted(unknown)))}, which were not asked")
        view = directory.view(reported)
        sent = view.take(state.shared)
        expected = Expected(
            digest=state.digest,
            shared_size=view.size,
            upload_size={client: kind.upload.size for client, kind in kinds.items()},
            num_exits={client: kind.num_exits for client, kind in kinds.items()},
            wire=run.wire,
            base=sent,
            counted=view.weight(1 if plain else directory.examples(client) for client in reported),
        )
        reply = TrainReply.from_message(message, run.keys, expected)
        if reply.reports:
            check_norm(reply.update(sent), run.bounds.max_norm, "its update")
        if reply.server_round != server_round:
            raise ValueError(f"it is of round {reply.server_round}")
        evaluates = run.evaluates_in(server_round)
        for r in reply.reports:
            if evaluates and r.test_examples and any(map(math.isnan, [*r.before.accuracy, *r.after.accuracy])):
                raise ValueError(f"client {r.client} has {r.test_examples} test examples and no accuracy")
            check_norm(r.upload, run.bounds.max_norm, f"what client {r.client} sends of its own")
            if r.num_examples != (examples := directory.examples(r.client)):
                raise ValueError(f"client {r.client} reports {r.num_examples} examples, {examples} at the start")
        return replace(reply, reports=[report.padded(directory.reference.num_exits) for report in reply.reports])

    def _within_bounds(self, state: ServerState, replies: Replies[TrainReply]) -> Replies[TrainReply]:
        """Leave out replies whose norm is far beyond the others'."""
        good, ratio = replies.good, self.run.bounds.max_ratio
        refused: dict[int, str] = {}
        views = [self.directory.view([report.client for report in reply.reports]) for reply in good]
        lengths = [norm(reply.update(view.take(state.shared))) for reply, view in zip(good, views, strict=True)]
        for i in far_longer(lengths, [reply.examples / len(reply.reports) for reply in good], ratio):
            refused[i] = f"its update has {times_median(lengths, i)}"
        reports = [(i, report) for i, reply in enumerate(good) for report in reply.reports]
        lengths = [norm(report.upload) for _, report in reports]
        for j in far_longer(lengths, [report.num_examples for _, report in reports], ratio):
            i, report = reports[j]
            refused.setdefault(i, f"what client {report.client} sends of its own has {times_median(lengths, j)}")
        left_out = dict(replies.left_out)
        for i, reason in refused.items():
            text = f"its node's reply cannot be used: {reason}; at most {ratio:g} times are allowed"
            left_out |= {report.client: text for report in good[i].reports}
        return Replies([reply for i, reply in enumerate(good) if i not in refused], left_out)


def sort_out(replies: Iterable[Message], pending: Sequence[PendingRequest], read: Callable[[Message], R]) -> Replies[R]:
    """Match replies, in any order, with the pending requests, and read them.

    Whatever ``read`` raises leaves the reply's clients out. Replies that nobody asked for are ignored.
    """
    waiting = {one.message.metadata.message_id: one for one in pending}
    good: list[R] = []
    left_out: dict[int, str] = {}
    for message in replies:
        # By the message it answers: an error's sender may be the server itself.
        one = waiting.pop(message.metadata.reply_to_message_id, None)
        if one is None:
            continue
        if message.has_error():
            left_out |= dict.fromkeys(one.clients, f"its node failed: {last_line(message.error.reason)}")
            continue
        try:
            reply = read(message)
            answered = [report.client for report in reply.reports] + list(reply.failures)
            if sorted(answered) != one.clients:
                raise ValueError(f"it answers for clients {answered}, asked were {one.clients}")
        except Exception as error:  # whatever a node may send: the round goes on without it
            left_out |= dict.fromkeys(one.clients, f"its node's reply cannot be used: {shown(str(error))}")
            continue
        left_out |= reply.failures
        if reply.reports:
            good.append(reply)
    for one in waiting.values():
        left_out |= dict.fromkeys(one.clients, "no reply from its node in time")
    return Replies(sorted(good, key=lambda reply: reply.reports[0].client), left_out)
