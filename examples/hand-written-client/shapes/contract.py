"""What travels: protocol 1 of docs/messages.md, for a node that hosts one client and runs the method cafedistill."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from shapes.model import ExitNet

PROTOCOL = 1

# What this client does with the settings of cafedistill: it follows some, others are the server's business or have
# only one value that it can follow. A setting that is in none of the three is one that it does not know.
FOLLOWED = {"distill-weight", "temperature"}
OF_THE_SERVER = {"mu", "conflict", "selection", "match-by", "solver", "equal-steps"}
ONLY = {
    "objective": "cross-entropy",
    "prior": False,
    "distill": False,
    "classifier-start": "zero",
    "write-back": True,
}
MATTER_TO_OTHER_OBJECTIVES = {
    *("ema-decay", "objective-temperature", "safe-kd-alpha", "safe-kd-beta"),
    *("erde-right", "erde-wrong", "neo-kd-alpha", "neo-kd-beta", "adversarial-epsilon", "adversarial-steps"),
}


def check(config: ConfigRecord) -> None:
    """Raise ValueError if a message asks for something that this client cannot do; Flower tells the server."""
    if config.get("protocol") != PROTOCOL:
        raise ValueError(f"the server speaks message protocol {config.get('protocol')}, this node {PROTOCOL}")
    if config["method"] != "cafedistill":
        raise ValueError(f"this node knows the method cafedistill only, not {config['method']}")
    for name, value in prefixed(config, "method.").items():
        if name in ONLY and value == ONLY[name]:
            continue
        if name not in FOLLOWED | OF_THE_SERVER | MATTER_TO_OTHER_OBJECTIVES:
            raise ValueError(f"this node cannot do {name} = {value!r}")
    if any(key.startswith("privacy.") for key in config):
        raise ValueError("this node neither clips nor adds noise")
    if config.get("wire-dtype", "float32") not in ("float32", "float16"):
        raise ValueError(f"this node cannot read {config['wire-dtype']}")


def prefixed(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Values of the keys that begin with a prefix, under the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class Schema:
    """Names and shapes of the tensors in a flat array, in their order."""

    entries: list[tuple[str, list[int]]]

    @classmethod
    def of(cls, network: ExitNet, names: list[str]) -> "Schema":
        """Schema of some of a network's tensors."""
        return cls([(name, list(network.state_dict()[name].shape)) for name in names])

    def text(self) -> str:
        """As JSON, without spaces."""
        return json.dumps(self.entries, separators=(",", ":"))

    def pack(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """The flat array."""
        return torch.cat([tensors[name].detach().flatten() for name, _ in self.entries]).numpy()

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(int(np.prod(shape)) for _, shape in self.entries)

    def unpack(self, flat: np.ndarray) -> dict[str, Tensor]:
        """The tensors of a flat array."""
        sizes = [int(np.prod(shape)) for _, shape in self.entries]
        parts = torch.from_numpy(flat.copy()).split(sizes)
        return {name: part.reshape(shape) for (name, shape), part in zip(self.entries, parts, strict=True)}


class Layout:
    """The four schemas of a network under cafedistill, and their fingerprint."""

    def __init__(self, network: ExitNet) -> None:
        exits = len(network.exits)
        heads = [name for k in range(exits) for name in network.head_names(k)]
        self.shared = Schema.of(network, [name for name in network.state_dict() if name not in heads])
        self.upload = self.download = Schema.of(network, network.head_names(exits - 1))
        self.personal = Schema.of(network, heads)
        schemas = (self.shared, self.upload, self.download, self.personal)
        self.digest = hashlib.sha256("\n".join(s.text() for s in schemas).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    """What a train or evaluate message says to this node's one client."""

    config: ConfigRecord
    base: np.ndarray
    mixture: dict[str, Tensor]
    version: int
    active: list[bool]

    @classmethod
    def read(cls, message: Message, layout: Layout, client: int) -> "Request":
        """Read a message; ValueError if it is not for this client and network."""
        config = message.content["config"]
        check(config)
        if config["digest"] != layout.digest:
            raise ValueError(f"the server's network has fingerprint {config['digest']}, this node's {layout.digest}")
        if list(config["clients"]) != [client]:
            raise ValueError(f"this node hosts client {client}, asked for were {config['clients']}")
        flat = message.content["arrays"]["flat"].numpy().astype(np.float32)
        mixed = list(config.get("downloads", [])) == [client]
        size = layout.shared.size
        if len(flat) != size + mixed * layout.download.size:
            raise ValueError(f"the request carries {len(flat)} values")
        mixture = layout.download.unpack(flat[size:]) if mixed else {}
        active = [bool(each) for each in config.get("active-exits", [])]
        return cls(config, flat[:size], mixture, int(config["versions"][0]), active)

    def sent(self, shared: np.ndarray, upload: np.ndarray) -> np.ndarray:
        """The flat array of the reply: in float16, what is shared goes as its difference to what came."""
        if self.config.get("wire-dtype") != "float16":
            return np.concatenate([shared, upload])
        return np.concatenate([shared - self.base, upload]).astype(np.float16)


def answer(message: Message, content: dict[str, Any]) -> Message:
    """A reply; arrays and plain dictionaries become records. Empty lists are left out."""
    records: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray):
            records[key] = ArrayRecord({"flat": Array(value)})
        elif isinstance(value, dict):
            records[key] = ConfigRecord({"protocol": PROTOCOL, **{k: v for k, v in value.items() if v != []}})
        else:
            records[key] = value
    return Message(RecordDict(records), reply_to=message)
