"""How much a node does for one request, whatever the server says."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cafe_flwr.core.text import kebab
from cafe_flwr.training.options import LocalBudget
from cafe_flwr.wire.train import TrainRequest

_OF_METHODS = 1000  # steps within a step, such as those of an adversarial example


@dataclass(frozen=True)
class NodeBounds:
    """The most that a node accepts, by the keys of its node-config (``max-steps``, …).

    Attributes
    ----------
    max_steps, max_epochs, max_examples
        Of local training of one client in one request; examples count as often as they are drawn.
    max_seconds
        Of a request, with all its clients; what trains then stops, and nothing is kept of it.
    max_clients, max_rounds
        That a request may speak of.
    """

    max_steps: int = 10**6
    max_epochs: int = 10**4
    max_examples: int = 10**8
    max_seconds: float = 86400.0
    max_clients: int = 10**6
    max_rounds: int = 10**6

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> NodeBounds:
        """The node's own; ValueError if one is no number greater than 0.

        Examples
        --------
        >>> NodeBounds.of({"max-steps": "500"}).max_steps
        500
        """
        found = {f.name: node_config[kebab(f.name)] for f in fields(cls) if kebab(f.name) in node_config}
        for name, value in found.items():
            try:
                found[name] = float(value) if name == "max_seconds" else int(str(value))
            except ValueError:
                found[name] = 0
            if not found[name] > 0:
                raise ValueError(f"node-config {kebab(name)} must be a number greater than 0, got {value!r}")
        return cls(**found)

    def check(self, request: TrainRequest) -> None:
        """ValueError, with both values, if a request asks for more."""
        self._check("max_rounds", "rounds", request.num_rounds, request.server_round)
        self._check("max_clients", "clients", len(request.clients))
        self._check("max_steps", "steps", 0 if request.budget.epochs else request.budget.steps)
        self._check("max_epochs", "epochs", request.budget.epochs)
        for name, value in request.method_settings.items():
            if name.endswith(("steps", "epochs")) and isinstance(value, int) and value > _OF_METHODS:
                asked = str(value)[:24]
                raise ValueError(f"this node takes at most {_OF_METHODS} {kebab(name)} of a method, got {asked}")

    def check_client(self, budget: LocalBudget, num_examples: int) -> None:
        """ValueError if a client with so many training examples would draw more of them, or take more steps."""
        drawn = budget.num_draws(num_examples)
        self._check("max_examples", "examples drawn for training", drawn)
        self._check("max_steps", "steps", -(-drawn // max(1, min(budget.batch_size, num_examples))))

    def check_clients(self, number: object) -> int:
        """The number of clients that a message speaks of; ValueError if it is none, or too large."""
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"the server speaks of {str(number)[:40]!r} clients: it must be a whole number, 1 or more")
        self._check("max_clients", "clients", number)
        return number

    @property
    def deadline(self) -> float:
        """When a request that begins now must be done, in seconds of ``time.monotonic``."""
        return time.monotonic() + self.max_seconds

    def _check(self, name: str, what: str, *asked: int) -> None:
        most = getattr(self, name)
        if max(asked) > most:
            raise ValueError(
                f"this node takes at most {most:,} {what} in a request ({kebab(name)} in its node-config), the server "
                f"asks for {str(max(asked))[:24]}"
            )
