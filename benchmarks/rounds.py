"""Time of a round with a SuperLink and three SuperNodes on loopback, compared with Flower's plain FedAvg.

Both do the same work: evaluate, one step, evaluate. FedAvg runs without its evaluation phase (one message per node and
round) and with it (two).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.runs import ROOT
from deploy.loopback import Loopback

NODES, ROUNDS, MEGABYTES = 3, 3, 5.0
MANY = 300
APPS = Path(__file__).parent / "loopback"
MANIFEST = """[project]
name = "{kind}"
version = "1.0.0"
license = "Apache-2.0"
description = "A benchmark"
dependencies = []

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "{kind}_server:app"
clientapp = "{kind}_client:app"

[tool.flwr.app.config]
rounds = 1
tensors = 1
megabytes = 1.0
evaluate = 0.0
times = ""
"""


class Job(NamedTuple):
    """A run: its strategy, number of tensors, and whether FedAvg evaluates in a second phase."""

    kind: str
    tensors: int
    evaluate: float = 0.0


def seconds_per_round(deployment: Loopback, folder: Path, job: Job) -> float:
    """Median time of a round; the first one, in which nodes are found, does not count."""
    app = folder / job.kind
    if not app.exists():
        app.mkdir()
        for path in APPS.glob("*.py"):
            shutil.copy(path, app)
        (app / "pyproject.toml").write_text(MANIFEST.format(kind=job.kind))
    times = folder / f"{job.kind}-{job.tensors}-{job.evaluate}.txt"
    config = {"rounds": ROUNDS, "tensors": job.tensors, "megabytes": MEGABYTES, "times": str(times)}
    run = deployment.submit(app, {**config, "evaluate": job.evaluate})
    status = deployment.wait(run, 900)
    if status != "finished:completed":
        raise RuntimeError(f"{job} ended as {status}:\n{deployment.log(run)[-3000:]}")
    stamps = [float(line) for line in times.read_text().split()]
    return median(later - earlier for earlier, later in pairwise(stamps[1:]))


def main() -> None:
    """Print the seconds of all runs, and the two ratios that have bounds."""
    plain, phases = Job("plain", 1), Job("plain", 1, 1.0)
    plain_many, ours, ours_many = Job("plain", MANY), Job("ours", 1), Job("ours", MANY)
    seconds: dict[Job, float] = {}
    environment = {"PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryDirectory() as name,
        Loopback(Path(name) / "deployment", secure=False, environment=environment) as deployment,
    ):
        for i in range(NODES):
            config = {"partition-id": i, "num-partitions": NODES, "state-dir": str(Path(name) / f"state-{i}")}
            deployment.add_node(f"node-{i}", config)
        deployment.wait_online(NODES)
        for job in (ours, ours_many, plain, phases, plain_many):
            seconds[job] = seconds_per_round(deployment, Path(name), job)
    print(f"a round of {NODES} SuperNodes on loopback, {MEGABYTES:g} MB each way, median of {ROUNDS - 1}:")
    for job, words in (
        (plain, "FedAvg, 1 tensor, training only"),
        (phases, "FedAvg, 1 tensor, training and evaluation"),
        (plain_many, f"FedAvg, {MANY} tensors, training only"),
        (ours, "CafeDistill, 1 tensor, with evaluation before and after"),
        (ours_many, f"CafeDistill, {MANY} tensors, with evaluation before and after"),
    ):
        print(f"  {words:<62} {seconds[job]:6.1f} s")
    phase, many = seconds[ours] / seconds[phases], seconds[ours_many] / seconds[ours]
    print(
        f"  one message in place of two: {seconds[ours] / seconds[plain]:.2f} of FedAvg's training, {phase:.2f} of both"
    )
    print(
        f"  {MANY} tensors against 1: {many:.2f} (bound 1.3); FedAvg's own {seconds[plain_many] / seconds[plain]:.2f}"
    )
    sys.exit(many > 1.3 or phase > 1)


if __name__ == "__main__":
    main()
