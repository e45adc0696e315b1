"""The model of a client: network and method of a run, and how its tensors get into a task and out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

from torch import Tensor

from cafe_flwr.core.random import rng_for
from cafe_flwr.core.schema import Schema, schema_hash
from cafe_flwr.data.split import ClientData
from cafe_flwr.methods.base import Method
from cafe_flwr.methods.client import LocalTask, without_prefix
from cafe_flwr.methods.starts import classifier_start
from cafe_flwr.methods.whole_model import UPDATE
from cafe_flwr.networks.capacity import Capacity
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.placement import OnDevice, device_of
from cafe_flwr.networks.weights import names_of_each, once
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.training.loop import snapshot
from cafe_flwr.wire.train import TrainRequest

MOMENTUM = "optimizer/"  # before the names of what the optimiser remembers, among a client's personal tensors
KINDS = ("shared", "upload", "download", "personal")  # of tensors: what travels, and what stays
T = TypeVar("T")


@dataclass(frozen=True)
class ClientModel:
    """The network and the method of a run; built once per process and kind of client.

    Clients of a kind take turns with one network, unless each gets a copy of its own.
    """

    network: EarlyExitNetwork
    method: Method
    weights: Mapping[str, Tensor]
    modality: str = ""
    held: Capacity | None = None  # all, if None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Initial values of all of a client's tensors: the network's, and those the method keeps beside them."""
        self.network.load_state_dict(self.weights)  # undoes earlier training in this process
        extra = {name: t.cpu() for name, t in self.method.extra_tensors(self.network).items()}
        assert not extra.keys() & self.weights.keys()
        return {**self.weights, **extra}

    @cached_property
    def initial(self) -> dict[str, Tensor]:
        """Initial values of the tensors that are not shared."""
        shared = set(self.schemas["shared"].names)
        return {name: tensor for name, tensor in self.tensors.items() if name not in shared}

    def classifiers_at_start(self, seed: int, client: int) -> dict[str, Tensor]:
        """Initial personal classifiers of the client, by name; empty where they start as they were built."""
        if self.method.classifier_start == "built":
            return {}
        personal = self.spread(dict.fromkeys(self.method.personal_names(self.network)))
        others = self.network.tied_classifiers()  # start as built: zeros, say, would undo an embedding
        names = [name for name in self.network.classifier_names() if name in personal and name not in others]
        entries = Schema.of(self.weights, names).entries
        return self.spread(classifier_start(entries, self.method.classifier_start, seed, client))

    @cached_property
    def schemas(self) -> dict[str, Schema]:
        """Schemas of the tensors that travel and of those that stay, by kind."""
        names = {kind: getattr(self.method, f"{kind}_names")(self.network) for kind in KINDS}
        return {kind: Schema.of(self.tensors, once(self.network, names[kind])) for kind in KINDS}

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        return names_of_each(self.network)

    def spread(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """These tensors under every name that they have in the network, as only one of tied names travels."""
        return {other: tensor for name, tensor in tensors.items() for other in self._names.get(name, [name])}

    def settled(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``before`` with what is new ``after``; where one of tied names is new, the others get its tensor."""
        new = {name: tensor for name, tensor in after.items() if tensor is not before.get(name)}
        return {**before, **self.spread(new)}

    @cached_property
    def shared(self) -> Schema:
        """The shared part under the federation's names, which begin with the modality, if any."""
        before = f"{self.modality}/" if self.modality else ""
        return Schema(tuple((before + name, shape) for name, shape in self.schemas["shared"].entries))

    def begin(
        self,
        request: TrainRequest,
        client: int,
        shared: Mapping[str, Tensor],
        store: PersonalStore,
        data: ClientData,
        *,
        apart: bool = False,
    ) -> LocalTask:
        """The client's task of the round, with the network as it starts; ``apart``: with a copy of the network."""
        network = copy.deepcopy(self.network) if apart else self.network
        download = self._download(request, client)
        row = request.clients.index(client)
        device = device_of(network)
        start = self.classifiers_at_start(request.seed, client)
        task = LocalTask(
            network=network,
            data=data.train,
            active=request.active[row, : network.num_exits - 1].tolist(),
            download={name: t.to(device) for name, t in self.spread(download).items()},
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
        own = self._own(kept, partial(store.note, client))
        tensors = {**self.initial, **start, **self.spread(shared), **self.spread(own)}
        self.put(task, self.settled(tensors, self.method.receive(tensors, download, task.initial, data.train)))
        offset = self.method.offset(data.train, network.num_classes)
        network.offset = None if offset is None else offset.to(device)
        return task

    def _own(self, kept: Mapping[str, Tensor], note: Callable[[str], None]) -> dict[str, Tensor]:
        """What the client still holds of the tensors that it kept.

        A client may have held another part before: what it no longer holds is dropped, what is new starts anew; both
        are noted, but not what earlier versions kept of the network although it is no weight.
        """
        entries = dict(self.schemas["personal"].entries)
        mine = {name: t for name, t in kept.items() if not name.startswith(MOMENTUM)}
        own = {
            name: mine[name]
            for name, shape in entries.items()
            if name in mine
            and tuple(mine[name].shape) == tuple(shape)
            and mine[name].is_floating_point() == self.tensors[name].is_floating_point()
        }
        dropped = [name for name in mine if name not in own and (name in entries or name not in self.weights)]
        anew = [name for name in entries if name not in own] if mine else []
        if dropped:
            note(f"of its state, what its network has not, or in another shape or type, is not used: {_some(dropped)}")
        if anew:
            note(f"what its state lacks starts anew: {_some(anew)}")
        return own

    def _download(self, request: TrainRequest, client: int) -> dict[str, Tensor]:
        """What the server sent to this client alone, by name; empty if nothing."""
        if client not in request.downloads:
            return {}
        return self.schemas["download"].unpack(request.downloads[client])

    def known_start(self, request: TrainRequest, client: int, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a client without personal state would start this round from, which the server can work out, too.

        Tensors that are updates hold the difference between this and the common start.
        """
        initial = {**self.weights, **self.classifiers_at_start(request.seed, client)}
        before = {**self.initial, **initial, **self.spread(shared)}
        start = self.settled(before, self.method.receive(before, self._download(request, client), initial))
        moved = {
            name: start[name.removeprefix(UPDATE)] - initial[name.removeprefix(UPDATE)]
            for name in start
            if name.startswith(UPDATE)
        }
        return {**start, **moved, **self.spread(shared)}

    def put(self, task: LocalTask, tensors: Mapping[str, Tensor]) -> None:
        """Load these tensors into a task: the network's into its network, the others into its state, on its device."""
        task.network.load_state_dict({name: tensors[name] for name in self.weights})
        device = device_of(task.network)
        task.state = {name: tensor.to(device) for name, tensor in tensors.items() if name not in self.weights}

    def take(self, task: LocalTask) -> dict[str, Tensor]:
        """The tensors of a task; the network's are its own, not copies."""
        return {**task.network.state_dict(), **task.state}

    @contextmanager
    def deployed(self, task: LocalTask) -> Iterator[EarlyExitNetwork]:
        """Turns the task's network into the client's personal one inside the block."""
        tensors = self.take(task)
        personal = self.method.deploy(tensors)
        if personal is tensors:
            yield task.network
            return
        kept, settled = snapshot(task.network), self.settled(tensors, personal)
        task.network.load_state_dict({name: settled[name] for name in self.weights})
        try:
            yield task.network
        finally:
            task.network.load_state_dict(kept)

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the schemas."""
        return schema_hash(*(self.schemas[kind] for kind in KINDS))


def _some(names: Sequence[str]) -> str:
    """Up to three names, and how many others there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
