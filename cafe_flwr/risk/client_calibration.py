"""Joint calibration of clients: each one counts, and thresholds are decided from the counts of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cafe_flwr.core.random import rng_for
from cafe_flwr.data.split import Split
from cafe_flwr.metrics.exits import exit_logits
from cafe_flwr.metrics.selective import confidence_and_correct
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.fingerprint import fingerprint
from cafe_flwr.risk.counts import ClientCounts, client_histogram, count
from cafe_flwr.risk.path import Histogram, ThresholdPath
from cafe_flwr.risk.pooled import ClientCertificate, certify
from cafe_flwr.risk.selective import folds


@dataclass(frozen=True)
class Request:
    """What a calibration asks for: risk α and confidence level 1 − δ, in (0, 1).

    With ``simultaneous``, the claims about clients that are certified by themselves hold all at once. ``seed`` draws
    the folds.
    """

    risk: float = 0.05
    confidence_level: float = 0.9
    simultaneous: bool = False
    seed: int = 0


class FoldCounts(NamedTuple):
    """A client's counts along the path: ``proposal`` says where the walk begins, ``certification`` how far it goes."""

    proposal: ClientCounts
    certification: ClientCounts


class ClientCalibration:
    """One client's side: its network on its own calibration examples, in two disjoint folds drawn by the seed.

    Raises ValueError if there are labels that the network does not know.
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
        """Histogram of the proposal fold; without rows for a single exit, where there is nothing to calibrate."""
        if self.confidence.shape[1] == 1:
            return Histogram(np.zeros((0, 0)), *(np.zeros((0, 0), dtype=np.int64) for _ in range(2)))
        return client_histogram(self.confidence[self.proposal], self.correct[self.proposal])

    def counts(self, path: ThresholdPath) -> FoldCounts:
        """Counts of both folds along a path."""
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
    """Groups of clients that are calibrated together, those with equally many exits, each with its request.

    Where all claims shall hold at once, the groups share δ by their sizes. Clients with a single exit never leave early
    and are in no group; ValueError if that is true of all.
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
