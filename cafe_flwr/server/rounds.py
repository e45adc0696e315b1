"""The loop of rounds: waits for clients, repeats a round with too few good replies, and makes its record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from cafe_flwr.core.log import logger
from cafe_flwr.methods.server import RoundPlan
from cafe_flwr.server.callbacks import RoundRecord
from cafe_flwr.server.directory import Directory
from cafe_flwr.server.replies import Replies
from cafe_flwr.server.requests import PendingRequest
from cafe_flwr.server.run import RunConstants, StrategyPart
from cafe_flwr.wire.codec import filled
from cafe_flwr.wire.reports import ClientReport
from cafe_flwr.wire.train import TrainReply

EvaluateOnServer = Callable[[int, ArrayRecord], MetricRecord | None]


class RoundFailed(RuntimeError):
    """Too few good replies in a round; the server's state is as before it. Clients ``left_out`` have the reason."""

    def __init__(self, text: str, participants: Sequence[int], left_out: Mapping[int, str]) -> None:
        super().__init__(text)
        self.participants = participants
        self.left_out = left_out


@dataclass
class CurrentRound:
    """The current round: participants (``clients``), their plan and requests, and then the content of their replies.

    ``failure`` says why the previous try failed if the round is repeated.
    """

    clients: Sequence[int] = ()
    plan: RoundPlan = field(default_factory=lambda: RoundPlan(np.zeros((0, 0), dtype=bool)))
    pending: Sequence[PendingRequest] = ()
    reports: Sequence[ClientReport] = ()
    left_out: Mapping[int, str] = field(default_factory=dict)
    notes: Mapping[int, str] = field(default_factory=dict)
    failure: RoundFailed | None = None

    def read(self, replies: Replies[TrainReply]) -> None:
        """Store the content of the replies."""
        self.reports, self.left_out, self.notes = replies.reports, replies.left_out, replies.notes

    def check(self, server_round: int, minimum: int, directory: Directory) -> None:
        """Raise RoundFailed, with all reasons, if fewer than ``minimum`` clients replied well."""
        replied = len(self.reports)
        if replied >= max(1, minimum):
            return
        few = f"has {replied} of the {minimum} clients it needs (min-train-nodes)" if replied else ""
        reasons = [f"\n  {directory.label(client)}: {reason}" for client, reason in sorted(self.left_out.items())]
        text = f"round {server_round} {few or 'failed for every client'}:{''.join(reasons)}"
        raise RoundFailed(text, self.clients, self.left_out)


@dataclass(frozen=True)
class Gathering(StrategyPart):
    """Waits for clients up to ``wait_seconds`` of the strategy; ``failure`` says why a round is repeated."""

    failure: RoundFailed | None = None

    def wait(self, grid: Grid) -> None:
        """Wait until the clients are there, or the time is up (:meth:`Directory.wait`)."""
        run = self.run
        self.directory.wait(
            grid, min_nodes=run.min_available_nodes, num_clients=run.num_clients, seconds=run.wait_seconds
        )

    def connect(self, grid: Grid) -> None:
        """Ask new nodes; if no client is known to be present, wait as at the start."""
        if self.directory.hosts:
            self.directory.refresh(grid)
        if self.directory.hosts:
            return
        try:
            self.wait(grid)
        except RuntimeError as error:
            if self.failure is None:
                raise
            raise RuntimeError(f"{error}\n{self.failure}") from None

    def enough(self, grid: Grid, server_round: int) -> list[int]:
        """Clients to sample from for a round, or participants to ask again if it is repeated; waits for missing ones.

        RuntimeError if there are too few for a round.
        """
        minimum, seconds = self.run.min_clients, self.run.wait_seconds
        wanted = self.failure.participants if self.failure else None
        deadline = time.monotonic() + seconds
        while len(there := self._there(wanted)) < minimum and time.monotonic() < deadline:
            time.sleep(self.directory.poll_seconds)
            self.directory.refresh(grid)
        if len(there) >= max(1, minimum):
            return there
        of, before = (f" of its {len(wanted)} participants", f"\n{self.failure}") if wanted else ("", "")
        raise RuntimeError(
            f"round {server_round} needs at least {minimum} clients (min-train-nodes), but {len(there)}{of} are "
            f"there, also after {seconds:g} s: start more nodes and resume the run{before}"
        )

    def _there(self, wanted: Sequence[int] | None) -> list[int]:
        hosts = self.directory.hosts
        return sorted(hosts) if wanted is None else [client for client in wanted if client in hosts]


