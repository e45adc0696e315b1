"""Evaluation of personal networks on their clients: between rounds on request, and after the last round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message, MessageType

from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.planning import RoundPlanner
from cafe_flwr.server.replies import Replies, sort_out
from cafe_flwr.server.requests import PendingRequest, RequestWriter
from cafe_flwr.server.run import StrategyPart
from cafe_flwr.wire.evaluate import EvaluationReply


@dataclass(frozen=True)
class PersonalEvaluation(StrategyPart):
    """Asks clients to evaluate the networks they would train next, and reads their replies."""

    def ask(
        self,
        state: ServerState,
        server_round: int,
        clients: Sequence[int],
        config: Mapping[str, Any],
        publish: bool = False,
    ) -> list[PendingRequest]:
        """Messages after a round; with ``publish``, clients also write their network to their own folder."""
        plan = RoundPlanner(self.run, self.directory).plan(state, server_round + 1, clients, trains=False)
        writer, config = RequestWriter(self.run, self.directory), {**config, "publish": publish}
        return writer.messages(state, server_round, clients, plan, config, MessageType.EVALUATE)

    def read(self, pending: Sequence[PendingRequest], messages: Iterable[Message]) -> Replies[EvaluationReply]:
        """Replies to the messages."""
        held = {client: self.directory.kind(client).num_exits for one in pending for client in one.clients}

        def read(message: Message) -> EvaluationReply:
            reply = EvaluationReply.from_message(message, self.run.keys, num_exits=held)
            for report in reply.reports:
                report.check(self.directory.examples(report.client))
            most = self.directory.reference.num_exits
            return replace(reply, reports=[report.padded(most) for report in reply.reports])

        replies = sort_out(messages, pending, read)
        self.directory.note_answers({one.node: one.clients for one in pending}, replies.left_out)
        return replies
