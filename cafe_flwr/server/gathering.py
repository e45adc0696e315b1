"""Waiting for the clients that a run, or a round, needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.serverapp import Grid

from cafe_flwr.server.errors import RoundFailed
from cafe_flwr.server.run import StrategyPart


@dataclass(frozen=True)
class Gathering(StrategyPart):
    """Waits for clients, as long as the strategy was told to.

    Attributes
    ----------
    failure
        Why the round is repeated, if it is.
    """

    failure: RoundFailed | None = None

    def wait(self, grid: Grid) -> None:
        """Wait until the clients are there, or the time is up (:meth:`Directory.wait`)."""
        run = self.run
        self.directory.wait(
            grid, min_nodes=run.min_available_nodes, num_clients=run.num_clients, seconds=run.wait_seconds
        )

    def connect(self, grid: Grid) -> None:
        """Ask nodes that have come since, or all of them if nobody is known to be there."""
        if self.directory.hosts:
            self.directory.refresh(grid)
        if self.directory.hosts:
            return
        try:
            self.wait(grid)
        except RuntimeError as error:
            if self.failure is None:
                raise
            raise RuntimeError(f"{error}\n{self.failure}") from None

    def enough(self, grid: Grid, server_round: int) -> list[int]:
        """Clients to choose from for a round, or to ask again in one that is repeated; waits for those missing.

        Raises
        ------
        RuntimeError
            If there are too few for a round.
        """
        minimum, seconds = self.run.min_clients, self.run.wait_seconds
        wanted = self.failure.participants if self.failure else None
        deadline = time.monotonic() + seconds
        while len(there := self._there(wanted)) < minimum and time.monotonic() < deadline:
            time.sleep(self.directory.poll_seconds)
            self.directory.refresh(grid)
        if len(there) >= max(1, minimum):
            return there
        of, before = (f" of its {len(wanted)} participants", f"\n{self.failure}") if wanted else ("", "")
        raise RuntimeError(
            f"round {server_round} needs at least {minimum} clients (min-train-nodes), but {len(there)}{of} are "
            f"there, also after {seconds:g} s: start more nodes and resume the run{before}"
        )

    def _there(self, wanted: Sequence[int] | None) -> list[int]:
        hosts = self.directory.hosts
        return sorted(hosts) if wanted is None else [client for client in wanted if client in hosts]
