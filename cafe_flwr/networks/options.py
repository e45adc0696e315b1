"""Settings of the network, and of where it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cafe_flwr.core.options import check_settings, option, options_of, section, shared
from cafe_flwr.core.text import brief

NETWORKS = ("conv", "resnet18", "transformer", "published-conv", "published-resnet18", "published-transformer")
TEXT_NETWORKS = ("transformer", "published-transformer")
PUBLISHED: Mapping[str, Mapping[str, int | str]] = {
    "published-conv": {"width": 128, "depth": 3, "feature_width": 128},
    "published-resnet18": {"width": 64, "depth": 4, "norm": "batch"},
    "published-transformer": {"width": 192, "depth": 4, "feature_width": 192, "norm": "layer", "attention_heads": 2},
}
"""Networks of fixed build, with the values of :class:`Model`'s options that describe them."""

DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:\d+)?)$"


@section("model")
@dataclass(frozen=True)
class Model:
    """One of the package's networks."""

    network: str = shared(
        "conv",
        "'conv': convolutional blocks; 'resnet18': four stages of residual blocks; both for images. 'transformer': "
        "blocks of attention, for texts. An exit after each block or stage. With 'published-' before the name: those "
        "that CAFEDistill's authors run, of fixed size (docs/networks.md).",
        key="network",
        choices=NETWORKS,
        sized=True,
    )
    feature_width: int = shared(
        24, "Width of the features that enter the classifier of every exit.", ge=1, le=65_536, sized=True
    )
    width: int = shared(
        0,
        "Channels of the first block (conv) or stage (resnet18), or of the embeddings (transformer); 0: 8, 64 or 128.",
        formerly="network-width",
        ge=0,
        le=8_192,
        sized=True,
    )
    depth: int = shared(
        0, "Blocks, and exits; 0: 3 (conv) or 4. resnet18 has 4.", formerly="network-depth", ge=0, le=64, sized=True
    )
    norm: Literal["group", "batch", "layer"] = shared(
        "group",
        "Norm over groups of channels of an example, over a batch, or over a token ('layer': transformer only).",
        choices=("group", "batch", "layer"),
        sized=True,
    )
    statistics: Literal["average", "personal", "drop"] = shared(
        "average",
        "Running statistics of batch norms: averaged as weights are, kept on the client, or none (docs/networks.md).",
        choices=("average", "personal", "drop"),
        sized=True,
    )
    stem_stride: int = shared(
        1,
        "Stride of resnet18's first convolution; 2 for 64×64 images at the cost of 32×32.",
        choices=(1, 2),
        sized=True,
    )
    attention_heads: int = shared(
        4,
        "Attention heads of the transformer; they must divide its width.",
        ge=1,
        sized=True,
        only={"network": TEXT_NETWORKS},
    )
    dropout: float = shared(0.1, "Of the transformer.", ge=0, lt=1, only={"network": TEXT_NETWORKS})

    @property
    def num_exits(self) -> int:
        """Exits of the network."""
        return int(PUBLISHED.get(self.network, {}).get("depth", self.depth or (3 if self.network == "conv" else 4)))


_WIDEST = 16_384  # channels of a block


def check_model(model: Model) -> None:
    """Raise ValueError, in the keys of a run's settings, if options do not go together."""
    published = PUBLISHED.get(model.network)
    if published is not None:
        _check_published(model, published)
    elif model.norm == "layer" and model.network != "transformer":
        raise ValueError(f"model.norm = 'layer' is of the transformer: {model.network!r} takes 'group' or 'batch'")
    norm = model.norm if published is None else published.get("norm")
    if model.statistics != "average" and norm != "batch":
        asked = f"model.statistics = {model.statistics!r} is about batch norms, and "
        if published is not None:
            raise ValueError(f"{asked}{model.network!r} has none: set it to 'average'")
        raise ValueError(
            f"{asked}model.norm = {model.norm!r} keeps none: set model.norm to 'batch', or model.statistics to "
            "'average'"
        )
    if model.network == "resnet18" and model.depth not in (0, 4):
        raise ValueError(f"resnet18 has 4 stages, got model.depth = {model.depth}: set it to 0")
    doublings = {"conv": model.num_exits - 1, "resnet18": 3}.get(model.network, 0)
    if (widest := (model.width or 8) << doublings) > _WIDEST:
        raise ValueError(
            f"model.width = {model.width} and model.depth = {model.depth} make a last block of {brief(widest)} "
            "channels, as every block has twice the channels of the one before: lower one of them, to at most "
            f"{_WIDEST} channels"
        )
    if model.stem_stride != 1 and model.network != "resnet18":
        raise ValueError(f"model.stem-stride = {model.stem_stride} is of resnet18: set it to 1 for {model.network!r}")


def _check_published(model: Model, fixed: Mapping[str, int | str]) -> None:
    """Refuse options that ask for another build than the published one: they would change nothing."""
    for o in options_of(Model):
        value = getattr(model, o.field)
        if o.field not in ("network", "statistics") and value not in (o.default, fixed.get(o.field, o.default)):
            raise ValueError(
                f"{o.key} = {value!r} does not change {model.network!r}, which is built as its authors run it: leave "
                f"it at {o.default!r}, or choose network = {model.network.removeprefix('published-')!r}"
            )


@section("compute")
@dataclass(frozen=True)
class Compute:
    """Where and how precisely networks compute (docs/devices.md)."""

    device: str = option(
        "auto",
        "'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', … or 'mps'. A node's own node-config 'device' comes "
        "first.",
        pattern=DEVICE_PATTERN,
    )
    precision: str = option(
        "float32",
        "Of matrix products and convolutions (autocast); weights, losses and all that is sent or kept are float32.",
        choices=("float32", "bfloat16", "float16"),
    )
    channels_last: bool = option(
        False, "Keep the weights of convolutions as (out, height, width, in): faster on GPUs with tensor cores."
    )
    compile: bool = option(
        False, "Compile stages and exits by torch.compile: the first steps take longer, the others less."
    )
    clients_per_gpu: int = option(
        1,
        "Clients that train at a time on one GPU, in a simulation started by cafe-flwr run; ignored without a GPU.",
        ge=1,
        le=100,
        free=True,
    )

    def __post_init__(self) -> None:
        check_settings(self)
