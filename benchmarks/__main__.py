"""Run every benchmark in turn, each in a process of its own."""

import subprocess
import sys

NAMES = (
    *("startup", "local_training", "memory", "server_step", "released_step", "risk", "inference"),
    *("hostile", "reading", "uplink", "attach", "growth", "rounds", "demo", "paired", "docstrings"),
)

if __name__ == "__main__":
    failed = [n for n in NAMES if subprocess.run([sys.executable, "-m", f"benchmarks.{n}"], check=False).returncode]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
