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

from cafe_flwr.participation import rng_for

SPLITS = ("train", "calibration", "test")
IMAGE_SIZE = 16  # height and width of the embedded images


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
    if dataset in _EMBEDDED:
        class_names = tuple(f"{label:0{2 if dataset == 'digit-pairs' else 1}d}" for label in range(_EMBEDDED[dataset]))
        per_class = -(-num_clients * examples_per_client // len(class_names))
        labels = np.repeat(np.arange(len(class_names)), per_class)
        input_shape: tuple[int, ...] = (1, IMAGE_SIZE, IMAGE_SIZE)
    elif kind == "local" and path:
        rows, labels, class_names = _read_local(Path(path).expanduser(), image_size, image_column, label_column)
        input_shape = rows.shape[1:]
    else:
        raise ValueError(f"dataset must be {', '.join(map(repr, _EMBEDDED))} or 'local:<path>', got {dataset!r}")

    parts = partition_labels(labels, num_clients, partition, alpha, classes_per_client, seed)

    @cache
    def load(client: int) -> ClientData:
        if not 0 <= client < num_clients:
            raise ValueError(f"client must be in 0..{num_clients - 1}, got {client}")
        mine = parts[client]
        chosen = stratified_split(labels[mine], shares, rng_for(seed, 0, client, "split"))
        splits = []
        for name, positions in zip(SPLITS, chosen, strict=True):
            y, source = labels[mine[positions]], mine[positions][:, None]
            if rows is None:
                x, source = _render(dataset, y, name, seed, rng_for(seed, 0, client, f"render-{name}"))
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


# --- the embedded sets, made from scikit-learn's 1,797 handwritten digits -------------------------------------------

_EMBEDDED = {"digits": 10, "digit-pairs": 100}


@lru_cache(maxsize=1)
def _base_digits() -> tuple[Tensor, NDArray[np.int64]]:
    """The 8×8 images, (1797, 1, 8, 8) in 0..1, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0, digits.target.astype(np.int64)


@lru_cache(maxsize=8)
def digit_pools(seed: int) -> dict[str, list[NDArray[np.int64]]]:
    """Base digits that each split may use: rows of scikit-learn's digits, per split and class, disjoint."""
    _, target = _base_digits()
    rng = rng_for(seed, 0, -1, "base digits")
    pools: dict[str, list[NDArray[np.int64]]] = {name: [] for name in SPLITS}
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(target == digit))
        cuts = (int(0.6 * len(rows)), int(0.75 * len(rows)))
        for name, part in zip(SPLITS, np.split(rows, cuts), strict=True):
            pools[name].append(part)
    return pools


