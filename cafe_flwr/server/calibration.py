"""Calibration through Flower: three messages to every node, of counts and thresholds only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from cafe_flwr.core.log import logger
from cafe_flwr.methods.base import settings_of
from cafe_flwr.personal.calibration import record
from cafe_flwr.risk.client_calibration import Request, decide, in_groups
from cafe_flwr.risk.counts import pooled_path
from cafe_flwr.risk.pooled import ClientCertificate
from cafe_flwr.server.directory import Directory
from cafe_flwr.server.replies import last_line
from cafe_flwr.settings import Settings
from cafe_flwr.wire.calibration import certificate_to_json, counts_from_json, histogram_from_json, path_to_json
from cafe_flwr.wire.codec import failures_of, method_config, prefixed, record_of
from cafe_flwr.wire.keys import PROTOCOL, Keys

MESSAGE = "query.calibrate"
STEPS = ("histogram", "counts", "certificate")


def calibrate_federation(grid: Grid, settings: Settings) -> dict[str, Any]:
    """Calibrate the personal networks that a run has left on its nodes; each node keeps its clients' thresholds.

    Returns
    -------
    What ``calibration.json`` holds.

    Raises
    ------
    RuntimeError
        If no client can be calibrated, with all reasons.
    """
    request = Request(settings.calibration.risk, settings.calibration.confidence_level, settings.calibration.simultaneous, settings.seed)
    keys = Keys()
    question = {
        "protocol": PROTOCOL,
        "seed": settings.seed,
        "num-clients": settings.num_clients,
        **method_config(settings.method, settings_of(settings.build_method())),
    }
    nodes = Directory(keys, question)
    nodes.wait(
        grid,
        min_nodes=settings.federation.min_available_nodes,
        num_clients=settings.num_clients,
        seconds=settings.federation.wait_seconds,
    )

    def ask(step: str, texts: Mapping[int, str]) -> dict[int, str]:
        """Ask every client in ``texts``, each with its own text; the texts they answer."""
        messages = {
            node: Message(
                RecordDict(
                    {
                        keys.config: ConfigRecord(
                            {**question, "step": step, **{f"client.{c}": texts[c] for c in clients}}
                        )
                    }
                ),
                node,
                MESSAGE,
            )
            for node, clients in nodes.by_node(list(texts)).items()
        }
        found: dict[int, str] = {}
        for reply in grid.send_and_receive(list(messages.values()), timeout=settings.federation.round_timeout):
            if reply.has_error():
                logger.warning("a node failed to calibrate: %s", last_line(reply.error.reason))
                continue
            config = record_of(reply, keys.config, ConfigRecord)
            found |= {int(c): str(text) for c, text in prefixed(config, "client.").items()}
            for client, reason in failures_of(config).items():
                logger.warning("client %d was not calibrated: %s", client, reason)
        return found

    histograms = {c: histogram_from_json(t) for c, t in ask("histogram", dict.fromkeys(nodes.hosts, "")).items()}
    if not histograms:
        raise RuntimeError("no client could be calibrated; see the reasons above")
    paths: dict[int, str] = {}
    groups = []
    for clients, wanted in in_groups(histograms, request):
        path = pooled_path([histograms[c] for c in clients])
        groups.append((clients, path, wanted))
        paths |= dict.fromkeys(clients, path_to_json(path))
    told = ask("counts", paths)
    certificates: dict[int, ClientCertificate] = {}
    for clients, path, wanted in groups:
        counts = {c: counts_from_json(told[c]) for c in clients if c in told}
        certificates |= decide(counts, path, wanted) if counts else {}
    certificates = dict(sorted(certificates.items()))
    kept = ask("certificate", {c: certificate_to_json(certificate) for c, certificate in certificates.items()})
    for client in sorted(certificates.keys() - kept.keys()):
        logger.warning("client %d did not confirm its thresholds: they may not be on its disk", client)
    found = record(settings.results / "calibration.json", certificates, request)
    for line in found["clients"]:
        logger.info("client %d · %s · %s", line["client"], line["basis"], line["claim"])
    return found
