"""Settings of the data set, of how it is dealt out, and of how clients differ."""

from __future__ import annotations

from dataclasses import dataclass

from cafe_flwr.core.options import option, section, shared
from cafe_flwr.core.text import nearest

EMBEDDED = ("digits", "digit-pairs")
HUB_IMAGES = ("cifar10", "cifar100", "tiny-imagenet")
HUB_TEXTS = ("ag-news",)
TEXT_SETS = ("docstrings", *HUB_TEXTS)
LOCAL = ("local", "local:<path>")
MODALITIES = ("image", "rows")

_NAMES = "|".join((*EMBEDDED, *HUB_IMAGES, *TEXT_SETS))
_TEXTS = {"dataset": TEXT_SETS}
_DEALT = {"dataset": (*EMBEDDED, *HUB_IMAGES, *TEXT_SETS, "local:<path>")}


@section("data")
@dataclass(frozen=True)
class Data:
    """A data set, and how it is dealt out to clients and split."""

    dataset: str = shared(
        "digit-pairs",
        "'digit-pairs', 'digits', 'docstrings'; 'cifar10', 'cifar100', 'tiny-imagenet', 'ag-news', of the hub or of "
        "data.dir; 'local': every client's own data, in the data-dir of its node's node-config; 'local:<path>': a "
        "parquet file or image folder, the same for all, dealt out (simulation only); it lies in data.dir if it is not "
        "absolute.",
        key="dataset",
        pattern=rf"^({_NAMES}|local|local:.+)$",
        sized=True,
    )
    dir: str = shared(
        "",
        "Folder with a copy of the hub's set in <data.dir>/<dataset>; empty: the hub. A node's own node-config "
        "'data-dir' comes first.",
        formerly="data-dir",
        sized=True,
        only={"dataset": (*HUB_IMAGES, *HUB_TEXTS, "local", "local:<path>")},
    )
    augmentation: str = shared(
        "usual",
        "Images of the hub's sets are cropped at random and mirrored in training.",
        choices=("usual", "none"),
        only={"dataset": HUB_IMAGES},
    )
    max_tokens: int = shared(64, "Texts: number of words that are kept.", ge=1, sized=True, only=_TEXTS)
    vocabulary: int = shared(
        8192,
        "Texts: number of different tokens, to which words are hashed; 0 is padding.",
        ge=2,
        sized=True,
        only=_TEXTS,
    )
    long_texts: str = shared(
        "cut", "Texts of more words than max-tokens are cut, or an error.", choices=("cut", "refuse"), only=_TEXTS
    )
    text_part: str = shared(
        "whole",
        "AG News: 'title' keeps the column 'title' where a copy has one, else the first 7 words of a text, as many as "
        "titles have on average (docs/data.md).",
        choices=("whole", "title"),
    )
    partition: str = shared(
        "dirichlet",
        "How data are dealt out: Dirichlet shares of every class, a fixed number of classes per client, or by the "
        "values of partition-column.",
        choices=("dirichlet", "pathological", "natural"),
        only=_DEALT,
    )
    dirichlet_alpha: float = shared(
        0.1,
        "Concentration of the Dirichlet partition: small = very different clients.",
        key="dirichlet-alpha",
        gt=0,
        le=1e6,
        only={**_DEALT, "data.partition": ("dirichlet", "natural")},
    )
    dirichlet_cap: bool = shared(
        False, "Dirichlet partition: a client that holds its fair share of the examples gets no more.", only=_DEALT
    )
    partition_column: str = shared(
        "", "Natural partition: column whose values are the clients; num-clients is a multiple of how many there are."
    )
    natural_split: str = shared(
        "even",
        "Natural partition: how a value is dealt out to several clients, in even parts or by dirichlet-alpha.",
        choices=("even", "dirichlet"),
    )
    classes_per_client: int = shared(
        10,
        "Classes of a client in the pathological partition.",
        ge=1,
        only={**_DEALT, "data.partition": ("pathological",)},
    )
    examples_per_client: int = shared(
        200,
        "Embedded data sets: mean number of examples per client, all splits together.",
        ge=10,
        sized=True,
        only={"dataset": (*EMBEDDED, "docstrings")},
    )
    calibration_share: float = shared(
        0.12, "Share of a client's examples kept for calibration (thresholds).", ge=0, lt=1
    )
    test_share: float = shared(0.40, "Share of a client's examples kept for its test split.", gt=0, lt=1)
    validation_share: float = option(
        0.0,
        "Share of the training split that takes the place of the test split, to choose settings by; 0: real test data.",
        ge=0,
        lt=1,
        compare="own",
    )
    label_groups: int = shared(
        0, "Clients form so many groups with one label distribution each; 0: every client has its own.", ge=0
    )
    rotations: int = shared(
        1, "Clients see their images under so many rotations, crossed with the label groups; 1: upright.", ge=1
    )
    test_shift: float = shared(
        0.0,
        "Share of test examples whose labels are drawn uniformly from the classes of the client's training split.",
        ge=0,
        le=1,
    )
    image_size: int = shared(
        0,
        "Local data: resize images to this height and width; 0: as they are.",
        ge=0,
        sized=True,
        only={"dataset": LOCAL},
    )
    image_range: str = shared(
        "",
        "Local data: numbers of black and white in images that have more than 8 bits, such as '0..1', '-1..1' or "
        "'0..4095'; empty: as their type and their numbers tell, and an error where these do not.",
        pattern=r"^(|-1\.\.1|0\.\.[1-9][0-9]{0,9})$",
        only={"dataset": LOCAL},
    )
    image_column: str = shared("image", "Local data: column of the images.", min_length=1, only={"dataset": LOCAL})
    label_column: str = shared("label", "Local data: column of the labels.", min_length=1, only={"dataset": LOCAL})
    image_channels: int = shared(
        0,
        "'local' data: make all images grey (1) or coloured (3); must be set there.",
        choices=(0, 1, 3),
        only={"dataset": ("local",)},
    )
    class_names: str = shared(
        "",
        "'local' data: names of the federation's classes, separated by commas, in the order of their labels.",
        only={"dataset": ("local",)},
    )

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of train, calibration and test."""
        return (1 - self.calibration_share - self.test_share, self.calibration_share, self.test_share)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if they are not set."""
        return tuple(name.strip() for name in self.class_names.split(",")) if self.class_names else ()


