"""Start-up of the client process: time to import the app, compared with torch and Flower alone.

On a device Flower starts a new process for every message, so a node pays this every round.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from statistics import median

from benchmarks.runs import ROOT

REPEATS = 7
BOUND = 1.2
_LINE = re.compile(r"import time:\s*\d+ \|\s*(\d+) \|( *)([\w.]+)")


def seconds(statement: str) -> float:
    """Import time, by ``python -X importtime``, of the modules that a statement names and all that they import."""
    command = [sys.executable, "-X", "importtime", "-c", statement]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.PIPE, text=True)
    top = [int(match[1]) for match in _LINE.finditer(done.stderr) if len(match[2]) == 1]
    return sum(top) / 1e6


def main() -> None:
    """Print both times, measured in turn, and the ratio of their medians."""
    alone, app = [], []
    seconds("import client_app")  # compiles what was edited
    for _ in range(REPEATS):
        alone.append(seconds("import torch, flwr.clientapp"))
        app.append(seconds("import client_app"))
    ratio = median(app) / median(alone)
    print(
        f"start-up of the client process: imports {median(app):.2f} s, of torch and flwr {median(alone):.2f} s: "
        f"ratio {ratio:.2f} (bound {BOUND})"
    )
    sys.exit(ratio > BOUND)


if __name__ == "__main__":
    main()
