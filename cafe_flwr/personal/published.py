"""The personal networks that a run has published, one per client: writing their metadata, and loading them again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cafe_flwr.core.files import STATE_VERSION
from cafe_flwr.data import digits
from cafe_flwr.data.split import ClientData
from cafe_flwr.networks.capacity import Capacity, Networks, networks_of
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.fingerprint import weights_hash
from cafe_flwr.training.loop import snapshot

_EMBEDDED_PIXELS = (0.3, 0.4)  # as cafe_flwr.data.digits renders them
_LOCAL_PIXELS = (0.5, 0.5)  # as cafe_flwr.data.local reads them


@dataclass(frozen=True)
class PersonalNetwork:
    """A client's personal network, in evaluation mode, and the contents of ``client-<partition>.json``."""

    client: int
    network: EarlyExitNetwork
    metadata: Mapping[str, Any]

    @property
    def temperatures(self) -> list[float]:
        """Temperature per exit, fitted on the client's calibration split."""
        return [float(t) for t in self.metadata["temperatures"]]


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Where a published network comes from; :meth:`beside` adds what can be read off the network.

    Attributes
    ----------
    run, round, method, digest, seed
        Token of the run, round after which it was published, name of the method, fingerprint of network and method,
        seed.
    modality, width
        Of the client's part of the federation's network; defaults where there is one modality, or it holds all.
    class_names
        In the order of the labels, if the settings do not contain them.
    joined
        How a client that joined after the end of the federation got its network.
    context
        Settings of the run and of the node, from which network and data can be built again.
    """

    run: str
    round: int
    method: str
    digest: str
    seed: int
    modality: str = ""
    width: float = 1.0
    class_names: Sequence[str] = ()
    joined: Mapping[str, Any] | None = None
    context: Mapping[str, Any] | None = None

    def beside(
        self,
        network: EarlyExitNetwork,
        tensors: Mapping[str, Tensor],
        input_shape: Sequence[int],
        accuracy_per_exit: Sequence[float],
        temperatures: Sequence[float],
    ) -> dict[str, Any]:
        """Contents of ``client-<partition>.json``, to be published with the tensors (:func:`with_offset`)."""
        return {
            **{key: getattr(self, key) for key in ("run", "round", "method", "digest", "seed")},
            **({"modality": self.modality} if self.modality else {}),
            **({"width": self.width} if self.width < 1 else {}),
            "num_exits": network.num_exits,
            "num_classes": network.num_classes,
            "input_shape": list(input_shape),
            "personal": network.personal_names(),
            "fingerprint": weights_hash(tensors),
            "accuracy_per_exit": list(accuracy_per_exit),
            "temperatures": list(temperatures),
            **({"class_names": list(self.class_names)} if self.class_names else {}),
            **({"joined": dict(self.joined)} if self.joined else {}),
            **({"context": dict(self.context)} if self.context else {}),
        }


def with_offset(network: EarlyExitNetwork) -> dict[str, Tensor]:
    """The network's tensors, on the CPU, with its logits' offset added to the biases of the classifiers."""
    tensors = {name: tensor.cpu() for name, tensor in snapshot(network).items()}
    if network.offset is not None:
        for k in range(network.num_exits):
            tensors[network.head_names(k)[1]] += network.offset.cpu()
    return tensors


def clients_of(folder: Path) -> list[int]:
    """Clients whose personal networks are in the folder (``results/<name>/personal`` or a node's state folder)."""
    found = (path.stem.removeprefix("client-") for path in folder.glob("client-*.safetensors"))
    return sorted(int(name) for name in found if name.isdigit())


def read_metadata(folder: Path, client: int) -> dict[str, Any]:
    """Contents of ``client-<partition>.json``, the metadata of a client's personal network.

    If the process that published it was killed between its two files, the metadata in that of the weights counts.

    Raises ValueError if the client has no personal network there, or the file is damaged or of another client.
    """
    weights, metadata_file = (folder / f"client-{client}.{kind}" for kind in ("safetensors", "json"))
    inside = _inside(weights)
    for path in (weights, *(() if inside else (metadata_file,))):
        if not path.is_file():
            known = ", ".join(map(str, clients_of(folder))) or "none"
            raise ValueError(f"{path} is not there: {folder} holds the personal networks of clients {known}")
    try:
        metadata = json.loads(metadata_file.read_text()) if metadata_file.exists() else inside
        version, owner = metadata.get("state-version"), metadata.get("client")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"the personal network of client {client} in {folder} is damaged: {error}") from None
    if version != STATE_VERSION or owner != client:
        raise ValueError(
            f"{metadata_file} is of client {owner} in format {version}, expected client {client} in format "
            f"{STATE_VERSION}"
        )
    newer = inside.get("client") == client and any(
        inside.get(k) != metadata.get(k) for k in ("run", "round", "fingerprint")
    )
    return dict(inside if newer else metadata)


