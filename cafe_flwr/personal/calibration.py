"""Thresholds for every client of a run, with what may be claimed of them, from counts over all clients.

In three steps, each client using only its own calibration examples. *Histograms* of a third of them shape one path of
thresholds for all; *counts* of the other two thirds along that path decide who may go how far on it
(:mod:`cafe_flwr.risk.pooled`); every client keeps its *certificate* beside its personal network. The same steps
serve a results folder (:func:`calibrate_run`) and a federation in Flower (:mod:`cafe_flwr.server.calibration`): no
example leaves a client.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.core.random import rng_for
from cafe_flwr.data.federation import Split
from cafe_flwr.metrics.exits import exit_logits
from cafe_flwr.metrics.selective import confidence_and_correct
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.personal.published import PersonalNetworks, fingerprint
from cafe_flwr.personal.store import to_json, write_atomically
from cafe_flwr.risk.counts import ClientCounts, client_histogram, count, pooled_path
from cafe_flwr.risk.path import Histogram, ThresholdPath
from cafe_flwr.risk.pooled import ClientCertificate, certify
from cafe_flwr.risk.selective import folds
from cafe_flwr.risk.thresholds import ExitThresholds


@dataclass(frozen=True)
class Request:
    """What a calibration asks for.

    Attributes
    ----------
    risk, confidence_level
        α and 1 − δ, in (0, 1).
    simultaneous
        Whether clients that are certified by themselves shall all be right at once.
    seed
        Of the clients' folds.
    """

    risk: float = 0.05
    confidence_level: float = 0.9
    simultaneous: bool = False
    seed: int = 0


class FoldCounts(NamedTuple):
    """A client's counts along the path: where its walk begins (proposal), and how far it may go (certification)."""

    proposal: ClientCounts
    certification: ClientCounts


class ClientCalibration:
    """One client's side: its network on its own calibration examples, in two folds that never meet.

    Parameters
    ----------
    client
        Which it is; its folds are drawn for it.
    network
        Its personal network.
    examples
        Its calibration split.
    seed
        Of the folds.

    Raises
    ------
    ValueError
        If there are labels that the network does not know.
    """

    def __init__(self, client: int, network: EarlyExitNetwork, examples: Split, seed: int) -> None:
        y = examples.y
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < network.num_classes:
            raise ValueError(
                f"client {client} has calibration labels {int(y.min())}..{int(y.max())}, its network knows "
                f"0..{network.num_classes - 1}"
            )
        self.confidence, self.correct = confidence_and_correct(exit_logits(network, examples.x), y)
        self.fingerprint = fingerprint(network)
        self.proposal, self.certification = folds(len(y), int(rng_for(seed, 0, client, "folds").integers(2**31)))

    def histogram(self) -> Histogram:
        """Of the proposal fold; without rows where a single exit leaves nothing to calibrate."""
        if self.confidence.shape[1] == 1:
            return Histogram(np.zeros((0, 0)), *(np.zeros((0, 0), dtype=np.int64) for _ in range(2)))
        return client_histogram(self.confidence[self.proposal], self.correct[self.proposal])

    def counts(self, path: ThresholdPath) -> FoldCounts:
        """Of both folds, along a path."""
        proposal, certification = (
            count(self.confidence[rows], self.correct[rows], path) for rows in (self.proposal, self.certification)
        )
        return FoldCounts(proposal, certification)


def decide(counts: Mapping[int, FoldCounts], path: ThresholdPath, request: Request) -> dict[int, ClientCertificate]:
    """The certificate of every client, from all clients' counts."""
    clients = sorted(counts)
    certificates = certify(
        [counts[c].certification for c in clients],
        request.risk,
        request.confidence_level,
        path=path,
        simultaneous=request.simultaneous,
        proposals=[counts[c].proposal for c in clients],
    )
    return dict(zip(clients, certificates, strict=True))


def in_groups(histograms: Mapping[int, Histogram], request: Request) -> list[tuple[list[int], Request]]:
    """Clients whose networks have equally many exits, who can be calibrated together, and what each group is asked for.

    Where all claims shall hold at once, the groups share δ by their sizes. Who has a single exit never leaves early: it
    is in no group.

    Raises
    ------
    ValueError
        If that is true of all.
    """
    groups: dict[int, list[int]] = {}
    for client in sorted(histograms):
        groups.setdefault(len(histograms[client].examples), []).append(client)
    groups.pop(0, None)
    if not groups:
        raise ValueError("a network with one exit has no thresholds to calibrate")
    if not request.simultaneous or len(groups) == 1:
        return [(clients, request) for clients in groups.values()]
    share = (1 - request.confidence_level) / sum(map(len, groups.values()))  # of δ, for one client
    return [(clients, replace(request, confidence_level=1 - share * len(clients))) for clients in groups.values()]


