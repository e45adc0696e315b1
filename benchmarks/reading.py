"""Time to read a train reply on the server; with the path of an earlier checkout, as a ratio to its time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from flwr.app import Message

from cafe_flwr.engine import InProcessGrid
from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.wire.keys import Keys
from cafe_flwr.wire.reports import ClientReport
from cafe_flwr.wire.train import Expected, TrainReply

EXITS, SHARED, UPLOAD = 3, 18_448, 250  # of the default job
PAIRS, REPEATS, BOUND = 3, 1000, 1.05


def milliseconds(clients: int) -> float:
    """Median time to read the reply of a node with these many clients."""
    InProcessGrid(lambda message, context: message, 1)
    rng = np.random.default_rng(0)
    metrics = ExitMetrics([0.5] * EXITS, [1.5] * EXITS, [0.25] * EXITS)
    uploads = rng.normal(size=(clients, UPLOAD)).astype(np.float32)
    reports = [
        ClientReport(c, 50, 20, 1.5, 6, 0.5, 0.1, [0.5] * (EXITS - 1), metrics, metrics, uploads[c])
        for c in range(clients)
    ]
    shared = rng.normal(size=SHARED).astype(np.float32 if clients == 1 else np.float64)
    message = Message(TrainReply(1, "x", shared, reports, {}).to_content(Keys()), 5, "train")
    expected = Expected("x", SHARED, UPLOAD, EXITS)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        TrainReply.from_message(message, Keys(), expected)
        times.append(time.perf_counter() - start)
    return 1000 * median(times)


def main() -> None:
    """Print the times, and with an argument the median ratio of pairs measured in turn; fail beyond the bound."""
    if sys.argv[1:] == ["-"]:
        print(*(milliseconds(clients) for clients in (1, 10)))
        return
    here, earlier = Path(__file__).parent.parent, sys.argv[1:]
    times: dict[str, list[list[float]]] = {}
    for _ in range(PAIRS if earlier else 1):
        for folder in (str(here), *earlier):
            command, environment = [sys.executable, __file__, "-"], {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            times.setdefault(folder, []).append(list(map(float, done.stdout.split())))
    beyond = False
    for place, clients in enumerate((1, 10)):
        now, *before = (median(row[place] for row in rows) for rows in times.values())
        ratio = f", {before[0]:.3f} ms before: ratio {now / before[0]:.2f} (bound {BOUND})" if before else ""
        print(f"reading a train reply of {clients} client(s): {now:.3f} ms{ratio}")
        beyond |= bool(before) and now / before[0] > BOUND
    sys.exit(beyond)


if __name__ == "__main__":
    main()
