"""Records when every round ended."""

import time
from pathlib import Path

from flwr.app import ArrayRecord, MetricRecord


class Clock:
    """A server-side evaluation that only notes the time; strategies call it before the first and after every round."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Append the time to the file."""
        with self.path.open("a") as file:
            file.write(f"{time.time()}\n")
        return None
