"""The replies in which nodes report the evaluation of personal networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from cafe_flwr.core.text import kebab, shown
from cafe_flwr.metrics.early_exit import THRESHOLDS, DynamicCounts
from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.wire.codec import check_client, failed, failures_of, noted, notes_of, of_client, record_of, scalars_of
from cafe_flwr.wire.keys import PROTOCOL, Keys
from cafe_flwr.wire.reader import read, share, whole
from cafe_flwr.wire.reports import EXITS

_SPLITS = ("calibration", "test")


@dataclass(frozen=True)
class FinalReport:
    """Evaluation of one client's personal network.

    Attributes
    ----------
    client, train_examples, calibration_examples, test_examples, classes
        Its number, the sizes of its splits, and the number of classes in its training split.
    local_steps
        Gradient steps of fine-tuning after the last round; 0 for most methods.
    ensemble
        Test accuracy of the mean of all exits' probabilities.
    exits
        Metrics per exit on the test split.
    adapted
        The same with the client's log-prior re-estimated on the unlabelled test inputs; NaN where the method has none.
    calibration, test
        Counts of dynamic inference at every threshold, on these splits.
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

    def withheld(self) -> FinalReport:
        """The report of a client that withholds its metrics: only the size of its training split is left."""
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
        """The report with exits that the client does not hold as NaN, and no examples that leave there."""

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
        """As a Flower record."""
        values: dict[str, Any] = {kebab(name): getattr(self, name) for name in scalars_of(FinalReport)}
        values |= {f.name: getattr(self.exits, f.name) for f in fields(ExitMetrics)}
        values |= {f"adapted-{f.name}": getattr(self.adapted, f.name) for f in fields(ExitMetrics)}
        for split in _SPLITS:
            counts = getattr(self, split)._asdict()
            values |= {f"{split}-{name}": value.flatten().tolist() for name, value in counts.items()}
        return MetricRecord(values)

    @classmethod
    def from_record(cls, record: MetricRecord, num_exits: int | Mapping[int, int]) -> FinalReport:
        """Inverse of :meth:`to_record`; ValueError if a value is missing, impossible or of another length."""
        client = read(record, {"client": whole()})["client"]
        width, positions = of_client(num_exits, client), len(THRESHOLDS)
        found = read(record, _DECLARED, {"m": width, "u": positions, "um": positions * width}, "its metrics")
        exits, adapted = (ExitMetrics(*(found[prefix + name] for name in EXITS)) for prefix in ("", "adapted-"))

        def counts(split: str) -> DynamicCounts:
            left, *others = (np.array(found[f"{split}-{name}"], dtype=np.int64) for name in DynamicCounts._fields)
            return DynamicCounts(left.reshape(-1, width), *others)

        scalars: dict[str, Any] = {name: found[kebab(name)] for name in scalars_of(cls)}
        return cls(**scalars, exits=exits, adapted=adapted, calibration=counts("calibration"), test=counts("test"))

    def check(self, train_examples: int) -> None:
        """ValueError if the numbers do not agree with one another, or with the client's training examples."""
        if self.train_examples != train_examples or self.classes > train_examples:
            raise ValueError(
                f"client {self.client} reports {self.train_examples} examples of {self.classes} classes, "
                f"{train_examples} examples at the start"
            )
        for split in _SPLITS:
            n, counts = getattr(self, f"{split}_examples"), getattr(self, split)
            if (counts.left.sum(axis=1) != n).any() or max(counts.correct.max(), counts.changed.max()) > n:
                raise ValueError(f"client {self.client} counts other {split} examples than the {n} that it has")
        if self.test_examples and any(map(math.isnan, self.exits.accuracy)):
            raise ValueError(f"client {self.client} has {self.test_examples} test examples and no accuracy")


_DECLARED = {
    **{kebab(name): whole() for name, kind in scalars_of(FinalReport).items() if kind is int},
    "ensemble": share(),
    **{prefix + name: value for prefix, (name, value) in product(("", "adapted-"), EXITS.items())},
    **{
        f"{split}-{name}": whole("um" if name == "left" else "u") for split in _SPLITS for name in DynamicCounts._fields
    },
}


@dataclass(frozen=True)
class EvaluationReply:
    """A node's evaluation of personal networks: reports, and reasons why clients failed."""

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
        """Read a reply on the server; ValueError if anything in it is not as it should be."""
        config = record_of(message, keys.config, ConfigRecord)
        check_client(config)
        records = message.content.metric_records
        reports = [FinalReport.from_record(record, num_exits) for record in records.values()]
        if list(records) != [f"client-{report.client}" for report in reports]:
            raise ValueError(f"its records {shown(', '.join(map(repr, records)))} are of other clients than they say")
        return cls(reports, failures_of(config), notes_of(config))
