"""The client's side: a Flower ClientApp that hosts one or more clients on its node."""

from __future__ import annotations

import copy
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr import __version__
from cafe_flwr.client.capacity import held_by
from cafe_flwr.client.node_config import hosted, name_of
from cafe_flwr.client.privacy import stricter
from cafe_flwr.core.log import logger
from cafe_flwr.core.random import rng_for
from cafe_flwr.core.schema import Schema, digest
from cafe_flwr.data.split import ClientData
from cafe_flwr.methods.base import Method
from cafe_flwr.methods.client import LocalTask, without_prefix
from cafe_flwr.methods.exit_agreement import classifier_similarity
from cafe_flwr.methods.registry import METHODS, method_from
from cafe_flwr.methods.starts import classifier_start
from cafe_flwr.methods.whole_model import UPDATE
from cafe_flwr.metrics.early_exit import dynamic_counts
from cafe_flwr.metrics.exits import ExitMetrics, ensemble_accuracy, evaluate, exit_logits, exit_metrics
from cafe_flwr.metrics.temperature import fit_temperatures
from cafe_flwr.networks.capacity import Held, Networks, networks_of, start_alike
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.fingerprint import fingerprint_of
from cafe_flwr.networks.memory import free_memory, is_out_of_memory, reason_of
from cafe_flwr.networks.placement import OnDevice, Placement, device_of
from cafe_flwr.personal.store import PersonalStore, personal_folder
from cafe_flwr.training.class_prior import adapt_to_label_shift
from cafe_flwr.training.loop import snapshot
from cafe_flwr.wire.averaging import weighted
from cafe_flwr.wire.capacity import Kind
from cafe_flwr.wire.codec import check_server, clients_in, prefixed, record_of
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.evaluate import EvaluationReply, FinalReport
from cafe_flwr.wire.keys import FLAT, Keys
from cafe_flwr.wire.privacy import release
from cafe_flwr.wire.slices import View
from cafe_flwr.wire.train import ClientReport, TrainReply, TrainRequest

BuildNetwork = Callable[[Context], EarlyExitNetwork | Networks]
LoadData = Callable[[int, Context], ClientData]
ModalityOf = Callable[[int, Context], str]


class Parts(NamedTuple):
    """The functions that a ready ClientApp was made from."""

    build_network: BuildNetwork
    load_data: LoadData
    modality_of: ModalityOf | None = None


PARTS = "cafe_flwr_parts"
MOMENTUM = "optimizer/"  # before the names of what the optimiser remembers, among a client's personal tensors


def make_client_app(
    build_network: BuildNetwork,
    load_data: LoadData,
    *,
    modality_of: ModalityOf | None = None,
    keys: Keys | None = None,
    state_dir: Callable[[Context], str] | None = None,
) -> ClientApp:
    """A ready Flower ClientApp for the strategies of this package.

    Parameters
    ----------
    build_network
        ``(context) -> EarlyExitNetwork``. Called once per process; torch's random generator is seeded with the run's
        seed before, so that all clients start from the same weights. Where clients have different modalities: a network
        by the name of each modality, the same on all nodes (docs/modalities.md).
    load_data
        ``(client, context) -> ClientData``. Called once per process and client.
    modality_of
        ``(client, context) -> name`` of the client's modality, where there are several.
    keys
        Names of the records in messages, if the strategy was given others than Flower's.
    state_dir
        ``(context) -> folder`` of the personal state where the node's own node-config names none; without it, the
        user's state folder.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> from cafe_flwr.data import load_federation
    >>> federation = load_federation("digits", num_clients=4)
    >>> app = make_client_app(
    ...     lambda context: ConvNet(federation.input_shape, federation.num_classes),
    ...     lambda client, context: federation.load(client),
    ... )
    """
    app = ClientApp()
    parts = Parts(build_network, load_data, modality_of)
    node = _Node(parts, keys or Keys(), state_dir or _no_choice)
    setattr(app, PARTS, parts)  # for the commands that work without a server
    app.query()(node.describe)
    app.query("initial")(node.initial)
    app.query("calibrate")(node.calibrate)
    app.train()(node.train)
    app.evaluate()(node.evaluate)
    return app


