"""The personal networks that a run leaves behind, loaded again: one network per client, with its facts and its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cafe_flwr.data import ClientData
from cafe_flwr.networks import EarlyExitNetwork
from cafe_flwr.state import STATE_VERSION


@dataclass(frozen=True)
class Personal:
    """A client's personal network.

    Attributes
    ----------
    client
        Whose it is.
    network
        Ready to be used, in evaluation mode.
    facts
        Contents of ``client-<partition>.json``: round, method, temperatures, accuracy per exit, …
    """

    client: int
    network: EarlyExitNetwork
    facts: Mapping[str, Any]

    @property
    def temperatures(self) -> list[float]:
        """Temperature per exit, fitted on the client's calibration split."""
        return [float(t) for t in self.facts["temperatures"]]


def clients_of(folder: Path) -> list[int]:
    """Clients whose personal networks are in the folder (``results/<name>/personal`` or a node's state folder)."""
    found = (path.stem.removeprefix("client-") for path in folder.glob("client-*.safetensors"))
    return sorted(int(name) for name in found if name.isdigit())


def read_personal(folder: Path, client: int, network: EarlyExitNetwork) -> Personal:
    """Load a client's personal weights into a network of the same architecture.

    Parameters
    ----------
    folder
        Holds ``client-<partition>.safetensors`` and ``.json``.
    client
        Whose.
    network
        As the run built it; it gets the weights, and is set to evaluation mode.

    Raises
    ------
    ValueError
        If there is no such client, a file is damaged, or the weights are those of another network.
    """
    weights, facts_file = (folder / f"client-{client}.{kind}" for kind in ("safetensors", "json"))
    for path in (weights, facts_file):
        if not path.is_file():
            known = ", ".join(map(str, clients_of(folder))) or "none"
            raise ValueError(f"{path} is not there: {folder} holds the personal networks of clients {known}")
    try:
        facts = json.loads(facts_file.read_text())
        tensors = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"the personal network of client {client} in {folder} is damaged: {error}") from None
    if facts.get("state-version") != STATE_VERSION or facts.get("client") != client:
        raise ValueError(
            f"{facts_file} is of client {facts.get('client')} in format {facts.get('state-version')}, expected client "
            f"{client} in format {STATE_VERSION}"
        )
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{weights} holds the weights of another network: {error}") from None
    network.offset = None  # it is in the biases of a published network
    network.eval()
    return Personal(client, network, facts)


@dataclass(frozen=True)
class FinishedRun:
    """A results folder whose networks and data can be built again from its settings."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "settings.json").is_file():
            raise ValueError(f"{self.folder} is no results folder of a run: it has no settings.json")

    @property
    def clients(self) -> list[int]:
        """Clients that have a personal network."""
        return clients_of(self.folder / "personal")

    def personal(self, client: int) -> Personal:
        """A client's personal network."""
        from cafe_flwr.federation import build_network

        return read_personal(self.folder / "personal", client, build_network(self._settings))

    def data(self, client: int) -> ClientData:
        """The client's data, as in the run."""
        from cafe_flwr.federation import federation

        return federation(self._settings).load(client)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        from cafe_flwr.federation import federation

        return federation(self._settings).class_names

    @property
    def _settings(self) -> Any:
        from cafe_flwr.settings import Settings

        return Settings.from_run_config(json.loads((self.folder / "settings.json").read_text()))


def fingerprint(network: EarlyExitNetwork) -> str:
    """Of a network's weights: what was calibrated or exported for one network must not be used with another.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> network = ConvNet((1, 16, 16), num_classes=10)
    >>> before = fingerprint(network)
    >>> _ = torch.nn.init.zeros_(network.exits[0].head.bias)
    >>> fingerprint(network) == before
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype};".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