@section("heterogeneity")
@dataclass(frozen=True)
class Heterogeneity:
    """How clients differ, beside their data."""

    depth_shares: str = shared(
        "",
        "Simulation: share of the clients by what they hold, exits such as '1:0.3,2:0.3', or exits and a share of the "
        "width such as '1x0.5:0.3'; the others hold all (docs/unequal-clients.md). A node's own node-config comes "
        "first.",
    )
    modalities: str = shared(
        "",
        "Modalities that the clients have in turn, such as 'image,rows': images, and the same row by row; empty: all "
        "images, or texts (docs/modalities.md).",
    )

    @property
    def modality_names(self) -> tuple[str, ...]:
        """The modalities; empty if there is only one."""
        return tuple(name.strip() for name in self.modalities.split(",")) if self.modalities else ()


def check_data(data: Data) -> None:
    """Raise ValueError, in the keys of a run's settings, if options do not go together."""
    if data.calibration_share + data.test_share >= 1:
        raise ValueError(
            "data.calibration-share + data.test-share must leave something for training, "
            f"got {data.calibration_share} + {data.test_share}"
        )
    if data.dataset == "local":
        _check_own(data)
    _check_partition(data)
    if data.text_part == "title" and data.dataset != "ag-news":
        raise ValueError(
            f"data.text-part = 'title' is for 'ag-news', and {data.dataset!r} has no titles: set it to 'whole'"
        )


def _check_own(data: Data) -> None:
    """Clients' own data: the run must say what they look like, and deals nothing out."""
    names = data.classes
    if len(names) < 2 or len(set(names)) < len(names) or not all(names):
        raise ValueError(
            "dataset = 'local' needs data.class-names, at least two different ones separated by commas, "
            f"got {data.class_names!r}"
        )
    if not data.image_size or not data.image_channels:
        raise ValueError(
            "dataset = 'local' needs data.image-size and data.image-channels (1 or 3): all clients' images must be "
            f"alike, got {data.image_size} and {data.image_channels}"
        )
    for key, value, off in (
        ("data.label-groups", data.label_groups, 0),
        ("data.rotations", data.rotations, 1),
        ("data.test-shift", data.test_shift, 0.0),
    ):
        if value != off:
            raise ValueError(
                f"{key} changes data that is dealt out, and with dataset = 'local' it is the clients' own: "
                f"set it to {off}"
            )


def _check_partition(data: Data) -> None:
    """Check options that only one partition reads; whether a column exists is checked later."""
    natural, column = data.partition == "natural", data.partition_column
    if natural and (data.dataset in (*EMBEDDED, "local", "docstrings")):
        raise ValueError(
            f"data.partition = 'natural' deals out by a column, and dataset = {data.dataset!r} has none: set "
            "dataset to a set of the hub or 'local:<path>', or data.partition to 'dirichlet'"
        )
    if natural and not column:
        raise ValueError(
            "data.partition = 'natural' needs data.partition-column, the column whose values are the clients"
        )
    if natural and data.label_groups:
        raise ValueError(f"data.label-groups = {data.label_groups} is not for data.partition = 'natural': set it to 0")
    for key, value in (("data.partition-column", column), ("data.natural-split", data.natural_split)):
        if not natural and value not in ("", "even"):
            raise ValueError(
                f"{key} = {value!r} is of the natural partition, and data.partition = {data.partition!r}: set "
                f"data.partition to 'natural', or leave {key} out"
            )
    if data.dirichlet_cap and (data.natural_split if natural else data.partition) != "dirichlet":
        raise ValueError(
            f"data.dirichlet-cap = true is of a Dirichlet partition, and data.partition = {data.partition!r}: set it "
            "to false" + ", or data.natural-split to 'dirichlet'" * natural
        )


def check_clients(clients: Heterogeneity, network: str, dataset: str) -> None:
    """Raise ValueError, in the keys of a run's settings, if the modalities do not suit the network and data set."""
    names, said = clients.modality_names, f"heterogeneity.modalities = {clients.modalities!r}"
    if unknown := [name for name in names if name not in MODALITIES]:
        raise ValueError(
            f"heterogeneity.modalities should be among {', '.join(MODALITIES)}, got {unknown[0]!r}; "
            f"{nearest(unknown[0], MODALITIES)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"heterogeneity.modalities names one twice: {clients.modalities!r}")
    if names and network != "conv":
        raise ValueError(f"{said} is for network = 'conv', got {network!r}")
    if names and dataset not in EMBEDDED:
        raise ValueError(f"{said} is for {' and '.join(EMBEDDED)}")
