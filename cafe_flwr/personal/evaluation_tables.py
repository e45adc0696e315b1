"""Evaluations of single clients, combined: the contents of ``evaluation.json`` and its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe_flwr.metrics.curve import CostCurve
from cafe_flwr.metrics.early_exit import DynamicCounts
from cafe_flwr.metrics.selective import (
    OWN,
    POOLED,
    RISK_OF,
    VOID,
    Outcome,
    calibration_error,
    leaving_curve,
    over_clients,
    reliability,
    risk_coverage,
)
from cafe_flwr.personal.client_evaluation import CLEAN, PER_EXIT, Certificate, ClientEvaluation, Condition, Measured

if TYPE_CHECKING:
    import pandas as pd


def put_together(
    found: Sequence[ClientEvaluation], pooled: Mapping[float, Certificate], *, guarantee: str, shifted: bool = False
) -> dict[str, Any]:
    """The measured part of ``evaluation.json``: by client (at least one), and over clients by condition.

    ``pooled`` are thresholds by risk from all clients' calibration examples together, ``guarantee`` what they were
    calibrated for; ``shifted`` says whether even clean test examples are distributed differently than calibration's.
    """
    clean = [c.measured[CLEAN] for c in found]
    confidence, correct = np.concatenate([m.confidence for m in clean]), np.concatenate([m.correct for m in clean])
    bins = [reliability(confidence[:, k], correct[:, k]) for k in range(confidence.shape[1])]
    curves = [risk_coverage(confidence[:, k], correct[:, k]) for k in range(confidence.shape[1])]
    curves.append(leaving_curve(confidence, correct))
    return {
        "clients": [_client(c) for c in found],
        "pooled": [{**certificate.to_json(risk), "label": POOLED} for risk, certificate in pooled.items()],
        "conditions": [_condition(found, pooled, condition, guarantee, shifted) for condition in found[0].measured],
        "reliability": bins,
        "ece_of_all_examples": [calibration_error(exit_bins) for exit_bins in bins],
        "risk_coverage": [
            {
                "of": f"exit {k}" if k < len(curves) else "dynamic",
                "area": curve.area,
                "coverage": curve.thinned().coverage.tolist(),
                "risk": curve.thinned().risk.tolist(),
            }
            for k, curve in enumerate(curves, start=1)
        ],
    }


def _client(c: ClientEvaluation) -> dict[str, Any]:
    clean = c.measured[CLEAN]
    return {
        "client": c.client,
        "calibration": len(c.confidence),
        "test": len(clean.confidence),
        "temperatures": c.temperatures,
        "value_range": None if c.values is None else list(c.values),
        **clean.exits,
        "certificates": [
            {**certificate.to_json(risk), "test": _measures(clean.own.get(risk), c.macs)}
            for risk, certificate in c.certificates.items()
        ],
    }


def _measures(outcome: Outcome | None, macs: Sequence[float]) -> dict[str, Any] | None:
    return None if outcome is None else {**outcome.measures(macs), "exit_shares": outcome.shares()}


def _condition(
    found: Sequence[ClientEvaluation],
    pooled: Mapping[float, Certificate],
    condition: Condition,
    guarantee: str,
    shifted: bool,
) -> dict[str, Any]:
    """Over clients, under one condition."""
    name, severity = condition
    void = condition != CLEAN or shifted
    measured = [c.measured[condition] for c in found]
    examples = [len(m.confidence) for m in measured]
    macs = found[0].macs
    exits = {
        measure: _columns([over_clients(v, examples, measure) for v in zip(*rows, strict=True)])
        for measure in PER_EXIT
        for rows in [[m.exits[measure] for m in measured]]
    }
    outcomes = [_outcomes(c, m, pooled) for c, m in zip(found, measured, strict=True)]
    dynamic = [
        {
            "risk": risk,
            "thresholds": thresholds,
            "label": VOID if void else text,
            **_over([o[thresholds][risk] for o in outcomes if risk in o[thresholds]], risk, guarantee, macs),
        }
        for risk in pooled
        for thresholds, text in (("own", OWN), ("pooled", POOLED))
    ]
    by_client = (m.counts for m in measured)
    counts = DynamicCounts(*(np.sum(part, axis=0) for part in zip(*by_client, strict=True)))
    return {
        "corruption": name,
        "severity": severity,
        "label": VOID if void else "",
        "examples": sum(examples),
        "exits": exits,
        "dynamic": dynamic,
        "curve": _curve(counts, sum(examples), macs),
    }


def _outcomes(c: ClientEvaluation, m: Measured, pooled: Mapping[float, Certificate]) -> dict[str, dict[float, Outcome]]:
    """Outcomes of a client's examples by owner of the thresholds and by risk, where there are thresholds."""
    together = {risk: certificate.outcome(m.confidence, m.correct) for risk, certificate in pooled.items()}
    return {
        "own": {risk: m.own[risk] for risk, certificate in c.certificates.items() if certificate.certified},
        "pooled": {risk: outcome for risk, outcome in together.items() if outcome is not None},
    }


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Statistics over clients, each a list over exits."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def _over(outcomes: Sequence[Outcome], risk: float, guarantee: str, macs: Sequence[float]) -> dict[str, Any]:
    """All test examples together and the spread over clients; no measures if there are no thresholds."""
    each = [outcome.measures(macs) for outcome in outcomes]
    if not each:
        return {"clients": 0, "all": None, "over_clients": {}, "clients_above_risk": 0}
    examples = [sum(outcome.left) for outcome in outcomes]
    return {
        "clients": len(each),
        "all": _measures(Outcome.total(outcomes), macs),
        "over_clients": {key: over_clients([m[key] for m in each], examples, key) for key in each[0]},
        "clients_above_risk": sum(m[RISK_OF[guarantee]] > risk for m in each),
    }


def _curve(counts: DynamicCounts, examples: int, macs: Sequence[float]) -> dict[str, Any]:
    """Accuracy against mean MACs at every threshold that all exits share."""
    mean_macs = (counts.left / max(examples, 1)) @ np.asarray(macs, dtype=np.float64)
    curve = CostCurve.from_counts(counts, mean_macs)
    return {**curve.points(), "area": curve.area}


def long_table(found: Sequence[ClientEvaluation], pooled: Mapping[float, Certificate]) -> pd.DataFrame:
    """One value per row: client, corruption, severity, thresholds, risk, exit (1..m), measure, value, examples.

    ``exit`` is 0 for measures of the dynamic network, and ``thresholds`` is empty for measures that depend on none.
    """
    import pandas as pd

    rows: list[tuple[Any, ...]] = []
    for c in found:
        for (name, severity), m in c.measured.items():
            head, n = (c.client, name, severity), len(m.confidence)
            rows += [
                (*head, "", math.nan, k, measure, value, n)
                for measure, values in m.exits.items()
                for k, value in enumerate(values, start=1)
            ]
            for thresholds, outcomes in _outcomes(c, m, pooled).items():
                for risk, outcome in outcomes.items():
                    at = (*head, thresholds, risk)
                    rows += [(*at, 0, measure, value, n) for measure, value in outcome.measures(c.macs).items()]
                    rows += [(*at, k, "exit_share", value, n) for k, value in enumerate(outcome.shares(), start=1)]
    columns = ("client", "corruption", "severity", "thresholds", "risk", "exit", "measure", "value", "examples")
    return pd.DataFrame(rows, columns=pd.Index(columns))
