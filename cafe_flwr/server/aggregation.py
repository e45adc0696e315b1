"""Averages over clients: of their shared parameters and of their metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from numpy.typing import NDArray

from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.robust import clipped_mean, trimmed_mean
from cafe_flwr.server.run import StrategyPart
from cafe_flwr.wire.averaging import weighted, weighted_mean
from cafe_flwr.wire.evaluate import FinalReport
from cafe_flwr.wire.keys import METRICS, PHASES
from cafe_flwr.wire.reports import ClientReport
from cafe_flwr.wire.slices import masked_mean
from cafe_flwr.wire.train import TrainReply

Average = Callable[[list[RecordDict], str], MetricRecord]


@dataclass(frozen=True)
class Aggregator(StrategyPart):
    """Averages what clients report."""

    def shared(self, state: ServerState, good: Sequence[TrainReply]) -> NDArray[np.float32]:
        """The shared parts of all clients that replied well, combined over those that hold them.

        By a robust rule the result does not depend on which node hosts whom, as the mean's.
        """
        rule = self.run.aggregation
        if rule.robust:
            kinds = [self.directory.kind(reply.reports[0].client) for reply in good]
            parts = [(kind.shared, reply.shared) for kind, reply in zip(kinds, good, strict=True)]
            combined = clipped_mean if rule.rule == "clipped-mean" else partial(trimmed_mean, cut=rule.cut)
            return combined(state.shared, self.directory.reference.shared, parts)
        views = [self.directory.view([report.client for report in reply.reports]) for reply in good]
        # A node that reports several clients has weighted its sum already.
        sums = (r.shared if r.summed else weighted(r.shared, r.weight) for r in good)
        if all(view.alike and view.schema == view.whole for view in views):
            return weighted_mean(sums, sum(float(reply.weight) for reply in good))
        return masked_mean(state.shared, zip(views, sums, [reply.weight for reply in good], strict=True))

    def training_metrics(
        self, average: Average, server_round: int, reports: Sequence[ClientReport]
    ) -> MetricRecord | None:
        """Training loss, and accuracy and loss per exit before and after training, of those that measured them."""
        key = self.run.keys.weight
        records = {}
        for report in reports:
            if report.test_examples and self.run.evaluates_in(server_round):  # else there is NaN
                values: dict[str, Any] = {key: report.num_examples, "train-loss": report.train_loss}
                for phase in PHASES:
                    values[f"accuracy-{phase}"] = getattr(report, phase).accuracy
                    values[f"loss-{phase}"] = getattr(report, phase).loss
                records[report.client] = MetricRecord(values)
        return self._averaged(average, records)

    def evaluation_metrics(self, average: Average, reports: Sequence[FinalReport]) -> MetricRecord | None:
        """Accuracy, loss and ECE per exit, by the clients' test examples."""
        key = self.run.keys.weight
        measured = [report for report in reports if report.test_examples]
        return self._averaged(
            average, {r.client: MetricRecord({key: r.test_examples, **vars(r.exits)}) for r in measured}
        )

    def _averaged(self, average: Average, records: dict[int, MetricRecord]) -> MetricRecord | None:
        """Average records, each exit over the clients that hold it; a user's function gets NaN for the others."""
        if not records:
            return None
        key = self.run.keys.weight
        metrics = average([RecordDict({METRICS: record}) for record in records.values()], key)
        held = np.array([self.directory.kind(client).num_exits for client in records])
        most = self.directory.reference.num_exits
        if average is not aggregate_metricrecords or held.min() == most:
            return metrics
        weights = np.array([[record[key]] for record in records.values()]) * (np.arange(most) < held[:, None])
        for name in [name for name, values in metrics.items() if isinstance(values, list) and len(values) == most]:
            rows = np.where(weights > 0, np.array([record[name] for record in records.values()]), 0.0)
            total = weights.sum(axis=0)
            metrics[name] = np.where(total, (rows * weights).sum(axis=0) / np.where(total, total, 1), np.nan).tolist()
        return metrics
