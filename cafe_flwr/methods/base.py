"""What a method of federated learning is: which tensors travel, what a client minimises, what the server combines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.data import Split
from cafe_flwr.networks import EarlyExitNetwork
from cafe_flwr.training import LocalBudget


@dataclass(frozen=True)
class LocalTask:
    """One client's work in one round.

    Attributes
    ----------
    network
        Holds the shared parameters of this round and the client's personal ones; trained in place.
    data
        Training split.
    active
        (m−1,): whether student exit k trains.
    download
        What the server sent to this client alone, by name; empty if nothing.
    budget
        Steps, batch size and optimiser settings.
    rng
        The client's random generator of this round for a purpose.
    """

    network: EarlyExitNetwork
    data: Split
    active: Sequence[bool]
    download: Mapping[str, Tensor]
    budget: LocalBudget
    rng: Callable[[str], np.random.Generator]


@dataclass(frozen=True)
class LocalResult:
    """What a client reports besides its parameters: mean training loss, and the similarity of each student exit."""

    loss: float
    similarity: list[float]


@dataclass(frozen=True)
class ClientRecord:
    """What the server knows of a client: its last report.

    Attributes
    ----------
    num_examples
        Training examples.
    seen
        Round of the report.
    upload
        What the method had it send of its own, flat (CAFEDistill: its last exit's classifier).
    similarity
        (m−1,): how similar its student exits are to its last exit.
    """

    num_examples: int
    seen: int
    upload: NDArray[np.float32]
    similarity: NDArray[np.float64]


@dataclass(frozen=True)
class RoundPlan:
    """What the server has decided for a round.

    Attributes
    ----------
    active
        (participants, m−1) bool, rows in the order of the participants.
    downloads
        Flat arrays for single clients, by client.
    weights
        Teacher weights, (rows: ``weight_rows``, columns: ``weight_columns``), for the records; None without.
    """

    active: NDArray[np.bool_]
    downloads: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    weights: NDArray[np.float64] | None = None
    weight_rows: Sequence[int] = ()
    weight_columns: Sequence[int] = ()


class Method(Protocol):
    """Both halves of a method; an implementation is a frozen dataclass of the method's own settings.

    The settings are scalars: they travel to the clients, which build the same object from them.
    """

    name: ClassVar[str]

    def shared_names(self, network: EarlyExitNetwork) -> list[str]:
        """Parameters that are averaged over clients."""

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """Parameters that stay on the client's disk."""

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """Parameters each client sends as its own, not averaged."""

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """Names of what a client receives as its own."""

    def plan(
        self,
        server_round: int,
        num_rounds: int,
        participants: Sequence[int],
        num_exits: int,
        known: Mapping[int, ClientRecord],
        rng: np.random.Generator,
    ) -> RoundPlan:
        """Server half: what the participants are told, given the last reports of all clients known."""

    def train(self, task: LocalTask) -> LocalResult:
        """Client half: one round of local training."""


def settings_of(method: Method) -> dict[str, Any]:
    """The method's own settings, by name."""
    return {f.name: getattr(method, f.name) for f in fields(method)}  # type: ignore[arg-type]
