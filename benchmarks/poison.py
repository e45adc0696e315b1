"""Accuracy of honest clients while others poison the shared part: attacks × shares of hostile clients × aggregation.

Prints a Markdown table for each method; docs/security.md has the last one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes on two cores; read when torch is imported

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from cafe_flwr import make_client_app
from cafe_flwr.app.parts import build_networks, federation
from cafe_flwr.app.run import build_strategy
from cafe_flwr.core.log import logger
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.server.callbacks import RoundRecord, RunInfo
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.rounds import RoundFailed
from cafe_flwr.settings import Settings
from cafe_flwr.wire.evaluate import FinalReport

CLIENTS, ROUNDS = 10, 15
METHODS = ("cafedistill", "fedavg")
RULES = ("mean", "median", "trimmed-mean", "clipped-mean")
HOSTILE = (1, 2, 4)  # of ten: 10, 20 and 40 %
JOB = {
    "name": "poison",
    "dataset": "digits",
    "num-clients": CLIENTS,
    "num-server-rounds": ROUNDS,
    "local-steps": 6,
    "dirichlet-alpha": 0.5,
    "data.examples-per-client": 60,
    "federation.evaluate-every": ROUNDS,
    "federation.wait-seconds": 1.0,
    "federation.round-retries": 0,
}

Update = NDArray[np.float64]


def _random(update: Update) -> Update:
    """The same direction for all hostile clients, in all rounds."""
    direction = np.random.default_rng(0).normal(size=len(update))
    return direction * (10 * np.linalg.norm(update) / np.linalg.norm(direction))


# What becomes of an update, and of the number of examples.
ATTACKS: Mapping[str, tuple[Callable[[Update], Update], Callable[[int], int]]] = {
    "update flipped": (lambda u: -u, lambda n: n),
    "update flipped, ×10": (lambda u: -10 * u, lambda n: n),
    "a random direction, ×10": (_random, lambda n: n),
    "update flipped, 10⁴ × the examples": (lambda u: -u, lambda n: 10**4 * n),
    "update flipped, 2⁴⁰ examples": (lambda u: -u, lambda n: 2**40),
}


class HostileApp:
    """The ClientApp of the settings; some clients, one on each node, lie."""

    def __init__(self, app: ClientApp, attack: str, hostile: Sequence[int]) -> None:
        self.app, self.hostile = app, hostile
        self.update, self.examples = ATTACKS[attack] if attack else (lambda u: u, lambda n: n)
        self.size = 0  # of the shared part

    def __call__(self, message: Message, context: Context) -> Message:
        """An honest client's reply, changed if the client is hostile."""
        reply = self.app(message, context)
        if context.node_config["partition-id"] not in self.hostile or reply.has_error():
            return reply
        content, kind = reply.content, message.metadata.message_type
        if kind == "query":
            config = dict(content["config"])
            self.size = sum(math.prod(shape) for _, shape in json.loads(str(config["shared"])))
            content["config"] = ConfigRecord({**config, "num-examples": [*map(self.examples, config["num-examples"])]})
        if kind == "train":
            metrics, flat = dict(content["metrics"]), content["arrays"]["flat"].numpy().copy()
            sent = message.content["arrays"]["flat"].numpy()[: self.size].astype(np.float64)
            flat[: self.size] = sent + self.update(flat[: self.size] - sent)
            content["arrays"] = ArrayRecord({"flat": Array(flat)})
            metrics["num-examples"] = [*map(self.examples, metrics["num-examples"])]
            content["metrics"] = MetricRecord(metrics)
        return reply


class Watcher:
    """Keeps what the honest clients measure in the end, and how often one of them was left out."""

    def __init__(self, hostile: Sequence[int]) -> None:
        self.hostile, self.round, self.wronged, self.accuracy = hostile, 0, 0, math.nan

    def on_start(self, run: RunInfo) -> None:
        """Nothing."""

    def on_round(self, record: RoundRecord, state: ServerState) -> None:
        """Count."""
        self.round, self.wronged = record.server_round, self.wronged + len({*record.left_out} - {*self.hostile})

    def on_finish(self, reports: Sequence[FinalReport]) -> None:
        """The mean over exits and honest clients."""
        self.accuracy = float(np.mean([r.exits.accuracy for r in reports if r.client not in self.hostile]))


def outcome(method: str, attack: str, count: int, rule: str) -> str:
    """Accuracy of the honest clients, or when the run stopped; and client-rounds of honest clients that were left out.

    The settings are the defaults but for the size of the job.
    """
    logger.setLevel(logging.ERROR)
    hostile = range(2, 2 + count)
    with tempfile.TemporaryDirectory() as folder:
        more = {"method": method, "federation.aggregation": rule, "results-dir": folder}
        if rule == "trimmed-mean" and count > 2:
            more["federation.trim-share"] = 0.4
        settings = Settings.from_run_config({**JOB, **more})
        app = make_client_app(
            lambda context: build_networks(settings),
            lambda client, context: federation(settings).load(client),
            state_dir=lambda context: folder,
        )
        strategy, watcher = build_strategy(settings), Watcher(hostile)
        strategy.callbacks = (watcher,)
        try:
            strategy.start(InProcessGrid(HostileApp(app, attack, hostile), CLIENTS, settings.to_run_config()))
        except RoundFailed:
            return f"stops in round {watcher.round + 1}"
    return f"{watcher.accuracy:.3f}" + f" ({watcher.wronged} wronged)" * bool(watcher.wronged)


def main() -> None:
    """Print the tables."""
    started = time.perf_counter()
    cases = [("", 0), *product(ATTACKS, HOSTILE)]
    jobs = [(method, *case, rule) for method in METHODS for case in cases for rule in RULES]
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip(jobs, pool.map(outcome, *zip(*jobs, strict=True)), strict=True))
    for method in METHODS:
        print(f"\n`{method}`\n\n| attack | hostile | {' | '.join(RULES)} |\n|---|---|{'---|' * len(RULES)}")
        for attack, count in cases:
            row = " | ".join(found[method, attack, count, rule] for rule in RULES)
            print(f"| {attack or 'none'} | {count} of {CLIENTS} | {row} |")
    print(f"\n{len(jobs)} runs in {(time.perf_counter() - started) / 60:.1f} min (bound 15 min)")


if __name__ == "__main__":
    main()