@dataclass
class RoundCost:
    """Cost of a round over all tries (``seconds_server``: of the last), and who was left out of each failed try."""

    server_round: int
    bytes_down: int = 0
    bytes_up: int = 0
    seconds_total: float = 0.0
    seconds_server: float = 0.0
    failed_tries: list[Mapping[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class RoundLoop:
    """Flower's loop of rounds, with rounds that may be repeated.

    Attributes
    ----------
    timeout
        Seconds after which a round goes on without the missing replies.
    retries
        How often a round is repeated after :class:`RoundFailed`.
    on_failure
        Called before every try of a round: with None first, then with the reason why it is repeated.
    on_round
        Called when the clients of a round have trained.
    """

    strategy: Strategy
    grid: Grid
    timeout: float
    retries: int
    on_failure: Callable[[RoundFailed | None], None]
    on_round: Callable[[RoundCost], None]
    train_config: ConfigRecord
    evaluate_config: ConfigRecord
    evaluate_fn: EvaluateOnServer | None

    def run(self, arrays: ArrayRecord, first: int, last: int) -> Result:
        """Run the rounds; raises RoundFailed if one fails in every try."""
        result = Result()
        result.arrays = arrays
        self._evaluate_on_server(first - 1, arrays, result)
        for server_round in range(first, last + 1):
            arrays = self._train(server_round, arrays, result)
            messages = self.strategy.configure_evaluate(server_round, arrays, self.evaluate_config, self.grid)
            replies = self.grid.send_and_receive(list(messages), timeout=self.timeout)
            if (metrics := self.strategy.aggregate_evaluate(server_round, replies)) is not None:
                result.evaluate_metrics_clientapp[server_round] = metrics
            self._evaluate_on_server(server_round, arrays, result)
        return result

    def _evaluate_on_server(self, server_round: int, arrays: ArrayRecord, result: Result) -> None:
        if self.evaluate_fn and (value := self.evaluate_fn(server_round, arrays)) is not None:
            result.evaluate_metrics_serverapp[server_round] = value

    def _train(self, server_round: int, arrays: ArrayRecord, result: Result) -> ArrayRecord:
        """Train in one round, with retries, and return the arrays after it."""
        start, cost = time.perf_counter(), RoundCost(server_round)
        self.on_failure(None)
        while True:
            try:
                new_arrays, metrics = self._try(cost, arrays)
                break
            except RoundFailed as failure:
                if len(cost.failed_tries) == self.retries:
                    raise
                cost.failed_tries.append(failure.left_out)
                self.on_failure(failure)
                tries = f"{len(cost.failed_tries)} of {self.retries}"
                logger.warning("%s\nRound %d is repeated (%s)", failure, server_round, tries)
        if metrics is not None:
            result.train_metrics_clientapp[server_round] = metrics
        if new_arrays is not None:
            result.arrays = arrays = new_arrays
        cost.seconds_total = time.perf_counter() - start
        self.on_round(cost)
        return arrays

    def _try(self, cost: RoundCost, arrays: ArrayRecord) -> tuple[ArrayRecord | None, MetricRecord | None]:
        started = time.perf_counter()
        messages = list(self.strategy.configure_train(cost.server_round, arrays, self.train_config, self.grid))
        configured = time.perf_counter()
        replies = list(self.grid.send_and_receive(messages, timeout=self.timeout))
        received = time.perf_counter()
        cost.bytes_down += sum(map(num_bytes, messages))
        cost.bytes_up += sum(num_bytes(reply) for reply in replies if reply.has_content())
        aggregated = self.strategy.aggregate_train(cost.server_round, replies)
        cost.seconds_server = (configured - started) + (time.perf_counter() - received)
        return aggregated


def round_record(run: RunConstants, directory: Directory, current: CurrentRound, cost: RoundCost) -> RoundRecord:
    """The record of a finished round."""
    reports = current.reports
    seconds = {
        "total": cost.seconds_total,
        "train": sum(report.seconds_train for report in reports),
        "evaluate": sum(report.seconds_evaluate for report in reports),
        "server": cost.seconds_server,
    }
    seconds["other"] = max(0.0, seconds["total"] - seconds["train"] - seconds["evaluate"] - seconds["server"])
    return RoundRecord(
        server_round=cost.server_round,
        num_rounds=run.num_rounds,
        participants=current.clients,
        left_out=current.left_out,
        plan=current.plan,
        reports=reports,
        learning_rate=run.learning_rate(cost.server_round),
        bytes_down=cost.bytes_down,
        bytes_up=cost.bytes_up,
        seconds=seconds,
        suspicious=current.plan.suspicious,
        failed_tries=cost.failed_tries,
        notes=current.notes,
        students=sum(directory.kind(client).num_exits - 1 for client in current.clients),
        names={client: directory.names[client] for client in current.clients if client in directory.names},
    )


def num_bytes(message: Message) -> int:
    """Bytes of a message, but for empty lists: they have none, and Flower cannot count them."""
    return sum(
        (type(record)(filled(dict(record))) if isinstance(record, ConfigRecord) else record).count_bytes()
        for record in message.content.values()
    )
