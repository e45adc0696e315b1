"""The replies in which nodes report the evaluation of personal networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from cafe_flwr.core.text import kebab
from cafe_flwr.metrics.early_exit import DynamicCounts
from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.wire.codec import check_client, failed, failures_of, noted, notes_of, of_client, record_of, scalars_of
from cafe_flwr.wire.keys import PROTOCOL, Keys


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
        for split in ("calibration", "test"):
            counts = getattr(self, split)._asdict()
            values |= {f"{split}-{name}": value.flatten().tolist() for name, value in counts.items()}
        return MetricRecord(values)

    @classmethod
    def from_record(cls, record: MetricRecord, num_exits: int | Mapping[int, int]) -> FinalReport:
        """Inverse of :meth:`to_record`."""
        scalars: dict[str, Any] = {name: record[kebab(name)] for name in scalars_of(cls)}
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
        """Read a reply on the server; ValueError or KeyError if something is missing."""
        config = record_of(message, keys.config, ConfigRecord)
        check_client(config)
        reports = [FinalReport.from_record(record, num_exits) for record in message.content.metric_records.values()]
        return cls(reports, failures_of(config), notes_of(config))
