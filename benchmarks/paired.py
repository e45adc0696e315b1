"""The default job with cafedistill and cafedistill-plus: three seeds, paired."""

from __future__ import annotations

import multiprocessing
import tempfile
from statistics import mean, stdev
from typing import Any

from benchmarks.runs import run_in_process

SEEDS = (0, 1, 2)
VARIANTS: dict[str, dict[str, Any]] = {name: {"method": name} for name in ("cafedistill", "cafedistill-plus")}


def _run(job: tuple[str, int, str]) -> tuple[str, int, dict[str, Any]]:
    variant, seed, folder = job
    name = f"{'-'.join(VARIANTS[variant].values())}-{seed}"
    summary, _ = run_in_process({"seed": seed, "name": name, "results-dir": folder, **VARIANTS[variant]})
    return variant, seed, summary


def main() -> None:
    """Print accuracy per seed, the paired difference, MACs and bytes."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(2) as pool:
        jobs = [(variant, seed, folder) for seed in SEEDS for variant in VARIANTS]
        results = {(variant, seed): summary for variant, seed, summary in pool.imap(_run, jobs, chunksize=1)}
    for variant in VARIANTS:
        values = [results[variant, seed]["accuracy"] for seed in SEEDS]
        words = ", ".join(f"{value:.4f}" for value in values)
        print(f"{variant}: average accuracy over exits {mean(values):.4f} (seeds 0, 1, 2: {words}; asked: 0.75)")
    first, second = VARIANTS
    gains = [100 * (results[second, seed]["accuracy"] - results[first, seed]["accuracy"]) for seed in SEEDS]
    print(f"{second} − {first}: {mean(gains):+.2f} ± {stdev(gains):.2f} points (each {[round(g, 2) for g in gains]})")
    summary = results[first, 0]
    full = summary["bytes_fedavg_per_client_round"]
    for way in ("up", "down"):
        print(f"bytes {way} per client and round: {summary[f'bytes_{way}_per_client_round']} (FedAvg of all: {full})")
    for variant in VARIANTS:
        equal = [results[variant, seed]["dynamic"] for seed in SEEDS]
        for words, points in (("", equal), (", one point less allowed", [d["one_point_less"] for d in equal])):
            each = ", ".join(f"{d['macs_reduction']:.0%} at {d['accuracy'] - d['accuracy_full']:+.3f}" for d in points)
            print(
                f"{variant}: fewer MACs at the threshold chosen on calibration data{words}, change of accuracy: {each}"
            )


if __name__ == "__main__":
    main()
