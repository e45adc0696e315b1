"""Data sets and how they are dealt out: train, calibration and test examples of every client.

A data set is partitioned over clients by its labels (flwr-datasets), then every client's share is split into train,
calibration and test with the same label distribution. The embedded sets are made from scikit-learn's handwritten
digits: their partition is drawn first, as labels only, and the images of each client are then rendered from base
digits that belong to one of the three splits alone, so no test image is made from a training digit.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr import digits
from cafe_flwr.local_data import read_local
from cafe_flwr.participation import rng_for


class Split(NamedTuple):
    """Examples of one client for one use.

    Attributes
    ----------
    x
        Inputs, (N, …) float32.
    y
        Labels 0..C−1, (N,) int64.
    source
        (N, s) int64: rows of the underlying data set each example was made from, where that is known.
    """

    x: Tensor
    y: Tensor
    source: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class ClientData:
    """What one client holds: three disjoint splits with the same label distribution."""

    train: Split
    calibration: Split
    test: Split


@dataclass(frozen=True)
class FederatedData:
    """A data set dealt out to clients.

    Attributes
    ----------
    num_clients
        How many clients there are.
    class_names
        Names of the classes, in the order of the labels.
    input_shape
        Shape of one input, e.g. (1, 16, 16).
    load
        The data of one client, made when it is asked for.
    """

    num_clients: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    load: Callable[[int], ClientData]

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)


@lru_cache(maxsize=4)
def load_federation(
    dataset: str,
    num_clients: int,
    *,
    partition: str = "dirichlet",
    alpha: float = 0.1,
    classes_per_client: int = 10,
    examples_per_client: int = 200,
    shares: tuple[float, float, float] = (0.48, 0.12, 0.40),
    image_size: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    seed: int = 0,
) -> FederatedData:
    """Deal a data set out to clients. Built once per process.

    Parameters
    ----------
    dataset
        ``"digits"``, ``"digit-pairs"`` or ``"local:<path>"`` (a parquet file, a folder of parquet files, or a folder
        with one subfolder of images per class).
    num_clients
        Number of clients.
    partition
        ``"dirichlet"`` (concentration ``alpha``) or ``"pathological"`` (``classes_per_client`` classes each).
    examples_per_client
        Embedded sets only: mean number of examples per client, all splits together.
    shares
        Shares of train, calibration and test; they sum to 1.
    image_size
        Local sets only: resize images to this height and width; 0 keeps them as they are.
    image_column, label_column
        Local sets only: names of the columns.
    seed
        Seed of the partition, the splits and the rendering.

    Raises
    ------
    ValueError
        If there is no such data set, or it cannot serve so many clients.

    Examples
    --------
    >>> federation = load_federation("digit-pairs", num_clients=20)
    >>> client = federation.load(3)
    >>> tuple(client.train.x.shape[1:]), federation.num_classes
    ((1, 16, 16), 100)
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares of train, calibration and test must be 0 or more and sum to 1, got {shares}")
    kind, _, path = dataset.partition(":")
    if min(num_clients, examples_per_client, classes_per_client) < 1:
        raise ValueError("num-clients, examples-per-client and classes-per-client must be at least 1")
    rows: NDArray[Any] | None = None
    if dataset in digits.NUM_CLASSES:
        class_names = digits.class_names(dataset)
        per_class = -(-num_clients * examples_per_client // len(class_names))
        labels = np.repeat(np.arange(len(class_names)), per_class)
        input_shape: tuple[int, ...] = (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    elif kind == "local" and path:
        rows, labels, class_names = read_local(Path(path).expanduser(), image_size, image_column, label_column)
        input_shape = rows.shape[1:]
    else:
        known = ", ".join(map(repr, digits.NUM_CLASSES))
        raise ValueError(f"dataset must be {known} or 'local:<path>', got {dataset!r}")

    parts = partition_labels(labels, num_clients, partition, alpha, classes_per_client, seed)

    @cache
    def load(client: int) -> ClientData:
        if not 0 <= client < num_clients:
            raise ValueError(f"client must be in 0..{num_clients - 1}, got {client}")
        mine = parts[client]
        chosen = stratified_split(labels[mine], shares, rng_for(seed, 0, client, "split"))
        splits = []
        for name, positions in zip(digits.SPLITS, chosen, strict=True):
            y, source = labels[mine[positions]], mine[positions][:, None]
            if rows is None:
                x, source = digits.render(dataset, y, name, seed, rng_for(seed, 0, client, f"render-{name}"))
            else:
                x = torch.from_numpy(rows[source[:, 0]])
            splits.append(Split(x, torch.from_numpy(y), torch.from_numpy(source)))
        return ClientData(*splits)

    return FederatedData(num_clients, class_names, tuple(int(n) for n in input_shape), load)


def partition_labels(
    labels: NDArray[np.int64], num_clients: int, partition: str, alpha: float, classes_per_client: int, seed: int
) -> list[NDArray[np.int64]]:
    """Positions of ``labels`` that each client gets, by a partitioner of flwr-datasets.

    Raises
    ------
    ValueError
        If the data cannot serve so many clients; the message says what to change.
    """
    logging.getLogger("datasets").setLevel(logging.ERROR)
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, Partitioner, PathologicalPartitioner

    partitioner: Partitioner
    minimum = 10  # examples of the smallest client
    if partition == "dirichlet":
        partitioner = DirichletPartitioner(num_clients, "label", alpha=alpha, min_partition_size=minimum, seed=seed)
    elif partition == "pathological":
        partitioner = PathologicalPartitioner(
            num_clients, "label", classes_per_client, class_assignment_mode="first-deterministic", seed=seed
        )
    else:
        raise ValueError(f"partition must be 'dirichlet' or 'pathological', got {partition!r}")
    if num_clients * minimum > len(labels):
        raise ValueError(
            f"{len(labels)} examples cannot serve {num_clients} clients with at least {minimum} each: "
            "lower num-clients or give more data"
        )
    partitioner.dataset = Dataset.from_dict({"label": labels, "position": np.arange(len(labels))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns at every retry; what counts is whether it succeeds
        try:
            parts = [np.asarray(partitioner.load_partition(i)["position"], dtype=np.int64) for i in range(num_clients)]
            smallest = min(len(part) for part in parts)
            if smallest < minimum:
                raise ValueError(f"the smallest client would have {smallest} of at least {minimum} examples")
            return parts
        except ValueError as error:
            advice = (
                "raise dirichlet-alpha or the number of examples, or lower num-clients"
                if partition == "dirichlet"
                else "change classes-per-client, lower num-clients or raise the number of examples"
            )
            raise ValueError(
                f"the {partition} partition of {len(labels)} examples over {num_clients} clients failed "
                f"({error}): {advice}"
            ) from error


def stratified_split(
    labels: NDArray[np.int64], shares: Sequence[float], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Split positions into parts of the given shares with the same label distribution.

    Every class is spread over the parts in proportion; what does not divide evenly is carried over to the next class,
    so that the parts' sizes come out right too, also when most classes have one or two examples.

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
