"""The message in which a node describes itself and its clients."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property

from flwr.app import ConfigRecord, Message, RecordDict

from cafe_flwr.core.schema import Schema
from cafe_flwr.core.text import MAX_NAME, kebab, shown
from cafe_flwr.wire.capacity import ClientSpec
from cafe_flwr.wire.codec import filled, record_of
from cafe_flwr.wire.keys import PROTOCOL, Keys
from cafe_flwr.wire.reader import CLIENT, MAX_SCHEMA, distinct, read, schema_of, token, whole, words

_MOST_CLIENTS = 100_000  # of a node, and most nodes of a simulation
_MOST_EXITS = 1000
_MOST_PROBLEMS = 100  # told one by one
QUERY = {"seed": whole(high=2**63 - 1), "method": token(), "num-clients": whole(low=1, default=None)}
"""What every message to a node says."""
_DECLARED = {
    "version": token(),
    "clients": CLIENT,
    "num-examples": whole("n", low=1),
    "problems": words("k"),
    "num-nodes": whole(high=_MOST_CLIENTS),
    "digest": token(),
    "shared": token(MAX_SCHEMA),
    "upload": token(MAX_SCHEMA),
    "download": token(MAX_SCHEMA),
    "num-exits": whole(low=1, high=_MOST_EXITS),
    "num-parameters": whole(),
    "macs": whole("m"),
    "name": token(MAX_NAME, default=""),
    "kinds": token(4 * MAX_SCHEMA, size="h"),
    "kind-of": whole("o"),
}


@dataclass(frozen=True)
class NodeInfo:
    """A node's answer to the first message of the server.

    Attributes
    ----------
    version
        Of this package on the node; empty for clients that do not use it (docs/messages.md).
    clients, num_examples
        Clients it can serve, and the training examples of each.
    problems
        Reasons why it cannot serve others.
    num_nodes
        Number of nodes in a simulation; 0 if unknown.
    digest
        Fingerprint of network and method; all nodes of a run must have the same.
    shared, upload, download
        The federation's shared part, and what a client with the whole network sends and receives of its own.
    num_exits, num_parameters, macs
        m, the values of the whole network, and the MACs of inference up to each exit, (m,).
    name
        Readable name of the node; may be empty.
    kinds, kind_of
        Where clients are not alike: the kinds on the node, and each client's place among them. Else empty.
    """

    version: str
    clients: list[int]
    num_examples: list[int]
    problems: list[str]
    num_nodes: int
    digest: str
    shared: Schema
    upload: Schema
    download: Schema
    num_exits: int
    num_parameters: int
    macs: list[int]
    name: str = ""
    kinds: list[ClientSpec] = field(default_factory=list)
    kind_of: list[int] = field(default_factory=list)

    def kind(self, client: int) -> ClientSpec:
        """The kind of a client."""
        if not self.kinds:
            return self.whole
        return self.kinds[self.kind_of[self.clients.index(client)]]

    @cached_property
    def whole(self) -> ClientSpec:
        """The kind of clients with the whole network."""
        size, macs = self.num_parameters, tuple(self.macs)
        return ClientSpec("", self.num_exits, size, macs, self.shared, self.upload, self.download)

    def to_content(self, keys: Keys) -> RecordDict:
        """As a Flower record."""
        values = {kebab(f.name): getattr(self, f.name) for f in fields(self) if f.name != "name" or self.name}
        for name in ("shared", "upload", "download"):
            values[name] = values[name].to_json()
        values["kinds"] = [kind.to_json() for kind in self.kinds]
        return RecordDict({keys.config: ConfigRecord(filled({"protocol": PROTOCOL, **values}))})

    @classmethod
    def from_message(cls, message: Message, keys: Keys) -> NodeInfo:
        """Read a node's answer; ValueError if it is invalid."""
        config = record_of(message, keys.config, ConfigRecord)
        if config.get("protocol") != PROTOCOL:
            raise ValueError(
                f"speaks message protocol {shown(str(config.get('protocol')))}, this server speaks {PROTOCOL}: "
                "install the same version of cafe-flwr on both"
            )
        missing = {key for key, value in _DECLARED.items() if not value.size or key == "macs"} - set(config) - {"name"}
        if missing:
            raise ValueError(f"answered without {', '.join(sorted(missing))}")
        try:
            found = read(config, _DECLARED)
            values = {f.name: found[kebab(f.name)] for f in fields(cls)}
            if (more := len(values["problems"]) - _MOST_PROBLEMS) > 0:
                values["problems"][_MOST_PROBLEMS:] = [f"and {more} more"]
            for name in ("clients", "kinds"):
                distinct(values[name], name)
            for name in ("shared", "upload", "download"):
                values[name] = schema_of(values[name])
            if len(values["macs"]) != values["num_exits"]:
                raise ValueError(f"{len(values['macs'])} numbers of MACs for {values['num_exits']} exits")
        except ValueError as error:
            raise ValueError(f"says what cannot be: {error}") from None
        kinds = values["kinds"] = [ClientSpec.from_json(text) for text in values["kinds"]]
        for kind in kinds:
            kind.check(values["shared"], values["num_exits"])
        fit = len(values["kind_of"]) == len(values["clients"]) and set(values["kind_of"]) <= set(range(len(kinds)))
        if kinds and not (fit and len({kind.name for kind in kinds}) == len(kinds)):
            raise ValueError("names kinds of clients that do not fit its clients, or the same kind twice")
        return cls(**values)