@dataclass(frozen=True)
class Workplace:
    """The network and the method of one run, with what follows from them. Built once per process and kind of client."""

    network: EarlyExitNetwork
    method: Method
    weights: Mapping[str, Tensor]
    modality: str = ""
    held: Held | None = None  # all, if None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All that a client has: the network's tensors and those the method keeps beside them, as they start."""
        self.network.load_state_dict(self.weights)  # whatever the process has trained before
        extra = {name: t.cpu() for name, t in self.method.extra_tensors(self.network).items()}
        assert not extra.keys() & self.weights.keys()
        return {**self.weights, **extra}

    @cached_property
    def initial(self) -> dict[str, Tensor]:
        """What a client starts from that is not shared."""
        shared = set(self.schemas["shared"].names)
        return {name: tensor for name, tensor in self.tensors.items() if name not in shared}

    def classifiers_at_start(self, seed: int, client: int) -> dict[str, Tensor]:
        """What the client's personal classifiers start from, by name; empty where they start as they were built."""
        personal = set(self.method.personal_names(self.network))
        names = [name for name in self.network.classifier_names() if name in personal]
        if self.method.classifier_start == "built":
            return {}
        return classifier_start(Schema.of(self.weights, names).entries, self.method.classifier_start, seed, client)

    @cached_property
    def schemas(self) -> dict[str, Schema]:
        """What travels, and what stays."""
        method, network = self.method, self.network
        return {
            "shared": Schema.of(self.tensors, method.shared_names(network)),
            "upload": Schema.of(self.tensors, method.upload_names(network)),
            "download": Schema.of(self.tensors, method.download_names(network)),
            "personal": Schema.of(self.tensors, method.personal_names(network)),
        }

    @cached_property
    def shared(self) -> Schema:
        """The shared part under the federation's names: those of a modality have its name before them."""
        before = f"{self.modality}/" if self.modality else ""
        return Schema(tuple((before + name, shape) for name, shape in self.schemas["shared"].entries))

    def begin(
        self,
        request: TrainRequest,
        client: int,
        shared: Mapping[str, Tensor],
        store: PersonalStore,
        data: ClientData,
    ) -> LocalTask:
        """The client's work of the round, with the network as it starts from it."""
        download: Mapping[str, Tensor] = {}
        if client in request.downloads:
            download = self.schemas["download"].unpack(request.downloads[client])
        row = request.clients.index(client)
        device = device_of(self.network)
        start = self.classifiers_at_start(request.seed, client)
        task = LocalTask(
            network=self.network,
            data=data.train,
            active=request.active[row, : self.network.num_exits - 1].tolist(),
            download={name: t.to(device) for name, t in download.items()},
            budget=request.budget,
            rng=partial(rng_for, request.seed, request.server_round, client),
            private_rng=partial(store.private_rng, client),
            server_round=request.server_round,
            num_rounds=request.num_rounds,
            initial=OnDevice({**self.weights, **start}, device),
            augment=data.augment,
        )
        kept = store.load(client, request.versions[row]) or {}
        if task.budget.keep_momentum:
            task.momentum = without_prefix(kept, MOMENTUM)
        # A client may have held another part before: what it holds no longer stays away, what is new starts anew.
        same = {name for name in kept.keys() & self.tensors.keys() if kept[name].shape == self.tensors[name].shape}
        tensors = {**self.initial, **start, **shared, **{name: kept[name] for name in same}}
        self.put(task, self.method.receive(tensors, download, task.initial, data.train))
        offset = self.method.offset(data.train, self.network.num_classes)
        self.network.offset = None if offset is None else offset.to(device)
        return task

    def known_start(self, request: TrainRequest, client: int, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a client without a past would start this round from: the server can tell, from what it has sent.

        For updates since the common start: how far that is from it.
        """
        download: Mapping[str, Tensor] = {}
        if client in request.downloads:
            download = self.schemas["download"].unpack(request.downloads[client])
        initial = {**self.weights, **self.classifiers_at_start(request.seed, client)}
        start = self.method.receive({**self.initial, **initial, **shared}, download, initial)
        moved = {
            name: start[name.removeprefix(UPDATE)] - initial[name.removeprefix(UPDATE)]
            for name in start
            if name.startswith(UPDATE)
        }
        return {**start, **moved, **shared}

    def put(self, task: LocalTask, tensors: Mapping[str, Tensor]) -> None:
        """Give a task these tensors: the network's into the network, the others beside it, on its device."""
        self.network.load_state_dict({name: tensors[name] for name in self.weights})
        device = device_of(self.network)
        task.state = {name: tensor.to(device) for name, tensor in tensors.items() if name not in self.weights}

    def take(self, task: LocalTask) -> dict[str, Tensor]:
        """The tensors of a task; the network's are its own, not copies."""
        return {**self.network.state_dict(), **task.state}

    @contextmanager
    def deployed(self, task: LocalTask) -> Iterator[EarlyExitNetwork]:
        """Inside, the network is the client's personal one, ready to be used; outside, as it was."""
        tensors = self.take(task)
        personal = self.method.deploy(tensors)
        if personal is tensors:
            yield self.network
            return
        kept = snapshot(self.network)
        self.network.load_state_dict(personal)
        try:
            yield self.network
        finally:
            self.network.load_state_dict(kept)

    @cached_property
    def digest(self) -> str:
        """Fingerprint of all that."""
        return digest(*(self.schemas[kind] for kind in ("shared", "upload", "download", "personal")))


class Workplaces:
    """The workplaces of a process for one method: for clients that hold the whole network of a modality, and others.

    Attributes
    ----------
    wholes
        Those for whole networks, by modality; the one of ``""`` where there is one only.
    shared
        All that the federation shares: the shared parts of the modalities, one after the other.
    digest
        Fingerprint of what travels and what stays.
    """

    def __init__(
        self,
        networks: Networks,
        method: Method,
        weights: Mapping[str, Mapping[str, Tensor]],
        placement: Placement,
    ) -> None:
        for network in networks.values():
            method.check(network)
        self._placement = placement
        self.wholes = {name: Workplace(network, method, weights[name], name) for name, network in networks.items()}
        self.shared = Schema(tuple(entry for work in self.wholes.values() for entry in work.shared.entries))
        kinds = ("upload", "download", "personal")
        self.digest = digest(self.shared, *(work.schemas[kind] for work in self.wholes.values() for kind in kinds))
        self._parts: dict[tuple[str, Held], Workplace] = {}

    def of(self, modality: str, held: Held) -> Workplace:
        """For clients that hold so much of a modality's network."""
        whole = self.wholes[modality]
        if held == Held(whole.network.num_exits):
            return whole
        if (modality, held) not in self._parts:
            network = held.of(whole.network)
            if held.width < 1:
                self._placement.place(network)
            shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
            weights = {name: whole.weights[name][tuple(map(slice, shape))] for name, shape in shapes.items()}
            self._parts[modality, held] = Workplace(network, whole.method, weights, modality, held)
        return self._parts[modality, held]

    def initial(self) -> NDArray[np.float32]:
        """The shared part that a run starts from, flat."""
        return np.concatenate([work.schemas["shared"].pack(work.tensors) for work in self.wholes.values()])


class _Process:
    """What a process builds once for a run: the network, on its device, and the data of its clients.

    Where the device cannot be had, ``trouble`` says why: the node then answers, and none of its clients takes part.
    """

    def __init__(self, built: EarlyExitNetwork | Networks, placement: Placement) -> None:
        self.networks = networks_of(built)
        start_alike(self.networks)
        self.placement = placement
        self.weights = {
            name: {key: tensor.clone() for key, tensor in network.state_dict().items()}
            for name, network in self.networks.items()
        }
        self.trouble = ""
        try:
            for network in self.networks.values():
                placement.place(network)
        except ValueError as error:
            self.trouble = str(error)
        self.workplaces: dict[Any, Workplaces] = {}
        self.data: dict[int, ClientData] = {}


class _Order(NamedTuple):
    """What a message asks for, and what is needed for it."""

    work: Workplaces
    request: TrainRequest
    store: PersonalStore
    places: Mapping[int, Workplace]
    view: View
    tensors: Mapping[int, Mapping[str, Tensor]]  # shared part by client; of clients with one workplace, the same

    def shared(self, client: int) -> NDArray[np.float32]:
        """The client's shared part as it was sent, flat."""
        return self.view.part(self.request.shared, self.places[client].shared)


# One run at a time. It lives here, in the module, because the Simulation Engine sends the ClientApp itself, pickled,
# with every message: what the app object remembers is forgotten.
_PROCESSES: dict[Any, _Process] = {}


class _Node:
    def __init__(self, parts: Parts, keys: Keys, state_dir: Callable[[Context], str]) -> None:
        self.parts = parts
        self.state_dir = state_dir
        self.keys = keys
        self.token = secrets.token_hex(8)  # of this app; a pickled copy keeps it

    # --- messages ---

    def describe(self, message: Message, context: Context) -> Message:
        """Answer the strategy's first question: who is here, with which network and how much data?"""
        from cafe_flwr.cost import macs_per_exit  # the other messages' processes need none of it

        seed, method, settings = _method_of(message, self.keys)
        work = self._workplaces(context, seed, method, settings)
        here = _hosted(message, context, self.keys)
        process = self._process(context, seed)
        clients, sizes, problems, places = [], [], [], []
        macs: dict[int, list[int]] = {}  # by workplace
        for client in here:
            try:
                if process.trouble:
                    raise ValueError(process.trouble)
                place = self._place(client, work, message, context)
                data = self._data_of(client, context, seed, here)
                problems += [f"client {client} {note}" for note in check_data(data, place.network.num_classes)]
                for split in (data.train, data.calibration, data.test):
                    place.network.check_inputs(split.x)
                for counted in (work.wholes[place.modality], place):
                    if id(counted) not in macs:
                        network = copy.deepcopy(counted.network) if process.placement.compile else counted.network
                        macs[id(counted)] = macs_per_exit(network, data.train.x[:1].to(device_of(network)))
            except Exception as error:
                logger.warning("client %d cannot serve: %s", client, error, exc_info=True)
                problems.append(f"client {client} is left out: {error}")
                continue
            clients.append(client)
            sizes.append(len(data.train))
            places.append(place)
        kinds = [_kind_of(place, macs[id(place)]) for place in places]
        alike = not any(kind.name for kind in kinds)
        different = list(dict.fromkeys(kinds))
        largest = max(work.wholes.values(), key=lambda whole: whole.network.num_exits)
        info = NodeInfo(
            version=__version__,
            clients=clients,
            num_examples=sizes,
            problems=problems,
            num_nodes=0 if "clients" in context.node_config else int(context.node_config.get("num-partitions", 0)),
            digest=work.digest,
            shared=work.shared,
            upload=largest.schemas["upload"],
            download=largest.schemas["download"],
            num_exits=largest.network.num_exits,
            num_parameters=_num_parameters(largest.network),
            macs=macs.get(id(largest), [0] * largest.network.num_exits),
            name=name_of(context.node_config),
            kinds=[] if alike else different,
            kind_of=[] if alike else [different.index(kind) for kind in kinds],
        )
        return Message(info.to_content(self.keys), reply_to=message)

    def initial(self, message: Message, context: Context) -> Message:
        """The shared parameters every run of this seed starts from, flat."""
        flat = self._workplaces(context, *_method_of(message, self.keys)).initial()
        return Message(RecordDict({self.keys.arrays: ArrayRecord({FLAT: Array(flat)})}), reply_to=message)

    def calibrate(self, message: Message, context: Context) -> Message:
        """A step of calibration (cafe_flwr.server.calibration) for the clients asked for."""
        from cafe_flwr.client.calibration import (
            NodeCalibration,  # SciPy takes longer to import than a message to answer
        )

        seed = _method_of(message, self.keys)[0]
        here = _hosted(message, context, self.keys)
        side = NodeCalibration(personal_folder(context, self.state_dir(context)), self._process(context, seed).networks)
        return side.answer(message, self.keys, lambda c: self._data_of(c, context, seed, here).calibration)

    def train(self, message: Message, context: Context) -> Message:
        """Evaluate, train and evaluate again every client asked for; one reply for all."""
        order = self._read(message, context)
        work, request, store, places = order.work, order.request, order.store, order.places
        here = _hosted(message, context, self.keys)
        reports: list[ClientReport] = []
        updates: list[NDArray[np.float32]] = []
        failures: dict[int, str] = {}
        for client in request.clients:
            short_of_memory = False
            try:
                data = self._data_of(client, context, request.seed, here)
                with store.locked(client):
                    report, update = _train_client(order, client, data)
                reports.append(report)
                updates.append(update)
            except Exception as error:
                logger.warning("client %d failed in round %d", client, request.server_round, exc_info=True)
                network = places[client].network
                failures[client] = reason_of(error, device_of(network))
                short_of_memory |= is_out_of_memory(error)
            if short_of_memory:  # here, where the error no longer holds on to what it was about
                free_memory(network)
        view = View(work.shared, [places[report.client].shared for report in reports])
        weights = [1 if request.plain_mean else report.num_examples for report in reports]
        if len(updates) == 1:
            total: NDArray[Any] = updates[0]
        else:
            total = np.zeros(view.size)
            for part, update, weight in zip(view.parts, updates, weights, strict=True):
                view.add(total, part, weighted(update, weight))
        reply = TrainReply(
            server_round=request.server_round,
            digest=request.digest,
            shared=total,
            reports=reports,
            failures=failures,
            wire=request.wire,
            notes=store.notes,
            counted=view.weight(weights),
        )
        received = order.view.part(request.shared, view.schema)
        return Message(reply.to_content(self.keys, received), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Evaluate the personal networks with the shared part sent; after the last round, publish them."""
        order = self._read(message, context)
        request, store = order.request, order.store
        config = message.content[self.keys.config]
        here = _hosted(message, context, self.keys)
        reports: list[FinalReport] = []
        failures: dict[int, str] = {}
        for client in request.clients:
            work = order.places[client]
            try:
                data = self._data_of(client, context, request.seed, here)
                with store.locked(client):
                    task = work.begin(request, client, order.tensors[client], store, data)
                    with seeded(int(task.rng("torch").integers(2**63))):
                        if config.get("publish"):
                            work.method.finish(task)
                    _check_finite(work.take(task))
                    with work.deployed(task) as network:
                        report, temperatures = final_report(client, network, data, task.steps)
                        if config.get("publish"):
                            facts = {
                                "run": request.run,
                                "round": request.server_round,
                                "method": request.method,
                                "digest": request.digest,
                                "seed": request.seed,
                                **({"modality": work.modality} if work.modality else {}),
                                **({"width": work.held.width} if work.held and work.held.width < 1 else {}),
                                **facts_of(network, data, report, temperatures),
                                "context": {
                                    "run_config": dict(context.run_config),
                                    "node_config": dict(context.node_config),
                                },
                            }
                            store.publish(client, with_offset(network), facts)
                reports.append(report if request.privacy.report_metrics else report.withheld())
            except Exception as error:
                logger.warning("client %d could not be evaluated", client, exc_info=True)
                failures[client] = reason_of(error, device_of(work.network))
        return Message(EvaluationReply(reports, failures, store.notes).to_content(self.keys), reply_to=message)

    # --- what lives as long as the process ---

    def _read(self, message: Message, context: Context) -> _Order:
        work = self._workplaces(context, *_method_of(message, self.keys))
        places = {c: self._place(c, work, message, context) for c in clients_in(message, self.keys)}
        view = View(work.shared, [place.shared for place in places.values()])
        downloads = {client: place.schemas["download"].size for client, place in places.items()}
        request = TrainRequest.from_message(message, self.keys, shared_size=view.size, download_size=downloads)
        if request.digest != work.digest:
            raise ValueError(
                f"the server's network has fingerprint {request.digest}, this node's {work.digest}: "
                "network, number of classes and method must be the same on both"
            )
        if trouble := self._process(context, request.seed).trouble:
            raise ValueError(trouble)
        request = replace(request, privacy=stricter(request.privacy, context.node_config))
        folder = personal_folder(context, self.state_dir(context))
        store = PersonalStore(folder, request.run, message.metadata.created_at)
        different = {id(place): place for place in places.values()}
        unpacked = {
            key: place.schemas["shared"].unpack(view.part(request.shared, place.shared))
            for key, place in different.items()
        }
        return _Order(work, request, store, places, view, {c: unpacked[id(place)] for c, place in places.items()})

    def _process(self, context: Context, seed: int) -> _Process:
        key = (self.token, seed, *sorted(context.run_config.items()))
        if key not in _PROCESSES:
            with seeded(seed):
                placement = Placement.of(context.run_config, context.node_config)
                process = _Process(self.parts.build_network(context), placement)
            _PROCESSES.clear()
            _PROCESSES[key] = process
        return _PROCESSES[key]

    def _workplaces(self, context: Context, seed: int, method: str, settings: Mapping[str, Any]) -> Workplaces:
        process = self._process(context, seed)
        key = (method, *sorted(settings.items()))
        if key not in process.workplaces:
            if method not in METHODS:
                raise ValueError(f"this node knows no method {method!r}, only {', '.join(METHODS)}")
            process.workplaces[key] = Workplaces(
                process.networks, method_from(method, settings), process.weights, process.placement
            )
        return process.workplaces[key]

    def _place(self, client: int, work: Workplaces, message: Message, context: Context) -> Workplace:
        """Where a client works: with the network of its modality, as much of it as it can hold."""
        modality = next(iter(work.wholes))
        if len(work.wholes) > 1:
            if self.parts.modality_of is None:
                known = ", ".join(work.wholes)
                raise ValueError(f"there are networks for {known}: say which client has which (modality_of)")
            modality = self.parts.modality_of(client, context)
            if modality not in work.wholes:
                raise ValueError(f"its modality is {modality!r}, there are networks for {', '.join(work.wholes)}")
        config = cast(Mapping[str, Any], message.content[self.keys.config])
        held = held_by(
            client,
            context.node_config,
            context.run_config,
            _num_clients(config),
            work.wholes[modality].network.num_exits,
            int(config["seed"]),
        )
        return work.of(modality, held)

    def _data_of(self, client: int, context: Context, seed: int, here: Sequence[int]) -> ClientData:
        if client not in here:
            raise ValueError(f"this node does not host client {client}, only {', '.join(map(str, here)) or 'none'}")
        data = self._process(context, seed).data
        if client not in data:
            with seeded(int(rng_for(seed, 0, client, "data").integers(2**63))):
                data[client] = self.parts.load_data(client, context)
        return data[client]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator seeded inside, and as before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _no_choice(context: Context) -> str:
    return ""


def _method_of(message: Message, keys: Keys) -> tuple[int, str, dict[str, Any]]:
    """Seed, name of the method and its settings, as every message to a node carries them."""
    config = cast(Mapping[str, Any], record_of(message, keys.config, ConfigRecord))
    check_server(config)
    return int(config["seed"]), str(config["method"]), prefixed(config, "method.")


def _hosted(message: Message, context: Context, keys: Keys) -> list[int]:
    """Clients this node hosts; in a simulation the message says how many there are."""
    return hosted(context.node_config, _num_clients(message.content[keys.config]))


def _num_clients(config: Any) -> int | None:
    """How many clients there are, where the message says so: in a simulation."""
    return int(config["num-clients"]) if "num-clients" in config else None


def _kind_of(place: Workplace, macs: Sequence[int]) -> Kind:
    """What clients of a workplace hold, as the server is told."""
    depth, part = place.network.num_exits, ""
    if place.held:
        width = f" at width {place.held.width:g}" if place.held.width < 1 else ""
        part = f"{depth} exit{'s' * (depth > 1)}{width}"
    return Kind(
        name=", ".join(filter(None, (place.modality, part))),
        num_exits=depth,
        num_parameters=_num_parameters(place.network),
        macs=tuple(macs),
        shared=place.shared,
        upload=place.schemas["upload"],
        download=place.schemas["download"],
    )


def _num_parameters(network: EarlyExitNetwork) -> int:
    return sum(tensor.numel() for tensor in network.state_dict().values())


def check_data(data: ClientData, num_classes: int) -> list[str]:
    """What is unusual about a client's data, in words; ValueError if it cannot take part."""
    if not len(data.train):
        raise ValueError("its training split is empty")
    for name in ("train", "calibration", "test"):
        x, y = getattr(data, name)[:2]
        if y.dim() != 1 or len(x) != len(y):
            raise ValueError(
                f"its {name} split has inputs of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)}: every "
                "input needs one label"
            )
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
            raise ValueError(
                f"its {name} split has labels {int(y.min())}..{int(y.max())}, expected 0..{num_classes - 1}"
            )
    if data.train.x.dtype not in (torch.float32, torch.uint8, torch.int64) or data.train.y.dtype != torch.int64:
        raise ValueError(
            "its inputs must be float32 (pixels of images: uint8; tokens of texts: int64) and its labels int64, got "
            f"{data.train.x.dtype} and {data.train.y.dtype}"
        )
    notes = []
    if len(data.train.y.unique()) == 1:
        notes.append("has a single class in its training split; it takes part")
    if not len(data.test):
        notes.append("has an empty test split; it takes part, but its accuracy is unknown")
    return notes


def _train_client(order: _Order, client: int, data: ClientData) -> tuple[ClientReport, NDArray[np.float32]]:
    """One client's round; its new personal state is on disk when this returns, and only then.

    Returns the report and the client's shared part, flat.
    """
    work, request, store = order.places[client], order.request, order.store
    shared = order.tensors[client]
    version = request.versions[request.clients.index(client)]
    store.check_current(client, request.server_round)
    task = work.begin(request, client, shared, store, data)
    start = time.perf_counter()
    tells = request.privacy.report_metrics
    before = _evaluate(work, task, data, request.evaluate and tells)
    evaluated = time.perf_counter()
    with seeded(int(task.rng("torch").integers(2**63))):  # for networks that draw, e.g. dropout
        result = work.method.train(task)
    trained = time.perf_counter()
    after = _evaluate(work, task, data, request.evaluate and tells)
    done = time.perf_counter()
    tensors = work.take(task)
    momentum = {MOMENTUM + name: tensor for name, tensor in task.momentum.items()}
    _check_finite({**tensors, **momentum})
    personal = {name: tensors[name].cpu() for name in work.schemas["personal"].names}
    personal |= {name: tensor.cpu() for name, tensor in momentum.items()}
    sent = _released(order, client, tensors, shared)
    store.save(client, request.server_round, personal, base=version, resumable_from=request.resumable_from)
    similarity = [0.0] * (work.network.num_exits - 1)
    if tells:
        similarity = result.similarity or classifier_similarity(work.network)
    report = ClientReport(
        client=client,
        num_examples=len(data.train),
        test_examples=len(data.test) if tells else 0,
        train_loss=result.loss if tells else math.nan,
        local_steps=task.steps,
        similarity=similarity,
        before=before,
        after=after,
        seconds_train=trained - evaluated,
        seconds_evaluate=(evaluated - start) + (done - trained),
        upload=sent["upload"],
    )
    return report, sent["shared"]


def _released(
    order: _Order, client: int, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]
) -> dict[str, NDArray[np.float32]]:
    """The client's shared part and its upload, flat, as they leave it: clipped and noised if the request says so."""
    work, request, store = order.places[client], order.request, order.store
    flat = {kind: work.schemas[kind].pack(tensors) for kind in ("shared", "upload")}
    privacy = request.privacy
    if privacy.on:
        known = work.known_start(request, client, shared)
        for kind, values in flat.items():
            purpose = f"uplink {kind} {request.run} {request.server_round}"
            flat[kind] = release(
                values,
                work.schemas[kind].pack(known),
                privacy.clip_of(kind),
                privacy.noise_multiplier,
                lambda content, purpose=purpose: store.private_rng(client, f"{purpose} {content}"),  # type: ignore[misc]
            )
    if request.wire == "float16":
        work.schemas["shared"].check_half(flat["shared"] - order.shared(client), "the update")
        work.schemas["upload"].check_half(flat["upload"], "the upload")
    return flat


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"training ended with NaN or infinite values in {', '.join(broken[:3])}: lower learning-rate")


