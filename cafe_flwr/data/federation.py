"""Deal data sets out to clients: train, calibration and test examples of every client.

A data set is partitioned by its labels (flwr-datasets) over clients or groups of clients; then every client's examples
are split into train, calibration and test with the same label distribution. For the embedded sets of handwritten digits
only labels are partitioned; each client's images are then rendered from base digits that belong to a single split, so
that no test image is made from a training digit. Images may be rotated by client, and test labels shifted; validation
examples may take the place of the test. Images of the hub (:mod:`cafe_flwr.data.hub`) are decoded when a client is
loaded and stay pixels (uint8), which networks normalise batch by batch. Texts become tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from cafe_flwr.core.random import rng_for
from cafe_flwr.data import digits
from cafe_flwr.data.options import Data
from cafe_flwr.data.partition import Rule, check_shares, partition_labels, partition_naturally, stratified_split
from cafe_flwr.data.shifts import check_rotations, check_shifts, rotate, shift_labels
from cafe_flwr.data.sources import Source, source_of
from cafe_flwr.data.split import ClientData, Split
from cafe_flwr.networks.preprocessing import SYMMETRIC, Normalisation


@dataclass(frozen=True)
class FederatedData:
    """A data set dealt out to clients.

    Attributes
    ----------
    class_names
        Names of the classes, in the order of the labels.
    input_shape
        Shape of one input, e.g. (1, 16, 16).
    load
        Gives the data of one client, which are made on the first call.
    vocabulary
        Number of different tokens of texts, padding included; 0: the inputs are not texts.
    pixels
        How networks normalise images that are pixels (uint8).
    num_examples
        Examples of all clients, in all splits; 0: unknown.
    """

    num_clients: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    load: Callable[[int], ClientData]
    vocabulary: int = 0
    pixels: Normalisation = SYMMETRIC
    num_examples: int = 0

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)


def load_federation(  # noqa: PLR0913 (public; same as options.Data)
    dataset: str,
    num_clients: int,
    *,
    partition: str = "dirichlet",
    alpha: float = 0.1,
    capped: bool = False,
    partition_column: str = "",
    natural_split: str = "even",
    classes_per_client: int = 10,
    examples_per_client: int = 200,
    shares: tuple[float, float, float] = (0.48, 0.12, 0.40),
    image_size: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    data_dir: str = "",
    augmentation: str = "usual",
    max_tokens: int = 64,
    vocabulary: int = 8192,
    long_texts: str = "cut",
    text_part: str = "whole",
    label_groups: int = 0,
    rotations: int = 1,
    validation_share: float = 0.0,
    test_shift: float = 0.0,
    seed: int = 0,
) -> FederatedData:
    """Deal a data set out to clients. Built once per process; see :class:`cafe_flwr.data.options.Data`.

    Parameters
    ----------
    dataset
        Embedded: ``"digits"``, ``"digit-pairs"``, ``"docstrings"``. Of the hub: ``"cifar10"``, ``"cifar100"``,
        ``"tiny-imagenet"``, ``"ag-news"``. Or ``"local:<path>"`` (a parquet file, a folder of parquet files, or a
        folder with one subfolder of images per class).
    partition
        ``"dirichlet"`` (concentration ``alpha``), ``"pathological"`` (``classes_per_client`` classes each) or
        ``"natural"`` (by the values of ``partition_column``).
    capped
        Dirichlet only: a client that holds its fair share gets no more
        (:func:`cafe_flwr.data.partition.partition_labels`).
    partition_column, natural_split
        Natural partition only: the column, and how a value is dealt out to several clients, ``"even"`` or
        ``"dirichlet"`` (:func:`cafe_flwr.data.partition.partition_naturally`).
    examples_per_client
        Embedded sets only: mean number of examples per client, all splits together.
    shares
        Shares of train, calibration and test; they sum to 1.
    image_size, image_column, label_column
        Local sets only: height and width that images are resized to (0: as they are), and names of the columns.
    data_dir, augmentation
        Sets of the hub only: folder with a local copy in ``<data_dir>/<dataset>`` (empty: the hub); and ``"usual"``,
        random crops and mirror images in training, or ``"none"``.
    max_tokens, vocabulary, long_texts
        Texts only: number of words that are kept, number of different tokens (:mod:`cafe_flwr.data.tokenizer`), and
        whether longer texts are cut (``"cut"``) or an error (``"refuse"``).
    text_part
        AG News only: ``"whole"`` texts, or ``"title"`` (:meth:`cafe_flwr.data.hub.OpenSet.texts`).
    label_groups
        G ≥ 1: client i is in group i mod G, and the clients of a group share one label distribution. 0: every client is
        a group of its own. Embedded sets: all clients of a group have the labels that its first client would have
        without groups, and images of their own for them. Other sets: they are partitioned over G groups, and each part
        is dealt out evenly to the group's clients, so that clients of a larger group get less.
    rotations
        R ≥ 1: all images of client i are rotated counter-clockwise by ⌊i / max(G, 1)⌋ mod R times 360/R degrees, so
        label groups and rotations are crossed: G·R clients hold each combination once. Quarter turns are exact.
    validation_share
        v in [0, 1), to choose hyper-parameters without test data: the share v of each client's training split is held
        out and takes the place of its test split, which is not used. On the embedded sets, training and validation
        images are made from the same base digits, so expect better results than on test data.
    test_shift
        Embedded sets only, s in [0, 1]: the share s of each client's test labels is redrawn uniformly from the classes
        in its training split, so that class priors shift but no new classes appear. The images are rendered for the new
        labels; with a ``validation_share``, from the base digits of training instead of the examples held out.

    Raises
    ------
    ValueError
        If the data set does not exist, has too few examples for so many clients, or does not support the shift.

    Examples
    --------
    >>> federation = load_federation("digit-pairs", num_clients=20)
    >>> client = federation.load(3)
    >>> tuple(client.train.x.shape[1:]), federation.num_classes
    ((1, 16, 16), 100)
    """
    check_shares(shares)
    options = Data(
        dataset=dataset,
        dir=data_dir,
        augmentation=augmentation,
        max_tokens=max_tokens,
        vocabulary=vocabulary,
        long_texts=long_texts,
        text_part=text_part,
        partition=partition,
        dirichlet_alpha=alpha,
        dirichlet_cap=capped,
        partition_column=partition_column,
        natural_split=natural_split,
        classes_per_client=classes_per_client,
        examples_per_client=examples_per_client,
        calibration_share=shares[1],
        test_share=shares[2],
        validation_share=validation_share,
        label_groups=label_groups,
        rotations=rotations,
        test_shift=test_shift,
        image_size=image_size,
        image_column=image_column,
        label_column=label_column,
    )
    return deal_out(options, num_clients, seed)


@lru_cache(maxsize=4)
def deal_out(options: Data, num_clients: int, seed: int = 0) -> FederatedData:
    """Deal a data set out to clients as its options say, once per process, see :func:`load_federation`."""
    if min(num_clients, options.examples_per_client, options.classes_per_client) < 1:
        raise ValueError("num-clients, examples-per-client and classes-per-client must be at least 1")
    check_shifts(options.dataset, num_clients, options.label_groups, options.validation_share, options.test_shift)
    if options.partition == "natural" and options.label_groups:
        raise ValueError(
            f"data.label-groups = {options.label_groups} is not for data.partition = 'natural': set it to 0"
        )
    source = source_of(options, num_clients * options.examples_per_client, seed)
    check_rotations(options.rotations, source.input_shape)
    parts = _parts(options, source, num_clients, seed)
    return FederatedData(
        num_clients,
        source.class_names,
        source.input_shape,
        cache(partial(_load, options, source, parts, seed)),
        vocabulary=source.vocabulary,
        pixels=source.pixels,
        num_examples=sum(map(len, parts)),
    )


def _parts(options: Data, source: Source, num_clients: int, seed: int) -> list[NDArray[np.int64]]:
    """Positions of every client's examples."""
    groups = options.label_groups
    if options.partition == "natural":
        if source.column is None:
            raise ValueError(
                f"data.partition = 'natural' deals out by a column, and {options.dataset!r} has none: choose a set of "
                "the hub or 'local:<path>', or another partition"
            )
        return partition_naturally(
            options.partition_column,
            source.column(options.partition_column),
            source.labels,
            num_clients,
            Rule(options.natural_split, options.dirichlet_alpha, capped=options.dirichlet_cap),
            seed,
        )
    rule = Rule(options.partition, options.dirichlet_alpha, options.classes_per_client, options.dirichlet_cap)
    dealt = 0 if source.read is None else groups  # rendered images: clients of a group share their labels
    parts = partition_labels(source.labels, num_clients, rule, seed, dealt)
    if source.read is None and groups:
        return [parts[client % groups] for client in range(num_clients)]
    return parts


