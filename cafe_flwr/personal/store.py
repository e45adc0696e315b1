"""State that survives: personal parameters on the client's disk, checkpoints on the server's.

Files are safetensors with their facts as JSON in the header, written to a temporary name and then renamed, so a file is
either whole or not there. A damaged one is reported and the version before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from safetensors.torch import save as save_tensors
from torch import Tensor

from cafe_flwr.core.locks import locked
from cafe_flwr.core.log import logger
from cafe_flwr.methods.base import ClientRecord, RoundPlan
from cafe_flwr.methods.pairs import Pairs
from cafe_flwr.wire.capacity import Kind

STATE_VERSION = 1
_VERSION_FILE = re.compile(r"round-(\d+)\.safetensors")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None and error.errno:  # of a write to a full disk, which does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the folder's list of names on disk; not every system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text that ends with a line; NaN and infinity, which JSON has not, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _versions(folder: Path) -> list[tuple[int, Path]]:
    """(round, file) of the versions in a folder, newest first."""
    found = []
    for path in folder.glob("round-*.safetensors"):
        match = _VERSION_FILE.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


class Damaged(Exception):
    """A file that is not whole, or not what was written."""


class Late(RuntimeError):
    """Work that the server no longer waits for."""


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    """CRC-32 of names and bytes: safetensors has none, and a flipped bit would pass for a weight."""
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors of any type as arrays of bytes."""
    return {name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for name, t in tensors.items()}


_SECRET_BYTES = 32
_LOCK_SECONDS = 10.0  # how long a client waits for another process that works on its state


