"""Messages in float16 instead of float32: bytes and accuracy of cafedistill-text, default job, paired by seed.

The environment variable UPLINK_METHOD names another method.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.runs import ROOT

SEEDS = (0, 1, 2)
ROUNDS = int(os.environ.get("UPLINK_ROUNDS", "30"))
METHOD = os.environ.get("UPLINK_METHOD", "cafedistill-text")
JOB: dict[str, Any] = {"method": METHOD}
if METHOD == "cafedistill-text":
    JOB |= {"learning-rate": 0.3, "train.momentum": 0.0}
DEMO_NODES, CLIENTS = 2, 20


class Outcome(NamedTuple):
    """Mean accuracy over clients and exits after the last round; bytes up and down per client and round."""

    accuracy: float
    up: float
    down: float


def run(job: tuple[int, str, int, int]) -> Outcome:
    """One run of (seed, wire, nodes, rounds) of the default job in this process."""
    import torch

    sys.path.insert(0, str(ROOT))
    from cafe_flwr.app.run import build_strategy
    from cafe_flwr.engine import InProcessGrid
    from cafe_flwr.server.callbacks import RoundRecord, RunInfo
    from cafe_flwr.server.checkpoints import ServerState
    from cafe_flwr.settings import Settings
    from cafe_flwr.wire.evaluate import FinalReport
    from client_app import app

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    seed, wire, nodes, rounds = job
    up: list[float] = []
    down: list[float] = []
    accuracies: list[float] = []

    class Meter:
        def on_start(self, run: RunInfo) -> None: ...

        def on_round(self, record: RoundRecord, state: ServerState) -> None:
            up.append(record.bytes_up / len(record.participants))
            down.append(record.bytes_down / len(record.participants))

        def on_finish(self, reports: Sequence[FinalReport]) -> None:
            accuracies.extend(mean(report.exits.accuracy) for report in reports)

    with tempfile.TemporaryDirectory() as folder:
        config: dict[str, Any] = {**JOB, "results-dir": folder, "seed": seed, "num-server-rounds": rounds}
        settings = Settings.from_run_config({**config, "federation.evaluate-every": rounds})
        strategy = build_strategy(settings)
        strategy.wire, strategy.callbacks = wire, (Meter(),)
        strategy.start(InProcessGrid(app, nodes, settings.to_run_config()))
    return Outcome(mean(accuracies) if accuracies else float("nan"), mean(up), mean(down))


def main() -> None:
    """Print bytes and accuracy of both, and the paired difference."""
    wires = ("float32", "float16")
    jobs = [(seed, wire, DEMO_NODES, ROUNDS) for seed in SEEDS for wire in wires]
    jobs += [(0, wire, CLIENTS, 2) for wire in wires]  # bytes only: a client on every node
    with multiprocessing.get_context("spawn").Pool(int(os.environ.get("UPLINK_PROCESSES", "1"))) as pool:
        results = dict(zip(jobs, pool.map(run, jobs, chunksize=1), strict=True))
    for nodes, rounds in ((DEMO_NODES, ROUNDS), (CLIENTS, 2)):
        full, half = (results[0, wire, nodes, rounds] for wire in wires)
        print(
            f"{METHOD}, {CLIENTS} clients on {nodes} nodes, bytes up per client and round: float32 {full.up:.0f}, "
            f"float16 {half.up:.0f}, {half.up / full.up:.1%} (bound 50 % and the metrics); down: {full.down:.0f}, "
            f"{half.down:.0f}, {half.down / full.down:.1%}"
        )
    gains = []
    for seed in SEEDS:
        full, half = (results[seed, wire, DEMO_NODES, ROUNDS] for wire in wires)
        gains.append(100 * (half.accuracy - full.accuracy))
        print(f"seed {seed}: accuracy after {ROUNDS} rounds {full.accuracy:.4f} in float32, {half.accuracy:.4f}")
    print(
        f"float16 changes accuracy by {mean(gains):+.2f} points (each {[round(g, 2) for g in gains]}; bound: 0.5 lost)"
    )


if __name__ == "__main__":
    main()
