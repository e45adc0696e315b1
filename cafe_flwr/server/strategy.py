"""The Flower strategy that runs any method of this package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from cafe_flwr.core.log import logger
from cafe_flwr.methods.base import Method
from cafe_flwr.server.accounting import tell_guarantee
from cafe_flwr.server.aggregation import Aggregator
from cafe_flwr.server.callbacks import RoundCallback, RunInfo
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.directory import Directory, describe_request
from cafe_flwr.server.evaluation import PersonalEvaluation
from cafe_flwr.server.log import RunLog
from cafe_flwr.server.planning import RoundPlanner
from cafe_flwr.server.replies import ReplyReader
from cafe_flwr.server.requests import PendingRequest, RequestWriter, check_reserved
from cafe_flwr.server.rounds import (
    CurrentRound,
    EvaluateOnServer,
    Gathering,
    RoundCost,
    RoundFailed,
    RoundLoop,
    round_record,
)
from cafe_flwr.server.run import RunConstants, check_arguments
from cafe_flwr.server.sampling import sample_clients
from cafe_flwr.server.shared import ask_initial, by_name, taken_up
from cafe_flwr.training.options import DEFAULT_BUDGET, LocalBudget
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.keys import Keys
from cafe_flwr.wire.options import Bounds, Privacy

DEFAULT_ROUNDS = 100


class FederatedStrategy(FedAvg):
    """A method of this package as a Flower strategy.

    Counts and fractions are of *clients*, the learners. A node hosts one or more clients and gets one message a round
    for all that take part; in Flower's own examples every node hosts one client.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`flwr.serverapp.strategy.FedAvg`, with other defaults: ``fraction_evaluate`` is 0, since clients
        evaluate before and after local training inside the training message; ``min_train_nodes`` and
        ``min_available_nodes`` are 1, since a node may host many clients. ``train_metrics_aggr_fn`` and
        ``evaluate_metrics_aggr_fn`` get one record per client.
    method
        What clients minimise and the server combines.
    num_rounds
        T, the rounds that schedules (learning rate, student exits) span. None: the number given to :meth:`start`.
    local
        Local training, with the learning rate of the first round; by default that of the settings.
    learning_rate_schedule, learning_rate_decay
        ``"cosine"``: the learning rate is constant until T/2, then falls to 0 as a cosine. ``"exponential"``: it is
        multiplied by ``learning_rate_decay`` every round.
    num_clients
        Clients in simulation, spread over the nodes; None: one client per node.
    seed
        Seed of participants, batches and the clients' initial weights.
    wait_seconds
        How long to wait for nodes before the first round.
    evaluate_every
        Interval, in rounds, at which clients evaluate before and after training; they also do in the last round.
    round_timeout
        Seconds after which a round goes on without the missing replies.
    round_retries
        How often a round in which fewer than ``min_train_nodes`` clients replied well is repeated, with those of its
        participants that are present or return within ``wait_seconds``, before the run stops.
    bounds
        Largest norm of a client's update; beyond it, the update is refused.
    privacy
        Clipping and noise of what clients send; by default neither.
    wire
        Type of the values in messages, both ways: ``"float32"``, or ``"float16"`` for half of the bytes.
    callbacks
        Called at the start, after every round and at the end, as :mod:`cafe_flwr.results.recorder` is.
    resume_from
        State of an earlier run to continue, see :class:`cafe_flwr.server.checkpoints.Checkpoints`.
    own_description
        Describes the network as the server builds it, without clients: where nodes describe different ones, those that
        agree with it take part. None, or where it raises: those that say what most nodes say.
    own_numbers
        Whether clients may have other numbers than 0 to ``num_clients`` − 1, as those with data of their own.
    """

    def __init__(  # noqa: PLR0913 (public constructor: a run is described by it, all by name)
        self,
        *args: Any,
        method: Method,
        num_rounds: int | None = None,
        local: LocalBudget | None = None,
        learning_rate_schedule: str = "cosine",
        learning_rate_decay: float = 1.0,
        num_clients: int | None = None,
        seed: int = 0,
        evaluate_every: int = 1,
        wait_seconds: float = 120.0,
        round_timeout: float = 600.0,
        round_retries: int = 1,
        bounds: Bounds | None = None,
        privacy: Privacy | None = None,
        wire: str = "float32",
        callbacks: Sequence[RoundCallback] = (),
        resume_from: ServerState | None = None,
        own_description: Callable[[], NodeInfo] | None = None,
        own_numbers: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **_with_defaults(args, kwargs))
        if len(args) < 2 and "fraction_evaluate" not in kwargs:
            self.fraction_evaluate = 0.0
        self._planned_rounds = num_rounds
        self.num_rounds = DEFAULT_ROUNDS if num_rounds is None else num_rounds
        self.method, self.local, self.num_clients, self.seed = method, local or DEFAULT_BUDGET, num_clients, seed
        self.learning_rate_schedule, self.learning_rate_decay = learning_rate_schedule, learning_rate_decay
        self.wait_seconds, self.round_timeout, self.round_retries = wait_seconds, round_timeout, round_retries
        self.bounds, self.privacy, self.wire = bounds or Bounds(), privacy or Privacy(), wire
        self.evaluate_every, self.callbacks = evaluate_every, tuple(callbacks)
        self.keys = Keys(self.arrayrecord_key, self.configrecord_key, self.weighted_by_key)
        check_arguments(self.constants)
        self.directory = Directory(self.keys, describe_request(seed, method, num_clients), own_description, own_numbers)
        self.log, self.current = RunLog(self.directory), CurrentRound()
        self.state = self._resume_from = resume_from
        self._evaluating: list[PendingRequest] = []

    def summary(self) -> None:
        """Log the configuration."""
        self.log.settings(self.constants)
        super().summary()

    @property
    def constants(self) -> RunConstants:
        """What stays the same in all rounds."""
        return RunConstants(**{field.name: getattr(self, field.name) for field in fields(RunConstants)})

    def sample(self, server_round: int, available: Sequence[int], purpose: str = "participants") -> list[int]:
        """Clients that take part in a round, or as ``"evaluators"`` in its evaluation; may be overridden."""
        fraction, minimum = self.fraction_train, self.min_train_nodes
        if purpose == "evaluators":
            fraction, minimum = self.fraction_evaluate, self.min_evaluate_nodes
        return sample_clients(available, fraction, minimum, seed=self.seed, server_round=server_round, purpose=purpose)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for every node that hosts participants, with each client's own download and active exits."""
        run, directory, failure = self.constants, self.directory, self.current.failure
        self.current = CurrentRound(failure=failure)
        if self.fraction_train == 0.0:
            return []
        gathering = Gathering(run, directory, failure)
        gathering.connect(grid)
        state = self.state = taken_up(self.state, directory.reference, arrays)
        there = gathering.enough(grid, server_round)
        clients = there if failure else self.sample(server_round, there)
        plan = RoundPlanner(run, directory).plan(state, server_round, clients)
        self.log.suspicious(server_round, plan.suspicious)
        state.plan = plan if plan.weights is not None else state.plan
        writer = RequestWriter(run, directory)
        pending = writer.messages(state, server_round, clients, plan, config, MessageType.TRAIN)
        self.current = CurrentRound(clients, plan, pending, failure=failure)
        return [one.message for one in pending]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the shared parts of all clients that replied well; leave out the others with a warning.

        RoundFailed, with all reasons, if fewer than ``min_train_nodes`` clients replied well.
        """
        state, current, run, directory = self.state, self.current, self.constants, self.directory
        if state is None or not current.clients:
            return None, None
        read = ReplyReader(run, directory).read(state, server_round, current.pending, replies)
        self.log.replies(server_round, read, "{} is left out")
        current.read(read)
        current.check(server_round, run.min_clients, directory)
        aggregator = Aggregator(run, directory)
        state.shared = aggregator.shared(state, read.good)
        state.round, state.kinds = server_round, dict(directory.kinds)
        plan, unmoved = RoundPlanner(run, directory).conclude(
            state, server_round, current.clients, current.plan, current.reports
        )
        self.log.unmoved(unmoved)
        if plan is not current.plan:  # made now, at the end of the round
            self.log.suspicious(server_round, plan.suspicious)
            current.plan = plan
        metrics = aggregator.training_metrics(self.train_metrics_aggr_fn, server_round, current.reports)
        return by_name(directory.reference.shared, state.shared), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to evaluate the aggregated network with their own heads; by default none."""
        self._evaluating = []
        if self.fraction_evaluate == 0.0:
            return []
        run, directory = self.constants, self.directory
        Gathering(run, directory).connect(grid)
        state = self.state = taken_up(self.state, directory.reference, arrays)
        clients = self.sample(server_round, list(directory.hosts), "evaluators")
        self._evaluating = PersonalEvaluation(run, directory).ask(state, server_round, clients, config)
        return [one.message for one in self._evaluating]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average accuracy, loss and ECE per exit over the clients that replied, weighted by their test examples."""
        run, directory = self.constants, self.directory
        read = PersonalEvaluation(run, directory).read(self._evaluating, replies)
        self.log.replies(server_round, read, "no evaluation of {}")
        return Aggregator(run, directory).evaluation_metrics(self.evaluate_metrics_aggr_fn, read.reports)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateOnServer | None = None,
    ) -> Result:
        """Run the federation: rounds, then one evaluation of every client's personal network.

        Parameters
        ----------
        grid
            Flower's grid.
        initial_arrays
            Initial shared parameters by name; other entries are ignored. None: a node is asked for those that the seed
            gives, so that the server needs neither network nor data.
        num_rounds
            Stop after this round; None: after the last. Schedules span the ``num_rounds`` of the constructor, or these
            if it had none.
        timeout
            Of a round, in seconds; None: the strategy's own.
        train_config, evaluate_config
            Entries that the clients receive, too.
        evaluate_fn
            Evaluation on the server, called with (round, arrays) before the first and after every round.

        Returns
        -------
        Flower's result: the shared parameters by name, and the metrics averaged over clients, per round.

        Raises
        ------
        RuntimeError
            If no client can take part, or if too few clients reply well in all tries of a round.
        """
        started = time.perf_counter()
        if self._planned_rounds is None:
            self.num_rounds = num_rounds or DEFAULT_ROUNDS
        last = self.num_rounds if num_rounds is None else num_rounds
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        check_reserved(train_config, evaluate_config)
        self.constants.check_rounds(last)
        arrays, state = self._begin(grid, initial_arrays, last)
        loop = RoundLoop(
            strategy=self,
            grid=grid,
            timeout=self.round_timeout if timeout is None else timeout,
            retries=self.round_retries,
            on_failure=self._repeat,
            on_round=self._finish_round,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
        )
        result = loop.run(arrays, state.round + 1, last)
        if state.round == self.num_rounds:
            self._finish(grid, state, evaluate_config, loop.timeout)
        logger.info("Finished after %.1f s", time.perf_counter() - started)
        return result

    def _begin(self, grid: Grid, initial_arrays: ArrayRecord | None, last: int) -> tuple[ArrayRecord, ServerState]:
        """Wait for clients, make the state or go on from one, and inform log and callbacks."""
        self.state, self._resume_from = self._resume_from, None
        resumed, run, directory = self.state is not None, self.constants, self.directory
        if self.state is not None:
            directory.agreement.expect(self.state.digest, self.state.kinds)
        self.log.starting(run, last)
        self.summary()
        Gathering(run, directory).wait(grid)
        if self.state is not None:
            self.state.check(directory.reference.digest)
            arrays = by_name(directory.reference.shared, self.state.shared)
        else:
            arrays = initial_arrays or ask_initial(grid, directory, self.round_timeout, self.wire)
        state = self.state = taken_up(self.state, directory.reference, arrays)
        directory.note_held()
        info = RunInfo.of(directory, state, self.num_rounds)
        self.log.started(info, resumed)
        tell_guarantee(self.privacy, self.num_rounds, directory.reference)
        for callback in self.callbacks:
            callback.on_start(info)
        return arrays, state

    def _repeat(self, failure: RoundFailed | None) -> None:
        """Remember why the round is repeated; None: it is not."""
        self.current.failure = failure

    def _finish_round(self, cost: RoundCost) -> None:
        record = round_record(self.constants, self.directory, self.current, cost)
        self.log.finished(record)
        if self.state is not None:
            for callback in self.callbacks:
                callback.on_round(record, self.state)

    def _finish(self, grid: Grid, state: ServerState, config: ConfigRecord, timeout: float) -> None:
        """Let every client present evaluate its personal network and publish it in its own folder."""
        directory, evaluation = self.directory, PersonalEvaluation(self.constants, self.directory)
        directory.refresh(grid)
        pending: list[PendingRequest] = []
        if directory.hosts:
            pending = evaluation.ask(state, state.round, sorted(directory.hosts), config, publish=True)
        else:
            logger.warning("No final evaluation: all nodes are gone")
        replies = grid.send_and_receive([one.message for one in pending], timeout=timeout)
        read = evaluation.read(pending, replies)
        self.log.replies(state.round, read, "no evaluation of {}")
        directory.note_held()
        for callback in self.callbacks:
            callback.on_finish(read.reports)


# Position and default here of FedAvg's arguments whose default differs: Flower's minimum of 2 nodes would overrule
# fractions, and make one node with many clients wait for another.
_DEFAULTS = {"min_train_nodes": (2, 1), "min_available_nodes": (4, 1)}


def _with_defaults(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: default for name, (place, default) in _DEFAULTS.items() if len(args) <= place}
    return {**own, **kwargs}
