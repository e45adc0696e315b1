"""A round in messages: what is asked of a node, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.training.options import LocalBudget
from cafe_flwr.wire.bounds import MAX_NORM, check_norm
from cafe_flwr.wire.codec import (
    budget_config,
    check_server,
    failed,
    failures_of,
    filled,
    ints_of,
    method_config,
    narrowed,
    noted,
    notes_of,
    of_client,
    prefixed,
    privacy_config,
    read_flat,
    record_of,
    round_of,
)
from cafe_flwr.wire.keys import FLAT, METRICS, PHASES, PROTOCOL, WIRES, Keys
from cafe_flwr.wire.options import Privacy
from cafe_flwr.wire.slices import Weight


@dataclass(frozen=True)
class TrainRequest:
    """What a node is asked to do in a round (or, to evaluate only, after the last one).

    Attributes
    ----------
    run, seed, digest
        Token of the run, its seed, fingerprint of network and method.
    server_round, num_rounds
        t and T.
    resumable_from
        Oldest round that the run may be resumed from; older personal state is not needed.
    clients, versions
        Clients that take part, ascending; and the round after which each one's personal state is taken up, 0 for none.
    active
        (clients, m−1) bool: which student exits train.
    shared
        Shared part, flat.
    downloads
        Flat array of a client's own, by client.
    method, method_settings
        Name of the method, and its settings.
    budget
        Local training.
    evaluate
        Whether clients evaluate before and after training.
    privacy
        What clients do to what they send.
    wire
        Type of the values that travel, ``"float32"`` or ``"float16"``.
    plain_mean
        Whether clients count alike in the average of the shared part, whatever their examples.
    """

    run: str
    seed: int
    digest: str
    server_round: int
    num_rounds: int
    resumable_from: int
    clients: list[int]
    versions: list[int]
    active: NDArray[np.bool_]
    shared: NDArray[np.float32]
    downloads: Mapping[int, NDArray[np.float32]]
    method: str
    method_settings: Mapping[str, Any]
    budget: LocalBudget
    evaluate: bool = True
    privacy: Privacy = field(default_factory=Privacy)
    wire: str = "float32"
    plain_mean: bool = False

    def to_content(self, keys: Keys, config: Mapping[str, Any]) -> RecordDict:
        """As a Flower record; ``config`` is the user's own, sent along."""
        mine = [c for c in self.clients if c in self.downloads]
        flat = narrowed(np.concatenate([self.shared, *(self.downloads[c] for c in mine)]), self.wire)
        values = {
            **config,
            "protocol": PROTOCOL,
            "run": self.run,
            "seed": self.seed,
            "digest": self.digest,
            "server-round": self.server_round,
            "num-rounds": self.num_rounds,
            "resumable-from": self.resumable_from,
            "clients": self.clients,
            "versions": self.versions,
            "downloads": mine,
            "active-exits": self.active.flatten().tolist(),
            "evaluate": self.evaluate,
            **method_config(self.method, self.method_settings),
            **budget_config(self.budget),
            **({} if self.privacy == Privacy() else privacy_config(self.privacy)),
            **({} if self.wire == "float32" else {"wire-dtype": self.wire}),
            **({"plain-mean": True} if self.plain_mean else {}),
        }
        return RecordDict({keys.arrays: ArrayRecord({FLAT: Array(flat)}), keys.config: ConfigRecord(filled(values))})

    @classmethod
    def from_message(
        cls, message: Message, keys: Keys, *, shared_size: int, download_size: int | Mapping[int, int]
    ) -> TrainRequest:
        """Read a request on the node; ValueError if it does not fit the node's network.

        ``shared_size`` is of what its clients hold together, ``download_size`` that of all, or by client.
        """
        config = record_of(message, keys.config, ConfigRecord)
        check_server(config)
        wire = str(config.get("wire-dtype", "float32"))
        if wire not in WIRES:
            raise ValueError(f"the server's values are {wire!r}, this node reads {' and '.join(WIRES)}")
        flat = read_flat(message, keys.arrays, wire).astype(np.float32, copy=False)
        with_download = ints_of(config, "downloads")
        sizes = [shared_size, *(of_client(download_size, client) for client in with_download)]
        if len(flat) != sum(sizes):
            raise ValueError(f"the request carries {len(flat)} values, this node's network needs {sum(sizes)}")
        shared, *downloads = np.split(flat, np.cumsum(sizes)[:-1])
        check_norm(shared, MAX_NORM, "the shared part received")
        for client, download in zip(with_download, downloads, strict=True):
            check_norm(download, MAX_NORM, f"what client {client} is sent of its own")
        clients, versions = ints_of(config, "clients"), ints_of(config, "versions")
        active = np.asarray(config.get("active-exits", []), dtype=bool)
        if len(versions) != len(clients) or (clients and active.size % len(clients)):
            raise ValueError(
                f"the request names {len(clients)} clients, {len(versions)} versions of their state and "
                f"{active.size} exits: they do not agree"
            )
        return cls(
            run=str(config["run"]),
            seed=int(config["seed"]),
            digest=str(config["digest"]),
            server_round=int(config["server-round"]),
            num_rounds=int(config["num-rounds"]),
            resumable_from=int(config["resumable-from"]),
            clients=clients,
            versions=versions,
            active=active.reshape(len(clients), -1),
            shared=shared,
            downloads=dict(zip(with_download, downloads, strict=True)),
            method=str(config["method"]),
            method_settings=prefixed(config, "method."),
            budget=LocalBudget(**prefixed(config, "local.")),
            evaluate=bool(config.get("evaluate", True)),
            privacy=Privacy(**prefixed(config, "privacy.")),
            wire=wire,
            plain_mean=bool(config.get("plain-mean", False)),
        )


