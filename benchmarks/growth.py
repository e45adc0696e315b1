"""Whether the clients' state folder and the memory of processes grow over two hundred rounds on one SuperNode."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from benchmarks.runs import ROOT

ROUNDS, CLIENTS = 200, 4
EARLY, LATE = (40, 80), (150, 190)  # rounds that are compared
NAMES = ("state folder", "memory of the ClientApp's workers", "memory of the ServerApp and the engine")
SLACK = 1.05
SETTINGS = (
    f'name="growth" dataset="digits" num-clients={CLIENTS} num-server-rounds={ROUNDS} local-steps=1 '
    "federation.evaluate-every=10"
)


def memory(process: psutil.Process, name: str) -> int:
    """Resident bytes of the process's descendants with this name in their command line."""
    total = 0
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss if name in " ".join(child.cmdline()) else 0
        except psutil.Error:
            continue
    return total


def main() -> None:
    """Print state folder and memory, early and late, with their ratios."""
    samples: list[tuple[int, int, int, int]] = []
    with tempfile.TemporaryDirectory() as name:
        results = Path(name) / "growth"
        command = [str(Path(sys.executable).with_name("cafe-flwr")), "run", str(ROOT), "--results-dir", name]
        command += ["-c", SETTINGS, "--federation-config", "num-supernodes=1 client-resources-num-cpus=1"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
            process = psutil.Process(run.pid)
            while run.poll() is None:
                time.sleep(0.25)
                lines = results / "rounds.jsonl"
                rounds = len(lines.read_text().splitlines()) if lines.exists() else 0
                if rounds:
                    files = [path.stat().st_size for path in (results / "personal").rglob("*") if path.is_file()]
                    actors, server = memory(process, "ray::"), memory(process, "flwr-simulation")
                    samples.append((rounds, sum(files), actors, server))
        if run.returncode:
            sys.exit(f"the run failed with exit code {run.returncode}")
    failed = False
    for column, words in enumerate(NAMES, 1):
        early, late = (
            median(sample[column] for sample in samples if low <= sample[0] <= high) for low, high in (EARLY, LATE)
        )
        ratio = late / early if early else float("nan")
        failed |= not ratio <= SLACK
        print(
            f"{words}: {early / 1e6:.2f} MB in rounds {EARLY[0]}–{EARLY[1]}, {late / 1e6:.2f} MB in rounds "
            f"{LATE[0]}–{LATE[1]}: ratio {ratio:.3f} (bound {SLACK})"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
