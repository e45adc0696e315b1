"""Whole runs of the app in this process, for the benchmarks."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def run_in_process(run_config: Mapping[str, Any], num_nodes: int = 2) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the app in InProcessGrid; return its summary and the lines of its rounds."""
    sys.path.insert(0, str(ROOT))
    from cafe_flwr.app.run import run
    from cafe_flwr.engine import InProcessGrid
    from cafe_flwr.settings import Settings
    from client_app import app

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    settings = Settings.from_run_config(run_config)
    run(InProcessGrid(app, num_nodes, settings.to_run_config()), settings)
    summary = json.loads((settings.results / "summary.json").read_text())
    lines = [json.loads(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    return summary, lines
