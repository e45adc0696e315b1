"""Constants of a run, their checks, and the base class of the strategy's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cafe_flwr.methods.base import Method
from cafe_flwr.server.directory import Directory
from cafe_flwr.server.options import Aggregation, Federation
from cafe_flwr.training.options import LocalBudget, Schedule, check_training, learning_rate_at
from cafe_flwr.wire.keys import WIRES, Keys
from cafe_flwr.wire.options import Bounds, Privacy


@dataclass(frozen=True)
class RunConstants:
    """What stays the same in all rounds of a run; see :class:`cafe_flwr.server.strategy.FederatedStrategy`."""

    keys: Keys
    method: Method
    seed: int
    num_rounds: int
    num_clients: int | None
    local: LocalBudget
    learning_rate_schedule: str
    learning_rate_decay: float
    evaluate_every: int
    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_available_nodes: int
    wait_seconds: float
    round_timeout: float
    round_retries: int
    bounds: Bounds
    aggregation: Aggregation
    privacy: Privacy
    wire: str

    @property
    def min_clients(self) -> int:
        """Clients that a round needs; at most ``num_clients`` where that is known."""
        return self.min_train_nodes if self.num_clients is None else min(self.min_train_nodes, self.num_clients)

    def evaluates_in(self, server_round: int) -> bool:
        """Whether clients evaluate before and after training in this round."""
        return server_round % self.evaluate_every == 0 or server_round == self.num_rounds

    def learning_rate(self, server_round: int) -> float:
        """The learning rate of a round."""
        schedule = self.num_rounds, self.learning_rate_schedule, self.learning_rate_decay
        return learning_rate_at(self.local.learning_rate, server_round, *schedule)

    def check_rounds(self, last: int) -> None:
        """ValueError if the run cannot stop after round ``last``, or its learning rate falls to 0 before the end."""
        if not 1 <= last <= self.num_rounds:
            raise ValueError(f"num_rounds must be in 1..{self.num_rounds}, for which the strategy was made, got {last}")
        if not self.learning_rate(self.num_rounds):
            raise ValueError(
                f"learning_rate_decay = {self.learning_rate_decay} shrinks the learning rate to 0 within "
                f"{self.num_rounds} rounds: choose one nearer to 1"
            )


def check_arguments(run: RunConstants) -> None:
    """ValueError for an argument of a strategy that is out of range, naming it."""
    if run.seed < 0:
        raise ValueError(f"seed must be at least 0, got {run.seed}")
    names = ("evaluate_every", "wait_seconds", "round_timeout", "round_retries")
    values: dict[str, Any] = {name: getattr(run, name) for name in names}
    values |= {} if run.num_clients is None else {"num_clients": run.num_clients}
    Federation(num_server_rounds=run.num_rounds, **values)
    check_training(run.local, Schedule(run.learning_rate_schedule, run.learning_rate_decay), run.num_rounds)
    for name in ("fraction_train", "fraction_evaluate"):
        if not 0 <= getattr(run, name) <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {getattr(run, name)}")
    if run.wire not in WIRES:
        raise ValueError(f"wire must be one of {', '.join(WIRES)}; got {run.wire!r}")


@dataclass(frozen=True)
class StrategyPart:
    """A part of a strategy, with the constants of the run and the directory of clients."""

    run: RunConstants
    directory: Directory

    @property
    def uniform_weights(self) -> bool:
        """Whether all clients weigh the same in the average of the shared part."""
        return self.run.method.uniform_weights(self.directory.unequal)