def keep(folder: Path, client: int, certificate: ClientCertificate, of: str) -> None:
    """Write a client's thresholds beside its personal network: ``client-<partition>.thresholds.json``."""
    thresholds = replace(certificate.thresholds, fingerprint=of)
    write_atomically(thresholds_file(folder, client), to_json(thresholds.to_dict(), indent=2))


def thresholds_file(folder: Path, client: int) -> Path:
    """Where a client's thresholds are, in the folder of its personal network."""
    return folder / f"client-{client}.thresholds.json"


def read_thresholds(folder: Path, client: int) -> ExitThresholds | None:
    """A client's thresholds; None if it was never calibrated.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    path = thresholds_file(folder, client)
    if not path.exists():
        return None
    try:
        return ExitThresholds.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): calibrate again") from None


def calibrate_run(
    run: PersonalNetworks, request: Request, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Calibrate all clients of a finished run, or one on its node; ``calibration.json`` says what is certified.

    Returns
    -------
    What ``calibration.json`` holds.

    Raises
    ------
    ValueError
        If there are no personal networks, or α or δ are out of range.
    """
    clients = run.clients
    if not clients:
        raise ValueError(f"{run.networks} holds no personal network: was the run finished?")
    sides = {}
    for done, client in enumerate(clients):
        if progress:
            progress(done, len(clients))
        sides[client] = ClientCalibration(
            client, run.personal(client).network, run.data(client).calibration, request.seed
        )
    histograms = {client: side.histogram() for client, side in sides.items()}
    certificates: dict[int, ClientCertificate] = {}
    for alike, wanted in in_groups(histograms, request):
        path = pooled_path([histograms[client] for client in alike])
        certificates |= decide({client: sides[client].counts(path) for client in alike}, path, wanted)
    certificates = dict(sorted(certificates.items()))
    for client, certificate in certificates.items():
        keep(run.networks, client, certificate, sides[client].fingerprint)
    return record(run.output("calibration.json"), certificates, request)


def record(path: Path, certificates: Mapping[int, ClientCertificate], request: Request) -> dict[str, Any]:
    """Write ``calibration.json``."""
    bases = [c.basis for c in certificates.values()]
    found = {
        "risk": request.risk,
        "confidence_level": request.confidence_level,
        "simultaneous": request.simultaneous,
        "seed": request.seed,
        "clients_by_basis": {basis: bases.count(basis) for basis in sorted(set(bases))},
        "clients": [
            {
                "client": client,
                "basis": c.basis,
                "claim": c.reason or c.thresholds.describe(),
                "thresholds": c.thresholds.to_dict()["thresholds"],
                "coverage": c.thresholds.coverage,
                "realised_risk": c.thresholds.realised_risk,
                "examples": c.thresholds.num_examples,
            }
            for client, c in certificates.items()
        ],
    }
    write_atomically(path, to_json(found, indent=2))
    return found


# --- what travels: counts as JSON ---


def histogram_to_json(h: Histogram) -> str:
    """Counts by bin; the bins are common to all."""
    return json.dumps({"examples": h.examples.tolist(), "harmed": h.harmed.tolist(), "edges": h.edges.tolist()})


def histogram_from_json(text: str) -> Histogram:
    """What :func:`histogram_to_json` wrote."""
    values = json.loads(text)
    return Histogram(
        np.array(values["edges"], dtype=np.float64), _counts(values["examples"]), _counts(values["harmed"])
    )


def counts_to_json(counts: FoldCounts) -> str:
    """Counts of both folds along the path."""
    return json.dumps(
        [{"n": c.n, **{k: getattr(c, k).tolist() for k in ("left", "wrong", "ever_wrong")}} for c in counts]
    )


def counts_from_json(text: str) -> FoldCounts:
    """What :func:`counts_to_json` wrote."""
    both = (
        ClientCounts(int(v["n"]), _counts(v["left"]), _counts(v["wrong"]), _counts(v["ever_wrong"]))
        for v in json.loads(text)
    )
    return FoldCounts(*both)


def path_to_json(path: ThresholdPath) -> str:
    """Thresholds, null where an exit is closed."""
    return json.dumps([[t if math.isfinite(t) else None for t in row] for row in path.thresholds.tolist()])


def path_from_json(text: str) -> ThresholdPath:
    """What :func:`path_to_json` wrote."""
    return ThresholdPath(np.array([[math.inf if t is None else t for t in row] for row in json.loads(text)]))


def certificate_to_json(c: ClientCertificate) -> str:
    """A certificate with its thresholds."""
    return json.dumps({"basis": c.basis, "reason": c.reason, "thresholds": c.thresholds.to_dict()})


def certificate_from_json(text: str) -> ClientCertificate:
    """What :func:`certificate_to_json` wrote."""
    values = json.loads(text)
    return ClientCertificate(values["basis"], ExitThresholds.from_dict(values["thresholds"]), values["reason"])


def _counts(values: Sequence[Any]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
