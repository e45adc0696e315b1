"""One client's published network and its data on its own node, without the server and the results folder.

Both are built again from ``client-<partition>.json`` beside the network: it has the settings of the run and the node's
own node-config, as they were when the network was published.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from cafe_flwr.client.app import PARTS
from cafe_flwr.client.description import check_fits
from cafe_flwr.client.process import Parts
from cafe_flwr.core.random import rng_for, seeded
from cafe_flwr.data import digits
from cafe_flwr.data.federation import FederatedData
from cafe_flwr.data.options import Data
from cafe_flwr.data.own import load_own
from cafe_flwr.data.split import ClientData
from cafe_flwr.networks.capacity import Networks
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.personal.published import PersonalNetwork, clients_of, pixels_of, read_metadata, read_personal


def parts_of(name: str) -> Parts:
    """The two functions that the ClientApp of this name (``"package.module:app"``) was made from.

    As in Flower, the module is looked for in the current folder first.

    Raises ValueError if there is no such app, or it was not made by :func:`cafe_flwr.make_client_app`.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"an app is named 'module:attribute', as in a Flower app's pyproject.toml, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        app = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} cannot be loaded from {os.getcwd()}: {error}") from error
    parts: Parts | None = getattr(app, PARTS, None)
    if parts is None:
        raise ValueError(f"{name} was not made by cafe_flwr.make_client_app: in Python, give its two functions (Parts)")
    return parts


