"""The server's step of `cafedistill` for many clients: a round's plan, similarities, weights, mixtures and S."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, as the bound says; read when numpy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from cafe_flwr.core.schema import Schema
from cafe_flwr.methods import CafeDistillMethod, ClientRecord, ServerRound
from cafe_flwr.methods.pairs import Pairs
from cafe_flwr.methods.server import Conclusion
from cafe_flwr.server.checkpoints import Checkpoints, ServerState

CLIENTS, PARTICIPANTS, CLASSES, FEATURES, EXITS, BEFORE = 10_000, 1_000, 10, 512, 4, 400
SECONDS, PEAK, ADDED = 5.0, 2 * 1024**3, 50e6
UPLOAD = Schema((("exits.3.head.weight", (CLASSES, FEATURES)), ("exits.3.head.bias", (CLASSES,))))


def classifiers(rng: np.random.Generator, number: int) -> np.ndarray:
    """Last classifiers of clients in ten groups, (number, d)."""
    groups = np.random.default_rng(1).normal(size=(10, UPLOAD.size)).astype(np.float32)
    return groups[rng.integers(10, size=number)] + rng.normal(size=(number, UPLOAD.size)).astype(np.float32)


def records(rng: np.random.Generator, clients: np.ndarray, server_round: int) -> dict[int, ClientRecord]:
    """Reports of clients."""
    heads = classifiers(rng, len(clients))
    agreement = rng.uniform(-1, 1, (len(clients), EXITS - 1))
    return {
        int(c): ClientRecord(int(rng.integers(20, 500)), server_round, heads[i], agreement[i])
        for i, c in enumerate(clients)
    }


def past(rng: np.random.Generator, known: np.ndarray) -> Pairs:
    """S after a few hundred rounds, when all of these have met."""
    keys = np.concatenate([(np.int64(low) << 32) | known[i + 1 :] for i, low in enumerate(known.tolist())])
    return Pairs(keys, rng.uniform(-1, 1, len(keys)).astype(np.float32))


def step(task: ServerRound, reports: dict[int, ClientRecord]) -> Conclusion:
    """One round of the server."""
    method = CafeDistillMethod()
    return method.conclude(task, method.plan(task), reports)


def added_to_checkpoint(task: ServerRound, done: Conclusion) -> int:
    """Bytes that the round adds to a checkpoint."""
    before = ServerState("0" * 8, BEFORE, "", np.zeros(1, dtype=np.float32), dict(task.known), None, {}, task.pairs)
    after = replace(before, round=BEFORE + 1, known={**task.known, **done.records}, plan=done.plan, pairs=done.pairs)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, sizes = Checkpoints(Path(folder)), []
        for state in (before, after):
            checkpoints.save(state)
            sizes.append(max(Path(folder).iterdir()).stat().st_size)
    return sizes[1] - sizes[0]


def main() -> None:
    """Print seconds, peak memory and bytes, next to their bounds."""
    rng = np.random.default_rng(0)
    everyone = rng.permutation(CLIENTS)
    new, known = np.sort(everyone[:PARTICIPANTS]), np.sort(everyone[PARTICIPANTS:])
    here = np.sort(np.concatenate([new[: PARTICIPANTS // 2], known[: PARTICIPANTS // 2]]))
    rounds = {"half of them new": here, "all new": new, "none new": known[:PARTICIPANTS]}
    pairs, reported, good = past(rng, known), records(rng, known, BEFORE), True
    for who, participants in rounds.items():
        task = ServerRound(
            server_round=BEFORE + 1,
            num_rounds=4 * BEFORE,
            participants=participants.tolist(),
            num_exits=EXITS,
            known=reported,
            upload=UPLOAD,
            rng=rng,
            pairs=pairs,
        )
        reports = records(rng, participants, BEFORE + 1)
        odd = int(participants[0])  # one that must be bounded, which takes longer
        reports[odd] = replace(reports[odd], upload=100 * reports[odd].upload)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            done = step(task, reports)
            times.append(time.perf_counter() - start)
        tracemalloc.start()
        step(task, reports)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        added, seconds = added_to_checkpoint(task, done), median(times)
        good &= seconds <= SECONDS and peak <= PEAK and added <= ADDED
        print(
            f"released step, {PARTICIPANTS} of {CLIENTS} clients ({who}), d = {UPLOAD.size}, {len(pairs):,} pairs "
            f"known, one core: {seconds:.2f} s (bound {SECONDS:g} s), peak {peak / 1024**2:.0f} MiB above the start "
            f"(bound {PEAK // 1024**2} MiB), checkpoint + {added / 1e6:.1f} MB (bound {ADDED / 1e6:g} MB)",
            flush=True,
        )
    if not good:
        sys.exit("a bound is missed")


if __name__ == "__main__":
    main()
