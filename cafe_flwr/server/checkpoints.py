"""The server's state between rounds, and its last two checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cafe_flwr.core.files import STATE_VERSION, Damaged, checksum, version_path, versions_in, write_atomically
from cafe_flwr.core.log import logger
from cafe_flwr.methods.pairs import Pairs
from cafe_flwr.methods.server import ClientRecord, RoundPlan
from cafe_flwr.wire.capacity import ClientSpec


@dataclass
class ServerState:
    """What the server carries from round to round.

    Attributes
    ----------
    run
        Token of the run.
    round
        Last finished round.
    digest
        Fingerprint of network and method.
    shared
        Shared parameters, flat.
    known
        Last report of every client that has taken part.
    plan
        Plan of the last round in which clients taught each other.
    kinds
        Where clients are not alike: what they hold, by name of the kind, including absent clients.
    pairs
        Similarities of clients that took part in the same round, where the method keeps them.
    """

    run: str
    round: int
    digest: str
    shared: NDArray[np.float32]
    known: dict[int, ClientRecord] = field(default_factory=dict)
    plan: RoundPlan | None = None
    kinds: dict[str, ClientSpec] = field(default_factory=dict)
    pairs: Pairs = field(default_factory=Pairs)

    def check(self, digest: str) -> None:
        """ValueError if the state was made with another network or method than ``digest`` stands for."""
        if self.digest != digest:
            raise ValueError(
                f"the checkpoint was made with another network or method (fingerprint {self.digest}, the clients' is "
                f"{digest}): resume with the settings of the run"
            )


class Checkpoints:
    """The last two states of the server, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: ServerState) -> None:
        """Write the state of a round; only the one before it is kept beside it."""
        clients = sorted(state.known)
        records = [state.known[c] for c in clients]
        metadata: dict[str, Any] = {
            "state-version": STATE_VERSION,
            "run": state.run,
            "round": state.round,
            "digest": state.digest,
            "clients": clients,
            "num-examples": [r.num_examples for r in records],
            "seen": [r.seen for r in records],
        }
        if any(state.kinds):
            metadata["kinds"] = [kind.to_json() for kind in state.kinds.values()]
            metadata["kind-of"] = [record.kind for record in records]
        if any(record.level for record in records):
            metadata["levels"] = [record.level for record in records]
        arrays: dict[str, NDArray[Any]] = {"shared": state.shared}
        if len(state.pairs):
            arrays |= {"pair-keys": state.pairs.keys, "pair-values": state.pairs.values}
        if state.plan is not None and state.plan.weights is not None:
            arrays |= {"active": state.plan.active, "weights": state.plan.weights}
            metadata |= {"rows": list(state.plan.weight_rows), "columns": list(state.plan.weight_columns)}
        if records:
            sizes = [len(r.upload) for r in records]
            arrays["uploads"] = np.concatenate([r.upload for r in records])
            if len(set(sizes)) == 1:
                arrays["uploads"] = arrays["uploads"].reshape(len(records), -1)
            else:
                metadata["upload-sizes"] = sizes
            arrays["similarity"] = np.stack([r.similarity for r in records])
        header = {"facts": json.dumps(metadata), "checksum": checksum(arrays)}
        write_atomically(version_path(self.folder, state.round), save(arrays, header))
        for _, path in versions_in(self.folder)[2:]:
            path.unlink(missing_ok=True)

    def load(self) -> ServerState | None:
        """The newest undamaged checkpoint, None if there is none; ValueError if its format is another version's."""
        for server_round, path in versions_in(self.folder):
            try:
                return _read(path, server_round)
            except Damaged as error:
                logger.warning("checkpoint of round %d is damaged (%s), using the one before", server_round, error)
        return None


def _read(path: Path, server_round: int) -> ServerState:
    """A checkpoint; :class:`Damaged` if it is not as it was written, ValueError if its format is another version's."""
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            metadata = dict(json.loads(header["facts"]))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version = metadata["state-version"]
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    if header.get("checksum", checksum(arrays)) != checksum(arrays):
        raise Damaged("its checksum differs")
    if version != STATE_VERSION:
        raise ValueError(f"{path} has format {version}, this version reads {STATE_VERSION}")
    try:
        state = _state_of(metadata, arrays)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"its contents do not agree, {type(error).__name__}: {error}") from error
    if state.round != server_round:
        raise Damaged(f"it is of round {state.round}")
    return state


def _state_of(metadata: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> ServerState:
    """The state that a checkpoint holds; whatever error if its parts do not agree."""
    known: dict[int, ClientRecord] = {}
    if clients := [int(client) for client in metadata["clients"]]:
        uploads = list(arrays["uploads"])
        if "upload-sizes" in metadata:
            uploads = np.split(arrays["uploads"], np.cumsum(metadata["upload-sizes"])[:-1])
        kinds_of = metadata.get("kind-of", [""] * len(clients))
        levels = metadata.get("levels", [0] * len(clients))
        columns = metadata["num-examples"], metadata["seen"], uploads, arrays["similarity"], kinds_of, levels
        known = {row[0]: ClientRecord(*row[1:]) for row in zip(clients, *columns, strict=True)}
    plan = None
    if "weights" in arrays:
        plan = RoundPlan(arrays["active"], {}, arrays["weights"], metadata["rows"], metadata["columns"])
    kinds = {kind.name: kind for kind in map(ClientSpec.from_json, metadata.get("kinds", []))}
    pairs = Pairs(arrays["pair-keys"], arrays["pair-values"]) if "pair-keys" in arrays else Pairs()
    run, digest, shared = str(metadata["run"]), str(metadata["digest"]), arrays["shared"]
    if shared.ndim != 1 or not np.isfinite(shared).all():
        raise ValueError("the shared part is not a list of finite values")
    return ServerState(run, int(metadata["round"]), digest, shared, known, plan, kinds, pairs)
