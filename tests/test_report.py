"""The page and the table are written from whatever a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cafe_flwr.coordination import active_exits
from cafe_flwr.teaching import teacher_weights


def make_run(folder: Path, *, clients: int = 20, exits: int = 3, rounds: int = 12, seed: int = 0) -> Path:
    """A folder as a run of CAFEDistill leaves it: accuracies rise, shallow exits are worse, clients differ."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    skill = rng.normal(0, 0.09, clients)
    depth = np.linspace(-0.1, 0.0, exits) if exits > 1 else np.zeros(1)
    settings = {"name": folder.name, "dataset": "digit-pairs", "method": "cafedistill", "num-server-rounds": rounds}
    settings |= {"num-clients": clients, "seed": seed, "learning-rate": 0.3, "mu": 0.5, "resume": False}
    (folder / "settings.json").write_text(json.dumps(settings))

    def accuracy(t: int, lift: float) -> np.ndarray:
        level = 0.72 * (1 - np.exp(-4 * t / rounds)) + lift
        noise = rng.normal(0, 0.02, (clients, exits))
        return np.round((level + skill[:, None] + depth + noise).clip(0, 1) * 80) / 80

    parts, lines = [], []
    for t in range(1, rounds + 1):
        phases = {"before": accuracy(t, 0.0), "after": accuracy(t, 0.05)}
        if t == rounds:
            phases["final"] = phases["before"]
        parts += [long_table(t, phase, values) for phase, values in phases.items()]
        similarity = 0.2 + 0.6 * t / rounds + rng.normal(0, 0.1, (clients, exits - 1))
        active = active_exits(t, rounds, similarity)
        line: dict[str, Any] = {"round": t, "num_rounds": rounds, "participants": list(range(clients)), "left_out": {}}
        line |= {"active_exits": active.sum(axis=0).tolist(), "train_loss": 4.6 / (1 + t), "learning_rate": 0.3}
        line |= {"accuracy_per_exit": phases["before"].mean(axis=0).tolist()}
        line |= {"accuracy_per_exit_after": phases["after"].mean(axis=0).tolist()}
        line |= {"similarity_per_exit": [*similarity.mean(axis=0)], "own_teacher_weight": 0.5 - 0.2 * t / rounds}
        line |= {"effective_teachers": 3 + 2 * t / rounds, "bytes_up": 38_200 * clients, "bytes_down": 40_100 * clients}
        line |= {"seconds": {"total": 2.0, "train": 1.2, "evaluate": 0.4, "server": 0.1, "other": 0.3}}
        lines.append(line)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pd.concat(parts).to_parquet(folder / "clients.parquet")

    final = phases["final"]
    macs = [int(214_000 * share) for share in np.linspace(0.3, 1.0, exits)] if exits > 1 else [214_000]
    means = final.mean(axis=0)
    thresholds = np.append(np.linspace(0, 1, 101), np.inf)
    leaving = np.stack([np.full(exits, 1 / exits) ** (1 + 0.0 * θ) for θ in thresholds])
    for row, θ in enumerate(thresholds):
        stay, left = 1.0, []
        for k in range(exits - 1):
            leave = (1 - min(θ, 1.0) ** 2) * (0.75 + 0.25 * k / exits)
            left.append(stay * leave)
            stay *= 1 - leave
        leaving[row] = [*left, stay]
    easy = 0.12 * (leaving[:, :-1] * (1 - leaving[:, :-1])).sum(axis=1)
    head = (
        np.random.default_rng(1).normal(size=(clients, 12))
        + np.repeat(np.eye(4, 12) * 4, -(-clients // 4), 0)[:clients]
    )
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    weights = teacher_weights(head @ head.T, np.full(clients, 1 / clients), 0.5)
    summary = {
        "name": folder.name, "method": "cafedistill", "dataset": "digit-pairs", "seed": seed, "num_rounds": rounds,
        "num_clients": clients, "accuracy_per_exit": means.tolist(), "accuracy": means.mean(),
        "accuracy_last_exit": means[-1], "accuracy_std_over_clients": final.mean(axis=1).std(),
        "accuracy_worst_tenth": np.sort(final.mean(axis=1))[: max(1, clients // 10)].mean(),
        "ece_per_exit": np.linspace(0.11, 0.07, exits).tolist(), "macs_per_exit": macs,
        "macs_reduction_at_equal_accuracy": 0.41,
        "dynamic": {
            "threshold": 0.62, "accuracy": means[-1] - 0.004, "accuracy_full": means[-1],
            "macs_reduction": 1 - float(leaving[62] @ macs) / macs[-1], "exit_shares": leaving[62].tolist(),
        },
        "curve": {
            "threshold": thresholds.tolist(), "accuracy": (leaving @ means + easy).tolist(),
            "macs": (leaving @ macs).tolist(), "exit_shares": leaving.tolist(),
        },
        "bytes_up_per_client_round": 38_200, "bytes_down_per_client_round": 40_100,
        "bytes_fedavg_per_client_round": 92_300, "seconds": 2.0 * rounds,
        "teacher_weights": {"clients": list(range(clients)), "weights": weights.tolist()},
        "clients": [
            {"client": i, "train": 96, "calibration": 24, "test": 80, "classes": 20, "accuracy_per_exit": final[i].tolist()}
            for i in range(clients)
        ],
        "versions": {"cafe-flwr": "0.1.0", "flwr": "1.41.0", "torch": "2.9.0"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def long_table(t: int, phase: str, values: np.ndarray) -> pd.DataFrame:
    clients, exits = values.shape
    client, k = np.divmod(np.arange(values.size), exits)
    columns = {"round": t, "client": client, "phase": phase, "exit": k + 1, "accuracy": values.ravel()}
    return pd.DataFrame(columns | {"loss": 1 - values.ravel(), "ece": 0.1, "examples": 80})
