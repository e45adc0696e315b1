"""A training round on a node: every client asked for is evaluated, trained and evaluated again; one reply for all."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.client.model import MOMENTUM, ClientModel
from cafe_flwr.client.node_bounds import NodeBounds
from cafe_flwr.client.privacy import stricter
from cafe_flwr.client.process import NodeContext
from cafe_flwr.core.log import logger
from cafe_flwr.data.split import ClientData
from cafe_flwr.methods.client import LocalResult, LocalTask
from cafe_flwr.methods.exit_agreement import classifier_similarity
from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.networks.memory import free_memory, is_out_of_memory, reason_of
from cafe_flwr.networks.placement import device_of
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.training.trainer import LocalTrainer
from cafe_flwr.wire.averaging import weighted
from cafe_flwr.wire.codec import clients_in
from cafe_flwr.wire.privacy import release
from cafe_flwr.wire.reports import ClientReport
from cafe_flwr.wire.slices import SharedSlice
from cafe_flwr.wire.train import TrainReply, TrainRequest


@dataclass(frozen=True)
class Assignment:
    """A request to the node's clients, and what is needed for it.

    Attributes
    ----------
    request
        The request, with the node's own demands on privacy.
    store
        Store of the clients' personal tensors.
    view
        Which values of the federation's shared part came with the message.
    tensors
        Shared tensors by client; clients with one model have the same ones.
    failures
        Clients that failed and why, filled as the work goes on.
    exhausted
        Errors of clients that ran out of memory, until it is freed.
    bounds, deadline
        The most that the node does for a request, and when it stops.
    """

    here: NodeContext
    request: TrainRequest
    store: PersonalStore
    models: Mapping[int, ClientModel]
    view: SharedSlice
    tensors: Mapping[int, Mapping[str, Tensor]]
    failures: dict[int, str] = field(default_factory=dict)
    exhausted: dict[int, Exception] = field(default_factory=dict)
    bounds: NodeBounds = field(default_factory=NodeBounds)
    deadline: float = math.inf

    @classmethod
    def read(cls, here: NodeContext) -> Assignment:
        """Read a message; ValueError if it does not fit the node's network, or asks for more than the node does."""
        message, keys, process = here.message, here.node.keys, here.process
        models = {client: here.model(client) for client in clients_in(message, keys)}
        view = SharedSlice(process.shared, [model.shared for model in models.values()])
        downloads = {client: model.schemas["download"].size for client, model in models.items()}
        deepest = max((model.network.num_exits for model in models.values()), default=1)
        request = TrainRequest.from_message(
            message, keys, shared_size=view.size, download_size=downloads, num_exits=deepest
        )
        if request.digest != process.digest:
            raise ValueError(
                f"the server's network has fingerprint {request.digest}, this node's {process.digest}: "
                "network, number of classes and method must be the same on both"
            )
        if process.trouble:
            raise ValueError(process.trouble)
        bounds = NodeBounds.of(here.context.node_config)
        bounds.check(request)
        request = replace(request, privacy=stricter(request.privacy, here.context.node_config))
        store = PersonalStore(here.state_folder, request.run, message.metadata.created_at)
        unpacked = {
            id(model): model.schemas["shared"].unpack(view.part(request.shared, model.shared))
            for model in {id(model): model for model in models.values()}.values()
        }
        tensors = {client: unpacked[id(model)] for client, model in models.items()}
        return cls(here, request, store, models, view, tensors, bounds=bounds, deadline=bounds.deadline)

    def begin(self, client: int, data: ClientData, *, apart: bool = False) -> LocalTask:
        """A client's task at the start of the round; ``apart``: with a network of its own."""
        self.bounds.check_client(self.request.budget, len(data.train))
        task = self.models[client].begin(self.request, client, self.tensors[client], self.store, data, apart=apart)
        return replace(task, deadline=self.deadline)

    @contextmanager
    def trying(self, client: int, otherwise: str) -> Iterator[None]:
        """Turns an error inside the block into a failure of this client: it is logged (``otherwise``) and reported."""
        device = device_of(self.models[client].network)
        try:
            yield
        except Exception as error:
            logger.warning("client %d %s", client, otherwise, exc_info=True)
            self.failures[client] = reason_of(error, device)
            if is_out_of_memory(error):
                self.exhausted[client] = error

    def free_memory(self) -> None:
        """After running out of memory: clear what the errors refer to, and PyTorch's cache."""
        while self.exhausted:
            client, error = self.exhausted.popitem()
            traceback.clear_frames(error.__traceback__)
            free_memory(self.models[client].network)


def train(here: NodeContext, trainer: LocalTrainer) -> RecordDict:
    """Train the clients a message asks for, ``trainer.at_once`` of them at a time, and return the reply."""
    work = Assignment.read(here)
    clients, done = work.request.clients, list[tuple[ClientReport, NDArray[np.float32]]]()
    for start in range(0, len(clients), trainer.at_once):
        done += _train_together(work, clients[start : start + trainer.at_once], trainer)
        work.free_memory()
    return _reply(work, done)


