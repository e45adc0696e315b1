"""The results folder of a finished run, as a source of personal networks and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe_flwr.core.older_settings import of_saved_run
from cafe_flwr.data.split import ClientData
from cafe_flwr.personal.published import PersonalNetwork, clients_of, pixels_of, read_personal


@dataclass(frozen=True)
class FinishedRun:
    """A results folder whose networks and data can be built again from its settings."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "settings.json").is_file():
            raise ValueError(f"{self.folder} is no results folder of a run: it has no settings.json")

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def networks(self) -> Path:
        """Folder of the personal networks."""
        return self.folder / "personal"

    @property
    def clients(self) -> list[int]:
        """Clients that have a personal network."""
        return clients_of(self.networks)

    @property
    def run_config(self) -> Mapping[str, Any]:
        """Settings of the run, in kebab-case."""
        from cafe_flwr.settings import todays

        return todays(of_saved_run(json.loads((self.folder / "settings.json").read_text())))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        from cafe_flwr.app.parts import federation

        return federation(self._settings).class_names

    @property
    def pixels(self) -> tuple[float, float]:
        """Mean and standard deviation that images were normalised by."""
        return pixels_of(self.run_config.get("dataset", ""))

    def personal(self, client: int) -> PersonalNetwork:
        """A client's personal network."""
        from cafe_flwr.app.parts import build_networks

        return read_personal(self.networks, client, build_networks(self._settings))

    def data(self, client: int) -> ClientData:
        """The client's data, as in the run."""
        from cafe_flwr.app.parts import federation

        return federation(self._settings).load(client)

    def output(self, name: str) -> Path:
        """Path of a file in the results folder."""
        return self.folder / name

    @property
    def _settings(self) -> Any:
        from cafe_flwr.settings import Settings

        return Settings.from_run_config(self.run_config)
