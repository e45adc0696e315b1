"""The published protocol on `digit-pairs`: our methods compared with the authors' code on the same partitions.

``python -m benchmarks.released --seeds 0 1 2 [--ablations] [--methods cafedistill fedper]``

20 clients that all take part, 100 rounds of one local epoch, batch 16, SGD at 0.1 · 0.99^t with momentum 0.9 that stays
with the client. It prints the accuracy per method and seed, mean over exits and clients, in the last round before local
training; then the means.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks.runs import run_in_process

PROTOCOL: Mapping[str, Any] = {
    "dataset": "digit-pairs",
    "num-clients": 20,
    "num-server-rounds": 100,
    "local-epochs": 1,
    "train.batch-size": 16,
    "learning-rate": 0.1,
    "train.learning-rate-schedule": "exponential",
    "train.learning-rate-decay": 0.99,
    "train.momentum": 0.9,
    "train.keep-momentum": True,
    "train.weight-decay": 0.0,
    "federation.evaluate-every": 100,
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    name: {"method": name} for name in ("cafedistill", "cafedistill-plus", "fedper")
} | {"cafedistill-plus, mixture alone": {"method": "cafedistill-plus", "cafedistill-plus.mixture-examples": 1e9}}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "not written back": {"cafedistill.write-back": False},
    "matched by parameters": {"cafedistill.match-by": "parameters"},
    "no selection": {"cafedistill.selection": "none"},
    "conflict of exits": {"cafedistill.conflict": "exits"},
    "λ = 0": {"distill-weight": 0.0},
    "λ = 0.3": {"distill-weight": 0.3},
    "classifiers start from own draws": {"train.classifier-start": "own"},
    "classifiers start from one common draw": {"train.classifier-start": "common"},
}
# The authors' code on these partitions, mean of seeds 0 to 2 (ablations: seed 0).
AUTHORS = {"cafedistill": 76.6, "cafedistill-plus, mixture alone": 81.2, "fedper": 68.6}


def accuracy_of(name: str, settings: Mapping[str, Any], seed: int) -> tuple[str, int, float]:
    """Accuracy of a run, in per cent."""
    with tempfile.TemporaryDirectory() as folder:
        config = {**PROTOCOL, **settings, "seed": seed, "name": "run", "results-dir": folder}
        rounds = run_in_process(config)[1]
    exits = rounds[-1]["accuracy_per_exit"]
    return name, seed, 100.0 * sum(exits) / len(exits)


def main() -> None:
    """Print a line per run, then the means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--ablations", action="store_true", help="one setting of cafedistill changed at a time, too")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    rows = {name: METHODS[name] for name in asked.methods} | (ABLATIONS if asked.ablations else {})
    found: dict[str, list[float]] = {name: [] for name in rows}
    with ProcessPoolExecutor(asked.processes) as pool:
        runs = [pool.submit(accuracy_of, name, rows[name], seed) for seed in asked.seeds for name in rows]
        for run in runs:
            name, seed, accuracy = run.result()
            found[name].append(accuracy)
            print(f"{name:40} {seed:6} {accuracy:6.2f}", flush=True)
    for name, values in found.items():
        authors = f"   (the authors' code: {AUTHORS[name]})" if name in AUTHORS else ""
        print(f"{name:40}   mean {sum(values) / len(values):6.2f}{authors}")


if __name__ == "__main__":
    main()
