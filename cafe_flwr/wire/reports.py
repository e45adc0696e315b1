"""A client's report of a round, and its encoding in messages as columns over clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, product
from typing import Any

import numpy as np
from flwr.app import MetricRecord
from numpy.typing import NDArray

from cafe_flwr.core.text import kebab
from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.wire.codec import of_client, scalars_of
from cafe_flwr.wire.keys import PHASES, Keys
from cafe_flwr.wire.reader import MAX_ROUNDING, Value, cosine, read, real, share, whole


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


_SCALARS = [name for name in scalars_of(ClientReport) if name != "client"]
EXITS = {"accuracy": share("m"), "loss": real("m", low=-MAX_ROUNDING), "ece": share("m")}
_SECONDS = real("n", low=0, high=1e9, nan=False)
_DECLARED = {
    "num_examples": whole("n", low=1),
    "test_examples": whole("n"),
    "train_loss": real("n"),  # an objective may subtract
    "local_steps": whole("n"),
    "seconds_train": _SECONDS,
    "seconds_evaluate": _SECONDS,
    "similarity": cosine("s"),
    **{f"{name}-{phase}": value for phase, (name, value) in product(PHASES, EXITS.items())},
}


def _key(name: str, keys: Keys) -> str:
    """Key of a column; users choose that of the training examples, as in Flower's strategies."""
    return keys.weight if name == "num_examples" else kebab(name)


@lru_cache
def _declared(keys: Keys) -> dict[str, Value]:
    """What the columns may hold, by key."""
    return {_key(name, keys): value for name, value in _DECLARED.items()}


def columns_of(reports: Sequence[ClientReport], keys: Keys) -> dict[str, list[Any]]:
    """A list for every number, client after client."""
    columns = {_key(name, keys): [getattr(report, name) for report in reports] for name in _SCALARS}
    columns["similarity"] = [value for report in reports for value in report.similarity]
    for phase, name in product(PHASES, EXITS):
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
    found = read(
        metrics, _declared(keys), {"n": len(exits), "m": sum(exits), "s": sum(exits) - len(exits)}, "its metrics"
    )

    def rows(key: str, widths: Iterable[int]) -> Iterator[list[float]]:
        values = iter(found[key])
        return (list(islice(values, width)) for width in widths)

    scalars = zip(*(found[_key(name, keys)] for name in _SCALARS), strict=True)
    similarity = rows("similarity", (m - 1 for m in exits))
    before, after = (map(ExitMetrics, *(rows(f"{name}-{phase}", exits) for name in EXITS)) for phase in PHASES)
    return [
        ClientReport(client, *numbers, *own)
        for client, numbers, *own in zip(clients, scalars, similarity, before, after, uploads, strict=True)
    ]
