"""JSON texts that calibration sends: histograms, counts, threshold paths and certificates."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.risk.client_calibration import FoldCounts
from cafe_flwr.risk.counts import ClientCounts
from cafe_flwr.risk.path import Histogram, ThresholdPath
from cafe_flwr.risk.pooled import ClientCertificate
from cafe_flwr.risk.thresholds import ExitThresholds


def histogram_to_json(h: Histogram) -> str:
    """Counts by bin; all clients have the same bins."""
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
