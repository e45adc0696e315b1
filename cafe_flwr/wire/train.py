"""The messages of a training round: the request to a node, and its reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from cafe_flwr.core.text import kebab, shown
from cafe_flwr.training.options import LocalBudget
from cafe_flwr.wire.bounds import MAX_NORM, check_norm
from cafe_flwr.wire.codec import (
    check_client,
    check_server,
    entries,
    failed,
    failures_of,
    filled,
    method_config,
    narrowed,
    noted,
    notes_of,
    of_client,
    prefixed,
    read_flat,
    record_of,
)
from cafe_flwr.wire.keys import FLAT, METRICS, PROTOCOL, Keys
from cafe_flwr.wire.options import Privacy
from cafe_flwr.wire.reader import CLIENT, distinct, read, whole
from cafe_flwr.wire.reports import ClientReport, columns_of, reports_of
from cafe_flwr.wire.request import request_values, settings_from
from cafe_flwr.wire.slices import Weight

# Fields of a request that its config holds unchanged, in this order.
_PLAIN = ("run", "seed", "digest", "server_round", "num_rounds", "resumable_from", "clients", "versions")

_REPLY = {"clients": CLIENT, "server-round": whole()}


@dataclass(frozen=True)
class TrainRequest:
    """What a node is asked to do in a round, or in an evaluation after one.

    Attributes
    ----------
    run, seed, digest
        Token of the run, its seed, fingerprint of network and method.
    server_round, num_rounds
        t and T.
    resumable_from
        Oldest round that the run may be resumed from; older personal state is not needed.
    clients, versions
        Clients that take part, ascending; and the round whose personal state each one starts from, 0 for none.
    active
        (clients, m−1) bool: which student exits train.
    shared, downloads
        Shared part, flat; and flat arrays for single clients, by client.
    method, method_settings, budget
        Name of the method, its settings, and local training.
    evaluate
        Whether clients evaluate before and after training.
    privacy
        Clipping and noise of what clients send.
    wire
        Type of the values that travel, ``"float32"`` or ``"float16"``.
    uniform_weights
        Whether all clients weigh the same in the average of the shared part, whatever their examples.
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
    uniform_weights: bool = False

    def to_content(self, keys: Keys, config: Mapping[str, Any]) -> RecordDict:
        """As a Flower record, with the entries of the user's ``config``."""
        mine = [c for c in self.clients if c in self.downloads]
        flat = narrowed(np.concatenate([self.shared, *(self.downloads[c] for c in mine)]), self.wire)
        budget = {k: v for k, v in vars(self.budget).items() if k != "keep_momentum" or v}  # sent only if true
        values = {
            **config,
            "protocol": PROTOCOL,
            **entries("", {name: getattr(self, name) for name in _PLAIN}),
            "downloads": mine,
            "active-exits": self.active.flatten().tolist(),
            "evaluate": self.evaluate,
            **method_config(self.method, self.method_settings),
            **entries("local.", budget),
            **({} if self.privacy == Privacy() else entries("privacy.", vars(self.privacy))),
            **({} if self.wire == "float32" else {"wire-dtype": self.wire}),
            **({"plain-mean": True} if self.uniform_weights else {}),
        }
        return RecordDict({keys.arrays: ArrayRecord({FLAT: Array(flat)}), keys.config: ConfigRecord(filled(values))})

    @classmethod
    def from_message(
        cls,
        message: Message,
        keys: Keys,
        *,
        shared_size: int,
        download_size: int | Mapping[int, int],
        num_exits: int | None = None,
    ) -> TrainRequest:
        """Read a request on the node; ValueError if it is senseless, or does not fit the node's network.

        ``shared_size`` is that of all its clients together, ``download_size`` that of each client, or by client,
        ``num_exits`` that of the deepest client.
        """
        config = record_of(message, keys.config, ConfigRecord)
        check_server(config)
        values = request_values(config, message.metadata.message_type, num_exits)
        wire, with_download = values["wire-dtype"], values["downloads"]
        sizes = [shared_size, *(of_client(download_size, client) for client in with_download)]
        shared, *rest = _received(read_flat(message, keys.arrays, wire), sizes, with_download)
        return cls(
            **{name: values[kebab(name)] for name in (*_PLAIN, "method", "evaluate")},
            active=np.array(values["active-exits"], dtype=bool).reshape(len(values["clients"]), -1),
            shared=shared,
            downloads=dict(zip(with_download, rest, strict=True)),
            method_settings=prefixed(config, "method."),
            budget=settings_from(LocalBudget, config, "local."),
            privacy=settings_from(Privacy, config, "privacy."),
            wire=wire,
            uniform_weights=values["plain-mean"],
        )


def _received(flat: NDArray[Any], sizes: Sequence[int], clients: Sequence[int]) -> list[NDArray[np.float32]]:
    """Split a request's array into the shared part and downloads; ValueError if the size or a norm is wrong."""
    if len(flat) != sum(sizes):
        raise ValueError(f"the request carries {len(flat)} values, this node's network needs {sum(sizes)}")
    parts = np.split(flat.astype(np.float32, copy=False), np.cumsum(sizes)[:-1])
    names = ("the shared part received", *(f"what client {client} is sent of its own" for client in clients))
    for part, name in zip(parts, names, strict=True):
        check_norm(part, MAX_NORM, name)
    return parts


