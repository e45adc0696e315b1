"""What a client process builds once for a run, and the node's state while it answers a message."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from numpy.typing import NDArray

from cafe_flwr.client.capacity import held_by
from cafe_flwr.client.model import ClientModel
from cafe_flwr.client.node_bounds import NodeBounds
from cafe_flwr.client.node_config import hosted
from cafe_flwr.core.random import rng_for, seeded
from cafe_flwr.core.schema import Schema, schema_hash
from cafe_flwr.data.split import ClientData
from cafe_flwr.methods.base import Method
from cafe_flwr.methods.registry import METHODS, method_from
from cafe_flwr.networks.capacity import Capacity, Networks, networks_of, start_alike
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.placement import Placement
from cafe_flwr.networks.weights import leading
from cafe_flwr.personal.store import personal_folder
from cafe_flwr.wire.codec import check_server, prefixed, record_of
from cafe_flwr.wire.describe import QUERY
from cafe_flwr.wire.keys import Keys
from cafe_flwr.wire.reader import read

BuildNetwork = Callable[[Context], EarlyExitNetwork | Networks]
LoadData = Callable[[int, Context], ClientData]
ModalityOf = Callable[[int, Context], str]


class Parts(NamedTuple):
    """The functions that a ready ClientApp was made from."""

    build_network: BuildNetwork
    load_data: LoadData
    modality_of: ModalityOf | None = None


class ProcessCache:
    """What a process builds once for a run: networks on their device, models made of them, and clients' data.

    Attributes
    ----------
    trouble
        Why the device is not available, empty if it is: then the node answers, but none of its clients takes part.
    wholes
        Models of whole networks by modality, ``""`` if there is only one.
    shared
        The federation's shared part: those of the modalities, one after the other.
    digest
        Fingerprint of what travels and what stays.
    data
        Data loaded so far, by client.
    """

    def __init__(self, built: EarlyExitNetwork | Networks, method: Method, placement: Placement) -> None:
        self.networks = networks_of(built)
        start_alike(self.networks)
        self.method, self.placement = method, placement
        weights = {
            name: {key: tensor.clone() for key, tensor in network.state_dict().items()}
            for name, network in self.networks.items()
        }
        self.trouble = ""
        try:
            for network in self.networks.values():
                placement.place(network)
        except ValueError as error:
            self.trouble = str(error)
        for network in self.networks.values():
            method.check(network)
        self.wholes = {name: ClientModel(net, method, weights[name], name) for name, net in self.networks.items()}
        self.shared = Schema(tuple(entry for whole in self.wholes.values() for entry in whole.shared.entries))
        kinds = ("upload", "download", "personal")
        personal = (whole.schemas[kind] for whole in self.wholes.values() for kind in kinds)
        self.digest = schema_hash(self.shared, *personal)
        self.data: dict[int, ClientData] = {}
        self._parts: dict[tuple[str, Capacity], ClientModel] = {}

    def model(self, modality: str, held: Capacity) -> ClientModel:
        """The model of clients that hold this much of a modality's network."""
        whole = self.wholes[modality]
        if held == Capacity(whole.network.num_exits):
            return whole
        if (modality, held) not in self._parts:
            network = held.of(whole.network)
            if held.width < 1:
                self.placement.place(network)
            own = {name: tensor.cpu().clone() for name, tensor in network.state_dict().items()}
            weights = {**own, **leading(whole.weights, own)}
            self._parts[modality, held] = ClientModel(network, whole.method, weights, modality, held)
        return self._parts[modality, held]

    @property
    def largest(self) -> ClientModel:
        """The model of the whole network with the most exits."""
        return max(self.wholes.values(), key=lambda whole: whole.network.num_exits)

    def initial(self) -> NDArray[np.float32]:
        """The shared part that a run starts from, flat."""
        return np.concatenate([whole.schemas["shared"].pack(whole.tensors) for whole in self.wholes.values()])


# Holds one run at a time. It is a module global because the Simulation Engine sends a pickled ClientApp with every
# message, so that the app object itself cannot remember anything.
_PROCESSES: dict[Any, ProcessCache] = {}


class Node:
    """The node of a ClientApp: its parts, record names, and the folder of its clients' personal state."""

    def __init__(self, parts: Parts, keys: Keys, state_dir: Callable[[Context], str]) -> None:
        self.parts = parts
        self.keys = keys
        self.state_dir = state_dir
        self.token = secrets.token_hex(8)  # of the app; a pickled copy keeps it


class NodeContext:
    """The node as it answers a message: ``config`` are the message's settings, ``seed`` is that of the run.

    ValueError for a message of another protocol, or with senseless values.
    """

    def __init__(self, node: Node, message: Message, context: Context) -> None:
        self.node, self.message, self.context = node, message, context
        self.config: Mapping[str, Any] = record_of(message, node.keys.config, ConfigRecord)
        check_server(self.config)
        self.seed: int = read(self.config, QUERY)["seed"]

    @cached_property
    def process(self) -> ProcessCache:
        """What the process has built for this run and method."""
        parts, context = self.node.parts, self.context
        name, settings = str(self.config["method"]), prefixed(self.config, "method.")
        key = (self.node.token, self.seed, name, *sorted(settings.items()), *sorted(context.run_config.items()))
        if key not in _PROCESSES:
            if name not in METHODS:
                raise ValueError(f"this node knows no method {name!r}, only {', '.join(METHODS)}")
            with seeded(self.seed):
                placement = Placement.of(context.run_config, context.node_config)
                cache = ProcessCache(parts.build_network(context), method_from(name, settings), placement)
            _PROCESSES.clear()
            _PROCESSES[key] = cache
        return _PROCESSES[key]

    @property
    def num_clients(self) -> int | None:
        """Number of clients if the message has it, as in a simulation; ValueError if the node takes fewer."""
        if "num-clients" not in self.config:
            return None
        return NodeBounds.of(self.context.node_config).check_clients(self.config["num-clients"])

    @cached_property
    def hosted(self) -> list[int]:
        """Clients that the node hosts (:func:`cafe_flwr.client.node_config.hosted`)."""
        return hosted(self.context.node_config, self.num_clients)

    @property
    def state_folder(self) -> Path:
        """Folder of the clients' personal state."""
        return personal_folder(self.context, self.node.state_dir(self.context))

    def model(self, client: int) -> ClientModel:
        """The model of a client: the part that it can hold of its modality's network."""
        wholes = self.process.wholes
        modality = next(iter(wholes))
        if len(wholes) > 1:
            if self.node.parts.modality_of is None:
                known = ", ".join(wholes)
                raise ValueError(f"there are networks for {known}: say which client has which (modality_of)")
            modality = self.node.parts.modality_of(client, self.context)
            if modality not in wholes:
                raise ValueError(f"its modality is {modality!r}, there are networks for {', '.join(wholes)}")
        held = held_by(
            client,
            self.context.node_config,
            self.context.run_config,
            self.num_clients,
            wholes[modality].network.num_exits,
            self.seed,
        )
        return self.process.model(modality, held)

    def data(self, client: int) -> ClientData:
        """A client's data; ValueError if the node does not host it."""
        if client not in self.hosted:
            here = ", ".join(map(str, self.hosted)) or "none"
            raise ValueError(f"this node does not host client {client}, only {here}")
        data = self.process.data
        if client not in data:
            with seeded(int(rng_for(self.seed, 0, client, "data").integers(2**63))):
                data[client] = self.node.parts.load_data(client, self.context)
        return data[client]
