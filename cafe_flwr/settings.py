"""Every setting of a run, in one place: typed, documented, validated before the first round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator
from pydantic.alias_generators import to_snake

from cafe_flwr.core.older_settings import renamed
from cafe_flwr.core.text import closest, kebab
from cafe_flwr.data import digits
from cafe_flwr.data.hub import names_of_sets
from cafe_flwr.data.modalities import MODALITIES
from cafe_flwr.methods import METHODS
from cafe_flwr.methods.base import Method
from cafe_flwr.networks.capacity import read_shares
from cafe_flwr.networks.placement import DEVICE_PATTERN
from cafe_flwr.training.objectives.base import READS
from cafe_flwr.training.options import DEFAULT_BUDGET, LocalBudget, learning_rate_at
from cafe_flwr.wire.bounds import Bounds
from cafe_flwr.wire.privacy import Privacy

IMAGE_SETS = (*digits.NUM_CLASSES, *names_of_sets(texts=False))
TEXT_SETS = ("docstrings", *names_of_sets(texts=True))
TEXT_NETWORKS = ("transformer", "published-transformer")

PUBLISHED: Mapping[str, Mapping[str, int | str]] = {
    "published-conv": {"network_width": 128, "network_depth": 3, "feature_width": 128},
    "published-resnet18": {"network_width": 64, "network_depth": 4, "norm": "batch"},
    "published-transformer": {
        "network_width": 192,
        "network_depth": 4,
        "feature_width": 192,
        "norm": "layer",
        "attention_heads": 2,
    },
}
"""Networks of fixed build, with the settings that could say the same of them."""

_OF_NETWORKS = ("network_width", "network_depth", "feature_width", "norm", "stem_stride", "attention_heads", "dropout")


# Of everything that people write by hand: kebab-case names, no unknown ones, no conversion of types.
STRICT = ConfigDict(
    alias_generator=kebab,
    validate_by_name=True,
    validate_by_alias=True,
    extra="forbid",
    frozen=True,
    strict=True,
    use_attribute_docstrings=True,
    allow_inf_nan=False,
)


def setting_key(method: type[Method], field: str) -> str:
    """Name of a method's setting among all settings: ``fedprox_mu``, CAFEDistill's ``mu``, ``prior`` of all methods."""
    owner = next(c for c in method.__mro__ if field in vars(c).get("__annotations__", {}))
    return vars(owner).get("prefix", "").replace("-", "_") + field


def _of_methods() -> dict[str, Any]:
    """The methods' own settings as pydantic fields."""
    found: dict[str, Any] = {}
    for method in METHODS.values():
        for f in fields(method):
            bounds = {key: f.metadata[key] for key in ("ge", "gt", "le") if f.metadata[key] is not None}
            kind = Literal[f.metadata["choices"]] if f.metadata["choices"] else type(f.default)
            value = Field(f.default, description=f.metadata["doc"], **bounds)
            found[setting_key(method, f.name)] = (kind, value)
    return found


# The settings of methods are declared by the methods; pydantic makes fields of them.
if TYPE_CHECKING:

    class _MethodSettings(BaseModel): ...
else:
    # They bring their descriptions; looking for docstrings, there are none, would cost every process time.
    _described = ConfigDict(**{**STRICT, "use_attribute_docstrings": False})
    _MethodSettings = create_model("_MethodSettings", __config__=_described, **_of_methods())


