"""Requests of a round: one message for every node that hosts participants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message, MessageType

from cafe_flwr.methods.base import settings_of
from cafe_flwr.methods.server import RoundPlan
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.run import StrategyPart
from cafe_flwr.wire.keys import RESERVED, RESERVED_PREFIXES
from cafe_flwr.wire.train import TrainRequest


@dataclass(frozen=True)
class PendingRequest:
    """A message that was sent, and the node and clients it is for."""

    message: Message
    node: int
    clients: list[int]


@dataclass(frozen=True)
class RequestWriter(StrategyPart):
    """Writes requests that carry each client's own download and active exits."""

    def messages(
        self,
        state: ServerState,
        server_round: int,
        clients: Sequence[int],
        plan: RoundPlan,
        config: Mapping[str, Any],
        message_type: str,
    ) -> list[PendingRequest]:
        """Messages that ask clients to train, or to evaluate after a round.

        ``plan`` has a row for every client; ``config`` is the user's. ValueError if values are too large for float16.
        """
        run, trains = self.run, message_type == MessageType.TRAIN
        row_of = {client: row for row, client in enumerate(clients)}
        if run.num_clients is not None:
            config = {**config, "num-clients": run.num_clients}
        if run.wire == "float16":
            self.directory.reference.shared.check_half(state.shared, "the shared part")
        pending = []
        for node, hosted in self.directory.by_node(clients).items():
            most = max(self.directory.kind(client).num_exits for client in hosted)
            active = plan.active[[row_of[client] for client in hosted], : most - 1]
            request = self._request(state, server_round, hosted, replace(plan, active=active), trains)
            message = Message(request.to_content(run.keys, config), node, message_type)
            pending.append(PendingRequest(message, node, hosted))
        return pending

    def _request(
        self, state: ServerState, server_round: int, hosted: list[int], plan: RoundPlan, trains: bool
    ) -> TrainRequest:
        """The request for a node; ``plan.active`` has only the rows of its clients."""
        run = self.run
        # Fine-tuning after the last round begins at the full rate.
        budget = replace(run.local, learning_rate=run.learning_rate(server_round)) if trains else run.local
        return TrainRequest(
            run=state.run,
            seed=run.seed,
            digest=state.digest,
            server_round=server_round,
            num_rounds=run.num_rounds,
            resumable_from=max(0, server_round - 2),  # the older of the two checkpoints kept
            clients=hosted,
            versions=[self.directory.claims.version(c, state.known[c].seen if c in state.known else 0) for c in hosted],
            active=plan.active,
            shared=self.directory.view(hosted).take(state.shared),
            downloads=plan.downloads,
            method=run.method.name,
            method_settings=settings_of(run.method),
            budget=budget,
            evaluate=run.evaluates_in(server_round),
            privacy=run.privacy,
            wire=run.wire,
            uniform_weights=trains and self.uniform_weights,
        )


def check_reserved(*configs: Mapping[str, Any]) -> None:
    """ValueError if a user's config for clients has keys that the strategy sets."""
    reserved = [key for config in configs for key in config if key in RESERVED or key.startswith(RESERVED_PREFIXES)]
    if set(reserved) - {"server-round"}:  # Flower's own strategies put it there, too
        raise ValueError(f"the config for clients must not hold keys of the strategy's own: {', '.join(reserved)}")
