"""Evaluation of one client: its network on its test examples, and the thresholds its calibration examples allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.core.random import rng_for
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.data.corruptions import ValueRange, corrupt, value_range
from cafe_flwr.data.split import ClientData
from cafe_flwr.metrics.early_exit import DynamicCounts, dynamic_counts
from cafe_flwr.metrics.exits import exit_logits, exit_metrics
from cafe_flwr.metrics.selective import Outcome, confidence_and_correct, scale_logits
from cafe_flwr.metrics.temperature import fit_temperatures
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.risk.selective import calibrate, folds
from cafe_flwr.risk.thresholds import ExitThresholds

PER_EXIT = ("accuracy", "ece", "nll", "ece_scaled", "nll_scaled")

Condition = tuple[str, int]  # corruption and severity
CLEAN: Condition = ("none", 0)


@dataclass(frozen=True)
class Certificate:
    """Thresholds for a risk, or the reason why there are none."""

    thresholds: ExitThresholds | None
    reason: str = ""

    @classmethod
    def of(cls, confidence: NDArray[Any], correct: NDArray[Any], risk: float, guarantee: str, seed: int) -> Certificate:
        """Calibrate on confidences and outcomes (N, m)."""
        try:
            found = calibrate(confidence, correct, risk=risk, guarantee=guarantee, seed=seed)
        except ValueError as error:
            return cls(None, str(error))
        return cls(found, "" if found.certified else f"no thresholds keep the risk {risk:g}: never leave early")

    @property
    def certified(self) -> bool:
        """Whether some examples may leave early with the guarantee."""
        return self.thresholds is not None and self.thresholds.certified

    def outcome(self, confidence: NDArray[Any], correct: NDArray[np.bool_]) -> Outcome | None:
        """Outcome of test examples (N, m) under the thresholds, if there are any."""
        return None if self.thresholds is None else Outcome.of(self.thresholds.leave(confidence), correct)

    def to_json(self, risk: float) -> dict[str, Any]:
        """As in ``evaluation.json``."""
        found = self.thresholds
        return {
            "risk": risk,
            "certified": self.certified,
            "reason": self.reason,
            "thresholds": None if found is None else list(found.thresholds),
            "temperatures": None if found is None else list(found.temperatures),
            "calibration_coverage": math.nan if found is None else found.coverage,
        }


def certify(
    logits: Tensor, y: Tensor, risks: Sequence[float], guarantee: str, seed: int
) -> tuple[list[float], dict[float, Certificate]]:
    """Temperatures and thresholds by risk from one client's calibration examples: logits (m, N, C) and labels (N,).

    The temperatures are fitted on the proposal fold only: labels that certify must not have influenced confidences.

    Examples
    --------
    >>> z = torch.tensor([[8.0, 0.0]] * 60).expand(2, 60, 2)
    >>> _, found = certify(z, torch.zeros(60, dtype=torch.int64), [0.01, 0.1], "selective", seed=0)
    >>> [certificate.certified for certificate in found.values()], found[0.01].reason[:27]
    ([False, True], '60 examples are too few to ')
    """
    proposal = torch.from_numpy(folds(len(y), seed)[0])
    temperatures = fit_temperatures(logits[:, proposal], y[proposal])
    if len(logits) == 1:
        return temperatures, {}  # with one exit nothing can leave early
    seen = confidence_and_correct(scale_logits(logits, temperatures), y)
    found = {risk: Certificate.of(*seen, risk, guarantee, seed) for risk in risks}
    for risk, certificate in found.items():
        if certificate.thresholds is not None:
            thresholds = replace(certificate.thresholds, temperatures=tuple(temperatures))
            found[risk] = replace(certificate, thresholds=thresholds)
    return temperatures, found


@dataclass(frozen=True)
class Measured:
    """One client's network on its test examples, as they are or corrupted.

    ``exits`` has every measure of ``PER_EXIT`` at every exit, (m,). ``confidence`` and ``correct``, (N, m), and the
    ``counts`` of dynamic inference at every threshold of ``metrics.THRESHOLDS`` use temperatures fitted on the whole
    calibration split. ``own`` has, by risk, the outcome under the client's own thresholds, if any.
    """

    exits: Mapping[str, list[float]]
    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]
    counts: DynamicCounts
    own: Mapping[float, Outcome]

    @classmethod
    def of(cls, logits: Tensor, y: Tensor, temperatures: Sequence[float], own: Mapping[float, Outcome]) -> Measured:
        """Measure test logits (m, N, C)."""
        scaled = scale_logits(logits, temperatures)
        plain, fitted = exit_metrics(logits, y), exit_metrics(scaled, y)
        values = (plain.accuracy, plain.ece, plain.loss, fitted.ece, fitted.loss)
        exits = dict(zip(PER_EXIT, values, strict=True))
        return cls(exits, *confidence_and_correct(scaled, y), dynamic_counts(scaled, y), own)


@dataclass(frozen=True)
class ClientEvaluation:
    """The evaluation of one client.

    ``values`` is the value range of its images, None if none was corrupted; ``macs`` those of leaving at each exit;
    ``confidence`` and ``correct``, (N, m), are of its calibration examples, with its temperatures; ``certificates`` its
    own thresholds by risk; ``measured`` its test examples by condition.
    """

    client: int
    temperatures: list[float]
    values: ValueRange | None
    macs: list[int]
    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]
    certificates: Mapping[float, Certificate]
    measured: Mapping[Condition, Measured]


def evaluate_client(
    client: int,
    network: EarlyExitNetwork,
    data: ClientData,
    conditions: Iterable[Condition],
    *,
    risks: Sequence[float],
    guarantee: str,
    seed: int,
) -> ClientEvaluation:
    """Measure one client's network.

    Temperatures and thresholds are fitted on the calibration split, and the value range of corruptions is that of the
    training and calibration images; the test split is used for measuring only.
    """
    calibration, test = data.calibration, data.test
    logits = exit_logits(network, calibration.x)
    temperatures = fit_temperatures(logits, calibration.y)
    own_temperatures, certificates = certify(logits, calibration.y, risks, guarantee, seed)
    measured, values = {}, None
    for name, severity in conditions:
        x = test.x
        if (name, severity) != CLEAN:
            values = values or value_range(network.inputs(torch.cat([data.train.x, calibration.x])))
            rng = rng_for(seed, 0, client, f"{name} {severity}")
            x = corrupt(network.inputs(x), name, severity, rng, values=values)
        seen = exit_logits(network, x)
        held = confidence_and_correct(scale_logits(seen, own_temperatures), test.y)
        outcomes = {risk: certificate.outcome(*held) for risk, certificate in certificates.items()}
        own = {risk: outcome for risk, outcome in outcomes.items() if outcome is not None}
        measured[name, severity] = Measured.of(seen, test.y, temperatures, own)
    macs = macs_per_exit(network, torch.zeros(1, *test.x.shape[1:], dtype=test.x.dtype))
    known = confidence_and_correct(scale_logits(logits, temperatures), calibration.y)
    return ClientEvaluation(client, temperatures, values, macs, *known, certificates, measured)


def certify_together(
    found: Sequence[ClientEvaluation], risks: Sequence[float], guarantee: str, seed: int
) -> dict[float, Certificate]:
    """Exploratory thresholds by risk, from the calibration examples of all clients together.

    They are not to be relied on: one binomial test over clients holds at best for their mixture, and the clients'
    temperatures were fitted on the same labels.
    """
    if len(found[0].macs) == 1:
        return {}
    seen = np.concatenate([c.confidence for c in found]), np.concatenate([c.correct for c in found])
    return {risk: Certificate.of(*seen, risk, guarantee, seed) for risk in risks}
