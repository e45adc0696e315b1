"""Strategies for Flower: who takes part, what travels, and what is kept from round to round."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from numpy.typing import NDArray

from cafe_flwr.core.log import logger
from cafe_flwr.core.random import rng_for
from cafe_flwr.core.text import kebab
from cafe_flwr.methods.base import Method, settings_of
from cafe_flwr.methods.cafedistill import CafeDistillMethod
from cafe_flwr.methods.server import ClientRecord, RoundPlan, ServerRound, joined_plans
from cafe_flwr.server.accounting import epsilon
from cafe_flwr.server.callbacks import RoundCallback, RoundRecord, RunInfo
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.directory import Directory
from cafe_flwr.server.replies import Asked, notes_in, sort_out
from cafe_flwr.server.sampling import sample_clients
from cafe_flwr.settings import Settings
from cafe_flwr.training.objectives.base import Objective
from cafe_flwr.training.options import DEFAULT_BUDGET, LocalBudget, learning_rate_at
from cafe_flwr.wire.averaging import weighted, weighted_mean
from cafe_flwr.wire.bounds import Bounds, check_norm, far_longer, norm, times_median
from cafe_flwr.wire.capacity import Kind, are_unequal
from cafe_flwr.wire.codec import clients_in, method_config
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.evaluate import EvaluationReply, FinalReport
from cafe_flwr.wire.keys import FLAT, METRICS, PHASES, PROTOCOL, RESERVED, RESERVED_PREFIXES, WIRES, Keys
from cafe_flwr.wire.privacy import Privacy
from cafe_flwr.wire.reports import ClientReport
from cafe_flwr.wire.slices import View, mean_of_holders
from cafe_flwr.wire.train import Expected, TrainReply, TrainRequest

DEFAULT_ROUNDS = 100


class RoundFailed(RuntimeError):
    """Too few clients replied well in a round; the server's state is as before it.

    Attributes
    ----------
    participants
        Clients that were asked.
    left_out
        Those that did not, with the reason.
    """

    def __init__(self, text: str, participants: Sequence[int], left_out: Mapping[int, str]) -> None:
        super().__init__(text)
        self.participants = participants
        self.left_out = left_out


@dataclass
class _Round:
    """The round under way."""

    clients: Sequence[int] = ()
    plan: RoundPlan = field(default_factory=lambda: RoundPlan(np.zeros((0, 0), dtype=bool)))
    reports: Sequence[ClientReport] = ()
    left_out: Mapping[int, str] = field(default_factory=dict)
    notes: Mapping[int, str] = field(default_factory=dict)


class FederatedStrategy(FedAvg):
    """A method of this package as a Flower strategy.

    Counts and fractions are of *clients*, the learners: a node hosts one or more, and is asked with one message a
    round for all of its clients that take part. Where every node hosts one client, as in Flower's own examples, the
    two are the same.

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
        T: schedules (learning rate, student exits) span so many rounds. None: as many as :meth:`start` is told.
    local
        Local training, with the learning rate of the first round; by default that of the settings.
    learning_rate_schedule, learning_rate_decay
        What becomes of the learning rate: ``"cosine"``, constant until T/2, then a cosine down to 0; or
        ``"exponential"``, by the factor ``learning_rate_decay`` a round.
    num_clients
        Clients in simulation, spread over the nodes; None: one client per node.
    seed
        Seed of participants, batches and the clients' initial weights.
    wait_seconds
        How long to wait for nodes before the first round.
    evaluate_every
        Clients evaluate before and after training in every so many rounds, and in the last one.
    round_timeout
        Seconds after which a round goes on without the replies that are missing.
    round_retries
        A round in which fewer than ``min_train_nodes`` clients replied well is repeated so many times with those of its
        participants that are there, or come back within ``wait_seconds``; then the run stops.
    bounds
        How long a client's update may be before it is refused.
    privacy
        Clipping and noise of what clients send; by default neither.
    wire
        Type of the values that travel, both ways: ``"float32"``, or ``"float16"`` for half of the bytes.
    callbacks
        Called after every round, see :mod:`cafe_flwr.results.recorder`.
    resume_from
        State of an earlier run to go on from, see :class:`cafe_flwr.server.checkpoints.Checkpoints`.
    """

    def __init__(
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
        **kwargs: Any,
    ) -> None:
        if len(args) < 3:  # FedAvg's 2 would overrule fractions, and make one node with many clients wait for another
            kwargs.setdefault("min_train_nodes", 1)
        if len(args) < 5:
            kwargs.setdefault("min_available_nodes", 1)
        given = len(args) > 1 or "fraction_evaluate" in kwargs
        super().__init__(*args, **kwargs)
        if not given:
            self.fraction_evaluate = 0.0
        checked = {
            "seed": seed,
            "evaluate-every": evaluate_every,
            "wait-seconds": wait_seconds,
            "round-timeout": round_timeout,
            "round-retries": round_retries,
            "learning-rate-schedule": learning_rate_schedule,
            "learning-rate-decay": learning_rate_decay,
        }
        checked |= {"num-server-rounds": num_rounds} if num_rounds is not None else {}
        checked |= {"num-clients": num_clients} if num_clients is not None else {}
        Settings.from_run_config(checked)
        for name in ("fraction_train", "fraction_evaluate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if wire not in WIRES:
            raise ValueError(f"wire must be one of {', '.join(WIRES)}; got {wire!r}")
        self.bounds = bounds or Bounds()
        self.privacy = privacy or Privacy()
        self.wire = wire
        self.method = method
        self._planned_rounds = num_rounds
        self.num_rounds = DEFAULT_ROUNDS if num_rounds is None else num_rounds
        self.local = local or DEFAULT_BUDGET
        self.learning_rate_schedule = learning_rate_schedule
        self.learning_rate_decay = learning_rate_decay
        self.num_clients = num_clients
        self.seed = seed
        self.evaluate_every = evaluate_every
        self.wait_seconds = wait_seconds
        self.round_timeout = round_timeout
        self.round_retries = round_retries
        self.callbacks = tuple(callbacks)
        self.keys = Keys(self.arrayrecord_key, self.configrecord_key, self.weighted_by_key)
        question = {"protocol": PROTOCOL, "seed": seed, **method_config(method.name, settings_of(method))}
        if num_clients is not None:
            question["num-clients"] = num_clients
        self.directory = Directory(self.keys, question)
        self.state = resume_from
        self._resume_from = resume_from
        self._asked: list[Asked] = []
        self._round = _Round()
        self._failure: RoundFailed | None = None  # of the round under way, if it is repeated
        self._kinds: dict[int, Kind] = {}  # of all clients that have been there
        self._unmoved: set[int] = set()  # of whom this has been said
        self._seconds: deque[float] = deque(maxlen=10)

    # --- Flower's strategy interface ---

    def summary(self) -> None:
        """Log the configuration."""
        logger.info("\t├──> Settings of %s:", self.method.name)
        settings = {k: value for k, value in settings_of(self.method).items() if k not in self.method.unread()}
        for i, (name, value) in enumerate(settings.items()):
            logger.info("\t│\t%s %s: %s", "└──" if i == len(settings) - 1 else "├──", name.replace("_", "-"), value)
        local = self.local
        length = f"{local.epochs} epochs" if local.epochs else f"{local.steps} steps"
        optimizer = "AdamW" if local.optimizer == "adamw" else "SGD"
        logger.info(
            "\t├──> Local training: %s of %d, %s at %g", length, local.batch_size, optimizer, local.learning_rate
        )
        if self.learning_rate_schedule == "exponential":
            logger.info("\t├──> Learning rate × %g a round", self.learning_rate_decay)
        if local.keep_momentum:
            logger.info("\t├──> The optimiser's momentum stays on the clients from round to round")
        for part in (self.bounds, self.privacy):
            if part != type(part)():
                logger.info("\t├──> %s", part)
        if self.wire != "float32":
            logger.info("\t├──> Values travel as %s", self.wire)
        logger.info("\t├──> Seed: %d | round timeout: %g s", self.seed, self.round_timeout)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for every node that hosts participants: each client its own download and active exits."""
        self._round, self._asked = _Round(), []
        if self.fraction_train == 0.0:
            return []
        self._connect(grid)
        state = self._state(arrays)
        there = self._enough(grid, server_round)
        clients = there
        if self._failure is None:
            clients = sample_clients(
                there, self.fraction_train, self.min_train_nodes, seed=self.seed, server_round=server_round
            )
        plan = self._plan(server_round, clients)
        self._round = _Round(clients, plan)
        self._tell_suspicious(server_round, plan)
        state.plan = plan if plan.weights is not None else state.plan
        return self._messages(server_round, clients, plan, config, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the shared parts of all clients that replied well; leave out the others with a warning.

        Raises
        ------
        RoundFailed
            If fewer than ``min_train_nodes`` clients replied well, with all reasons.
        """
        if self.state is None or not self._round.clients:
            return None, None
        info = self.directory.reference
        good, left_out = self._read(server_round, replies, info)
        good = self._within_bounds(good, left_out)
        for client, reason in sorted(left_out.items()):
            logger.warning("Round %d: %s is left out: %s", server_round, self.directory.label(client), reason)
        notes = notes_in(good)
        for client, note in notes.items():
            logger.warning("Round %d: %s: %s", server_round, self.directory.label(client), note)
        reports = sorted((r for reply in good for r in reply.reports), key=lambda report: report.client)
        self._round.reports, self._round.left_out, self._round.notes = reports, left_out, notes
        if len(reports) < max(1, self._minimum):
            few = f"has {len(reports)} of the {self._minimum} clients it needs (min-train-nodes)"
            text = few if reports else "failed for every client"
            reasons = "".join(f"\n  {self.directory.label(c)}: {reason}" for c, reason in sorted(left_out.items()))
            raise RoundFailed(f"round {server_round} {text}:{reasons}", self._round.clients, left_out)
        self.state.shared = self._mean(good)
        self.state.round = server_round
        self.state.kinds = dict(self.directory.kinds)
        self._conclude(server_round, reports)
        measured = [r for r in reports if r.test_examples and self._evaluates_in(server_round)]  # else there is NaN
        records = [(r.client, _client_metrics(r, self.weighted_by_key)) for r in measured]
        return self._arrays(self.state.shared), self._averaged(self.train_metrics_aggr_fn, records)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to evaluate the aggregated network with their own heads; nobody, by default."""
        self._asked = []
        if self.fraction_evaluate == 0.0:
            return []
        self._connect(grid)
        self._state(arrays)
        clients = sample_clients(
            list(self.directory.hosts),
            self.fraction_evaluate,
            self.min_evaluate_nodes,
            seed=self.seed,
            server_round=server_round,
            purpose="evaluators",
        )
        return self._evaluate_messages(server_round, clients, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average accuracy, loss and ECE per exit over the clients that replied, by their test examples."""
        reports = self._read_evaluations(server_round, replies)
        if not reports:
            return None
        records = [
            (r.client, MetricRecord({self.weighted_by_key: r.test_examples, **vars(r.exits)}))
            for r in reports
            if r.test_examples
        ]
        return self._averaged(self.evaluate_metrics_aggr_fn, records)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation: rounds, then one evaluation of every client's personal network.

        Parameters
        ----------
        grid
            Flower's grid.
        initial_arrays
            Initial shared parameters by name; others are not looked at, since personal ones are the clients' own.
            None: a node is asked for those that the seed gives, so that the server needs neither network nor data.
        num_rounds
            Stop after this round. The schedules span the ``num_rounds`` the strategy was made with, or these here if it
            was made without. None: all of them.
        timeout
            Of a round, in seconds; None: the strategy's own.
        train_config, evaluate_config
            Sent along to the clients.
        evaluate_fn
            Evaluation on the server, called with (round, arrays) before the first and after every round.

        Returns
        -------
        Flower's result: the shared parameters by name, and the metrics averaged over clients, per round.

        Raises
        ------
        RuntimeError
            If no client can take part, or too few clients of a round reply well, also when it is repeated.
        """
        started = time.perf_counter()
        if self._planned_rounds is None:
            self.num_rounds = num_rounds or DEFAULT_ROUNDS
        for config in (train_config, evaluate_config):
            _check_reserved(config or {})
        last = self.num_rounds if num_rounds is None else num_rounds
        if not 1 <= last <= self.num_rounds:
            raise ValueError(f"num_rounds must be in 1..{self.num_rounds}, for which the strategy was made, got {last}")
        if not self._learning_rate(self.num_rounds):
            raise ValueError(
                f"learning_rate_decay = {self.learning_rate_decay} shrinks the learning rate to 0 within "
                f"{self.num_rounds} rounds: choose one nearer to 1"
            )
        self.state, self._resume_from = self._resume_from, None
        self.directory.kinds |= self.state.kinds if self.state else {}
        logger.info("Starting %s:", self.method.name)
        logger.info("\t├── Number of rounds: %d%s", self.num_rounds, f", stop after {last}" * (last < self.num_rounds))
        self.summary()
        self.directory.wait(
            grid, min_nodes=self.min_available_nodes, num_clients=self.num_clients, seconds=self.wait_seconds
        )
        resumed = self.state is not None
        self._check_digest()
        arrays = self._arrays(self.state.shared) if self.state else (initial_arrays or self._ask_initial(grid))
        state = self._state(arrays)
        info = self.directory.reference
        run = RunInfo(
            run=state.run,
            first_round=state.round + 1,
            num_rounds=self.num_rounds,
            clients=sorted(self.directory.hosts),
            num_exits=info.num_exits,
            num_parameters=info.num_parameters,
            macs_per_exit=self._macs(info),
            kinds=self._kinds,
        )
        self._note_kinds()
        nodes = len({*self.directory.hosts.values()})
        logger.info("%d clients on %d node(s), %d parameters", len(run.clients), nodes, info.num_parameters)
        if resumed:
            logger.info("Resuming after round %d", state.round)
        self._tell_privacy(info)
        for callback in self.callbacks:
            callback.on_start(run)

        result = Result()
        result.arrays = arrays
        timeout = self.round_timeout if timeout is None else timeout
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        if evaluate_fn and (value := evaluate_fn(state.round, arrays)) is not None:
            result.evaluate_metrics_serverapp[state.round] = value
        for server_round in range(state.round + 1, last + 1):
            arrays = self._run_round(grid, server_round, arrays, train_config, timeout, result)
            replies = grid.send_and_receive(
                list(self.configure_evaluate(server_round, arrays, evaluate_config, grid)), timeout=timeout
            )
            if (metrics := self.aggregate_evaluate(server_round, replies)) is not None:
                result.evaluate_metrics_clientapp[server_round] = metrics
            if evaluate_fn and (value := evaluate_fn(server_round, arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = value
        if state.round == self.num_rounds:
            reports = self._evaluate_all(grid, evaluate_config, timeout)
            self._note_kinds()
            for callback in self.callbacks:
                callback.on_finish(reports)
        logger.info("Finished after %.1f s", time.perf_counter() - started)
        return result

    def _note_kinds(self) -> None:
        """Take down what the clients that are there hold; of some that are gone it is known already."""
        self._kinds |= {client: self.directory.kind(client) for client in sorted(self.directory.hosts)}

    def _macs(self, info: NodeInfo) -> Sequence[int]:
        """MACs per exit of the largest network; the first node may host none of its clients, and not know them."""
        known = [kind.macs for kind in self.directory.kinds.values() if kind.num_exits == info.num_exits]
        return max([info.macs, *map(list, known)], key=lambda macs: macs[-1])

    def _tell_privacy(self, info: NodeInfo) -> None:
        """Log what the clients' noise guarantees."""
        privacy = self.privacy
        if not privacy.on:
            return
        if not privacy.noise_multiplier:
            logger.info(
                "Updates are clipped to norm %g, without noise: this is no differential privacy", privacy.clip_norm
            )
            return
        releases = sum(schema.size > 0 for schema in (info.shared, info.upload))
        try:
            value = epsilon(privacy.noise_multiplier, self.num_rounds, delta=privacy.delta, releases=releases)
        except ValueError as error:
            logger.warning("Updates get noise, but what it guarantees is not known here: %s", error)
            return
        logger.info(
            "Differential privacy of what a client sends: ε = %.4g at δ = %g, for a client that takes part in all %d "
            "rounds (its whole update against none; %d release(s) of σ = %g a round; nothing claimed for sampling)",
            value,
            privacy.delta,
            self.num_rounds,
            releases,
            privacy.noise_multiplier,
        )
        if privacy.report_metrics:
            logger.warning("Accuracies, losses and similarities get no noise: report-metrics = false withholds them")

    # --- one round ---

    def _run_round(
        self,
        grid: Grid,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        timeout: float,
        result: Result,
    ) -> ArrayRecord:
        start = time.perf_counter()
        bytes_down = bytes_up = 0
        failed_tries: list[Mapping[int, str]] = []
        self._failure = None
        while True:
            tried = time.perf_counter()
            messages = list(self.configure_train(server_round, arrays, config, grid))
            configured = time.perf_counter()
            replies = list(grid.send_and_receive(messages, timeout=timeout))
            received = time.perf_counter()
            bytes_down += sum(_num_bytes(message) for message in messages)
            bytes_up += sum(_num_bytes(reply) for reply in replies if reply.has_content())
            try:
                new_arrays, metrics = self.aggregate_train(server_round, replies)
                break
            except RoundFailed as failure:
                if len(failed_tries) == self.round_retries:
                    raise
                failed_tries.append(failure.left_out)
                self._failure = failure
                tries = f"{len(failed_tries)} of {self.round_retries}"
                logger.warning("%s\nRound %d is repeated (%s)", failure, server_round, tries)
        if metrics is not None:
            result.train_metrics_clientapp[server_round] = metrics
        if new_arrays is not None:
            result.arrays = arrays = new_arrays
        done = time.perf_counter()
        reports = self._round.reports
        seconds = {
            "total": done - start,
            "train": sum(r.seconds_train for r in reports),
            "evaluate": sum(r.seconds_evaluate for r in reports),
            "server": (configured - tried) + (done - received),
        }
        seconds["other"] = max(0.0, seconds["total"] - seconds["train"] - seconds["evaluate"] - seconds["server"])
        record = RoundRecord(
            server_round=server_round,
            num_rounds=self.num_rounds,
            participants=self._round.clients,
            left_out=self._round.left_out,
            plan=self._round.plan,
            reports=reports,
            learning_rate=self._learning_rate(server_round),
            bytes_down=bytes_down,
            bytes_up=bytes_up,
            seconds=seconds,
            suspicious=self._round.plan.suspicious,
            failed_tries=failed_tries,
            notes=self._round.notes,
            students=sum(self.directory.kind(client).num_exits - 1 for client in self._round.clients),
            names={c: self.directory.names[c] for c in self._round.clients if c in self.directory.names},
        )
        self._seconds.append(seconds["total"])
        left = sum(self._seconds) / len(self._seconds) * (self.num_rounds - server_round)
        logger.info("%s · %s", record.line(), f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
        if self.state is None:  # nobody trains
            return arrays
        for callback in self.callbacks:
            callback.on_round(record, self.state)
        return arrays

    @property
    def _minimum(self) -> int:
        """Clients that a round needs; where it is known how many there are, not more than these."""
        return self.min_train_nodes if self.num_clients is None else min(self.min_train_nodes, self.num_clients)

    def _enough(self, grid: Grid, server_round: int) -> list[int]:
        """Clients to choose from, or to ask again; waits for those that are missing.

        Raises
        ------
        RuntimeError
            If there are too few for a round.
        """
        wanted = self._failure.participants if self._failure else None
        there = self.directory.gather(grid, wanted, self._minimum, self.wait_seconds)
        if len(there) >= max(1, self._minimum):
            return there
        of, before = (f" of its {len(wanted)} participants", f"\n{self._failure}") if wanted else ("", "")
        raise RuntimeError(
            f"round {server_round} needs at least {self._minimum} clients (min-train-nodes), but {len(there)}{of} are "
            f"there, also after {self.wait_seconds:g} s: start more nodes and resume the run{before}"
        )

    def _plan(self, server_round: int, clients: Sequence[int], trains: bool = True) -> RoundPlan:
        """The method's plan; where clients are not alike, one for all those whose uploads can be compared."""
        plans = [(task.participants, self.method.plan(task)) for task in self._tasks(server_round, clients, trains)]
        return joined_plans(clients, plans, self.directory.reference.num_exits)

    def _conclude(self, server_round: int, reports: Sequence[ClientReport]) -> None:
        """Keep what the method makes of a round's reports, group by group as they were planned."""
        assert self.state is not None
        records = {}
        for r in reports:
            similarity, kind = np.asarray(r.similarity, dtype=np.float64), self.directory.kind(r.client).name
            records[r.client] = ClientRecord(r.num_examples, server_round, r.upload, similarity, kind)
        whole, rows = self._round.plan, {client: row for row, client in enumerate(self._round.clients)}
        plans = []
        for task in self._tasks(server_round, self._round.clients):
            here = [client for client in task.participants if client in records]
            active = whole.active[[rows[client] for client in task.participants], : task.num_exits - 1]
            plan = replace(whole, active=active)
            if here:
                done = self.method.conclude(task, plan, {client: records[client] for client in here})
                plan, self.state.pairs = done.plan, done.pairs
                self.state.known |= {c: self._as_sent(record) for c, record in done.records.items()}
                self._tell_unmoved(done.unmoved)
            plans.append((task.participants, plan))
        if any(plan.weights is not whole.weights for _, plan in plans):  # found now, at the end of the round
            self._round.plan = joined_plans(self._round.clients, plans, self.directory.reference.num_exits)
            self.state.plan = self._round.plan
            self._tell_suspicious(server_round, self._round.plan)

    def _as_sent(self, record: ClientRecord) -> ClientRecord:
        """With what is sent to the client next as it arrives there, rounded if half of the digits travel."""
        if self.wire == "float32":
            return record
        return replace(record, upload=record.upload.astype(np.float16).astype(np.float32))

    def _tell_suspicious(self, server_round: int, plan: RoundPlan) -> None:
        for client, reason in plan.suspicious.items():
            who = self.directory.label(client)
            logger.warning("Round %d: %s counts for next to nothing with others: %s", server_round, who, reason)

    def _tell_unmoved(self, clients: Sequence[int]) -> None:
        """Say once of a client that it sends its classifier back as it got it."""
        for client in set(clients) - self._unmoved:
            logger.warning(
                "%s sent its classifier back as it got it: it is like nobody (cosine 0), and gets the mean of all",
                self.directory.label(client),
            )
        self._unmoved |= set(clients)

    def _tasks(self, server_round: int, clients: Sequence[int], trains: bool = True) -> Iterator[ServerRound]:
        """The round as every group of clients that can learn from one another meets it."""
        assert self.state is not None
        rng = rng_for(self.seed, server_round, -1, "selection")
        here, known = {client: self.directory.kind(client) for client in clients}, self.state.known
        for alike in self._comparable(here.values()):
            participants = [client for client in clients if here[client].name in alike]
            yield ServerRound(
                server_round=server_round,
                num_rounds=self.num_rounds,
                participants=participants,
                num_exits=max(here[client].num_exits for client in participants),
                known={
                    client: record
                    for client, record in known.items()
                    if record.kind in alike
                    and (client not in here or here[client].name == record.kind)
                    and len(record.upload) == self.directory.kinds[record.kind].upload.size
                },
                upload=here[participants[0]].upload,
                rng=rng,
                held={client: here[client].num_exits for client in participants},
                pairs=self.state.pairs,
                seed=self.seed,
                trains=trains,
            )

    def _comparable(self, here: Iterable[Kind]) -> list[set[str]]:
        """Names of kinds of clients, in groups whose clients can learn from one another."""
        key = self.method.comparable
        groups: list[set[str]] = []
        for kind in {kind.name: kind for kind in here}.values():
            alike = {name for name, other in self.directory.kinds.items() if key(other) == key(kind)}
            if alike not in groups:
                groups.append(alike)
        return groups

    def _messages(
        self, server_round: int, clients: Sequence[int], plan: RoundPlan, config: Mapping[str, Any], message_type: str
    ) -> list[Message]:
        assert self.state is not None
        row_of = {client: row for row, client in enumerate(clients)}
        rate = self.local.learning_rate  # fine-tuning after the last round begins at the full rate
        if message_type == MessageType.TRAIN:
            rate = self._learning_rate(server_round)
        budget = LocalBudget(**{**vars(self.local), "learning_rate": rate})
        if self.num_clients is not None:
            config = {**config, "num-clients": self.num_clients}
        if self.wire == "float16":
            self.directory.reference.shared.check_half(self.state.shared, "the shared part")
        messages: list[Message] = []
        self._asked = []
        for node, hosted in self.directory.by_node(clients).items():
            most = max(self.directory.kind(client).num_exits for client in hosted)
            request = TrainRequest(
                run=self.state.run,
                seed=self.seed,
                digest=self.state.digest,
                server_round=server_round,
                num_rounds=self.num_rounds,
                resumable_from=max(0, server_round - 2),  # the older of the two checkpoints kept
                clients=hosted,
                versions=[self.state.known[c].seen if c in self.state.known else 0 for c in hosted],
                active=plan.active[[row_of[client] for client in hosted], : most - 1],
                shared=self._view(hosted).take(self.state.shared),
                downloads=plan.downloads,
                method=self.method.name,
                method_settings=settings_of(self.method),
                budget=budget,
                evaluate=self._evaluates_in(server_round),
                privacy=self.privacy,
                wire=self.wire,
                plain_mean=self._plain_mean and message_type == MessageType.TRAIN,
            )
            messages.append(Message(request.to_content(self.keys, config), node, message_type))
            self._asked.append(Asked(messages[-1], node, hosted))
        return messages

    def _within_bounds(self, good: Sequence[TrainReply], left_out: dict[int, str]) -> list[TrainReply]:
        """The replies that are not far longer than the others; clients of those that are join those left out."""
        assert self.state is not None
        ratio = self.bounds.max_ratio
        refused: dict[int, str] = {}
        examples = [reply.examples / len(reply.reports) for reply in good]
        lengths = [norm(reply.update(self._sent(reply))) for reply in good]
        for i in far_longer(lengths, examples, ratio):
            refused[i] = f"its update has {times_median(lengths, i)}"
        reports = [(i, report) for i, reply in enumerate(good) for report in reply.reports]
        lengths = [norm(report.upload) for _, report in reports]
        for j in far_longer(lengths, [report.num_examples for _, report in reports], ratio):
            i, report = reports[j]
            refused.setdefault(i, f"what client {report.client} sends of its own has {times_median(lengths, j)}")
        for i, reason in refused.items():
            text = f"its node's reply cannot be used: {reason}; at most {ratio:g} times are allowed"
            left_out |= {report.client: text for report in good[i].reports}
        return [reply for i, reply in enumerate(good) if i not in refused]

    def _view(self, clients: Sequence[int]) -> View:
        """What clients hold together of the shared part."""
        return View(self.directory.reference.shared, [self.directory.kind(client).shared for client in clients])

    def _sent(self, reply: TrainReply) -> NDArray[np.float32]:
        """What the clients that a node reports were sent of the shared part."""
        assert self.state is not None
        return self._view([report.client for report in reply.reports]).take(self.state.shared)

    def _mean(self, good: Sequence[TrainReply]) -> NDArray[np.float32]:
        """The shared parts of all clients that replied well, averaged over those that hold them."""
        assert self.state is not None
        views = [self._view([report.client for report in reply.reports]) for reply in good]
        # A node that reports several clients has weighted its sum already.
        sums = (weighted(r.shared, r.weight) if len(r.reports) == 1 else r.shared for r in good)
        if all(view.alike and view.schema == view.whole for view in views):
            return weighted_mean(sums, sum(float(reply.weight) for reply in good))
        return mean_of_holders(self.state.shared, zip(views, sums, [reply.weight for reply in good], strict=True))

    @property
    def _plain_mean(self) -> bool:
        """Whether clients count alike in the mean."""
        return self.method.plain_mean(are_unequal(self.directory.kinds.values()))

    def _averaged(
        self, average: Callable[..., MetricRecord], records: Sequence[tuple[int, MetricRecord]]
    ) -> MetricRecord | None:
        """Metrics of clients as one, each exit's over those that hold it; a function of the user's gets NaN for others.

        ``records``: the client, and its metrics.
        """
        if not records:
            return None
        metrics = average([RecordDict({METRICS: record}) for _, record in records], self.weighted_by_key)
        held = np.array([self.directory.kind(client).num_exits for client, _ in records])
        most = self.directory.reference.num_exits
        if average is not aggregate_metricrecords or held.min() == most:
            return metrics
        weights = np.array([[record[self.weighted_by_key]] for _, record in records]) * (
            np.arange(most) < held[:, None]
        )
        for name in [name for name, values in metrics.items() if isinstance(values, list) and len(values) == most]:
            rows = np.where(weights > 0, np.array([record[name] for _, record in records]), 0.0)
            total = weights.sum(axis=0)
            metrics[name] = np.where(total, (rows * weights).sum(axis=0) / np.where(total, total, 1), np.nan).tolist()
        return metrics

    def _evaluates_in(self, server_round: int) -> bool:
        return server_round % self.evaluate_every == 0 or server_round == self.num_rounds

    def _learning_rate(self, server_round: int) -> float:
        schedule = self.num_rounds, self.learning_rate_schedule, self.learning_rate_decay
        return learning_rate_at(self.local.learning_rate, server_round, *schedule)

    def _read(
        self, server_round: int, replies: Iterable[Message], info: NodeInfo
    ) -> tuple[list[TrainReply], dict[int, str]]:
        """Replies that can be used, in the order of their clients, and clients left out with the reason."""
        assert self.state is not None
        digest, shared = self.state.digest, self.state.shared

        kinds = {client: self.directory.kind(client) for client in self._round.clients}

        def read(message: Message) -> TrainReply:
            reported = clients_in(message, self.keys)
            if unknown := set(reported) - kinds.keys():
                raise ValueError(f"it reports clients {sorted(unknown)}, which were not asked")
            view = self._view(reported)
            expected = Expected(
                digest=digest,
                shared_size=view.size,
                upload_size={client: kind.upload.size for client, kind in kinds.items()},
                num_exits={client: kind.num_exits for client, kind in kinds.items()},
                wire=self.wire,
                base=view.take(shared),
                counted=view.weight(1 if self._plain_mean else self._examples(client) for client in reported),
            )
            reply = TrainReply.from_message(message, self.keys, expected)
            if reply.reports:
                check_norm(reply.update(view.take(shared)), self.bounds.max_norm, "its update")
            if reply.server_round != server_round:
                raise ValueError(f"it is of round {reply.server_round}")
            for r in reply.reports:
                check_norm(r.upload, self.bounds.max_norm, f"what client {r.client} sends of its own")
                if r.num_examples != self._examples(r.client):
                    raise ValueError(
                        f"client {r.client} reports {r.num_examples} examples, {self._examples(r.client)} at the start"
                    )
            return replace(reply, reports=[report.padded(info.num_exits) for report in reply.reports])

        return sort_out(replies, self._asked, read, self.directory.suspect)

    # --- evaluation of the personal networks ---

    def _evaluate_messages(
        self, server_round: int, clients: Sequence[int], config: Mapping[str, Any], publish: bool = False
    ) -> list[Message]:
        config = {**config, "publish": publish}
        plan = self._plan(server_round + 1, clients, trains=False)
        return self._messages(server_round, clients, plan, config, MessageType.EVALUATE)

    def _read_evaluations(self, server_round: int, replies: Iterable[Message]) -> list[FinalReport]:
        """Reports of the clients that were asked; the others are named in the log, with the reason."""
        held = {client: self.directory.kind(client).num_exits for one in self._asked for client in one.clients}
        good, left_out = sort_out(
            replies,
            self._asked,
            lambda message: EvaluationReply.from_message(message, self.keys, num_exits=held),
            self.directory.suspect,
        )
        for client, reason in sorted(left_out.items()):
            logger.warning("Round %d: no evaluation of %s: %s", server_round, self.directory.label(client), reason)
        for client, note in notes_in(good).items():
            logger.warning("Round %d: %s: %s", server_round, self.directory.label(client), note)
        found = sorted((report for reply in good for report in reply.reports), key=lambda report: report.client)
        return [report.padded(self.directory.reference.num_exits) for report in found]

    def _evaluate_all(self, grid: Grid, config: ConfigRecord, timeout: float) -> list[FinalReport]:
        """Every client there is evaluates its personal network and publishes it in its own folder."""
        assert self.state is not None
        self.directory.refresh(grid)
        if not self.directory.hosts:
            logger.warning("No final evaluation: all nodes are gone")
            return []
        messages = self._evaluate_messages(self.state.round, sorted(self.directory.hosts), config, publish=True)
        return self._read_evaluations(self.state.round, grid.send_and_receive(messages, timeout=timeout))

    def _examples(self, client: int) -> int:
        """Training examples of a client, as its node said when it was first asked."""
        info = self.directory.nodes[self.directory.hosts[client]]
        return info.num_examples[info.clients.index(client)]

    # --- shared parameters, flat and by name ---

    def _connect(self, grid: Grid) -> None:
        """Ask nodes that have come since, or all of them if nobody has asked yet."""
        if self.directory.hosts:
            self.directory.refresh(grid)
        if self.directory.hosts:
            return
        try:
            self.directory.wait(
                grid, min_nodes=self.min_available_nodes, num_clients=self.num_clients, seconds=self.wait_seconds
            )
        except RuntimeError as error:
            if self._failure is None:
                raise
            raise RuntimeError(f"{error}\n{self._failure}") from None

    def _state(self, arrays: ArrayRecord) -> ServerState:
        """The state with the given shared parameters; made in the first round."""
        info = self.directory.reference
        missing = [name for name in info.shared.names if name not in arrays]
        if missing:
            raise ValueError(f"the initial arrays lack shared parameters of the clients' network: {', '.join(missing)}")
        parts = [arrays[name].numpy() for name in info.shared.names]
        for (name, shape), part in zip(info.shared.entries, parts, strict=True):
            if part.shape != shape:
                raise ValueError(f"the initial array {name} has shape {part.shape}, the clients' network needs {shape}")
        flat = np.concatenate([np.zeros(0), *(part.ravel() for part in parts)]).astype(np.float32)
        if self.state is None:
            self.state = ServerState(secrets.token_hex(8), 0, info.digest, flat)
        self._check_digest()
        self.state.shared = flat
        return self.state

    def _check_digest(self) -> None:
        info = self.directory.reference
        if self.state is not None and self.state.digest != info.digest:
            raise ValueError(
                f"the checkpoint was made with another network or method (fingerprint {self.state.digest}, the "
                f"clients' is {info.digest}): resume with the settings of the run"
            )

    def _arrays(self, flat: NDArray[np.float32]) -> ArrayRecord:
        """Shared parameters by name, as Flower's results hold them."""
        schema = self.directory.reference.shared
        parts = np.split(flat, np.cumsum(schema.sizes)[:-1]) if schema.sizes else []
        return ArrayRecord({n: Array(p.reshape(s)) for (n, s), p in zip(schema.entries, parts, strict=True)})

    def _ask_initial(self, grid: Grid) -> ArrayRecord:
        node = self.directory.hosts[min(self.directory.hosts)]
        content = RecordDict({self.keys.config: ConfigRecord(dict(self.directory.question))})
        replies = list(
            grid.send_and_receive([Message(content, node, f"{MessageType.QUERY}.initial")], timeout=self.round_timeout)
        )
        if not replies or replies[0].has_error():
            reason = replies[0].error.reason if replies else "no reply"
            raise RuntimeError(f"the node of client {min(self.directory.hosts)} gave no initial parameters: {reason}")
        return self._arrays(cast(ArrayRecord, replies[0].content[self.keys.arrays])[FLAT].numpy())


class CafeDistill(FederatedStrategy):
    """CAFEDistill (arXiv 2601.10015, as its authors run it) as a Flower strategy.

    Averages the shared backbone, decides which student exits train on which client, and mixes the last classifiers of
    clients whose updates agree; the mixture becomes the client's own. The method itself is
    :class:`cafe_flwr.methods.cafedistill.CafeDistillMethod`.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`FederatedStrategy`, and so for Flower's FedAvg.
    num_rounds
        T; students join over its first half. None: as many as ``start`` is told.
    mu, distill_weight, temperature
        μ of matching (the authors' α), λ and τ of distillation.
    conflict, selection, match_by, write_back, solver, classifier_start, objective
        Ablations and variants, see :class:`cafe_flwr.settings.Settings`; docs/objectives.md has the objectives.

    Raises
    ------
    ValueError
        For impossible values, naming the setting.

    Examples
    --------
    In your own ServerApp::

        strategy = CafeDistill(fraction_train=0.5, num_rounds=50, mu=0.6)
        result = strategy.start(grid, initial_arrays=ArrayRecord(network.state_dict()))
    """

    def __init__(
        self,
        *args: Any,
        num_rounds: int | None = None,
        mu: float = 0.6,
        distill_weight: float = 1.0,
        temperature: float = 2.0,
        conflict: str = "clients",
        selection: str = "shallow-first",
        match_by: str = "updates",
        write_back: bool = True,
        solver: str = "exact",
        classifier_start: str = "zero",
        objective: Objective | str = "cross-entropy",
        **kwargs: Any,
    ) -> None:
        own: dict[str, Any] = {
            "mu": mu,
            "distill_weight": distill_weight,
            "temperature": temperature,
            "conflict": conflict,
            "selection": selection,
            "match_by": match_by,
            "write_back": write_back,
            "solver": solver,
            "classifier_start": classifier_start,
        }
        Settings.from_run_config({kebab(name): value for name, value in own.items()})
        super().__init__(*args, method=CafeDistillMethod(objective=objective, **own), num_rounds=num_rounds, **kwargs)


def _check_reserved(config: Mapping[str, Any]) -> None:
    reserved = [key for key in config if key in RESERVED or key.startswith(RESERVED_PREFIXES)]
    if set(reserved) - {"server-round"}:  # Flower's own strategies put it there, too
        raise ValueError(f"the config for clients must not hold keys of the strategy's own: {', '.join(reserved)}")


def _client_metrics(report: ClientReport, weight_key: str) -> MetricRecord:
    values: dict[str, Any] = {weight_key: report.num_examples, "train-loss": report.train_loss}
    for phase in PHASES:
        values[f"accuracy-{phase}"] = getattr(report, phase).accuracy
        values[f"loss-{phase}"] = getattr(report, phase).loss
    return MetricRecord(values)


def _num_bytes(message: Message) -> int:
    return sum(record.count_bytes() for record in message.content.values())
