"""Accuracy of newcomers to a finished federation, compared with training alone and with the mean head untrained.

Clients that no node hosts take no part in the run, and join afterwards. "alone": the same network from the common
initial weights, with the same loss, batches and steps, without the federation. Methods may be named as arguments.
"""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.runs import ROOT

SEEDS = (0, 1, 2)
EPOCHS = (5, 10, 20)
NEWCOMERS = 5
METHODS = ("cafedistill-text", "cafedistill", "cafedistill-plus")
JOBS: dict[str, dict[str, Any]] = {
    "digit-pairs, 20 clients, 60 rounds": {"dataset": "digit-pairs", "num-clients": 20, "num-server-rounds": 60},
    "digits, 10 clients, 40 rounds": {"dataset": "digits", "num-clients": 10, "num-server-rounds": 40},
}
TEXT_RATES = {"digit-pairs": 0.3, "digits": 0.1}  # without momentum; other methods train by the default


def settings_of(method: str, job: dict[str, Any]) -> dict[str, Any]:
    """The job as the method trains on it."""
    own = {"learning-rate": TEXT_RATES[job["dataset"]], "train.momentum": 0.0} if method == "cafedistill-text" else {}
    return {**job, **own, "method": method}


def federate(job: dict[str, Any], seed: int, folder: str) -> Path:
    """Run a federation on all but the last clients of a partition; return its results folder."""
    sys.path.insert(0, str(ROOT))
    from cafe_flwr.app.run import run
    from cafe_flwr.engine import InProcessGrid
    from cafe_flwr.settings import Settings
    from client_app import app

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    members = job["num-clients"]
    given = {"num-clients": members + NEWCOMERS, "seed": seed, "name": f"seed-{seed}"}
    settings = Settings.from_run_config(
        {
            **job,
            **given,
            "results-dir": folder,
            "federation.wait-seconds": 0.0,
            "federation.evaluate-every": job["num-server-rounds"],
        }
    )
    grid = InProcessGrid(app, 1, settings.to_run_config())
    for context in grid.contexts.values():
        context.node_config = {"clients": ",".join(map(str, range(members))), "state-dir": f"{folder}/state-{seed}"}
    run(grid, settings)
    return settings.results


def measure(results: Path, epochs: int) -> dict[str, float]:
    """Mean test accuracy over exits and newcomers, for every way to get a network."""
    from cafe_flwr.app.joining import package_run
    from cafe_flwr.app.parts import build_network, federation
    from cafe_flwr.client.model import ClientModel
    from cafe_flwr.client.newcomer import train_newcomer
    from cafe_flwr.core.random import seeded
    from cafe_flwr.metrics import evaluate
    from cafe_flwr.personal import FinishedRun
    from cafe_flwr.settings import Settings
    from cafe_flwr.training import snapshot

    package = package_run(results)
    settings = Settings.from_run_config(FinishedRun(results).run_config)
    method = settings.build_method()
    found: dict[str, list[float]] = {"mean head": [], "joined": [], "joined, no teacher": [], "alone": []}
    for client in range(settings.num_clients - NEWCOMERS, settings.num_clients):
        data = federation(settings).load(client)

        def fresh() -> ClientModel:
            with seeded(settings.seed):
                network = build_network(settings)
            return ClientModel(network, method, snapshot(network))

        work = fresh()
        start, _ = train_newcomer(work, package, client, data, epochs)
        found["mean head"].append(mean(start.accuracy))
        found["joined"].append(mean(evaluate(work.network, data.test).accuracy))
        work = fresh()
        train_newcomer(work, replace(package, teacher={}), client, data, epochs)
        found["joined, no teacher"].append(mean(evaluate(work.network, data.test).accuracy))
        network = train_alone(fresh(), package.metadata, client, data, epochs)
        found["alone"].append(mean(evaluate(network, data.test).accuracy))
    return {way: mean(values) for way, values in found.items()}


def train_alone(work: Any, metadata: Any, client: int, data: Any, epochs: int) -> Any:
    """The whole network, trained from the common start with the steps and learning rates of a newcomer."""
    from cafe_flwr.core.random import rng_for
    from cafe_flwr.methods import LocalTask
    from cafe_flwr.training import LocalBudget, learning_rate_at

    budget = LocalBudget(**metadata["budget"])
    work.network.load_state_dict({**work.weights, **work.classifiers_at_start(metadata["seed"], client)})
    for epoch in range(1, epochs + 1):
        rate = learning_rate_at(budget.learning_rate, epoch, epochs)
        task = LocalTask(
            network=work.network,
            data=data.train,
            active=[True] * (work.network.num_exits - 1),
            download={},
            budget=replace(budget, epochs=1, learning_rate=rate),
            rng=partial(rng_for, metadata["seed"], metadata["num_rounds"] + epoch, client),
        )
        work.method.train(task)
    return work.network


def main() -> None:
    """Print a line per method, job and number of epochs: mean over seeds, and each."""
    from cafe_flwr.results.run import read_run

    for method, (name, job) in itertools.product(sys.argv[1:] or METHODS, JOBS.items()):
        with tempfile.TemporaryDirectory() as folder:
            runs = [federate(settings_of(method, job), seed, folder) for seed in SEEDS]
            members = [mean(read_run(run).summary["accuracy_per_exit"]) for run in runs]
            print(f"{method}, {name}; members {mean(members):.3f} ({', '.join(f'{a:.3f}' for a in members)})")
            for epochs in EPOCHS:
                each = [measure(run, epochs) for run in runs]
                words = (
                    f"{way} {mean(found[way] for found in each):.3f} ({', '.join(f'{f[way]:.3f}' for f in each)})"
                    for way in each[0]
                )
                print(f"  {epochs} epochs: {'; '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
