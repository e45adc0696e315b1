"""The message contract between strategy and nodes: one record of arrays, one of settings, one of metrics.

A node hosts one or more clients, and one message a round carries the work of all that take part. Every message has one
flat array (key ``flat``):

- down: the shared part, then the download of every client in ``downloads``, in that order;
- up: the shared part, then the upload of every client in ``clients``, in that order. A node that reports several
  clients sends the sum of n_i·θ_i over them as its shared part, in float64, each value in the place of two float32: one
  backbone per node, not per client, and the same average whatever node hosts whom (see ``aggregation``).

Where clients are not alike (:mod:`cafe_flwr.wire.capacity`), the shared part of a message is what its clients hold
together: down, those it is for, up, those reported. In a sum a value counts the clients that hold it.

With ``wire-dtype = "float16"`` every value takes half of the place, both ways: float16 for float32, float32 for the
sums. A shared part then goes up as its difference to what came down, Δ_i = θ_i − θ, or Σ n_i·Δ_i: small numbers keep
more digits.

Lists of per-client values are flattened, client after client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from cafe_flwr.client.node_config import check_name
from cafe_flwr.core.schema import Schema
from cafe_flwr.metrics.exits import DynamicCounts, ExitMetrics
from cafe_flwr.settings import kebab
from cafe_flwr.training.loop import LocalBudget
from cafe_flwr.wire.bounds import MAX_NORM, check_norm
from cafe_flwr.wire.capacity import Kind
from cafe_flwr.wire.privacy import Privacy
from cafe_flwr.wire.slices import Weight

PROTOCOL = 1
FLAT = "flat"
METRICS = "metrics"
WIRES = ("float32", "float16")
PHASES = ("before", "after")  # local training

# Keys of a request's config that a user's own must leave alone, as all that begin with one of these words.
RESERVED_PREFIXES = ("method.", "local.", "privacy.")
RESERVED = frozenset(
    {
        *("protocol", "run", "seed", "digest", "server-round", "num-rounds", "num-clients", "resumable-from"),
        *("clients", "versions", "downloads", "active-exits", "method", "evaluate", "publish", "wire-dtype"),
        "plain-mean",
    }
)


@dataclass(frozen=True)
class Keys:
    """Names of the records in a message, as Flower's strategies let users choose them."""

    arrays: str = "arrays"
    config: str = "config"
    weight: str = "num-examples"


