"""Calibration of exit thresholds over Flower: three messages to every node, with counts and thresholds only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from cafe_flwr.core.log import logger
from cafe_flwr.methods.base import Method
from cafe_flwr.personal.calibration import record
from cafe_flwr.risk.client_calibration import Request, decide, in_groups
from cafe_flwr.risk.counts import pooled_path
from cafe_flwr.risk.options import Calibration
from cafe_flwr.risk.path import Histogram
from cafe_flwr.risk.pooled import ClientCertificate
from cafe_flwr.server.directory import Directory, describe_request, last_line
from cafe_flwr.server.options import Federation
from cafe_flwr.wire.calibration import certificate_to_json, counts_from_json, histogram_from_json, path_to_json
from cafe_flwr.wire.codec import failures_of, prefixed, record_of
from cafe_flwr.wire.keys import Keys

MESSAGE = "query.calibrate"


def calibrate_federation(
    grid: Grid, method: Method, calibration: Calibration, federation: Federation, *, seed: int, output: Path
) -> dict[str, Any]:
    """Calibrate the personal networks that a run has left on its nodes; each node keeps its clients' thresholds.

    ``method`` and ``seed`` are those of the run. The record written to ``output`` (``calibration.json``) is returned.
    RuntimeError if no client can be calibrated.
    """
    request = Request(calibration.risk, calibration.confidence_level, calibration.simultaneous, seed)
    nodes = Directory(Keys(), describe_request(seed, method, federation.num_clients))
    nodes.wait(
        grid,
        min_nodes=federation.min_available_nodes,
        num_clients=federation.num_clients,
        seconds=federation.wait_seconds,
    )
    asker = _Asker(grid, nodes, federation.round_timeout)
    found = asker.ask("histogram", dict.fromkeys(nodes.hosts, ""))
    if not found:
        raise RuntimeError("no client could be calibrated; see the reasons above")
    certificates = _certify(asker, {client: histogram_from_json(text) for client, text in found.items()}, request)
    kept = asker.ask("certificate", {c: certificate_to_json(certificate) for c, certificate in certificates.items()})
    for client in sorted(certificates.keys() - kept.keys()):
        logger.warning("client %d did not confirm its thresholds: they may not be on its disk", client)
    recorded = record(output, certificates, request)
    for line in recorded["clients"]:
        logger.info("client %d · %s · %s", line["client"], line["basis"], line["claim"])
    return recorded


def _certify(asker: _Asker, histograms: Mapping[int, Histogram], request: Request) -> dict[int, ClientCertificate]:
    """Thresholds of every client, from counts along its group's path; in ascending order of clients."""
    groups = [
        (clients, pooled_path([histograms[client] for client in clients]), wanted)
        for clients, wanted in in_groups(histograms, request)
    ]
    paths: dict[int, str] = {}
    for clients, path, _ in groups:
        paths |= dict.fromkeys(clients, path_to_json(path))
    told = asker.ask("counts", paths)
    certificates: dict[int, ClientCertificate] = {}
    for clients, path, wanted in groups:
        counts = {client: counts_from_json(told[client]) for client in clients if client in told}
        certificates |= decide(counts, path, wanted) if counts else {}
    return dict(sorted(certificates.items()))


@dataclass(frozen=True)
class _Asker:
    """Sends the steps of a calibration to clients."""

    grid: Grid
    nodes: Directory
    timeout: float

    def ask(self, step: str, texts: Mapping[int, str]) -> dict[int, str]:
        """Send every client its text of ``texts``; returns their answers by client."""
        messages = [
            self.nodes.request_to(node, MESSAGE, step=step, **{f"client.{c}": texts[c] for c in clients})
            for node, clients in self.nodes.by_node(list(texts)).items()
        ]
        found: dict[int, str] = {}
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            if reply.has_error():
                logger.warning("a node failed to calibrate: %s", last_line(reply.error.reason))
                continue
            config = record_of(reply, self.nodes.keys.config, ConfigRecord)
            found |= {int(c): str(text) for c, text in prefixed(config, "client.").items()}
            for client, reason in failures_of(config).items():
                logger.warning("client %d was not calibrated: %s", client, reason)
        return found
