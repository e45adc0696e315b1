"""Thresholds for every client of a run, each with the claim that holds for it, from counts over all clients.

There are three steps, and no example leaves a client. *Histograms* of a third of each client's calibration examples
shape one path of thresholds for all; *counts* of the other two thirds decide how far along it each client may go
(:mod:`cafe_flwr.risk.pooled`); every client keeps its *certificate* beside its personal network. The steps are the same
for a results folder (:func:`calibrate_run`) and a federation in Flower (:mod:`cafe_flwr.server.calibration`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.personal.published import PersonalNetworks
from cafe_flwr.risk.client_calibration import ClientCalibration, Request, decide, in_groups
from cafe_flwr.risk.counts import pooled_path
from cafe_flwr.risk.pooled import ClientCertificate
from cafe_flwr.risk.thresholds import ExitThresholds


def keep(folder: Path, client: int, certificate: ClientCertificate, of: str) -> None:
    """Write a client's thresholds beside its personal network: ``client-<partition>.thresholds.json``."""
    thresholds = replace(certificate.thresholds, fingerprint=of)
    write_atomically(thresholds_file(folder, client), to_json(thresholds.to_dict(), indent=2))


def thresholds_file(folder: Path, client: int) -> Path:
    """Where a client's thresholds are, in the folder of its personal network."""
    return folder / f"client-{client}.thresholds.json"


def read_thresholds(folder: Path, client: int) -> ExitThresholds | None:
    """A client's thresholds, None if it was never calibrated; ValueError if the file is damaged."""
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
    """Calibrate all clients of a finished run, or one on its node; write ``calibration.json`` and return its contents.

    Raises ValueError if there are no personal networks, or α or δ are out of range.
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
    """Write ``calibration.json`` and return its contents."""
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