@dataclass(frozen=True)
class NodeInfo:
    """A node's answer to the first question: who are you, and whom do you host?

    Attributes
    ----------
    version
        Of this package on the node; empty where a client of one's own answers (docs/messages.md).
    clients
        Clients it hosts and can serve.
    num_examples
        Training examples of each.
    problems
        Clients it cannot serve, with the reason, in words.
    num_nodes
        How many nodes there are, where the node knows it (simulation); 0 otherwise.
    digest
        Fingerprint of network and method; all nodes of a run must agree on it.
    shared, upload, download
        What travels, for this network and method: all that the federation shares, and what a client that holds the
        whole network sends and receives of its own.
    num_exits, num_parameters
        m, and the values of the whole network.
    macs
        MACs of inference up to each exit, (m,).
    name
        What people call the node; empty if it has no name.
    kinds, kind_of
        Where clients are not alike: the kinds there are on the node, and each client's place among them. Else empty.
    """

    version: str
    clients: list[int]
    num_examples: list[int]
    problems: list[str]
    num_nodes: int
    digest: str
    shared: Schema
    upload: Schema
    download: Schema
    num_exits: int
    num_parameters: int
    macs: list[int]
    name: str = ""
    kinds: list[Kind] = field(default_factory=list)
    kind_of: list[int] = field(default_factory=list)

    def kind(self, client: int) -> Kind:
        """What the client holds."""
        if not self.kinds:
            return self.whole
        return self.kinds[self.kind_of[self.clients.index(client)]]

    @cached_property
    def whole(self) -> Kind:
        """What a client holds that is like all others."""
        size, macs = self.num_parameters, tuple(self.macs)
        return Kind("", self.num_exits, size, macs, self.shared, self.upload, self.download)

    def to_content(self, keys: Keys) -> RecordDict:
        """As a Flower record."""
        values = {kebab(f.name): getattr(self, f.name) for f in fields(self) if f.name != "name" or self.name}
        for name in ("shared", "upload", "download"):
            values[name] = values[name].to_json()
        values["kinds"] = [kind.to_json() for kind in self.kinds]
        return RecordDict({keys.config: ConfigRecord(_filled({"protocol": PROTOCOL, **values}))})

    @classmethod
    def from_message(cls, message: Message, keys: Keys) -> NodeInfo:
        """Read a node's answer; ValueError if it is not one."""
        config = record_of(message, keys.config, ConfigRecord)
        if config.get("protocol") != PROTOCOL:
            raise ValueError(
                f"speaks message protocol {config.get('protocol')}, this server speaks {PROTOCOL}: "
                "install the same version of cafe-flwr on both"
            )
        lists = {"clients", "num-examples", "problems", "kinds", "kind-of"}
        missing = {kebab(f.name) for f in fields(cls)} - set(config) - lists - {"name"}
        if missing:
            raise ValueError(f"answered without {', '.join(sorted(missing))}")
        values: dict[str, Any] = {f.name: config.get(kebab(f.name), []) for f in fields(cls)}
        values["name"] = str(config.get("name", ""))
        check_name(values["name"])
        for name in ("shared", "upload", "download"):
            values[name] = Schema.from_json(values[name])
        kinds = values["kinds"] = [Kind.from_json(text) for text in values["kinds"]]
        for kind in kinds:
            kind.check(values["shared"], int(values["num_exits"]))
        fit = len(values["kind_of"]) == len(values["clients"]) and set(values["kind_of"]) <= set(range(len(kinds)))
        if kinds and not (fit and len({kind.name for kind in kinds}) == len(kinds)):
            raise ValueError("names kinds of clients that do not fit its clients, or one twice")
        return cls(**values)


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
            **_budget_config(self.budget),
            **({} if self.privacy == Privacy() else _privacy_config(self.privacy)),
            **({} if self.wire == "float32" else {"wire-dtype": self.wire}),
            **({"plain-mean": True} if self.plain_mean else {}),
        }
        return RecordDict({keys.arrays: ArrayRecord({FLAT: Array(flat)}), keys.config: ConfigRecord(_filled(values))})

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
        flat = _flat(message, keys.arrays, wire).astype(np.float32, copy=False)
        with_download = _ints(config, "downloads")
        sizes = [shared_size, *(of_client(download_size, client) for client in with_download)]
        if len(flat) != sum(sizes):
            raise ValueError(f"the request carries {len(flat)} values, this node's network needs {sum(sizes)}")
        shared, *downloads = np.split(flat, np.cumsum(sizes)[:-1])
        check_norm(shared, MAX_NORM, "the shared part received")
        for client, download in zip(with_download, downloads, strict=True):
            check_norm(download, MAX_NORM, f"what client {client} is sent of its own")
        clients, versions = _ints(config, "clients"), _ints(config, "versions")
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


def _budget_config(budget: LocalBudget) -> dict[str, Any]:
    """``local.…``; that momentum is kept is said only where it is."""
    names = [f.name for f in fields(LocalBudget) if f.name != "keep_momentum" or budget.keep_momentum]
    return {f"local.{kebab(name)}": getattr(budget, name) for name in names}


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
                METRICS: MetricRecord(_filled(metrics)),
                keys.config: ConfigRecord(_filled(config)),
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
        clients = _ints(config, "clients")
        failures = failures_of(config)
        n = len(clients)
        if not n:
            nothing = np.zeros(0, dtype=np.float32)
            return cls(_round(config), digest, nothing, [], failures, wire)
        flat = _flat(message, keys.arrays, wire)
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
        return cls(_round(config), digest, shared, reports, failures, wire, notes_of(config), counted)