@dataclass(frozen=True)
class ClientReport:
    """One client's result of a round.

    Attributes
    ----------
    client
        Who.
    num_examples, test_examples
        Sizes of its training and test split.
    train_loss
        Mean loss of local training; NaN where it did not train.
    local_steps
        Gradient steps taken.
    similarity
        (m−1,): similarity of its student exits to its last exit; NaN where it cannot be measured.
    before, after
        Exits on the test split, before and after local training; NaN in rounds without evaluation, and for exits that
        it does not hold.
    seconds_train, seconds_evaluate
        Time it took.
    upload
        Flat array of its own, not averaged.
    """

    client: int
    num_examples: int
    test_examples: int
    train_loss: float
    local_steps: int
    similarity: list[float]
    before: ExitMetrics
    after: ExitMetrics
    seconds_train: float
    seconds_evaluate: float
    upload: NDArray[np.float32]

    def padded(self, num_exits: int) -> ClientReport:
        """With NaN for the exits that the client does not hold."""
        missing = [math.nan] * (num_exits - 1 - len(self.similarity))
        return replace(
            self,
            similarity=[*self.similarity, *missing],
            before=self.before.padded(num_exits),
            after=self.after.padded(num_exits),
        )


@dataclass(frozen=True)
class TrainReply:
    """A node's result of a round.

    Attributes
    ----------
    server_round, digest
        As in the request.
    shared
        Shared part of the one client reported (float32), or Σ n_i θ_i over several (float64): what they hold together.
    reports
        Clients that finished.
    failures
        Clients that did not, with the reason.
    wire
        Type of the values that travel.
    notes
        What was unusual about clients that finished, in words.
    counted
        Weight of every value of the shared part, where it is not that of all examples.
    """

    server_round: int
    digest: str
    shared: NDArray[Any]
    reports: Sequence[ClientReport]
    failures: Mapping[int, str]
    wire: str = "float32"
    notes: Mapping[int, str] = field(default_factory=dict)
    counted: Weight | None = None

    @property
    def examples(self) -> int:
        """Training examples of all clients reported."""
        return sum(report.num_examples for report in self.reports)

    @property
    def weight(self) -> Weight:
        """What the shared part counts in an average."""
        return self.examples if self.counted is None else self.counted

    def update(self, base: NDArray[Any]) -> NDArray[np.float64]:
        """How far the shared part, or its mean over several clients, is from what was sent of it."""
        mean = self.shared if len(self.reports) == 1 else self.shared / self.weight
        return np.asarray(mean.astype(np.float64) - base)

    def to_content(self, keys: Keys, base: NDArray[np.float32] | None = None) -> RecordDict:
        """As a Flower record; ``base`` is what those reported received of the shared part, needed for float16."""
        config = {
            "protocol": PROTOCOL,
            "server-round": self.server_round,
            "digest": self.digest,
            "clients": [r.client for r in self.reports],
            **failed(self.failures),
            **noted(self.notes),
        }
        metrics: dict[str, list[int] | list[float]] = {
            keys.weight: [r.num_examples for r in self.reports],
            "test-examples": [r.test_examples for r in self.reports],
            "train-loss": [r.train_loss for r in self.reports],
            "local-steps": [r.local_steps for r in self.reports],
            "seconds-train": [r.seconds_train for r in self.reports],
            "seconds-evaluate": [r.seconds_evaluate for r in self.reports],
            "similarity": [s for r in self.reports for s in r.similarity],
        }
        for phase in PHASES:
            for f in fields(ExitMetrics):
                metrics[f"{f.name}-{phase}"] = [v for r in self.reports for v in getattr(getattr(r, phase), f.name)]
        shared = self.shared
        if self.wire == "float16" and self.reports:
            assert base is not None
            shared = shared - base if len(self.reports) == 1 else shared - self.weight * base.astype(np.float64)
        # A sum takes two places of a single value.
        wide = "float32" if self.wire == "float16" else "float64"
        places = narrowed(shared, self.wire if len(self.reports) == 1 else wide).view(self.wire)
        flat = np.concatenate([places, *(narrowed(r.upload, self.wire) for r in self.reports)])
        return RecordDict(
            {
                keys.arrays: ArrayRecord({FLAT: Array(flat)}),
                METRICS: MetricRecord(filled(metrics)),
                keys.config: ConfigRecord(filled(config)),
            }
        )

    @classmethod
    def from_message(
        cls,
        message: Message,
        keys: Keys,
        *,
        digest: str,
        shared_size: int,
        upload_size: int | Mapping[int, int],
        num_exits: int | Mapping[int, int],
        wire: str = "float32",
        base: NDArray[np.float32] | None = None,
        counted: Weight | None = None,
    ) -> TrainReply:
        """Read a reply on the server; ValueError, in words, if anything in it is not as it should be.

        Sizes are those of all, or by client. ``base`` is the shared part as the server has it, needed where the wire is
        float16: the clients' differences to what they were sent, rounded, count from there, so that the server's own
        keeps its digits.
        """
        config = record_of(message, keys.config, ConfigRecord)
        metrics = record_of(message, METRICS, MetricRecord)
        if config.get("protocol") != PROTOCOL:
            raise ValueError(f"it speaks message protocol {config.get('protocol')}, this server {PROTOCOL}")
        if config.get("digest") != digest:
            raise ValueError(f"its network has fingerprint {config.get('digest')}, expected {digest}")
        clients = ints_of(config, "clients")
        failures = failures_of(config)
        n = len(clients)
        if not n:
            nothing = np.zeros(0, dtype=np.float32)
            return cls(round_of(config), digest, nothing, [], failures, wire)
        flat = read_flat(message, keys.arrays, wire)
        places = shared_size if n == 1 else 2 * shared_size
        ends = np.cumsum([places, *(of_client(upload_size, client) for client in clients)])
        if len(flat) != ends[-1]:
            raise ValueError(f"its array has {len(flat)} values, expected {ends[-1]}")
        shared: NDArray[Any] = flat[:places]
        if n > 1:
            shared = shared.view(np.float64 if wire == "float32" else np.float32)
        uploads = np.split(flat[places:].astype(np.float32, copy=False), ends[1:-1] - places)
        broken = sum(int((~np.isfinite(part)).sum()) for part in (shared, *uploads))
        if broken:
            raise ValueError(f"{broken} of the values in its array are NaN or infinite")

        exits = [of_client(num_exits, client) for client in clients]

        def column(key: str, widths: Sequence[int]) -> list[list[Any]]:
            values = metrics.get(key, [])
            if not isinstance(values, list) or len(values) != sum(widths):
                raise ValueError(f"its metrics need {sum(widths)} values of {key!r}, got {values!r}")
            rows = iter(values)
            return [list(islice(rows, width)) for width in widths]

        weights = [w[0] for w in column(keys.weight, [1] * n)]
        if not all(isinstance(w, int) and 1 <= w < 2**53 for w in weights):
            raise ValueError(f"{keys.weight!r} must be a whole number of at least 1 for every client, got {weights}")
        if wire == "float16":
            assert base is not None
            counts: Weight = 1 if n == 1 else sum(weights) if counted is None else counted
            wide = shared.astype(np.float64) + counts * base.astype(np.float64)
            shared = wide if n > 1 else wide.astype(np.float32)
        scalars = {
            k: column(k, [1] * n)
            for k in ("test-examples", "train-loss", "local-steps", "seconds-train", "seconds-evaluate")
        }
        if min(int(row[0]) for key in ("test-examples", "local-steps") for row in scalars[key]) < 0:
            raise ValueError("its test examples and local steps must be 0 or more")
        if n > 1 and np.abs(shared).max(initial=0.0) > sum(weights) * float(np.finfo(np.float32).max):
            raise ValueError("its shared parameters are too large for float32")
        similarity = column("similarity", [m - 1 for m in exits])
        if any(abs(value) > 1.01 for row in similarity for value in row):  # NaN: it cannot be measured
            raise ValueError("its similarities must lie between −1 and 1")
        measured = {
            phase: {f.name: column(f"{f.name}-{phase}", exits) for f in fields(ExitMetrics)} for phase in PHASES
        }
        reports = [
            ClientReport(
                client=clients[i],
                num_examples=weights[i],
                test_examples=int(scalars["test-examples"][i][0]),
                train_loss=float(scalars["train-loss"][i][0]),
                local_steps=int(scalars["local-steps"][i][0]),
                similarity=similarity[i],
                before=ExitMetrics(**{name: values[i] for name, values in measured["before"].items()}),
                after=ExitMetrics(**{name: values[i] for name, values in measured["after"].items()}),
                seconds_train=float(scalars["seconds-train"][i][0]),
                seconds_evaluate=float(scalars["seconds-evaluate"][i][0]),
                upload=uploads[i],
            )
            for i in range(n)
        ]
        return cls(round_of(config), digest, shared, reports, failures, wire, notes_of(config), counted)