class Settings(_MethodSettings):
    """Settings of a run. In ``pyproject.toml`` and on the command line the names are kebab-case.

    Examples
    --------
    >>> settings = Settings.from_run_config({"num-clients": 10, "dirichlet-alpha": 0.3})
    >>> settings.num_clients, settings.learning_rate
    (10, 0.15)
    >>> Settings.from_run_config({"dirichlet-alhpa": 0.3})
    Traceback (most recent call last):
        ...
    ValueError: unknown setting 'dirichlet-alhpa'; did you mean 'dirichlet-alpha'?
    """

    model_config = STRICT

    # The run
    name: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=100)
    """Name of the run and of its results folder; empty: made from data set, method and seed."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything that is random: partition, images, initial weights, participants, batches."""
    results_dir: str = Field("~/cafe-flwr-results", min_length=1)
    """Folder of all results, absolute or from '~'. A run writes to <results-dir>/<name>."""
    state_dir: str = ""
    """Folder of the clients' personal state; empty: <results-dir>/<name>/personal. A node's own node-config
    'state-dir' comes first."""
    mode: Literal["train", "calibrate"] = "train"
    """'train': a federation. 'calibrate': thresholds for the personal networks that the run of this name has left."""
    resume: bool = False
    """Go on from the last checkpoint of the run of this name."""

    # The federation
    method: str = "cafedistill"
    """Method of federated learning, see docs/methods.md."""
    num_server_rounds: int = Field(100, ge=1)
    """Rounds T. Schedules (learning rate, student exits) span all of them."""
    num_clients: int = Field(20, ge=1)
    """Clients, each with its own data and personal network. A node hosts one or more."""
    fraction_train: float = Field(1.0, gt=0, le=1)
    """Share of the clients that train in a round."""
    min_train_nodes: int = Field(1, ge=1)
    """At least so many clients train in a round, whatever fraction-train says; a round in which fewer replied well does
    not count."""
    min_available_nodes: int = Field(1, ge=1)
    """Wait for at least so many nodes before the first round."""
    evaluate_every: int = Field(1, ge=1)
    """Clients evaluate before and after training in every so many rounds, and in the last one."""
    wait_seconds: float = Field(120.0, ge=0)
    """How long to wait, before the first round, for the nodes that host the missing clients."""
    round_timeout: float = Field(600.0, gt=0)
    """Seconds after which a round goes on without the replies that are missing."""
    round_retries: int = Field(1, ge=0)
    """A round with fewer than min-train-nodes good replies is repeated so many times, then the run stops."""

    # What is sent, and what is believed
    wire_dtype: Literal["float32", "float16"] = "float32"
    """Numbers of the flat arrays in messages; 'float16' halves the bytes."""
    max_update_norm: float = Field(1e6, ge=0)
    """A client whose update, or what it sends of its own, has a larger norm is left out of its round; 0: no bound."""
    max_update_ratio: float = Field(100.0, ge=0)
    """So many times the median norm of a round's replies is refused too; 0: no bound, else greater than 1."""
    clip_norm: float = Field(0.0, ge=0)
    """Clients scale the update of the shared part down to this norm C before it is sent; 0: off (docs/security.md)."""
    upload_clip_norm: float = Field(0.0, ge=0)
    """C of what a client sends of its own (its head); 0: as clip-norm."""
    noise_multiplier: float = Field(0.0, ge=0)
    """Clients add Gaussian noise of standard deviation so many times C to what they send; 0: none."""
    privacy_delta: float = Field(1e-5, gt=0, lt=1)
    """δ at which the log states ε."""
    report_metrics: bool = True
    """Clients report accuracies, losses and similarities, which get no noise."""

    # The data
    dataset: str = Field("digit-pairs", pattern=rf"^({'|'.join((*IMAGE_SETS, *TEXT_SETS))}|local|local:.+)$")
    """'digit-pairs', 'digits', 'docstrings'; 'cifar10', 'cifar100', 'tiny-imagenet', 'ag-news', of the hub or of
    data-dir; 'local': every client's own data, in the data-dir of its node's node-config; 'local:<path>': a parquet
    file or image folder, the same for all, dealt out (simulation only); it lies in data-dir if it is not absolute."""
    data_dir: str = ""
    """Folder with a copy of the hub's set in <data-dir>/<dataset>; empty: the hub. A node's own node-config 'data-dir'
    comes first."""
    augmentation: Literal["usual", "none"] = "usual"
    """Images of the hub's sets are cropped at random and mirrored in training."""
    max_tokens: int = Field(64, ge=1)
    """Texts: words that are kept."""
    vocabulary: int = Field(8192, ge=2)
    """Texts: number of different tokens, to which words are hashed; 0 is padding."""
    long_texts: Literal["cut", "refuse"] = "cut"
    """Texts of more words than max-tokens are cut, or an error."""
    text_part: Literal["whole", "title"] = "whole"
    """AG News: 'title' keeps the column 'title' where a copy has one, else the first 7 words of a text, as many as
    titles have in the mean (docs/data.md)."""
    partition: Literal["dirichlet", "pathological", "natural"] = "dirichlet"
    """How data are dealt out: Dirichlet shares of every class, a fixed number of classes per client, or by the values
    of partition-column."""
    dirichlet_alpha: float = Field(0.1, gt=0)
    """Concentration of the Dirichlet partition: small = very different clients."""
    dirichlet_cap: bool = False
    """Dirichlet partition: a client that holds its fair share of the examples gets no more."""
    partition_column: str = ""
    """Natural partition: column whose values are the clients; num-clients is a multiple of how many there are."""
    natural_split: Literal["even", "dirichlet"] = "even"
    """Natural partition: how a value is dealt out to several clients, in even parts or by dirichlet-alpha."""
    classes_per_client: int = Field(10, ge=1)
    """Classes of a client in the pathological partition."""
    examples_per_client: int = Field(200, ge=10)
    """Embedded data sets: mean number of examples per client, all splits together."""
    calibration_share: float = Field(0.12, ge=0, lt=1)
    """Share of a client's examples kept for calibration (thresholds)."""
    test_share: float = Field(0.40, gt=0, lt=1)
    """Share of a client's examples kept for its test split."""
    validation_share: float = Field(0.0, ge=0, lt=1)
    """Share of the training split that takes the place of the test split, to choose settings by; 0: real test data."""
    label_groups: int = Field(0, ge=0)
    """Clients form so many groups with one label distribution each; 0: every client has its own."""
    rotations: int = Field(1, ge=1)
    """Clients see their images under so many rotations, crossed with the label groups; 1: upright."""
    test_shift: float = Field(0.0, ge=0, le=1)
    """Share of test examples with labels drawn evenly from the client's classes, not in its own shares."""
    image_size: int = Field(0, ge=0)
    """Local data: resize images to this height and width; 0: as they are."""
    image_column: str = Field("image", min_length=1)
    """Local data: column of the images."""
    label_column: str = Field("label", min_length=1)
    """Local data: column of the labels."""
    image_channels: Literal[0, 1, 3] = 0
    """'local' data: make all images grey (1) or coloured (3); must be set there."""
    class_names: str = ""
    """'local' data: names of the federation's classes, separated by commas, in the order of their labels."""

    # Clients that are not alike
    depth_shares: str = ""
    """Simulation: share of the clients by what they hold, exits such as '1:0.3,2:0.3', or exits and a share of the
    width such as '1x0.5:0.3'; the others hold all (docs/unequal-clients.md). A node's own node-config comes first."""
    modalities: str = ""
    """Modalities that the clients have in turn, such as 'image,rows': images, and the same row by row; empty: all
    images, or texts (docs/modalities.md)."""

    # Calibration (mode = "calibrate")
    risk: float = Field(0.05, gt=0, lt=1)
    """Share α of errors that is allowed among those who leave early (docs/risk.md)."""
    confidence_level: float = Field(0.9, gt=0, lt=1)
    """How surely, 1 − δ."""
    simultaneous: bool = False
    """Clients that are certified by themselves shall all be right at once."""

    # The network
    network: Literal[
        "conv", "resnet18", "transformer", "published-conv", "published-resnet18", "published-transformer"
    ] = "conv"
    """'conv': convolutional blocks; 'resnet18': four stages of residual blocks; both for images. 'transformer': blocks
    of attention, for texts. An exit after each block or stage. With 'published-' before the name: those that
    CAFEDistill's authors run, of fixed size (docs/networks.md)."""
    feature_width: int = Field(24, ge=1)
    """Width of the features that enter the classifier of every exit."""
    network_width: int = Field(0, ge=0)
    """Channels of the first block (conv) or stage (resnet18), or of the embeddings (transformer); 0: 8, 64 or 128."""
    network_depth: int = Field(0, ge=0)
    """Blocks, and exits; 0: 3 (conv) or 4. resnet18 has 4."""
    norm: Literal["group", "batch", "layer"] = "group"
    """Of groups of channels of an example, of a batch, or of a token ('layer': transformer only)."""
    statistics: Literal["average", "personal", "drop"] = "average"
    """Running statistics of batch norms: averaged as weights are, kept on the client, or none (docs/networks.md)."""
    stem_stride: Literal[1, 2] = 1
    """Of resnet18's first convolution; 2 for 64×64 images at the cost of 32×32."""
    attention_heads: int = Field(4, ge=1)
    """Of the transformer; they divide its width."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of the transformer."""

    # Local training
    local_steps: int = Field(6, ge=1)
    """Gradient steps of a client in a round; used where local-epochs is 0."""
    local_epochs: int = Field(0, ge=0)
    """Passes over the client's training split in a round; 0: count local-steps instead."""
    batch_size: int = Field(16, ge=1)
    """Examples a step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Of local training; 'adamw' needs a far smaller learning-rate, such as 0.0003."""
    learning_rate: float = Field(DEFAULT_BUDGET.learning_rate, gt=0)
    """Of the optimiser, in the first round. It and momentum were chosen for the default job on validation data
    (docs/evidence.md)."""
    learning_rate_schedule: Literal["cosine", "exponential"] = "cosine"
    """'cosine': the learning rate is constant until half of the rounds, then a cosine down to 0. 'exponential': it
    shrinks by the factor learning-rate-decay a round."""
    learning_rate_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the exponential schedule: in round t = 0, 1, … the rate is learning-rate · factor^t; 1: constant."""
    momentum: float = Field(DEFAULT_BUDGET.momentum, ge=0, lt=1)
    """Of SGD; AdamW has means of its own."""
    keep_momentum: bool = False
    """What the optimiser remembers (SGD's momentum, AdamW's running means) stays with the client between rounds, on its
    disk; false: it starts anew in every round."""
    weight_decay: float = Field(0.0, ge=0)
    """Of the optimiser."""
    max_grad_norm: float = Field(0.0, ge=0)
    """Scale gradients down to this norm; 0: leave them."""

    # Where it computes (docs/devices.md)
    device: str = Field("auto", pattern=DEVICE_PATTERN)
    """'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', … or 'mps'. A node's own node-config 'device' comes
    first."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of matrix products and convolutions (autocast); weights, losses and all that is sent or kept are float32."""
    channels_last: bool = False
    """Keep the weights of convolutions as (out, height, width, in): faster on GPUs with tensor cores."""
    compile: bool = False
    """Compile stages and exits by torch.compile: the first steps take longer, the others less."""
    clients_per_gpu: int = Field(1, ge=1, le=100)
    """Clients that train at a time on one GPU, in a simulation started by cafe-flwr run; without a GPU: no meaning."""

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Settings:
        """Read settings from a run config (kebab-case keys).

        Raises
        ------
        ValueError
            Naming every key that is unknown (with the nearest known one), has the wrong type or an impossible value.
        """
        try:
            return cls.model_validate(dict(run_config), by_alias=True, by_name=False)
        except ValidationError as error:
            raise ValueError("; ".join(_explain(cls, detail) for detail in error.errors())) from None

    @classmethod
    def keys(cls) -> list[str]:
        """All setting names, in kebab-case: first those of every run, then the methods' own."""
        own = [name for name in cls.__annotations__ if name in cls.model_fields]
        return [kebab(name) for name in dict.fromkeys([*own, *cls.model_fields])]

    def to_run_config(self) -> dict[str, bool | int | float | str]:
        """All settings, in kebab-case."""
        return self.model_dump(by_alias=True)

    @field_validator("image_channels", "stem_stride", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """A choice among numbers is compared as ``==`` does, for which 1.0 and True are 1."""
        if type(value) is not int:
            raise ValueError("it should be a whole number")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.calibration_share + self.test_share >= 1:
            raise ValueError(
                "calibration-share + test-share must leave something for training, "
                f"got {self.calibration_share} + {self.test_share}"
            )
        if self.min_train_nodes > self.num_clients:
            raise ValueError(
                f"min-train-nodes ({self.min_train_nodes}) must not exceed num-clients ({self.num_clients})"
            )
        if self.method not in METHODS:
            near = closest(self.method, METHODS)
            raise ValueError(
                f"method should be one of {', '.join(METHODS)}, got {self.method!r}"
                + (f"; did you mean {near!r}?" if near else "")
            )
        method = self.build_method()
        if method.equal_steps and not self.local_epochs and self.local_steps < method.phases:
            raise ValueError(
                f"local-steps = {self.local_steps} cannot be shared by the {method.phases} things that {self.method} "
                "trains in a round: raise it, or set equal-steps = false"
            )
        self._check_network()
        self.build_bounds()
        self.build_privacy()
        self._check_own_data()
        self._check_partition()
        self._check_kinds()
        self._check_optimizer()
        for key in ("results_dir", "state_dir", "data_dir", "dataset"):
            path = getattr(self, key)
            if key == "dataset":
                path = "" if self.data_dir else path.partition(":")[2]
            if path and not Path(path).expanduser().is_absolute():
                raise ValueError(
                    f"{kebab(key)} must be an absolute path or start with '~', got {path!r}: Flower's processes have "
                    "their own working directory" + "; or set data-dir, where it lies" * (key == "dataset")
                )
        return self

    def _check_partition(self) -> None:
        """Settings that only one way to deal data out reads; the data's columns come later."""
        natural, column = self.partition == "natural", self.partition_column
        if natural and (self.dataset == "local" or self.dataset in (*digits.NUM_CLASSES, "docstrings")):
            raise ValueError(
                f"partition = 'natural' deals out by a column, and dataset = {self.dataset!r} has none: set "
                "dataset to a set of the hub or 'local:<path>', or partition to 'dirichlet'"
            )
        if natural and not column:
            raise ValueError("partition = 'natural' needs partition-column, the column whose values are the clients")
        if natural and self.label_groups:
            raise ValueError(f"label-groups = {self.label_groups} is not for partition = 'natural': set it to 0")
        for key, value in (("partition-column", column), ("natural-split", self.natural_split)):
            if not natural and value not in ("", "even"):
                raise ValueError(
                    f"{key} = {value!r} is of the natural partition, and partition = {self.partition!r}: set partition "
                    f"to 'natural', or leave {key} out"
                )
        if self.dirichlet_cap and (self.natural_split if natural else self.partition) != "dirichlet":
            raise ValueError(
                f"dirichlet-cap = true is of a Dirichlet partition, and partition = {self.partition!r}: set it to false"
                + ", or natural-split to 'dirichlet'" * natural
            )
        if self.text_part == "title" and self.dataset != "ag-news":
            raise ValueError(
                f"text-part = 'title' is for 'ag-news', and {self.dataset!r} has no titles: set it to 'whole'"
            )

    def _check_optimizer(self) -> None:
        """The optimiser's momentum and its learning rates."""
        if self.optimizer != "sgd" and self.momentum not in (0.0, type(self).model_fields["momentum"].default):
            raise ValueError(f"momentum = {self.momentum} is of sgd: set it to 0, or optimizer = 'sgd'")
        if self.keep_momentum and self.optimizer == "sgd" and not self.momentum:
            raise ValueError(
                "keep-momentum = true has nothing to keep, as momentum = 0.0: raise momentum (0.9 is usual), or set "
                "keep-momentum to false"
            )
        if self.learning_rate_decay != 1 and self.learning_rate_schedule != "exponential":
            raise ValueError(
                f"learning-rate-decay = {self.learning_rate_decay} is of learning-rate-schedule = 'exponential', got "
                f"{self.learning_rate_schedule!r}: set learning-rate-schedule to 'exponential', or "
                "learning-rate-decay to 1.0"
            )
        if not self.learning_rate_in(self.num_server_rounds):
            raise ValueError(
                f"learning-rate-decay = {self.learning_rate_decay} shrinks the learning rate to 0 within "
                f"{self.num_server_rounds} rounds: choose one nearer to 1, such as 0.99"
            )

    def learning_rate_in(self, server_round: int) -> float:
        """The learning rate of a round t = 1, …, T."""
        schedule = self.num_server_rounds, self.learning_rate_schedule, self.learning_rate_decay
        return learning_rate_at(self.learning_rate, server_round, *schedule)

    @property
    def modality_names(self) -> tuple[str, ...]:
        """The modalities, none where the setting is empty."""
        return tuple(name.strip() for name in self.modalities.split(",")) if self.modalities else ()

    def _check_kinds(self) -> None:
        """Depths and modalities of the clients."""
        read_shares(self.depth_shares)
        names = self.modality_names
        if unknown := [name for name in names if name not in MODALITIES]:
            near = closest(unknown[0], MODALITIES)
            raise ValueError(
                f"modalities should be among {', '.join(MODALITIES)}, got {unknown[0]!r}"
                + (f"; did you mean {near!r}?" if near else "")
            )
        if len(set(names)) < len(names):
            raise ValueError(f"modalities names one twice: {self.modalities!r}")
        if names and self.network != "conv":
            raise ValueError(f"modalities = {self.modalities!r} is for network = 'conv', got {self.network!r}")
        if names and self.dataset not in digits.NUM_CLASSES:
            raise ValueError(f"modalities = {self.modalities!r} is for {' and '.join(digits.NUM_CLASSES)}")

    def _check_network(self) -> None:
        """What the settings alone say against the network; the data's shape comes later."""
        takes, holds = "texts" if self.network in TEXT_NETWORKS else "images", "images"
        if self.dataset in TEXT_SETS:
            holds = "texts"
        if takes != holds:
            fitting = "'transformer'" if holds == "texts" else "'conv' or 'resnet18'"
            raise ValueError(
                f"network = {self.network!r} takes {takes}, and {self.dataset!r} holds {holds}: set network to "
                f"{fitting}"
            )
        if self.build_method().objective == "neo-kd" and takes == "texts":
            raise ValueError("objective = 'neo-kd' changes inputs a little, and tokens cannot be: choose another one")
        if self.network in PUBLISHED:
            self._check_published()
        elif self.norm == "layer" and self.network != "transformer":
            raise ValueError(f"norm = 'layer' is of the transformer: {self.network!r} takes 'group' or 'batch'")
        published = PUBLISHED.get(self.network)
        norm = self.norm if published is None else published.get("norm")
        if self.statistics != "average" and norm != "batch":
            if published is not None:
                raise ValueError(
                    f"statistics = {self.statistics!r} is about batch norms, and {self.network!r} has none: set it to "
                    "'average'"
                )
            raise ValueError(
                f"statistics = {self.statistics!r} is about batch norms, and norm = {self.norm!r} keeps none: set "
                "norm to 'batch', or statistics to 'average'"
            )
        if self.network == "resnet18" and self.network_depth not in (0, 4):
            raise ValueError(f"resnet18 has 4 stages, got network-depth = {self.network_depth}: set it to 0")
        if self.stem_stride != 1 and self.network != "resnet18":
            raise ValueError(f"stem-stride = {self.stem_stride} is of resnet18: set it to 1 for {self.network!r}")

    def _check_published(self) -> None:
        """A published network is as it is: a setting that asks for another one would change nothing."""
        fixed = PUBLISHED[self.network]
        for name in _OF_NETWORKS:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value not in (default, fixed.get(name, default)):
                raise ValueError(
                    f"{kebab(name)} = {value!r} does not change {self.network!r}, which is built as its authors run "
                    f"it: leave it at {default!r}, or choose network = {self.network.removeprefix('published-')!r}"
                )

    def _check_own_data(self) -> None:
        """Where clients bring their own data, the run must say what it is to look like, and deals nothing out."""
        if self.dataset != "local":
            return
        names = self.classes
        if len(names) < 2 or len(set(names)) < len(names) or not all(names):
            raise ValueError(
                "dataset = 'local' needs class-names, at least two different ones separated by commas, "
                f"got {self.class_names!r}"
            )
        if not self.image_size or not self.image_channels:
            raise ValueError(
                "dataset = 'local' needs image-size and image-channels (1 or 3): all clients' images must be alike, "
                f"got {self.image_size} and {self.image_channels}"
            )
        for name, off in (("label_groups", 0), ("rotations", 1), ("test_shift", 0.0)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"{kebab(name)} changes data that is dealt out, and with dataset = 'local' it is the clients' own: "
                    f"set it to {off}"
                )

    def build_method(self) -> Method:
        """The method, with its own settings."""
        method = METHODS[self.method]
        return method(**{f.name: getattr(self, setting_key(method, f.name)) for f in fields(method)})

    def build_budget(self) -> LocalBudget:
        """How a client trains in one round."""
        return LocalBudget(
            batch_size=self.batch_size,
            steps=self.local_steps,
            epochs=self.local_epochs,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            momentum=self.momentum if self.optimizer == "sgd" else 0.0,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            keep_momentum=self.keep_momentum,
        )

    def build_bounds(self) -> Bounds:
        """What is refused for its size."""
        return Bounds(self.max_update_norm, self.max_update_ratio)

    def build_privacy(self) -> Privacy:
        """Clipping and noise of what clients send."""
        return Privacy(
            clip_norm=self.clip_norm,
            upload_clip_norm=self.upload_clip_norm,
            noise_multiplier=self.noise_multiplier,
            delta=self.privacy_delta,
            report_metrics=self.report_metrics,
        )

    def unread(self) -> list[str]:
        """Settings, in kebab-case, that were changed although the method or its objective does not read them."""
        changed = {kebab(name) for name, f in type(self).model_fields.items() if getattr(self, name) != f.default}
        method = self.build_method()
        unread = {name for names in READS.values() for name in names} - set(READS[method.objective])
        others = {kebab(setting_key(type(method), f.name)) for f in fields(method) if f.name in unread}
        return sorted(changed & (keys_of_other_methods(self.method) | others))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, where the run says them."""
        return tuple(name.strip() for name in self.class_names.split(",")) if self.class_names else ()

    @property
    def run_name(self) -> str:
        """The name of the run: as given, or made from data set, method and seed."""
        if self.name:
            return self.name
        return f"{self.dataset.partition(':')[0]}-{self.method}-seed{self.seed}"

    @property
    def results(self) -> Path:
        """Folder of this run's results."""
        return Path(self.results_dir).expanduser() / self.run_name

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of train, calibration and test."""
        return (1 - self.calibration_share - self.test_share, self.calibration_share, self.test_share)


def keys_of_other_methods(method: str) -> set[str]:
    """Settings, in kebab-case, that only other methods than this one read."""
    mine = {setting_key(METHODS[method], f.name) for f in fields(METHODS[method])} if method in METHODS else set()
    every = {setting_key(other, f.name) for other in METHODS.values() for f in fields(other)}
    return {kebab(name) for name in every - mine}


def _explain(settings: type[Settings], detail: Any) -> str:
    """One pydantic error in words for people."""
    if not detail["loc"]:  # raised by a rule about several settings
        return str(detail["ctx"]["error"])
    key = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden" and (now := renamed(key)):
        return f"unknown setting {key!r}: {now}"
    if detail["type"] == "extra_forbidden":
        known = settings.keys()
        near = closest(key, known)
        return f"unknown setting {key!r}; " + (
            f"did you mean {near!r}?" if near else f"known settings: {', '.join(known)}"
        )
    expected = detail["msg"].partition(" should ")[2] or detail["msg"]
    about = (settings.model_fields[to_snake(key)].description or "").replace("\n", " ")
    return f"{key} should {expected}, got {detail['input']!r} ({about})"