@dataclass(frozen=True)
class FinalReport:
    """One client's personal network after the last aggregation.

    Attributes
    ----------
    client, train_examples, calibration_examples, test_examples, classes
        Who, the sizes of its splits, and the number of classes in its training split.
    local_steps
        Gradient steps of fine-tuning after the last round; 0 for most methods.
    ensemble
        Accuracy of the mean of all exits' probabilities on the test split.
    exits
        Exits on the test split.
    adapted
        The same with the client's log-prior re-estimated on the unlabelled test inputs; NaN where the method has none.
    calibration, test
        Dynamic inference at every threshold, on these splits.
    """

    client: int
    train_examples: int
    calibration_examples: int
    test_examples: int
    classes: int
    local_steps: int
    ensemble: float
    exits: ExitMetrics
    adapted: ExitMetrics
    calibration: DynamicCounts
    test: DynamicCounts

    _SCALARS = (
        "client",
        "train_examples",
        "calibration_examples",
        "test_examples",
        "classes",
        "local_steps",
        "ensemble",
    )

    def withheld(self) -> FinalReport:
        """What a client reports that keeps its metrics to itself: the size of its training split."""
        nothing = ExitMetrics.unknown(len(self.exits.accuracy))

        def no_counts(counts: DynamicCounts) -> DynamicCounts:
            return DynamicCounts(*(np.zeros_like(values) for values in counts))

        return replace(
            self,
            calibration_examples=0,
            test_examples=0,
            classes=0,
            ensemble=math.nan,
            exits=nothing,
            adapted=nothing,
            calibration=no_counts(self.calibration),
            test=no_counts(self.test),
        )

    def padded(self, num_exits: int) -> FinalReport:
        """With NaN for the exits that the client does not hold, at which nothing leaves."""

        def wide(counts: DynamicCounts) -> DynamicCounts:
            missing = num_exits - counts.left.shape[1]
            return counts._replace(left=np.pad(counts.left, ((0, 0), (0, missing))))

        return replace(
            self,
            exits=self.exits.padded(num_exits),
            adapted=self.adapted.padded(num_exits),
            calibration=wide(self.calibration),
            test=wide(self.test),
        )

    def to_record(self) -> MetricRecord:
        """As a Flower record of its own."""
        values: dict[str, Any] = {kebab(name): getattr(self, name) for name in self._SCALARS}
        values |= {f.name: getattr(self.exits, f.name) for f in fields(ExitMetrics)}
        values |= {f"adapted-{f.name}": getattr(self.adapted, f.name) for f in fields(ExitMetrics)}
        for split in ("calibration", "test"):
            counts = getattr(self, split)._asdict()
            values |= {f"{split}-{name}": value.flatten().tolist() for name, value in counts.items()}
        return MetricRecord(values)

    @classmethod
    def from_record(cls, record: MetricRecord, num_exits: int | Mapping[int, int]) -> FinalReport:
        """Read what :meth:`to_record` wrote."""
        scalars: dict[str, Any] = {name: record[kebab(name)] for name in cls._SCALARS}
        width = of_client(num_exits, scalars["client"])
        exits, adapted = (
            ExitMetrics(**{f.name: record[prefix + f.name] for f in fields(ExitMetrics)})  # type: ignore[arg-type]
            for prefix in ("", "adapted-")
        )

        def counts(split: str) -> DynamicCounts:
            left, correct, changed = (
                np.asarray(record[f"{split}-{name}"], dtype=np.int64) for name in DynamicCounts._fields
            )
            return DynamicCounts(left.reshape(-1, width), correct, changed)

        return cls(**scalars, exits=exits, adapted=adapted, calibration=counts("calibration"), test=counts("test"))


