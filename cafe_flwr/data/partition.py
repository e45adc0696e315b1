"""Partition a data set over clients, by its labels or by a column, and a client's examples into splits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.core.random import rng_for

MIN_EXAMPLES = 10
"""Examples of the smallest client, in all splits."""


class Rule(NamedTuple):
    """How examples are dealt out: ``"dirichlet"`` or ``"pathological"``, by labels; ``"even"``, at random.

    ``alpha`` and ``capped`` belong to the Dirichlet partition. If capped, classes are dealt out in the order of their
    labels, and a client (or group) that holds more than its fair share, N/n examples, gets none of the remaining ones,
    as in the code of Yurochkin et al. (arXiv 1905.12022) and PFLlib. ``classes_per_client`` is of the pathological one.
    """

    kind: str = "dirichlet"
    alpha: float = 0.1
    classes_per_client: int = 10
    capped: bool = False

    def partitioner(self, parts: int, smallest: int, seed: int) -> Any:
        """A partitioner of flwr-datasets by column ``label``; a Dirichlet part has at least ``smallest`` examples."""
        from flwr_datasets.partitioner import DirichletPartitioner, PathologicalPartitioner

        if self.kind == "dirichlet":
            return DirichletPartitioner(
                parts, "label", self.alpha, min_partition_size=smallest, self_balancing=self.capped, seed=seed
            )
        if self.kind == "pathological":
            return PathologicalPartitioner(
                parts, "label", self.classes_per_client, class_assignment_mode="first-deterministic", seed=seed
            )
        raise ValueError(f"partition must be 'dirichlet' or 'pathological', got {self.kind!r}")


EVEN = Rule("even")


def partition_labels(
    labels: NDArray[np.int64], num_clients: int, rule: Rule, seed: int, label_groups: int = 0
) -> list[NDArray[np.int64]]:
    """Positions of ``labels`` that each client gets; with ``label_groups``, each group deals evenly to its clients.

    ValueError if there are too few examples for so many clients; the message says what to change.
    """
    logging.getLogger("datasets").setLevel(logging.ERROR)
    groups = label_groups or num_clients
    partitioner = rule.partitioner(groups, MIN_EXAMPLES * -(-num_clients // groups), seed)
    if num_clients * MIN_EXAMPLES > len(labels):
        raise ValueError(
            f"{len(labels)} examples cannot serve {num_clients} clients with at least {MIN_EXAMPLES} each: "
            "lower num-clients or give more data"
        )
    try:
        parts = _load(partitioner, groups, {"label": labels, "position": np.arange(len(labels))})
        if label_groups:
            parts = _deal(labels, parts, num_clients, rng_for(seed, 0, -1, "label groups"))
        if (smallest := min(map(len, parts))) < MIN_EXAMPLES:
            raise ValueError(f"the smallest client would have {smallest} of at least {MIN_EXAMPLES} examples")
        return parts
    except ValueError as error:
        advice = (
            "raise dirichlet-alpha or the number of examples, or lower num-clients"
            if rule.kind == "dirichlet"
            else "change classes-per-client, lower num-clients or raise the number of examples"
        )
        grouped = f" in {label_groups} label groups" if label_groups else ""
        raise ValueError(
            f"the {rule.kind} partition of {len(labels)} examples over {num_clients} clients{grouped} failed "
            f"({error}): {advice}"
        ) from error


def _load(partitioner: Any, parts: int, columns: dict[str, NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Values of the column ``position`` in each part."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns at every retry
        return [np.asarray(partitioner.load_partition(k)["position"], dtype=np.int64) for k in range(parts)]


def partition_naturally(
    column: str, values: Sequence[Any], labels: NDArray[np.int64], num_clients: int, rule: Rule = EVEN, seed: int = 0
) -> list[NDArray[np.int64]]:
    """Positions that each client gets if a client, or several, hold one value of a column.

    With v different values, in sorted order, client i has examples of value i mod v only; num_clients is a multiple of
    v. The rule says how a value is dealt out to its num_clients/v clients: at random in equal parts, or by a Dirichlet
    partition of its labels, drawn anew for every value.

    ValueError if values are missing or do not suit so many clients; the message says what to change.

    Examples
    --------
    >>> parts = partition_naturally("style", ["photo", "sketch"] * 20, np.zeros(40, dtype=np.int64), 2)
    >>> [len(part) for part in parts], parts[1][:3].tolist()
    ([20, 20], [1, 3, 5])
    """
    names, value = _distinct(column, values)
    counts = np.bincount(value, minlength=len(names))
    found = f"partition-column = {column!r} has {_counted(names, counts)}"
    if len(names) < 2:
        raise ValueError(f"{found}: it must tell two clients apart at least, choose another column or partition")
    clients, rest = divmod(num_clients, len(names))
    if rest or not clients:
        fitting = [len(names) * k for k in (clients, clients + 1) if k]
        raise ValueError(
            f"{found}, and num-clients = {num_clients} is no multiple of {len(names)}: set num-clients to "
            f"{' or '.join(map(str, fitting))}"
        )
    if (smallest := int(counts.min())) < clients * MIN_EXAMPLES:
        raise ValueError(
            f"{found}: the {smallest} examples of {names[int(counts.argmin())]!r} cannot serve its {clients} of "
            f"num-clients = {num_clients} clients with at least {MIN_EXAMPLES} each: lower num-clients, or choose "
            "another column"
        )
    dealt: dict[int, NDArray[np.int64]] = {}
    for place, name in enumerate(names):
        positions = np.flatnonzero(value == place)
        own_seed = int(rng_for(seed, 0, -1, f"natural {place}").integers(2**31))
        try:
            parts = _split_value(labels[positions], clients, rule, own_seed)
        except ValueError as error:
            raise ValueError(f"natural-split of the value {name!r} of {column!r}: {error}") from error
        dealt |= {k * len(names) + place: positions[part] for k, part in enumerate(parts)}
    return [dealt[client] for client in range(num_clients)]


def _split_value(labels: NDArray[np.int64], num_clients: int, rule: Rule, seed: int) -> list[NDArray[np.int64]]:
    """Positions, among the examples of one value, of each of its clients."""
    if num_clients == 1:
        return [np.arange(len(labels))]
    if rule.kind == "dirichlet":
        return partition_labels(labels, num_clients, rule, seed)
    if rule.kind != "even":
        raise ValueError(f"natural-split must be 'even' or 'dirichlet', got {rule.kind!r}")
    from flwr_datasets.partitioner import IidPartitioner

    shuffled = np.random.default_rng(seed).permutation(len(labels))
    return _load(IidPartitioner(num_clients), num_clients, {"position": shuffled})


def _distinct(column: str, values: Sequence[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """The different values, sorted, and which of them every example has, (N,)."""
    if missing := sum(value is None or value != value for value in values):  # NaN differs from itself
        raise ValueError(
            f"partition-column = {column!r} has {missing} of {len(values)} rows without a value: fill them in, leave "
            "the rows out, or choose another column"
        )
    if kinds := {type(value).__name__ for value in values} - {"str", "int", "bool", "float"}:
        raise ValueError(
            f"partition-column = {column!r} must hold names or numbers, got {', '.join(sorted(kinds))}: choose another "
            "column"
        )
    names, value = np.unique(np.asarray(values), return_inverse=True)
    return names.tolist(), value.astype(np.int64)


def _counted(names: Sequence[Any], counts: NDArray[np.int64], most: int = 8) -> str:
    """'2 values (photo: 1670, sketch: 3929)'."""
    listed = ", ".join(f"{name}: {count}" for name, count in zip(names[:most], counts, strict=False))
    return f"{len(names)} value{'s' * (len(names) > 1)} ({listed}{', …' * (len(names) > most)})"


def _deal(
    labels: NDArray[np.int64], shared: list[NDArray[np.int64]], num_clients: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Positions that each client gets of its group's examples; client i is in group i mod G."""
    dealt: dict[int, NDArray[np.int64]] = {}
    for group, positions in enumerate(shared):
        members = range(group, num_clients, len(shared))
        parts = stratified_split(labels[positions], [1 / len(members)] * len(members), rng)
        dealt |= {client: positions[part] for client, part in zip(members, parts, strict=True)}
    return [dealt[client] for client in range(num_clients)]


def check_shares(shares: Sequence[float]) -> None:
    """Raise ValueError unless these are shares of train, calibration and test."""
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares of train, calibration and test must be 0 or more and sum to 1, got {tuple(shares)}")


def stratified_split(
    labels: NDArray[np.int64], shares: Sequence[float], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Split positions into parts of the given shares with the same label distribution.

    Every class is spread over the parts in proportion. Remainders carry over to the next class, so that the sizes of
    the parts are right even if most classes have one or two examples.

    Examples
    --------
    >>> parts = stratified_split(np.array([0] * 10 + [1] * 5), (0.6, 0.2, 0.2), np.random.default_rng(0))
    >>> [len(p) for p in parts]
    [9, 3, 3]
    """
    classes = rng.permutation(np.unique(labels))
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == c)) for c in classes])
    deficit = rng.random(len(shares)) * 1e-6  # breaks ties by chance
    part = np.empty(len(labels), dtype=np.int64)
    for position in order:
        deficit += shares
        part[position] = chosen = int(np.argmax(deficit))
        deficit[chosen] -= 1.0
    return [np.flatnonzero(part == k) for k in range(len(shares))]
