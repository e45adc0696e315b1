"""JSON texts that calibration sends: histograms, counts, threshold paths and certificates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from flwr.app import ConfigRecord, Message

from cafe_flwr.core.text import shown
from cafe_flwr.risk.client_calibration import FoldCounts
from cafe_flwr.risk.counts import ClientCounts, shared_bins
from cafe_flwr.risk.path import Histogram, ThresholdPath
from cafe_flwr.risk.pooled import ClientCertificate
from cafe_flwr.risk.thresholds import ExitThresholds
from cafe_flwr.wire.codec import failures_of, prefixed, record_of
from cafe_flwr.wire.keys import Keys
from cafe_flwr.wire.reader import parsed, read, real, whole

T = TypeVar("T")


def histogram_to_json(h: Histogram) -> str:
    """Counts by bin; all clients have the same bins."""
    return json.dumps({"examples": h.examples.tolist(), "harmed": h.harmed.tolist(), "edges": h.edges.tolist()})


def histogram_from_json(text: str) -> Histogram:
    """What :func:`histogram_to_json` wrote; ValueError for what no client's examples give."""
    values = _object(parsed(text), "edges", "examples", "harmed")
    edges, examples, harmed = values["edges"], values["examples"], values["harmed"]
    if not all(type(table) is list and all(type(row) is list for row in table) for table in values.values()):
        raise ValueError("a histogram needs tables of numbers")
    sizes = {"b": max(map(len, examples), default=0)}
    declared = {"edges": real("b", low=0, high=1, nan=False), "examples": whole("b"), "harmed": whole("b")}
    rows = [
        read(dict(zip(declared, row, strict=True)), declared, sizes, "its histograms")
        for row in zip(edges, examples, harmed, strict=True)
    ]
    shape = len(rows), sizes["b"]
    found = Histogram(
        np.array([row["edges"] for row in rows], dtype=np.float64).reshape(shape),
        *(np.array([row[key] for row in rows], dtype=np.int64).reshape(shape) for key in ("examples", "harmed")),
    )
    if (found.harmed > found.examples).any() or len(set(found.examples.sum(axis=1).tolist())) > 1:
        raise ValueError("a histogram counts the same examples at every exit, and harm among them only")
    return found


def check_histogram(h: Histogram, num_exits: int) -> None:
    """ValueError if a histogram is not in the bins that all clients with so many exits share."""
    if h.edges.tolist() != shared_bins(num_exits).tolist():
        raise ValueError(f"its histogram is not of the {num_exits - 1} exits, or not in the bins of all clients")


def counts_to_json(counts: FoldCounts) -> str:
    """Counts of both folds along the path."""
    return json.dumps(
        [{"n": c.n, **{k: getattr(c, k).tolist() for k in ("left", "wrong", "ever_wrong")}} for c in counts]
    )


def counts_from_json(text: str) -> FoldCounts:
    """What :func:`counts_to_json` wrote; ValueError for what no client's examples give."""
    both = parsed(text)
    if type(both) is not list or len(both) != 2:
        raise ValueError("counts are of two folds")
    names = ("left", "wrong", "ever_wrong")
    declared = {"n": whole(), **dict.fromkeys(names, whole("u"))}
    folds = [read(_object(one, *declared), declared, subject="its counts") for one in both]
    left, wrong, ever_wrong = ([np.array(one[name], dtype=np.int64) for one in folds] for name in names)
    return FoldCounts(*map(ClientCounts, (one["n"] for one in folds), left, wrong, ever_wrong))


def check_counts(counts: FoldCounts, path: ThresholdPath, h: Histogram) -> None:
    """ValueError if counts are not along this path, or of other examples than those of which the client said so many.

    The proposal fold, whose histogram the client has sent, is a third of its examples, rounded down.
    """
    told = int(h.examples[0].sum()) if len(h.examples) else 0
    proposal, certification = counts
    if {len(proposal.left), len(certification.left)} != {len(path)}:
        raise ValueError(f"its counts are not along the path of {len(path)} positions")
    if proposal.n != told or not 2 * told <= certification.n <= 2 * told + 2:
        raise ValueError(
            f"it counts {proposal.n} and {certification.n} examples, of which its histogram held {told} as a third"
        )


def path_to_json(path: ThresholdPath) -> str:
    """Thresholds, null where an exit is closed."""
    return json.dumps([[t if math.isfinite(t) else None for t in row] for row in path.thresholds.tolist()])


def path_from_json(text: str) -> ThresholdPath:
    """What :func:`path_to_json` wrote."""
    return ThresholdPath(np.array([[math.inf if t is None else t for t in row] for row in json.loads(text)]))


def certificate_to_json(c: ClientCertificate) -> str:
    """A certificate with its thresholds."""
    return json.dumps({"basis": c.basis, "reason": c.reason, "thresholds": c.thresholds.to_dict()})


def certificate_from_json(text: str) -> ClientCertificate:
    """What :func:`certificate_to_json` wrote."""
    values = json.loads(text)
    return ClientCertificate(values["basis"], ExitThresholds.from_dict(values["thresholds"]), values["reason"])


def _object(value: Any, *keys: str) -> dict[str, Any]:
    """These keys of a JSON object; ValueError if it is none, or lacks one."""
    if type(value) is not dict or not set(keys) <= value.keys():
        raise ValueError(f"not an object with {', '.join(keys)}")
    return {key: value[key] for key in keys}


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What a client answered to a step."""

    client: int
    value: T


@dataclass(frozen=True)
class CalibrationReply(Generic[T]):
    """A node's answers to a step of calibration, and reasons why clients failed."""

    reports: Sequence[Answer[T]]
    failures: Mapping[int, str]
    notes: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def from_message(cls, message: Message, keys: Keys, understood: Callable[[int, str], T]) -> CalibrationReply[T]:
        """Read a reply; ``understood`` turns a client's text into its value.

        A client whose text is not understood has failed. ValueError if the reply itself cannot be read.
        """
        config = record_of(message, keys.config, ConfigRecord)
        answers, failures = list[Answer[T]](), failures_of(config)
        for name, text in prefixed(config, "client.").items():
            if not (name.isdecimal() and name.isascii() and len(name) < 17) or type(text) is not str:
                raise ValueError(f"it has something for a client that has no number, {shown(name)!r}")
            try:
                answers.append(Answer(int(name), understood(int(name), text)))
            except ValueError as error:
                failures.setdefault(int(name), f"its answer cannot be used: {shown(str(error))}")
        return cls(answers, failures)
