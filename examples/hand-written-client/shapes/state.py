"""Personal tensors on the node's own disk: a file per round, so that a repeated or resumed round finds its start."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor


class Versions:
    """Personal tensors of one client in one run, after each round that may still be asked for."""

    def __init__(self, context: Context, run: str, client: int) -> None:
        users = os.environ.get("XDG_STATE_HOME", "~/.local/state")
        home = Path(str(context.node_config.get("state-dir") or Path(users, "shapes"))).expanduser()
        if not (run.isalnum() and run.isascii()):
            raise ValueError(f"run must be letters and digits, got {run!r}")
        self.folder = home / run / f"client-{client}"

    def load(self, version: int) -> dict[str, Tensor]:
        """Tensors after a round; nothing for round 0, before which there are none."""
        if version == 0:
            return {}
        path = self._path(version)
        if not path.exists():
            raise ValueError(f"the personal state of round {version} is not in {self.folder}")
        with np.load(path) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    def save(self, server_round: int, tensors: Mapping[str, Tensor], *, base: int, resumable_from: int) -> None:
        """Write the tensors of a round that began with version ``base``, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{server_round}.npz"
        with open(temporary, "wb") as file:
            np.savez(file, **{name: tensor.detach().numpy() for name, tensor in tensors.items()})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path(server_round))
        others = sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))
        unacknowledged = [version for version in others if base < version < server_round]
        old = [version for version in others if version <= min(base, resumable_from)]
        for version in unacknowledged + old[:-1]:
            self._path(version).unlink()

    def _path(self, version: int) -> Path:
        return self.folder / f"{version:06d}.npz"
