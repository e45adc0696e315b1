"""The node's side of calibration over Flower: it sends only counts, and keeps its clients' thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from cafe_flwr.core.log import logger
from cafe_flwr.data.split import Split
from cafe_flwr.networks.capacity import Networks
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.personal.calibration import keep
from cafe_flwr.personal.published import read_personal
from cafe_flwr.risk.client_calibration import ClientCalibration
from cafe_flwr.wire.calibration import certificate_from_json, counts_to_json, histogram_to_json, path_from_json
from cafe_flwr.wire.codec import failed, prefixed, record_of
from cafe_flwr.wire.keys import Keys

STEPS = ("histogram", "counts", "certificate")


class NodeCalibration:
    """Answers steps of calibration for the personal networks in ``folder``; ``networks`` take their weights in turn."""

    def __init__(self, folder: Path, networks: EarlyExitNetwork | Networks) -> None:
        self.folder = folder
        self.networks = networks

    def answer(self, message: Message, keys: Keys, examples: Callable[[int], Split]) -> Message:
        """Reply to one step for all clients asked for, with the reason for each client that fails."""
        config = record_of(message, keys.config, ConfigRecord)
        found: dict[str, str] = {}
        failures: dict[int, str] = {}
        for name, text in prefixed(config, "client.").items():
            client = int(name)
            try:
                found[f"client.{client}"] = self._answer(
                    str(config["step"]), client, str(text), examples(client), config
                )
            except Exception as error:
                logger.warning("client %d was not calibrated", client, exc_info=True)
                failures[client] = f"{type(error).__name__}: {error}"
        return Message(RecordDict({keys.config: ConfigRecord({**found, **failed(failures)})}), reply_to=message)

    def _answer(self, step: str, client: int, text: str, examples: Split, config: Mapping[str, Any]) -> str:
        network = read_personal(self.folder, client, self.networks).network
        side = ClientCalibration(client, network, examples, int(config["seed"]))
        if step == "histogram":
            return histogram_to_json(side.histogram())
        if step == "counts":
            return counts_to_json(side.counts(path_from_json(text)))
        if step == "certificate":
            keep(self.folder, client, certificate_from_json(text), side.fingerprint)
            return "kept"
        raise ValueError(f"a calibration has the steps {', '.join(STEPS)}, not {step!r}")
