"""The personal parameters of clients on disk, kept from round to round and after crashes.

Files are safetensors with metadata in the header, written to a temporary name and then renamed, so a file is whole or
absent. A damaged one is reported, and the version before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from cafe_flwr.core.files import (
    STATE_VERSION,
    Damaged,
    checksum,
    sweep,
    to_json,
    version_path,
    versions_in,
    write_atomically,
)
from cafe_flwr.core.locks import locked
from cafe_flwr.core.log import logger
from cafe_flwr.personal.aside import MOST, bring_back, confirm, set_aside


class Late(RuntimeError):
    """Work that the server no longer waits for."""


def _bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors of any type as arrays of bytes."""
    return {name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for name, t in tensors.items()}


_SECRET_BYTES = 32
_MOST_VERSIONS = 16  # of a client in a run, whatever the server says it may resume from
_LOCK_SECONDS = 10.0  # how long a client waits for another process that works on its state


def _only_for_me(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


class PersonalStore:
    """Personal parameters of the clients of one node, a file per client and round.

    The server says which version a client starts from: that of the client's last report that it has. A message that
    arrives twice therefore gives the same result twice, a lost reply counts as not given, and a run resumed from an
    older checkpoint continues from the older version. Work for a message that the server has given up on, because it
    sent it again or went on without, is refused.

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
        By client, what was unusual about its state.
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
        """Keep other processes off the client's state of this run.

        Raises InUse if another still works on it after a while, with its process number: two nodes share one folder, or
        a node has not finished an earlier message.
        """
        path = self.folder / "locks" / f"{self.run}-client-{client}.lock"
        with locked(path, f"the state of client {client} in {self.folder}", _LOCK_SECONDS):
            yield

    def load(self, client: int, version: int) -> dict[str, Tensor] | None:
        """Personal parameters after round ``version``; None for version 0, the state before the first round.

        If the file is damaged, the newest whole one before it is used, with a warning and a note.

        Raises ValueError if there is no such version, it belongs to another run, client or round, or all are damaged.
        """
        if version == 0:
            return None
        folder = self._of(client)
        bring_back(folder, version)
        versions = versions_in(folder)
        if version not in dict(versions):
            raise ValueError(self._missing(client, version, [r for r, _ in versions]))
        for server_round, path in versions:
            if server_round > version:
                continue
            try:
                metadata, tensors = _read_version(path)
            except Damaged as error:
                logger.warning(
                    "state of client %d, round %d, is damaged (%s): using an older", client, server_round, error
                )
                continue
            self._check_owner(path, metadata, client, server_round)
            if server_round < version:
                self.note(client, f"its state of round {version} is damaged, that of round {server_round} was used")
            else:
                confirm(folder, version)
            return tensors
        if len(versions) > 1:
            raise ValueError(
                f"its personal state of round {version}, and all before it, is damaged in {folder}: bring the folder "
                "back from a copy"
            )
        self.note(client, f"its state of round {version}, the only one, is damaged: it started anew")
        return None

    def note(self, client: int, text: str) -> None:
        """Add to what is unusual about a client's state."""
        self.notes[client] = "; ".join(filter(None, (self.notes.get(client), text)))

    def _check_owner(self, path: Path, metadata: Mapping[str, str], client: int, server_round: int) -> None:
        """ValueError if a version is not this client's of this run and round, in this format."""
        if metadata.get("client") != str(client) or metadata.get("state-version") != str(STATE_VERSION):
            raise ValueError(
                f"{path} holds the state of client {metadata.get('client')} in format "
                f"{metadata.get('state-version')}, expected client {client} in format {STATE_VERSION}: "
                "give every client its own state folder"
            )
        run = metadata.get("run", self.run)
        if run != self.run or metadata.get("round") != str(server_round):
            raise ValueError(
                f"{path} holds the state of round {metadata.get('round')} of the run {run}, expected round "
                f"{server_round} of the run {self.run}: files were swapped, bring the folder back from a copy"
            )
        if "run" not in metadata:
            self.note(client, f"its state of round {server_round} is an earlier version's, which does not name its run")

    def _missing(self, client: int, version: int, rounds: list[int]) -> str:
        """Why a version is missing, as far as can be told, and what to do."""
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
        """Raise Late if the server has since asked for this round again, or for a later one.

        Without this the work of a slow process, or of a message that was long on its way, would replace what the
        server already has from this client.
        """
        for number, path in versions_in(self._of(client)):
            if number >= server_round and _asked_at(path) > self.asked_at:
                raise Late(
                    f"too late: the server has asked for round {number} since it asked for this round {server_round}; "
                    "the newer state stays"
                )

    def save(
        self, client: int, server_round: int, tensors: Mapping[str, Tensor], *, base: int, resumable_from: int
    ) -> None:
        """Write the version of a round: personal parameters by name, after training from version ``base``.

        Versions between ``base`` and this one were never acknowledged. They, and an earlier one of this round, are set
        aside until the server starts from a later one (:mod:`cafe_flwr.personal.aside`). Those that are not needed to
        resume the run from round ``resumable_from`` or later are removed, and all but the newest few. Raises Late, and
        writes nothing, as :meth:`check_current`.
        """
        self.check_current(client, server_round)
        folder = self._of(client)
        path, arrays = version_path(folder, server_round), _bytes_of(tensors)
        metadata = {
            "state-version": str(STATE_VERSION),
            "run": self.run,
            "client": str(client),
            "round": str(server_round),
            "asked-at": repr(self.asked_at),
            "checksum": checksum(arrays),
        }
        apart = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        content = save_tensors(apart, metadata)
        sweep(folder)
        if path.exists() and _fact(path, "checksum") != metadata["checksum"]:
            set_aside(folder, [server_round])
        write_atomically(path, content)
        versions = versions_in(folder)
        set_aside(folder, [r for r, _ in versions if base < r < server_round])
        newer = [path for r, path in versions if r > server_round]  # of a run that was resumed
        older = [path for r, path in versions if r <= base]
        old = [path for r, path in versions if r <= min(base, resumable_from)]
        for path in {*newer[:-MOST], *older[_MOST_VERSIONS:], *old[1:]}:
            path.unlink(missing_ok=True)

    def private_rng(self, client: int, purpose: str) -> np.random.Generator:
        """A random generator for a purpose, always with the same seed, derived from the client's own secret."""
        path = self.folder / "secrets" / f"client-{client}"
        sweep(path.parent, path.name, ending="")
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

    def publish(self, client: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write the client's whole personal network: ``client-<partition>.safetensors`` and its metadata as JSON.

        The metadata is in both files, so that they belong together also if the process is killed between the two
        (:func:`cafe_flwr.personal.published.read_metadata`).
        """
        facts = {"state-version": STATE_VERSION, "client": client, **metadata}
        content = save_tensors({name: t.contiguous() for name, t in tensors.items()}, {"facts": to_json(facts)})
        write_atomically(self.folder / f"client-{client}.safetensors", content)
        write_atomically(self.folder / f"client-{client}.json", to_json(facts, indent=2))


def _read_version(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a version; :class:`Damaged` if it is not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Damaged(str(error)) from error
    if "checksum" in metadata and metadata["checksum"] != checksum(_bytes_of(tensors)):
        raise Damaged("its checksum differs")
    return metadata, tensors


def _fact(path: Path, name: str) -> str:
    """An entry of a version's metadata, empty if its file does not say."""
    try:
        with safe_open(path, framework="np") as file:
            return str((file.metadata() or {})[name])
    except (SafetensorError, OSError, KeyError):
        return ""


def _asked_at(path: Path) -> float:
    """When the server asked for a version, 0 if its file does not say."""
    try:
        return float(_fact(path, "asked-at"))
    except ValueError:
        return 0.0


def personal_folder(context: Context, chosen: str = "") -> Path:
    """Where a node keeps personal state: its own node-config ``state-dir``, else ``chosen``, else the user's folder.

    A path never comes from the server's messages.

    Raises ValueError if the folder is not absolute: Flower's processes have their own working directory.
    """
    path = str(context.node_config.get("state-dir", "")) or chosen
    if not path:
        from platformdirs import user_state_path

        return user_state_path("cafe-flwr")
    folder = Path(path).expanduser()
    if not folder.is_absolute():
        raise ValueError(f"state-dir must be an absolute path or start with '~', got {path!r}")
    return folder
