"""A client's report of a round, and its encoding in messages as columns over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, product
from typing import Any

import numpy as np
from flwr.app import MetricRecord
from numpy.typing import NDArray

from cafe_flwr.core.text import kebab
from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.wire.codec import of_client, scalars_of
from cafe_flwr.wire.keys import PHASES, Keys


@dataclass(frozen=True)
class ClientReport:
    """One client's result of a round.

    Attributes
    ----------
    num_examples, test_examples
        Sizes of its training and test split.
    train_loss
        Mean loss of local training; NaN where it did not train.
    local_steps
        Gradient steps taken.
    similarity
        (m−1,): similarity of its student exits to its last exit; NaN where it cannot be measured.
    before, after
        Test metrics per exit, before and after local training; NaN in rounds without evaluation, and for exits that it
        does not hold.
    upload
        Flat array of what it sends of its own, not averaged.
    """

    client: int
    num_examples: int
    test_examples: int
    train_loss: float
    local_steps: int
    seconds_train: float
    seconds_evaluate: float
    similarity: list[float]
    before: ExitMetrics
    after: ExitMetrics
    upload: NDArray[np.float32]

    def padded(self, num_exits: int) -> ClientReport:
        """The report with NaN for exits that the client does not hold."""
        missing = [math.nan] * (num_exits - 1 - len(self.similarity))
        return replace(
            self,
            similarity=[*self.similarity, *missing],
            before=self.before.padded(num_exits),
            after=self.after.padded(num_exits),
        )


_SCALARS = {name: kind for name, kind in scalars_of(ClientReport).items() if name != "client"}
_EXITS = [f.name for f in fields(ExitMetrics)]


def _key(name: str, keys: Keys) -> str:
    """Key of a column; users choose that of the training examples, as in Flower's strategies."""
    return keys.weight if name == "num_examples" else kebab(name)


def columns_of(reports: Sequence[ClientReport], keys: Keys) -> dict[str, list[Any]]:
    """A list for every number, client after client."""
    columns = {_key(name, keys): [getattr(report, name) for report in reports] for name in _SCALARS}
    columns["similarity"] = [value for report in reports for value in report.similarity]
    for phase, name in product(PHASES, _EXITS):
        columns[f"{name}-{phase}"] = [value for report in reports for value in getattr(getattr(report, phase), name)]
    return columns


def reports_of(
    metrics: MetricRecord,
    keys: Keys,
    clients: Sequence[int],
    uploads: Sequence[NDArray[np.float32]],
    num_exits: int | Mapping[int, int],
) -> list[ClientReport]:
    """Inverse of :func:`columns_of`, with each client's upload; ValueError if a number is out of range."""
    exits = [of_client(num_exits, client) for client in clients]

    def column(key: str, widths: Sequence[int]) -> list[list[Any]]:
        values = metrics.get(key, [])
        if not isinstance(values, list) or len(values) != sum(widths):
            raise ValueError(f"its metrics need {sum(widths)} values of {key!r}, got {values!r}")
        rows = iter(values)
        return [list(islice(rows, width)) for width in widths]

    scalars = {name: [row[0] for row in column(_key(name, keys), [1] * len(clients))] for name in _SCALARS}
    weights = scalars["num_examples"]
    if not all(isinstance(w, int) and 1 <= w < 2**53 for w in weights):
        raise ValueError(f"{keys.weight!r} must be a whole number of at least 1 for every client, got {weights}")
    if min(int(value) for name in ("test_examples", "local_steps") for value in scalars[name]) < 0:
        raise ValueError("its test examples and local steps must be 0 or more")
    similarity = column("similarity", [m - 1 for m in exits])
    if any(abs(value) > 1.01 for row in similarity for value in row):  # NaN: it cannot be measured
        raise ValueError("its similarities must lie between −1 and 1")
    measured = {phase: zip(*(column(f"{name}-{phase}", exits) for name in _EXITS), strict=True) for phase in PHASES}
    before, after = ([ExitMetrics(*values) for values in measured[phase]] for phase in PHASES)
    return [
        ClientReport(
            client=clients[i],
            **{name: kind(scalars[name][i]) for name, kind in _SCALARS.items()},  # type: ignore[arg-type]
            similarity=similarity[i],
            before=before[i],
            after=after[i],
            upload=uploads[i],
        )
        for i in range(len(clients))
    ]
