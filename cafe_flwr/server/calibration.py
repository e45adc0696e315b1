"""Calibration of exit thresholds over Flower: three messages to every node, with counts and thresholds only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flwr.serverapp import Grid

from cafe_flwr.core.log import logger
from cafe_flwr.core.text import shown
from cafe_flwr.methods.base import Method
from cafe_flwr.personal.calibration import record
from cafe_flwr.risk.client_calibration import FoldCounts, Request, decide, in_groups
from cafe_flwr.risk.counts import pooled_path
from cafe_flwr.risk.options import Calibration
from cafe_flwr.risk.path import Histogram
from cafe_flwr.risk.pooled import ClientCertificate
from cafe_flwr.server.directory import Directory, describe_request
from cafe_flwr.server.options import Federation
from cafe_flwr.server.replies import Replies, sort_out
from cafe_flwr.server.requests import PendingRequest
from cafe_flwr.wire.calibration import (
    CalibrationReply,
    certificate_to_json,
    check_counts,
    check_histogram,
    counts_from_json,
    histogram_from_json,
    path_to_json,
)
from cafe_flwr.wire.keys import Keys

T = TypeVar("T")

MESSAGE = "query.calibrate"


def calibrate_federation(
    grid: Grid,
    method: Method,
    calibration: Calibration,
    federation: Federation,
    *,
    seed: int,
    output: Path,
    own_numbers: bool = False,
) -> dict[str, Any]:
    """Calibrate the personal networks that a run has left on its nodes; each node keeps its clients' thresholds.

    ``method`` and ``seed`` are those of the run, ``own_numbers`` is as for the strategy. The record written to
    ``output`` (``calibration.json``) is returned.
    RuntimeError if no client can be calibrated.
    """
    request = Request(calibration.risk, calibration.confidence_level, calibration.simultaneous, seed)
    nodes = Directory(Keys(), describe_request(seed, method, federation.num_clients), own_numbers=own_numbers)
    nodes.wait(
        grid,
        min_nodes=federation.min_available_nodes,
        num_clients=federation.num_clients,
        seconds=federation.wait_seconds,
    )
    asker = Asker(grid, nodes, federation.round_timeout)
    found = asker.ask("histogram", dict.fromkeys(nodes.hosts, ""), asker.histogram)
    certificates = _certify(asker, found, request) if found else {}
    if not certificates:
        raise RuntimeError("no client could be calibrated; see the reasons above")
    texts = {c: certificate_to_json(certificate) for c, certificate in certificates.items()}
    asker.ask("certificate", texts, kept, otherwise="did not confirm its thresholds, they may not be on its disk")
    recorded = record(output, certificates, request)
    for line in recorded["clients"]:
        logger.info("client %d · %s · %s", line["client"], line["basis"], line["claim"])
    return recorded


def _certify(asker: Asker, histograms: Mapping[int, Histogram], request: Request) -> dict[int, ClientCertificate]:
    """Thresholds of every client, from counts along its group's path; in ascending order of clients."""
    groups = [
        (clients, pooled_path([histograms[client] for client in clients]), wanted)
        for clients, wanted in in_groups(histograms, request)
    ]
    paths = {client: path for clients, path, _ in groups for client in clients}

    def understood(client: int, text: str) -> FoldCounts:
        counts = counts_from_json(text)
        check_counts(counts, paths[client], histograms[client])
        return counts

    told = asker.ask("counts", {client: path_to_json(path) for client, path in paths.items()}, understood)
    certificates: dict[int, ClientCertificate] = {}
    for clients, path, wanted in groups:
        counts = {client: told[client] for client in clients if client in told}
        certificates |= decide(counts, path, wanted) if counts else {}
    return dict(sorted(certificates.items()))


@dataclass(frozen=True)
class Asker:
    """Sends the steps of a calibration to clients."""

    grid: Grid
    nodes: Directory
    timeout: float

    def histogram(self, client: int, text: str) -> Histogram:
        """A client's histogram; ValueError if it is not one of its network's exits."""
        found = histogram_from_json(text)
        check_histogram(found, self.nodes.kind(client).num_exits)
        return found

    def ask(
        self,
        step: str,
        texts: Mapping[int, str],
        understood: Callable[[int, str], T],
        otherwise: str = "was not calibrated",
    ) -> dict[int, T]:
        """Send every client its text of ``texts``; returns, by client, what is ``understood`` of the answers.

        A node answers for the clients that it was asked for. What is missing, or not understood (ValueError), is logged
        by client.
        """
        keys = self.nodes.keys
        pending = [
            PendingRequest(
                self.nodes.request_to(node, MESSAGE, step=step, **{f"client.{c}": texts[c] for c in clients}),
                node,
                clients,
            )
            for node, clients in self.nodes.by_node(list(texts)).items()
        ]

        def of_those_asked(client: int, text: str) -> T:
            if client not in texts:
                raise ValueError("it was not asked")
            return understood(client, text)

        messages = self.grid.send_and_receive([one.message for one in pending], timeout=self.timeout)
        replies: Replies[CalibrationReply[T]] = sort_out(
            messages, pending, lambda m: CalibrationReply.from_message(m, keys, of_those_asked)
        )
        self.nodes.note_answers({one.node: one.clients for one in pending}, replies.left_out)
        for client, reason in sorted(replies.left_out.items()):
            logger.warning("%s %s: %s", self.nodes.label(client), otherwise, reason)
        return {answer.client: answer.value for answer in replies.reports}


def kept(client: int, text: str) -> str:
    """A client's confirmation; ValueError if it is none."""
    if text != "kept":
        raise ValueError(f"it says {shown(text)!r}, not that it has kept them")
    return text
