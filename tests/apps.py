"""Flower apps in their folders, loaded as Flower loads them, and run in this process."""

from __future__ import annotations

import importlib
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from cafe_flwr.engine import InProcessGrid


@dataclass(frozen=True)
class App:
    """The two parts of a Flower app, and the run config of its manifest."""

    client: ClientApp
    server: ServerApp
    config: dict[str, Any]

    def serve(self, grid: Grid, **config: Any) -> None:
        """Run the ServerApp; keys of the run config as Python names."""
        changed = self._keys(config)
        self.server(grid, Context(1, 1, {}, RecordDict(), {**self.config, **changed}))

    def run(self, num_nodes: int = 2, node_config: dict[str, Any] | None = None, **config: Any) -> None:
        """Run both parts, as ``flwr run`` would."""
        self.serve(InProcessGrid(self.client, num_nodes, {**self.config, **self._keys(config)}, node_config), **config)

    def _keys(self, config: dict[str, Any]) -> dict[str, Any]:
        """Keys of the run config for Python names, which leave the table out."""
        keys = {key.rpartition(".")[2].replace("-", "_"): key for key in reversed(self.config)}
        return {keys[name]: value for name, value in config.items()}


def load_app(folder: Path) -> App:
    """The app of a folder; its modules are forgotten at once, so that another may have some of the same names."""
    folder = folder.resolve()
    manifest = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        parts = []
        for part in ("clientapp", "serverapp"):
            module, _, name = manifest["components"][part].partition(":")
            parts.append(getattr(importlib.import_module(module), name))
        return App(*parts, _flat(manifest.get("config", {})))
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(f"{folder}/"):
                del sys.modules[name]
        importlib.invalidate_caches()


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