def with_offset(network: EarlyExitNetwork) -> dict[str, Tensor]:
    """The network's tensors, on the CPU, with what is added to its logits in the biases of the classifiers."""
    tensors = {name: tensor.cpu() for name, tensor in snapshot(network).items()}
    if network.offset is not None:
        for k in range(network.num_exits):
            tensors[network.head_names(k)[1]] += network.offset.cpu()
    return tensors


def _evaluate(work: Workplace, task: LocalTask, data: ClientData, wanted: bool) -> ExitMetrics:
    if not wanted:
        return ExitMetrics.unknown(work.network.num_exits)
    with work.deployed(task) as network:
        return evaluate(network, data.test)


def facts_of(
    network: EarlyExitNetwork, data: ClientData, report: FinalReport, temperatures: Sequence[float]
) -> dict[str, Any]:
    """What is told of a published network beside it: what it takes and gives, and how good it is."""
    return {
        "num_exits": network.num_exits,
        "num_classes": network.num_classes,
        "input_shape": list(data.train.x.shape[1:]),
        "personal": network.personal_names(),
        "fingerprint": fingerprint_of(with_offset(network)),
        "accuracy_per_exit": report.exits.accuracy,
        "temperatures": list(temperatures),
    }


def final_report(
    client: int, network: EarlyExitNetwork, data: ClientData, local_steps: int
) -> tuple[FinalReport, list[float]]:
    """Evaluation of a personal network, and the temperature of each exit, fitted on the calibration split."""
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
    return report, temperatures