def _inside(weights: Path) -> dict[str, Any]:
    """The metadata in the file of the weights, which were written together; empty in files of earlier versions."""
    try:
        with safe_open(weights, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})["facts"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return {}


def read_personal(folder: Path, client: int, built: EarlyExitNetwork | Networks) -> PersonalNetwork:
    """Load a client's personal weights into its part of the run's network, or of its networks by modality.

    Raises ValueError if there is no such client, a file is damaged, or the weights are those of another network or
    client.
    """
    metadata, weights = read_metadata(folder, client), folder / f"client-{client}.safetensors"
    network = _held(networks_of(built), metadata)
    try:
        tensors = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"the personal network of client {client} in {folder} is damaged: {error}") from None
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{weights} holds the weights of another network: {error}") from None
    published = metadata.get("fingerprint")  # files of earlier versions have none
    if published is not None and published != weights_hash(tensors):
        raise ValueError(
            f"{weights} is damaged, or not the file that client {client} published: its fingerprint is "
            f"{weights_hash(tensors)}, that in client-{client}.json is {published}. Bring both files back together"
        )
    network.offset = None  # it is in the biases of a published network
    network.eval()
    return PersonalNetwork(client, network, metadata)


def _held(networks: Networks, metadata: Mapping[str, Any]) -> EarlyExitNetwork:
    """The network of a client's modality, as deep and wide as the client holds it."""
    modality = str(metadata.get("modality", ""))
    if modality not in networks:
        known = ", ".join(networks) or "one modality"
        raise ValueError(f"the network of client {metadata['client']} is of modality {modality!r}, built are {known}")
    network = networks[modality]
    exits = min(int(metadata.get("num_exits", network.num_exits)), network.num_exits)
    return Capacity(exits, float(metadata.get("width", 1.0))).of(network)


class PersonalNetworks(Protocol):
    """Personal networks with the data of their clients: of a finished run, or one client's on its own node."""

    @property
    def name(self) -> str:
        """What they are called in tables."""

    @property
    def networks(self) -> Path:
        """Folder of ``client-<partition>.safetensors`` and thresholds."""

    @property
    def clients(self) -> list[int]:
        """Clients that have a personal network."""

    @property
    def run_config(self) -> Mapping[str, Any]:
        """Settings of the run, in kebab-case."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""

    @property
    def pixels(self) -> tuple[float, float] | None:
        """Mean and standard deviation that images in 0..1 were normalised by; None if unknown."""

    def personal(self, client: int) -> PersonalNetwork:
        """A client's personal network."""

    def data(self, client: int) -> ClientData:
        """The client's data, as in the run."""

    def output(self, name: str) -> Path:
        """Path for a file that is made from the networks."""


def pixels_of(dataset: str) -> tuple[float, float]:
    """Mean and standard deviation of pixels, as the embedded sets are rendered or local images are read."""
    return _EMBEDDED_PIXELS if dataset in digits.NUM_CLASSES else _LOCAL_PIXELS
