"""Evaluation of personal networks on a node, and their publication after the last round."""

from __future__ import annotations

from typing import NamedTuple

import torch
from flwr.app import RecordDict

from cafe_flwr.client.process import NodeContext
from cafe_flwr.client.round import Assignment
from cafe_flwr.core.random import seeded
from cafe_flwr.data.split import ClientData
from cafe_flwr.metrics.early_exit import dynamic_counts
from cafe_flwr.metrics.exits import ExitMetrics, ensemble_accuracy, exit_logits, exit_metrics
from cafe_flwr.metrics.temperature import fit_temperatures
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.weights import weights_of
from cafe_flwr.personal.published import Metadata, with_offset
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.training.class_prior import adapt_to_label_shift
from cafe_flwr.training.loop import check_finite
from cafe_flwr.wire.evaluate import EvaluationReply, FinalReport


def evaluate(here: NodeContext) -> RecordDict:
    """Evaluate personal networks with the shared part received, publish them if asked to, and return the reply."""
    work = Assignment.read(here)
    publish = bool(here.config.get("publish"))
    reports: list[FinalReport] = []
    for client in work.request.clients:
        with work.trying(client, "could not be evaluated"):
            data = here.data(client)
            with work.store.locked(client):
                reports.append(_evaluate(work, client, data, publish=publish))
        work.free_memory()
    return EvaluationReply(reports, work.failures, work.store.notes).to_content(here.node.keys)


def _evaluate(work: Assignment, client: int, data: ClientData, *, publish: bool) -> FinalReport:
    """A client's report on its personal network; with ``publish`` it is fine-tuned before and published."""
    model, request = work.models[client], work.request
    task = work.begin(client, data)
    if publish:
        with seeded(int(task.rng("torch").integers(2**63))):
            model.method.finish(task)
    check_finite({**weights_of(task.network), **task.state})
    with model.deployed(task) as network:
        evaluated = evaluate_personal(client, network, data, task.steps)
        if publish:
            context = work.here.context
            metadata = Metadata(
                run=request.run,
                round=request.server_round,
                method=request.method,
                digest=request.digest,
                seed=request.seed,
                modality=model.modality,
                width=model.held.width if model.held else 1.0,
                context={"run_config": dict(context.run_config), "node_config": dict(context.node_config)},
            )
            publish_personal(work.store, network, data, evaluated, metadata)
    return evaluated.report if request.privacy.report_metrics else evaluated.report.withheld()


class Evaluated(NamedTuple):
    """Measurements of a personal network: the report, and the temperature of each exit."""

    report: FinalReport
    temperatures: list[float]


def evaluate_personal(client: int, network: EarlyExitNetwork, data: ClientData, local_steps: int) -> Evaluated:
    """Evaluate a personal network, with temperatures fitted on the calibration split."""
    calibration, test = exit_logits(network, data.calibration.x), exit_logits(network, data.test.x)
    temperatures = fit_temperatures(calibration, data.calibration.y)
    scale = torch.tensor(temperatures)[:, None, None]
    adapted = ExitMetrics.unknown(network.num_exits)
    if network.offset is not None:
        adapted = exit_metrics(adapt_to_label_shift(test, scale, network.offset.cpu()), data.test.y)
    report = FinalReport(
        client=client,
        train_examples=len(data.train),
        calibration_examples=len(data.calibration),
        test_examples=len(data.test),
        classes=len(data.train.y.unique()),
        local_steps=local_steps,
        ensemble=ensemble_accuracy(test, data.test.y),
        exits=exit_metrics(test, data.test.y),
        adapted=adapted,
        calibration=dynamic_counts(calibration / scale, data.calibration.y),
        test=dynamic_counts(test / scale, data.test.y),
    )
    return Evaluated(report, temperatures)


def publish_personal(
    store: PersonalStore, network: EarlyExitNetwork, data: ClientData, evaluated: Evaluated, metadata: Metadata
) -> None:
    """Write a client's personal network and its metadata into the store's folder."""
    tensors, (report, temperatures) = with_offset(network), evaluated
    shape = data.train.x.shape[1:]
    told = metadata.beside(network, tensors, shape, report.exits.accuracy, temperatures)
    store.publish(report.client, tensors, told)