def _only_for_me(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _version_path(folder: Path, server_round: int) -> Path:
    return folder / f"round-{server_round:06d}.safetensors"


class PersonalStore:
    """Personal parameters of the clients of one node, a file per client and round.

    The server says which version a client starts from: that of the last report it has of the client. A message that
    arrives twice therefore gives the same result twice, a reply that got lost counts as not given, and a run that is
    resumed from an older checkpoint goes on from the older version. The work of a message that the server has given up,
    and sent again or gone on without, is refused.

    Parameters
    ----------
    folder
        Folder of the personal state, of any number of clients and runs.
    run
        Token of the run; state of other runs is neither read nor overwritten.
    asked_at
        When the server made the message that the store is opened for, in seconds of its clock.

    Attributes
    ----------
    notes
        What was unusual about a client's state, in words.
    """

    def __init__(self, folder: Path, run: str, asked_at: float = 0.0) -> None:
        if not re.fullmatch(r"[0-9a-f]{8,64}", run):
            raise ValueError(f"run must be a hexadecimal token, got {run!r}")
        self.folder = folder
        self.run = run
        self.asked_at = asked_at
        self._versions = folder / "versions" / run
        self.notes: dict[int, str] = {}

    def _of(self, client: int) -> Path:
        return self._versions / f"client-{client}"

    @contextmanager
    def locked(self, client: int) -> Iterator[None]:
        """Inside, no other process works on the client's state of this run.

        Raises
        ------
        InUse
            If another still does after a while, with its process number: two nodes with one folder, or one that has
            not finished what it was asked for earlier.
        """
        path = self.folder / "locks" / f"{self.run}-client-{client}.lock"
        with locked(path, f"the state of client {client} in {self.folder}", _LOCK_SECONDS):
            yield

    def load(self, client: int, version: int) -> dict[str, Tensor] | None:
        """Personal parameters after the given round; None for version 0, what a client starts from.

        If the file is damaged, the newest whole one before it is used, with a warning and a note.

        Raises
        ------
        ValueError
            If there is no such version, it belongs to another client, or all are damaged.
        """
        if version == 0:
            return None
        folder = self._of(client)
        versions = _versions(folder)
        if version not in dict(versions):
            raise ValueError(self._missing(client, version, [r for r, _ in versions]))
        for server_round, path in versions:
            if server_round > version:
                continue
            try:
                facts, tensors = _read_version(path)
            except Damaged as error:
                logger.warning(
                    "state of client %d, round %d, is damaged (%s): using an older", client, server_round, error
                )
                continue
            if facts.get("client") != str(client) or facts.get("state-version") != str(STATE_VERSION):
                raise ValueError(
                    f"{path} holds the state of client {facts.get('client')} in format {facts.get('state-version')}, "
                    f"expected client {client} in format {STATE_VERSION}: give every client its own state folder"
                )
            if server_round < version:
                self.notes[client] = f"its state of round {version} is damaged, that of round {server_round} was used"
            return tensors
        if len(versions) > 1:
            raise ValueError(
                f"its personal state of round {version}, and all before it, is damaged in {folder}: bring the folder "
                "back from a copy"
            )
        self.notes[client] = f"its state of round {version}, the only one, is damaged: it started anew"
        return None

    def _missing(self, client: int, version: int, rounds: list[int]) -> str:
        """Why a version is not there, as far as can be told, and what to do."""
        folder = self._of(client)
        text = f"its personal state of round {version} is not in {folder}"
        if not rounds:
            others = sum((run / f"client-{client}").exists() for run in self._versions.parent.glob("*"))
            found = f" (it has state of {others} other run(s))" if others else ""
            return f"{text}{found}: bring the folder back, or set state-dir to where it is"
        kept = ", ".join(map(str, sorted(rounds)))
        if min(rounds) > version:
            return (
                f"{text}, which has rounds {kept}: the server was resumed from a checkpoint older than its last two; "
                "bring the newer checkpoint back, or start a new run"
            )
        return (
            f"{text}, which has rounds {kept}: the folder is an older copy; bring the newer one back, or set state-dir "
            "to where it is"
        )

    def check_current(self, client: int, server_round: int) -> None:
        """Refuse what the server has given up: it has asked for this round, or a later one, again since.

        Without this the work of a slow process, or of a message that was long on its way, would take the place of what
        the server has from this client.

        Raises
        ------
        Late
            If there is a version of this round or a later one, asked for later.
        """
        for number, path in _versions(self._of(client)):
            if number >= server_round and _asked_at(path) > self.asked_at:
                raise Late(
                    f"too late: the server has asked for round {number} since it asked for this round {server_round}; "
                    "the newer state stays"
                )

    def save(
        self,
        client: int,
        server_round: int,
        tensors: Mapping[str, Tensor],
        *,
        base: int,
        resumable_from: int,
    ) -> None:
        """Write the version of a round.

        Parameters
        ----------
        client, server_round
            Whose state, and after which round.
        tensors
            Personal parameters by name.
        base
            Version that training started from. Versions between it and this one were never acknowledged: they go.
        resumable_from
            Oldest round that the run may be resumed from; versions that are not needed for it go, too.

        Raises
        ------
        Late
            If the server has asked again since; nothing is written.
        """
        self.check_current(client, server_round)
        facts = {
            "state-version": str(STATE_VERSION),
            "client": str(client),
            "round": str(server_round),
            "asked-at": repr(self.asked_at),
            "checksum": _checksum(_bytes_of(tensors)),
        }
        content = save_tensors({name: t.contiguous() for name, t in tensors.items()}, facts)
        write_atomically(_version_path(self._of(client), server_round), content)
        versions = _versions(self._of(client))
        lost = [path for r, path in versions if base < r < server_round]
        old = [path for r, path in versions if r <= min(base, resumable_from)]
        for path in lost + old[1:]:
            path.unlink(missing_ok=True)

    def private_rng(self, client: int, purpose: str) -> np.random.Generator:
        """A random generator for a purpose, always the same, from a secret of the client that nobody else knows."""
        path = self.folder / "secrets" / f"client-{client}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}.{os.getpid()}")
            with open(new, "wb", opener=_only_for_me) as file:
                file.write(os.urandom(_SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was faster: its secret counts
                os.link(new, path)
            new.unlink()
        secret = path.read_bytes()
        if len(secret) != _SECRET_BYTES:
            raise ValueError(f"{path} holds no secret of {_SECRET_BYTES} bytes: restore it, or remove it for a new one")
        seed = hashlib.sha256(secret + purpose.encode()).digest()
        return np.random.default_rng(np.frombuffer(seed, dtype=np.uint32))

    def publish(self, client: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write the client's whole personal network: ``client-<partition>.safetensors`` and its facts as JSON."""
        content = save_tensors({name: t.contiguous() for name, t in tensors.items()})
        write_atomically(self.folder / f"client-{client}.safetensors", content)
        text = to_json({"state-version": STATE_VERSION, "client": client, **facts}, indent=2)
        write_atomically(self.folder / f"client-{client}.json", text)


def _read_version(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Facts and tensors of a version; :class:`Damaged` if it is not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Damaged(str(error)) from error
    if "checksum" in facts and facts["checksum"] != _checksum(_bytes_of(tensors)):
        raise Damaged("its checksum differs")
    return facts, tensors


def _asked_at(path: Path) -> float:
    """When the server asked for a version, 0 if its file does not say."""
    try:
        with safe_open(path, framework="np") as file:
            return float((file.metadata() or {})["asked-at"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return 0.0


def personal_folder(context: Context, chosen: str = "") -> Path:
    """Where a node keeps personal state: its own node-config ``state-dir``, else ``chosen``, else the user's folder.

    A path never comes from the server's messages.

    Raises
    ------
    ValueError
        If the folder is not absolute: Flower's processes have their own working directory.
    """
    path = str(context.node_config.get("state-dir", "")) or chosen
    if not path:
        from platformdirs import user_state_path

        return user_state_path("cafe-flwr")
    folder = Path(path).expanduser()
    if not folder.is_absolute():
        raise ValueError(f"state-dir must be an absolute path or start with '~', got {path!r}")
    return folder


@dataclass
class ServerState:
    """All that the server carries from round to round.

    Attributes
    ----------
    run
        Token of the run.
    round
        Last finished round.
    digest
        Fingerprint of the network and of what travels.
    shared
        Shared parameters, flat.
    known
        Last report of every client that has taken part.
    plan
        Of the last round in which clients taught each other.
    kinds
        What clients hold, by name, where they are not alike; also those that are away.
    pairs
        Similarities of clients that have met in a round, where the method keeps them.
    """

    run: str
    round: int
    digest: str
    shared: NDArray[np.float32]
    known: dict[int, ClientRecord] = field(default_factory=dict)
    plan: RoundPlan | None = None
    kinds: dict[str, Kind] = field(default_factory=dict)
    pairs: Pairs = field(default_factory=Pairs)


class Checkpoints:
    """The last two states of the server, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: ServerState) -> None:
        """Write the state of a round; the one before it stays."""
        clients = sorted(state.known)
        records = [state.known[c] for c in clients]
        facts: dict[str, Any] = {
            "state-version": STATE_VERSION,
            "run": state.run,
            "round": state.round,
            "digest": state.digest,
            "clients": clients,
            "num-examples": [r.num_examples for r in records],
            "seen": [r.seen for r in records],
        }
        if any(state.kinds):
            facts["kinds"] = [kind.to_json() for kind in state.kinds.values()]
            facts["kind-of"] = [record.kind for record in records]
        if any(record.level for record in records):
            facts["levels"] = [record.level for record in records]
        arrays: dict[str, NDArray[Any]] = {"shared": state.shared}
        if len(state.pairs):
            arrays |= {"pair-keys": state.pairs.keys, "pair-values": state.pairs.values}
        if state.plan is not None and state.plan.weights is not None:
            arrays |= {"active": state.plan.active, "weights": state.plan.weights}
            facts |= {"rows": list(state.plan.weight_rows), "columns": list(state.plan.weight_columns)}
        if records:
            sizes = [len(r.upload) for r in records]
            arrays["uploads"] = np.concatenate([r.upload for r in records])
            if len(set(sizes)) == 1:
                arrays["uploads"] = arrays["uploads"].reshape(len(records), -1)
            else:
                facts["upload-sizes"] = sizes
            arrays["similarity"] = np.stack([r.similarity for r in records])
        header = {"facts": json.dumps(facts), "checksum": _checksum(arrays)}
        write_atomically(_version_path(self.folder, state.round), save(arrays, header))
        for _, path in _versions(self.folder)[2:]:
            path.unlink(missing_ok=True)

    def load(self) -> ServerState | None:
        """The newest whole checkpoint, None if there is none."""
        for server_round, path in _versions(self.folder):
            try:
                with safe_open(path, framework="np") as file:
                    header = file.metadata() or {}
                    facts = json.loads(header["facts"])
                    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if header.get("checksum", _checksum(arrays)) != _checksum(arrays):
                    raise Damaged("its checksum differs")
            except (SafetensorError, OSError, KeyError, ValueError, Damaged) as error:
                logger.warning("checkpoint of round %d is damaged (%s), using the one before", server_round, error)
                continue
            if facts["state-version"] != STATE_VERSION:
                raise ValueError(f"{path} has format {facts['state-version']}, this version reads {STATE_VERSION}")
            known = {}
            if facts["clients"]:
                uploads = list(arrays["uploads"])
                if "upload-sizes" in facts:
                    uploads = np.split(arrays["uploads"], np.cumsum(facts["upload-sizes"])[:-1])
                columns = (facts["num-examples"], facts["seen"], uploads, arrays["similarity"])
                number = len(uploads)
                kinds_of, levels = facts.get("kind-of", [""] * number), facts.get("levels", [0] * number)
                records = map(ClientRecord, *columns, kinds_of, levels)
                known = dict(zip(facts["clients"], records, strict=True))
            plan = None
            if "weights" in arrays:
                rows, columns = facts["rows"], facts["columns"]
                plan = RoundPlan(arrays["active"], {}, arrays["weights"], rows, columns)
            kinds = {kind.name: kind for kind in map(Kind.from_json, facts.get("kinds", []))}
            pairs = Pairs(arrays["pair-keys"], arrays["pair-values"]) if "pair-keys" in arrays else Pairs()
            return ServerState(
                facts["run"], facts["round"], facts["digest"], arrays["shared"], known, plan, kinds, pairs
            )
        return None
