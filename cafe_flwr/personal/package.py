"""The file with which a new client joins a federation that has ended (docs/after-the-run.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from cafe_flwr import __version__
from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.networks.fingerprint import weights_hash

FORMAT, FORMAT_VERSION = "cafe-flwr-joining", 1
_SHARED, _TEACHER = "shared.", "teacher."


@dataclass(frozen=True)
class Package:
    """What a new client needs to join.

    Attributes
    ----------
    metadata
        How the federation was trained, and what its network is; JSON values.
    shared
        The shared part after the last round, by name.
    teacher
        Mean of the heads that clients send, by name; empty if it was left out or they send none.
    """

    metadata: Mapping[str, Any]
    shared: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it to one safetensors file, whole or not at all."""
        tensors = {_SHARED + name: t for name, t in self.shared.items()}
        tensors |= {_TEACHER + name: t for name, t in self.teacher.items()}
        metadata = {**self.metadata, "fingerprint": weights_hash(tensors)}
        content = save_tensors({name: t.contiguous() for name, t in tensors.items()}, {"facts": to_json(metadata)})
        write_atomically(path, content)

    @classmethod
    def load(cls, path: Path) -> Package:
        """Read what :meth:`save` wrote.

        Raises ValueError if it is damaged, not a joining package, or was made by another version of cafe-flwr.
        """
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; the server makes it, cafe-flwr join-package")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get("facts", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or no joining package: {error}") from None
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no joining package: cafe-flwr join-package makes one")
        if (metadata.get("format_version"), metadata.get("version")) != (FORMAT_VERSION, __version__):
            raise ValueError(
                f"{path} was made by cafe-flwr {metadata.get('version')} (format "
                f"{metadata.get('format_version')}), this is {__version__} (format "
                f"{FORMAT_VERSION}): install the same version"
            )
        if metadata.get("fingerprint") != weights_hash(tensors):
            raise ValueError(f"{path} is damaged: its fingerprint is not that of what it holds; copy it again")
        if broken := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
            raise ValueError(f"{path}: {broken[0]} has NaN or infinite values")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        return cls(metadata, part(_SHARED), part(_TEACHER))