@dataclass(frozen=True)
class TrainReply:
    """A node's result of a round.

    Attributes
    ----------
    server_round, digest, wire
        As in the request.
    shared
        Shared part of the only client reported (float32), or Σ n_i θ_i over several (float64).
    reports, failures
        Reports of clients that finished; reasons why others did not.
    notes
        Remarks on clients that finished.
    counted
        Weight of every value of the shared part, where it is not the number of all examples.
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
        """Weight of the shared part in an average."""
        return self.examples if self.counted is None else self.counted

    def update(self, base: NDArray[Any]) -> NDArray[np.float64]:
        """Difference of the shared part, or its mean over several clients, to ``base``, which the server sent."""
        mean = self.shared if len(self.reports) == 1 else self.shared / self.weight
        return np.asarray(mean.astype(np.float64) - base)

    def to_content(self, keys: Keys, base: NDArray[np.float32] | None = None) -> RecordDict:
        """As a Flower record; ``base``, needed for float16, is the shared part that the clients reported received."""
        config = {
            "protocol": PROTOCOL,
            "server-round": self.server_round,
            "digest": self.digest,
            "clients": [r.client for r in self.reports],
            **failed(self.failures),
            **noted(self.notes),
        }
        shared = self.shared
        if self.wire == "float16" and self.reports:
            assert base is not None
            shared = shared - base if len(self.reports) == 1 else shared - self.weight * base.astype(np.float64)
        places = narrowed(shared, self.wire if len(self.reports) == 1 else _wide(self.wire)).view(self.wire)
        flat = np.concatenate([places, *(narrowed(r.upload, self.wire) for r in self.reports)])
        return RecordDict(
            {
                keys.arrays: ArrayRecord({FLAT: Array(flat)}),
                METRICS: MetricRecord(filled(columns_of(self.reports, keys))),
                keys.config: ConfigRecord(filled(config)),
            }
        )

    @classmethod
    def from_message(cls, message: Message, keys: Keys, expected: Expected) -> TrainReply:
        """Read a reply on the server; ValueError if anything in it is not as expected."""
        config = record_of(message, keys.config, ConfigRecord)
        metrics = record_of(message, METRICS, MetricRecord)
        check_client(config)
        if config.get("digest") != expected.digest:
            found = shown(str(config.get("digest")))
            raise ValueError(f"its network has fingerprint {found}, expected {expected.digest}")
        values = read(config, _REPLY)
        clients, failures = distinct(values["clients"], "clients"), failures_of(config)
        shared: NDArray[Any] = np.zeros(0, dtype=np.float32)
        reports: list[ClientReport] = []
        if clients:
            shared, uploads = _arrays(read_flat(message, keys.arrays, expected.wire), clients, expected)
            reports = reports_of(metrics, keys, clients, uploads, expected.num_exits)
            shared = _widened(shared, [report.num_examples for report in reports], expected)
        notes, wire = notes_of(config), expected.wire
        return cls(values["server-round"], expected.digest, shared, reports, failures, wire, notes, expected.counted)


@dataclass(frozen=True)
class Expected:
    """What the server expects of a reply.

    Attributes
    ----------
    shared_size
        Values of the shared part that the clients reported hold together.
    upload_size, num_exits
        Of every client, or by client.
    base
        The server's shared part, needed for float16: the clients' rounded differences are added to it in full
        precision.
    digest, wire, counted
        As in :class:`TrainReply`.
    """

    digest: str
    shared_size: int
    upload_size: int | Mapping[int, int]
    num_exits: int | Mapping[int, int]
    wire: str = "float32"
    base: NDArray[np.float32] | None = None
    counted: Weight | None = None


def _arrays(
    flat: NDArray[Any], clients: Sequence[int], expected: Expected
) -> tuple[NDArray[Any], list[NDArray[np.float32]]]:
    """Split a reply's array into the shared part, as it travels, and the clients' uploads."""
    alone = len(clients) == 1
    places = expected.shared_size if alone else 2 * expected.shared_size
    ends = np.cumsum([places, *(of_client(expected.upload_size, client) for client in clients)])
    if len(flat) != ends[-1]:
        raise ValueError(f"its array has {len(flat)} values, expected {ends[-1]}")
    shared: NDArray[Any] = flat[:places]
    if not alone:
        shared = shared.view(_wide(expected.wire))
    uploads = np.split(flat[places:].astype(np.float32, copy=False), ends[1:-1] - places)
    if broken := sum(int((~np.isfinite(part)).sum()) for part in (shared, *uploads)):
        raise ValueError(f"{broken} of the values in its array are NaN or infinite")
    return shared, uploads


def _widened(shared: NDArray[Any], weights: Sequence[int], expected: Expected) -> NDArray[Any]:
    """The shared part as :class:`TrainReply` has it; ValueError if it is too large for float32."""
    if expected.wire == "float16":
        assert expected.base is not None
        counts: Weight = sum(weights) if expected.counted is None else expected.counted
        wide = shared.astype(np.float64) + (1 if len(weights) == 1 else counts) * expected.base.astype(np.float64)
        shared = wide if len(weights) > 1 else wide.astype(np.float32)
    if len(weights) > 1 and np.abs(shared).max(initial=0.0) > sum(weights) * float(np.finfo(np.float32).max):
        raise ValueError("its shared parameters are too large for float32")
    return shared


def _wide(wire: str) -> str:
    """Type of a sum over clients, which takes the space of two values."""
    return "float32" if wire == "float16" else "float64"
