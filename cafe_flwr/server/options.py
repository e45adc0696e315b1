"""Settings of the server: name and mode of the run, clients, rounds and waiting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cafe_flwr.core.options import check_settings, option, section


@section("")
@dataclass(frozen=True)
class Run:
    """What the run is, and where it writes."""

    name: str = option(
        "",
        "Name of the run and of its results folder; empty: made from data set, method and seed.",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        max_length=100,
        compare="own",
        free=True,
    )
    seed: int = option(
        0,
        "Seed of everything that is random: partition, images, initial weights, participants, batches.",
        ge=0,
        lt=2**32,
        compare="own",
    )
    results_dir: str = option(
        "~/cafe-flwr-results",
        "Folder of all results, absolute or from '~'. A run writes to <results-dir>/<name>.",
        min_length=1,
        compare="own",
        free=True,
    )
    mode: str = option(
        "train",
        "'train': a federation. 'calibrate': thresholds for the personal networks that the run of this name has left.",
        choices=("train", "calibrate"),
        compare="row",
    )
    resume: bool = option(False, "Go on from the last checkpoint of the run of this name.", compare="own", free=True)
    method: str = option("cafedistill", "Method of federated learning, see docs/methods.md.", compare="own")

    def called(self, dataset: str) -> str:
        """The name of the run: as given, or made from data set, method and seed."""
        return self.name or f"{dataset.partition(':')[0]}-{self.method}-seed{self.seed}"

    def folder(self, dataset: str) -> Path:
        """Folder of the run's results."""
        return Path(self.results_dir).expanduser() / self.called(dataset)


@section("federation")
@dataclass(frozen=True)
class Aggregation:
    """How the clients' shared parts become one (docs/security.md)."""

    rule: str = option(
        "mean",
        "How the clients' shared parts are combined: their mean, weighted by examples; or, with every client counted "
        "alike, value by value the median or a trimmed mean, or the mean of updates no longer than the median update.",
        key="federation.aggregation",
        choices=("mean", "median", "trimmed-mean", "clipped-mean"),
    )
    trim_share: float = option(
        0.2,
        "Share of the clients that a trimmed mean leaves out at either end of every value.",
        ge=0,
        lt=0.5,
        only={"federation.aggregation": ("trimmed-mean",)},
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def robust(self) -> bool:
        """Whether every client counts alike and is looked at alone."""
        return self.rule != "mean"

    def cut(self, count: int) -> int:
        """How many of ``count`` values a median or trimmed mean leaves out at either end."""
        return (count - 1) // 2 if self.rule == "median" else int(self.trim_share * count + 1e-9)


def check_aggregation(aggregation: Aggregation, method: str, shared_size: int) -> None:
    """ValueError for a robust rule if the method shares nothing that it could combine."""
    if aggregation.robust and not shared_size:
        raise ValueError(
            f"federation.aggregation = {aggregation.rule!r} combines what clients share, and {method} shares nothing: "
            "set it to 'mean'"
        )


@section("federation")
@dataclass(frozen=True)
class Federation:
    """Clients, rounds and waiting."""

    num_server_rounds: int = option(
        100,
        "Rounds T. Schedules (learning rate, student exits) span all of them.",
        key="num-server-rounds",
        ge=1,
        compare="budget",
    )
    num_clients: int = option(
        20,
        "Clients, each with its own data and personal network. A node hosts one or more.",
        key="num-clients",
        ge=1,
        compare="all",
        sized=True,
    )
    fraction_train: float = option(1.0, "Share of the clients that train in a round.", gt=0, le=1, compare="all")
    min_train_nodes: int = option(
        1,
        "Least number of clients that train in a round, whatever fraction-train says; a round with fewer good replies "
        "does not count.",
        ge=1,
        compare="all",
    )
    min_available_nodes: int = option(
        1, "Number of nodes to wait for before the first round.", ge=1, compare="all", free=True
    )
    evaluate_every: int = option(
        1,
        "Interval, in rounds, at which clients evaluate before and after training; they also do in the last round.",
        ge=1,
        compare="all",
    )
    wait_seconds: float = option(
        120.0,
        "How long to wait, before the first round, for the nodes that host the missing clients.",
        ge=0,
        compare="free",
    )
    round_timeout: float = option(
        600.0, "Seconds after which a round goes on without the replies that are missing.", gt=0, compare="free"
    )
    round_retries: int = option(
        1,
        "How often a round with fewer than min-train-nodes good replies is repeated before the run stops.",
        ge=0,
        compare="free",
    )
    wire_dtype: str = option(
        "float32",
        "Numbers of the flat arrays in messages; 'float16' halves the bytes.",
        choices=("float32", "float16"),
        compare="all",
    )
    state_dir: str = option(
        "",
        "Folder of the clients' personal state; empty: <results-dir>/<name>/personal. A node's own node-config "
        "'state-dir' comes first.",
        compare="own",
        free=True,
    )

    def __post_init__(self) -> None:
        check_settings(self)