@dataclass(frozen=True)
class Source:
    """Where a client's network and data come from.

    Attributes
    ----------
    run_config
        Settings of the run, in kebab-case.
    node_config
        Of the node; its ``data-dir`` says where the client's own data is.
    seed
        Of the run.
    parts
        Functions of a project of one's own that build network and data; by default the settings do.
    data_dir
        Folder (or parquet file) of the client's data, if it is not where the run found it.
    """

    run_config: Mapping[str, Any]
    node_config: Mapping[str, Any]
    seed: int = 0
    parts: Parts | None = None
    data_dir: Path | None = None

    def network(self) -> EarlyExitNetwork | Networks:
        """The network, by modality if there are several, with the initial weights of the run."""
        from cafe_flwr.app.parts import build_networks

        moved = self._moved
        with seeded(self.seed):
            if self.parts:
                return self.parts.build_network(self._context(moved))
            return build_networks(moved._settings, moved.node_config)

    def data(self, client: int) -> ClientData:
        """A client's data: as in the run, or from ``data_dir``.

        ``data_dir`` holds the client's own data if the run's data set was embedded or its clients' own (``"local"``);
        else (``"local:<path>"``, copies of the hub's) the data set of the run, which is dealt out as it was.
        """
        moved = self._moved
        with seeded(int(rng_for(self.seed, 0, client, "data").integers(2**63))):
            if self.parts:
                return self.parts.load_data(client, self._context(moved))
            if self.data_dir and self.run_config.get("dataset") in digits.NUM_CLASSES:
                return self._own(self.data_dir, client)
            return moved._federation(client).load(client)

    def _own(self, path: Path, client: int) -> ClientData:
        """Data of the client's own, in the classes of an embedded data set."""
        options = replace(self._settings.of(Data), validation_share=0.0)
        shape = (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
        return load_own(path, client, options, class_names=self.class_names, shape=shape, seed=self.seed)

    def _federation(self, client: int) -> FederatedData:
        from cafe_flwr.app.parts import federation

        settings = self._settings
        if settings.dataset != "local" and client >= settings.num_clients:
            advice = ": say where its own data is (--data)" if settings.dataset in digits.NUM_CLASSES else ""
            raise ValueError(
                f"the data set {settings.dataset!r} is dealt out to clients 0..{settings.num_clients - 1}, and client "
                f"{client} is none of them{advice}"
            )
        if self.data_dir and settings.dataset == "local":
            return federation(settings, {**self.node_config, "clients": str(client)})
        return federation(settings, self.node_config)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; none for a project of one's own."""
        from cafe_flwr.app.parts import federation

        return () if self.parts else federation(self._moved._settings, self._moved.node_config).class_names

    @property
    def pixels(self) -> tuple[float, float] | None:
        """Mean and standard deviation of pixels in 0..1; None for a project of one's own."""
        return None if self.parts else pixels_of("local" if self.data_dir else self.run_config.get("dataset", ""))

    @cached_property
    def _moved(self) -> Source:
        """This source with the data where it is now."""
        if not self.data_dir:
            return self
        folder = str(self.data_dir.expanduser().resolve())
        if not self.parts and str(self.run_config.get("dataset", "")).startswith("local:"):
            return replace(self, run_config={**self.run_config, "dataset": f"local:{folder}"})
        return replace(self, node_config={**self.node_config, "data-dir": folder})

    @property
    def _settings(self) -> Any:
        from cafe_flwr.settings import Settings

        return Settings.from_run_config(self.run_config)

    def _context(self, source: Source) -> Context:
        return Context(0, 0, dict(source.node_config), RecordDict(), dict(source.run_config))


@dataclass(frozen=True)
class NodeNetwork:
    """A client's published network in its node's state folder; the same commands work on it as on a results folder.

    Parameters
    ----------
    networks, client
        The node's state folder, with ``client-<client>.safetensors`` and ``.json``.
    parts, data_dir
        As for :class:`Source`.
    node_config
        Replaces entries of the node-config that was published.

    Raises
    ------
    ValueError
        If the client has no published network there, or it does not say how it was built.
    """

    networks: Path
    client: int
    parts: Parts | None = None
    data_dir: Path | None = None
    node_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_published(self.networks, self.client)
        if "context" not in self.metadata:
            raise ValueError(
                f"{self.networks / f'client-{self.client}.json'} does not say with which settings its network was "
                "made: it was published by an earlier version. Use the commands on the results folder of the run"
            )

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Contents of ``client-<client>.json``."""
        return read_metadata(self.networks, self.client)

    @property
    def name(self) -> str:
        """The client, and the name of its run if it has one."""
        return f"client {self.client} of {self.run_config.get('name') or 'the federation'}"

    @property
    def clients(self) -> list[int]:
        """The one client."""
        return [self.client]

    @property
    def run_config(self) -> Mapping[str, Any]:
        """Settings of the run, in kebab-case."""
        from cafe_flwr.settings import todays

        return todays(self.metadata["context"]["run_config"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or their numbers if they have no names."""
        names = tuple(self.metadata.get("class_names", ())) or self._source.class_names
        return names or tuple(map(str, range(int(self.metadata["num_classes"]))))

    @property
    def pixels(self) -> tuple[float, float] | None:
        """Mean and standard deviation that images in 0..1 were normalised by; None for a project of one's own."""
        return self._source.pixels

    def personal(self, client: int) -> PersonalNetwork:
        """The client's network."""
        self._check(client)
        return read_personal(self.networks, client, self._source.network())

    def data(self, client: int) -> ClientData:
        """The client's data, checked against what its network takes."""
        self._check(client)
        data = self._source.data(client)
        check_fits(data, self.metadata["input_shape"], int(self.metadata["num_classes"]))
        return data

    def output(self, name: str) -> Path:
        """Path of a file in the state folder, with the client's number before it, since a node may host several."""
        return self.networks / f"client-{self.client}.{name}"

    @cached_property
    def _source(self) -> Source:
        context = self.metadata["context"]
        node_config = {**context["node_config"], **(self.node_config or {})}
        found = Path(context["data_dir"]) if context.get("data_dir") else None  # of a client that has joined later
        return Source(
            context["run_config"], node_config, int(self.metadata["seed"]), self.parts, self.data_dir or found
        )

    def _check(self, client: int) -> None:
        if client != self.client:
            raise ValueError(f"this is the network of client {self.client}, not of client {client}")


def check_published(folder: Path, client: int) -> None:
    """ValueError if a client has no published network in a state folder, saying what is there instead."""
    if (folder / f"client-{client}.safetensors").is_file():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a state folder: there is no such folder on this machine")
    if rounds := _rounds_of(folder, client):
        raise ValueError(
            f"{folder} holds personal state of client {client} after round {max(rounds)}, but no published network: "
            "the run has not finished, or the client was not there at its end. Resume it on the server (resume=true)"
        )
    known = ", ".join(map(str, clients_of(folder))) or "none"
    raise ValueError(f"{folder} holds no personal network of client {client}; it has those of clients {known}")


def only_client(folder: Path) -> int:
    """The one client whose network is in a state folder; ValueError if there are several, or none."""
    clients = clients_of(folder)
    if len(clients) == 1:
        return clients[0]
    if clients:
        raise ValueError(f"{folder} holds the networks of clients {', '.join(map(str, clients))}: say which, --client")
    unfinished = sorted({int(path.name.removeprefix("client-")) for path in folder.glob("versions/*/client-*")})
    for client in unfinished:
        check_published(folder, client)
    raise ValueError(f"{folder} holds no personal network")


def _rounds_of(folder: Path, client: int) -> list[int]:
    """Rounds of which a client's training state is there, of any run."""
    found = folder.glob(f"versions/*/client-{client}/round-*.safetensors")
    return [int(path.stem.removeprefix("round-")) for path in found]
