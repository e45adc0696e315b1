"""Robust aggregation of many clients, in comparison with the mean."""

from __future__ import annotations

import math
import os
import resource
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from cafe_flwr.core.schema import Schema
from cafe_flwr.server.options import Aggregation
from cafe_flwr.server.robust import clipped_mean, trimmed_mean
from cafe_flwr.wire.averaging import weighted, weighted_mean

CLIENTS, PARAMETERS, BOUND = 1000, 10**6, 3.0


def main() -> None:
    """Print times, their ratio to the mean's, and the memory that they take beside the clients' parts."""
    rng, whole = np.random.default_rng(0), Schema((("w", (PARAMETERS,)),))
    before = rng.normal(size=PARAMETERS).astype(np.float32)
    parts = [before + 0.1 * rng.standard_normal(PARAMETERS, dtype=np.float32) for _ in range(CLIENTS)]
    clients = [(whole, part) for part in parts]
    rules = {
        "mean": lambda: weighted_mean((weighted(part, 50) for part in parts), 50 * CLIENTS),
        "median": lambda: trimmed_mean(before, whole, clients, Aggregation(rule="median").cut),
        "trimmed-mean": lambda: trimmed_mean(before, whole, clients, Aggregation(rule="trimmed-mean").cut),
        "clipped-mean": lambda: clipped_mean(before, whole, clients),
    }
    seconds: dict[str, float] = {}
    failed = []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, rule in (*rules.items(), *rules.items()):  # the better of two
        start = time.perf_counter()
        rule()
        seconds[name] = min(seconds.get(name, math.inf), time.perf_counter() - start)
    for name in rules:
        ratio, memory = seconds[name] / seconds["mean"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        failed += [name] * (ratio > BOUND)
        print(
            f"robust aggregation, {CLIENTS} clients × {PARAMETERS} parameters: {name} {seconds[name]:.2f} s, "
            f"{ratio:.2f} × the mean (bound {BOUND:g}), at most {memory / 1024:.0f} MiB beside the clients' "
            f"{CLIENTS * PARAMETERS * 4 / 2**20:.0f}"
        )
    sys.exit(f"slower than the bound: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