def _load(options: Data, source: Source, parts: Sequence[NDArray[np.int64]], seed: int, client: int) -> ClientData:
    """The data of one client."""
    if not 0 <= client < len(parts):
        raise ValueError(f"client must be in 0..{len(parts) - 1}, got {client}")
    rng = partial(rng_for, seed, 0, client)
    turn = client // max(options.label_groups, 1) % options.rotations
    labels = source.labels[parts[client]]
    if source.splits is None:
        uses = stratified_split(labels, options.shares, rng("split"))
    else:
        uses = [np.flatnonzero(source.splits[parts[client]] == k) for k in range(len(digits.SPLITS))]
    positions = dict(zip(digits.SPLITS, uses, strict=True))

    def make(use: str, split: str, y: NDArray[np.int64]) -> Split:
        if source.read is None:
            x, origin = digits.render(options.dataset, y, split, seed, rng(f"render-{use}"))
            x = rotate(x, turn, options.rotations, digits.BACKGROUND)
        else:
            rows = parts[client][positions[split]]
            rows = rows if source.rows is None else source.rows[rows]
            x, origin = rotate(source.read(rows), turn, options.rotations), rows[:, None]
        return Split(x, torch.from_numpy(y), torch.from_numpy(origin))

    train, calibration = (make(split, split, labels[positions[split]]) for split in ("train", "calibration"))
    held = options.validation_share
    if not held:
        y = shift_labels(labels[positions["test"]], train.y.numpy(), options.test_shift, rng("test-shift"))
        return ClientData(train, calibration, make("test", "test", y), source.augment)
    train, validation = map(train.take, stratified_split(train.y.numpy(), (1 - held, held), rng("validation")))
    if options.test_shift:
        y = shift_labels(validation.y.numpy(), train.y.numpy(), options.test_shift, rng("test-shift"))
        validation = make("validation", "train", y)
    return ClientData(train, calibration, validation, source.augment)
