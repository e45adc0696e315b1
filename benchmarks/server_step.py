"""Teacher matching of `cafedistill-text` for many clients: similarity, weights and mixtures, exact and by OSQP."""

from __future__ import annotations

import os
import time
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, as the bound says; read when numpy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from cafe_flwr.teaching import cosine_similarity, teacher_weights

CLIENTS, PARAMETERS, MU = 1000, 5000, 0.5


def step(heads: np.ndarray, examples: np.ndarray, solver: str) -> tuple[np.ndarray, np.ndarray]:
    """One round's teacher matching: weights (n, n) and heads (n, d)."""
    weights = teacher_weights(cosine_similarity(heads), examples / examples.sum(), MU, solver)
    return weights, weights.astype(np.float32) @ heads


def main() -> None:
    """Print times, their ratio and how far the weights differ."""
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(20, PARAMETERS))
    heads = (groups[rng.integers(20, size=CLIENTS)] + rng.normal(size=(CLIENTS, PARAMETERS))).astype(np.float32)
    examples = rng.integers(20, 500, size=CLIENTS).astype(float)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        exact, _ = step(heads, examples, "exact")
        times.append(time.perf_counter() - start)
    seconds = median(times[1:])  # the first one warms up
    start = time.perf_counter()
    osqp, _ = step(heads, examples, "osqp")
    seconds_osqp = time.perf_counter() - start
    print(
        f"server step, {CLIENTS} clients with heads of {PARAMETERS} parameters, one core: exact {seconds:.2f} s "
        f"(bound 1 s), one OSQP call per client {seconds_osqp:.1f} s: {seconds_osqp / seconds:.0f} × faster "
        f"(bound 30), weights differ by at most {np.abs(exact - osqp).max():.1e} (bound 1e-06)"
    )


if __name__ == "__main__":
    main()