def _reply(work: Assignment, done: Sequence[tuple[ClientReport, NDArray[np.float32]]]) -> RecordDict:
    """The clients' reports, and the shared part of one client or the weighted sum over several."""
    request, reports = work.request, [report for report, _ in done]
    view = SharedSlice(work.here.process.shared, [work.models[report.client].shared for report in reports])
    weights = [1 if request.uniform_weights else report.num_examples for report in reports]
    if len(done) == 1:
        total: NDArray[Any] = done[0][1]
    else:
        total = np.zeros(view.size)
        for part, (_, shared), weight in zip(view.parts, done, weights, strict=True):
            view.add(total, part, weighted(shared, weight))
    reply = TrainReply(
        server_round=request.server_round,
        digest=request.digest,
        shared=total,
        reports=reports,
        failures=work.failures,
        wire=request.wire,
        notes=work.store.notes,
        counted=view.weight(weights),
    )
    return reply.to_content(work.here.node.keys, work.view.part(request.shared, view.schema))


class _Started(NamedTuple):
    data: ClientData
    task: LocalTask
    before: ExitMetrics
    seconds: float  # of the evaluation


def _train_together(
    work: Assignment, clients: Sequence[int], trainer: LocalTrainer
) -> list[tuple[ClientReport, NDArray[np.float32]]]:
    """Reports and flat shared parts of the clients that finish."""
    otherwise = f"failed in round {work.request.server_round}"
    started: dict[int, _Started] = {}
    done = []
    with ExitStack() as locks:
        for client in clients:
            with work.trying(client, otherwise):
                data = work.here.data(client)
                locks.enter_context(work.store.locked(client))
                started[client] = _start(work, client, data, trainer, apart=len(clients) > 1)
        begin = time.perf_counter()
        method = work.here.process.method
        results = trainer.train(method, [one.task for one in started.values()])
        seconds = (time.perf_counter() - begin) / max(1, len(started))
        for (client, one), result in zip(started.items(), results, strict=True):
            with work.trying(client, otherwise):
                if isinstance(result, Exception):
                    raise result
                done.append(_finish(work, client, one, result, seconds, trainer))
    return done


def _start(work: Assignment, client: int, data: ClientData, trainer: LocalTrainer, *, apart: bool) -> _Started:
    """A client that is ready to train, evaluated as it starts."""
    work.store.check_current(client, work.request.server_round)
    task = work.begin(client, data, apart=apart)
    begin = time.perf_counter()
    before = _measure(work, client, task, data, trainer)
    return _Started(data, task, before, time.perf_counter() - begin)


def _finish(
    work: Assignment, client: int, started: _Started, result: LocalResult, seconds: float, trainer: LocalTrainer
) -> tuple[ClientReport, NDArray[np.float32]]:
    """Evaluate a trained client and save its personal state; returns its report and flat shared part."""
    data, task, before, seconds_before = started
    model, request = work.models[client], work.request
    begin = time.perf_counter()
    after = _measure(work, client, task, data, trainer)
    seconds_after = time.perf_counter() - begin
    tensors = model.take(task)
    personal = {name: tensors[name].cpu() for name in model.schemas["personal"].names}
    personal |= {MOMENTUM + name: tensor.cpu() for name, tensor in task.momentum.items()}
    sent = _released(work, client, tensors)
    version = request.versions[request.clients.index(client)]
    work.store.save(client, request.server_round, personal, base=version, resumable_from=request.resumable_from)
    tells = request.privacy.report_metrics
    similarity = [0.0] * (task.network.num_exits - 1)
    if tells:
        similarity = result.similarity or classifier_similarity(task.network)
    report = ClientReport(
        client=client,
        num_examples=len(data.train),
        test_examples=len(data.test) if tells else 0,
        train_loss=result.loss if tells else math.nan,
        local_steps=task.steps,
        similarity=similarity,
        before=before,
        after=after,
        seconds_train=seconds,
        seconds_evaluate=seconds_before + seconds_after,
        upload=sent["upload"],
    )
    return report, sent["shared"]


def _measure(work: Assignment, client: int, task: LocalTask, data: ClientData, trainer: LocalTrainer) -> ExitMetrics:
    """Metrics of the personal network on the test split; unknown if the server or the client does not want them."""
    if not (work.request.evaluate and work.request.privacy.report_metrics):
        return ExitMetrics.unknown(task.network.num_exits)
    with work.models[client].deployed(task) as network:
        return trainer.evaluate([network], [data.test])[0]


def _released(work: Assignment, client: int, tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """The flat shared part and upload that leave the client, clipped and noised if the request asks for it."""
    model, request = work.models[client], work.request
    flat = {kind: model.schemas[kind].pack(tensors) for kind in ("shared", "upload")}
    privacy = request.privacy
    if privacy.on:
        known = model.known_start(request, client, work.tensors[client])
        for kind, values in flat.items():
            purpose = f"uplink {kind} {request.run} {request.server_round}"
            flat[kind] = release(
                values,
                model.schemas[kind].pack(known),
                privacy.clip_of(kind),
                privacy.noise_multiplier,
                lambda content, purpose=purpose: work.store.private_rng(client, f"{purpose} {content}"),  # type: ignore[misc]
            )
    if request.wire == "float16":
        received = work.view.part(request.shared, model.shared)
        model.schemas["shared"].check_half(flat["shared"] - received, "the update")
        model.schemas["upload"].check_half(flat["upload"], "the upload")
    return flat
