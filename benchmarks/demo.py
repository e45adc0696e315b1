"""Wall clock of `make demo`, and memory of all its processes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from benchmarks.runs import ROOT


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Resident and proportional memory of a process and its descendants, in bytes."""
    resident = proportional = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            info = one.memory_full_info()
        except psutil.Error:
            continue
        resident, proportional = resident + info.rss, proportional + info.pss
    return resident, proportional


def main() -> None:
    """Print seconds and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("cafe-flwr")), "run", str(ROOT), "--results-dir", folder]
        start = time.perf_counter()
        with subprocess.Popen([*command, "-c", 'name="demo"'], stdout=subprocess.DEVNULL) as run:
            process, peaks, done = psutil.Process(run.pid), [(0, 0)], threading.Event()

            def watch() -> None:
                while not done.wait(1.0):
                    peaks.append(_memory(process))

            watcher = threading.Thread(target=watch)
            watcher.start()
            code = run.wait()
            done.set()
            watcher.join()
        seconds = time.perf_counter() - start
    gib = 1024**3
    print(
        f"demo: exit code {code}, {seconds:.0f} s (bound 300 s), peak memory of all its processes "
        f"{max(p for _, p in peaks) / gib:.2f} GiB, shared pages counted once "
        f"({max(r for r, _ in peaks) / gib:.2f} GiB as the sum of resident sizes; bound 4 GiB)"
    )


if __name__ == "__main__":
    main()