def _render(
    dataset: str, labels: NDArray[np.int64], split: str, seed: int, rng: np.random.Generator
) -> tuple[Tensor, NDArray[np.int64]]:
    """Images for the labels, (N, 1, 16, 16), and the base digits they were made from, (N, digits per image)."""
    if not len(labels):
        return torch.zeros(0, 1, IMAGE_SIZE, IMAGE_SIZE), np.zeros((0, 1), dtype=np.int64)
    pairs = dataset == "digit-pairs"
    digits = np.stack([labels // 10, labels % 10], axis=1) if pairs else labels[:, None]
    pools = digit_pools(seed)[split]
    source = np.array([[rng.choice(pools[d]) for d in row] for row in digits], dtype=np.int64).reshape(digits.shape)
    # Centres in units of half the canvas: a pair stands left and right, a single digit in the middle.
    centres = (-0.5, 0.5) if pairs else (0.0,)
    size = 0.5 if pairs else 0.9
    canvas = torch.zeros(len(labels), 1, IMAGE_SIZE, IMAGE_SIZE)
    for position, centre in enumerate(centres):
        canvas = torch.maximum(canvas, _place(source[:, position], size, (centre, 0.0), rng))
    if pairs:
        # Clutter: a faint piece of some digit anywhere, and noise.
        stray = rng.choice(np.concatenate(pools), size=len(labels))
        corner = rng.uniform(-1.0, 1.0, size=(2, len(labels)))
        canvas = torch.maximum(canvas, 0.5 * _place(stray, 0.4, tuple(torch.from_numpy(corner).float()), rng))
        canvas = canvas + torch.from_numpy(rng.normal(0.0, 0.08, size=canvas.shape)).float()
    return (canvas - 0.3) / 0.4, source


def _place(
    rows: NDArray[np.int64], size: float, centre: tuple[float | Tensor, float | Tensor], rng: np.random.Generator
) -> Tensor:
    """Base digits drawn on empty canvases at about ``centre``, randomly scaled, rotated and shifted."""
    images, _ = _base_digits()
    n = len(rows)

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, size=n)).float()

    angle, scale = draw(-0.14, 0.14), size * draw(0.9, 1.06)
    x, y = centre[0] + draw(-0.05, 0.05), centre[1] + draw(-0.1, 0.1)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # affine_grid wants the map from the canvas back to the digit.
    inverse = torch.stack(
        [torch.stack([cos, sin, -(cos * x + sin * y)], 1), torch.stack([-sin, cos, sin * x - cos * y], 1)], 1
    )
    grid = torch.nn.functional.affine_grid(inverse, [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return torch.nn.functional.grid_sample(images[rows], grid, align_corners=False)


# --- local files ----------------------------------------------------------------------------------------------------


def _read_local(
    path: Path, image_size: int, image_column: str, label_column: str
) -> tuple[NDArray[np.float32], NDArray[np.int64], tuple[str, ...]]:
    """Images (N, C, H, W), labels (N,) and class names of a parquet file or an image folder."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    from datasets import ClassLabel, Dataset, Image, Value, load_dataset

    if not path.exists():
        raise ValueError(f"dataset = 'local:{path}': there is no such file or folder on this machine")
    parquet = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"dataset = 'local:{path}': expected a .parquet file or a folder, got a {path.suffix} file")
    try:
        if parquet:
            dataset = Dataset.from_parquet([str(file) for file in parquet])
        else:
            # All files: left to itself, imagefolder takes 'train' or 'test' in a folder's name for a split.
            files = {"train": str(path / "**")}
            dataset = load_dataset("imagefolder", data_files=files, split="train", drop_labels=False)
    except Exception as error:
        raise ValueError(
            f"dataset = 'local:{path}' cannot be read ({type(error).__name__}: {error}): expected a parquet file, a "
            "folder of parquet files, or a folder with one subfolder of images per class"
        ) from error
    for column in (image_column, label_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"dataset = 'local:{path}' has no column {column!r}; it has {', '.join(dataset.column_names)}. "
                "Set image-column and label-column"
            )
    if None in dataset.unique(label_column):
        raise ValueError(f"dataset = 'local:{path}' has rows without a label in column {label_column!r}")
    if dataset.features[label_column] in (Value("string"), Value("large_string")):
        dataset = dataset.class_encode_column(label_column)
    labels = np.asarray(dataset[label_column])
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    elif np.issubdtype(labels.dtype, np.integer) and len(labels) and labels.min() >= 0:
        names = tuple(str(c) for c in range(int(labels.max()) + 1))
    else:
        raise ValueError(f"column {label_column!r} of 'local:{path}' must hold labels 0..C−1 or names of classes")
    if len(labels) == 0 or labels.min() < 0:
        raise ValueError(f"dataset = 'local:{path}' has rows without a label, or no rows")

    if isinstance(dataset.features[image_column], dict) or dataset.features[image_column] == Value("binary"):
        dataset = dataset.cast_column(image_column, Image())  # as the hub's parquet files hold them
    images = []
    for row in range(len(dataset)):
        try:
            images.append(_to_array(dataset[row][image_column], image_size))
        except Exception as error:
            raise ValueError(f"row {row} of 'local:{path}' holds no image that can be read: {error}") from error
    if len({len(image) for image in images}) > 1:  # some are grey, some are not
        images = [np.repeat(image, 3, axis=0) if len(image) == 1 else image for image in images]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images of 'local:{path}' have {len(shapes)} different shapes: set image-size")
    return np.stack(images), labels.astype(np.int64), names


def _to_array(image: Any, size: int) -> NDArray[np.float32]:
    """One image as (C, H, W) float32, about −1..1."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    white = 65535.0 if image.mode.startswith("I") else 255.0  # "I" and "I;16" come from 16-bit files
    grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    image = image.convert("L").convert("F") if image.mode in ("1", "LA") else image.convert("F" if grey else "RGB")
    if size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32) / (white / 2) - 1.0
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()
