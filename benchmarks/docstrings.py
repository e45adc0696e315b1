"""A Transformer on docstrings: personal networks against a single global one, over three seeds.

Learning rates are the best of 0.002, 0.006 and 0.015 (and 0.03 for the global network) on seed 0, which does not count.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from statistics import mean, stdev
from typing import Any

import yaml

from benchmarks.runs import ROOT, run_in_process

SEEDS = (1, 2, 3)
PERSONAL, GLOBAL = "cafedistill-text", "fedavg"
LEARNING_RATES = {PERSONAL: 0.006, GLOBAL: 0.015}


def _run(job: tuple[str, int, str, dict[str, Any]]) -> tuple[str, int, float]:
    method, seed, folder, settings = job
    own = {"method": method, "seed": seed, "name": f"{method}-{seed}", "results-dir": folder}
    own |= {"learning-rate": LEARNING_RATES[method], "federation.evaluate-every": settings["num-server-rounds"]}
    summary, _ = run_in_process({**settings, **own})
    return method, seed, summary["accuracy"]


def main() -> None:
    """Print the average accuracy over exits of both, and the paired difference."""
    settings = yaml.safe_load((ROOT / "experiments" / "docstrings.yaml").read_text())["settings"]
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(2) as pool:
        jobs = [(method, seed, folder, settings) for seed in SEEDS for method in (PERSONAL, GLOBAL)]
        found = {(method, seed): accuracy for method, seed, accuracy in pool.imap(_run, jobs, chunksize=1)}
    for method in (PERSONAL, GLOBAL):
        values = [found[method, seed] for seed in SEEDS]
        words = ", ".join(f"{value:.4f}" for value in values)
        print(f"docstrings, {method}: average accuracy over exits {mean(values):.4f} (seeds 1, 2, 3: {words})")
    gains = [100 * (found[PERSONAL, seed] - found[GLOBAL, seed]) for seed in SEEDS]
    each = [round(gain, 2) for gain in gains]
    print(f"paired difference: {mean(gains):+.2f} ± {stdev(gains):.2f} points (each {each}; bound +5)")


if __name__ == "__main__":
    main()