def method_config(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A method and its settings, as every message to a node carries them."""
    return {"method": name, **{f"method.{kebab(key)}": value for key, value in settings.items()}}


def failed(failures: Mapping[int, str]) -> dict[str, Any]:
    """Clients that failed and why, as replies carry them."""
    return _filled({"failed-clients": list(failures), "failures": list(failures.values())})


def failures_of(config: Mapping[str, Any]) -> dict[int, str]:
    """What :func:`failed` wrote."""
    return dict(zip(_ints(config, "failed-clients"), map(str, config.get("failures", [])), strict=True))


def noted(notes: Mapping[int, str]) -> dict[str, Any]:
    """What is unusual about clients, as replies carry it."""
    return _filled({"noted-clients": list(notes), "notes": list(notes.values())})


def notes_of(config: Mapping[str, Any]) -> dict[int, str]:
    """What :func:`noted` wrote."""
    return dict(zip(_ints(config, "noted-clients"), map(str, config.get("notes", [])), strict=True))


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """Without empty lists: Flower's records cannot count their bytes. A list that is not there is empty."""
    return {key: value for key, value in values.items() if value != []}


@dataclass(frozen=True)
class EvaluationReply:
    """A node's evaluation of personal networks: clients that finished, and those that did not with the reason."""

    reports: Sequence[FinalReport]
    failures: Mapping[int, str]
    notes: Mapping[int, str] = field(default_factory=dict)

    def to_content(self, keys: Keys) -> RecordDict:
        """As a Flower record."""
        content = RecordDict({f"client-{report.client}": report.to_record() for report in self.reports})
        content[keys.config] = ConfigRecord({"protocol": PROTOCOL, **failed(self.failures), **noted(self.notes)})
        return content

    @classmethod
    def from_message(cls, message: Message, keys: Keys, *, num_exits: int | Mapping[int, int]) -> EvaluationReply:
        """Read a reply on the server; ValueError or KeyError if something is not there."""
        config = record_of(message, keys.config, ConfigRecord)
        if config.get("protocol") != PROTOCOL:
            raise ValueError(f"it speaks message protocol {config.get('protocol')}, this server {PROTOCOL}")
        reports = [FinalReport.from_record(record, num_exits) for record in message.content.metric_records.values()]
        return cls(reports, failures_of(config), notes_of(config))


_T = TypeVar("_T")


def of_client(values: _T | Mapping[int, _T], client: int) -> _T:
    """What holds for a client, of values by client or one for all; ValueError if nothing does.

    Examples
    --------
    >>> of_client(3, 7), of_client({7: 2}, 7)
    (3, 2)
    """
    if not isinstance(values, Mapping):
        return values
    if client not in values:
        raise ValueError(f"it names client {client}, which it was not asked for")
    return values[client]


def clients_in(message: Message, keys: Keys) -> list[int]:
    """Clients that a request is for, or a reply reports."""
    return _ints(record_of(message, keys.config, ConfigRecord), "clients")


def check_server(config: Mapping[str, Any]) -> None:
    """ValueError, on the node, if the server's message follows another version of the contract (docs/messages.md)."""
    if config.get("protocol") != PROTOCOL:
        raise ValueError(f"the server speaks message protocol {config.get('protocol')}, this node {PROTOCOL}")


def record_of(message: Message, key: str, kind: type[Any]) -> Any:
    """A record of a message; ValueError, with those found, if it is not there."""
    record = message.content.get(key)
    if not isinstance(record, kind):
        found = ", ".join(map(repr, message.content)) or "nothing"
        raise ValueError(f"needs a {kind.__name__} named {key!r}, found {found}")
    return record


def narrowed(values: NDArray[Any], wire: str) -> NDArray[Any]:
    """Values as they travel; ValueError if they are too large for it."""
    with np.errstate(over="ignore"):
        narrow = values.astype(wire, copy=False)
    beyond = np.isinf(narrow) & np.isfinite(values)
    if beyond.any():
        raise ValueError(
            f"{int(beyond.sum())} values are too large to travel as {wire}, the largest {np.abs(values).max():.4g}: "
            'set wire-dtype = "float32"'
        )
    return np.asarray(narrow)


def _privacy_config(privacy: Privacy) -> dict[str, Any]:
    return {f"privacy.{kebab(name)}": value for name, value in vars(privacy).items()}


def _flat(message: Message, key: str, wire: str) -> NDArray[Any]:
    record = record_of(message, key, ArrayRecord)
    if list(record) != [FLAT]:
        raise ValueError(f"needs exactly one array, {FLAT!r}, found {', '.join(map(repr, record)) or 'none'}")
    flat = record[FLAT].numpy()
    if flat.ndim != 1 or flat.dtype != np.dtype(wire):
        raise ValueError(f"its array must be flat {wire}, got {flat.dtype} of shape {flat.shape}")
    return np.asarray(flat)


def _ints(config: Mapping[str, Any], key: str) -> list[int]:
    return [int(v) for v in config.get(key, [])]


def _round(config: Mapping[str, Any]) -> int:
    return int(config["server-round"])


def prefixed(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Values whose key begins with the prefix, under Python names: ``method.distill-weight`` → ``distill_weight``."""
    return {k.removeprefix(prefix).replace("-", "_"): v for k, v in config.items() if k.startswith(prefix)}
