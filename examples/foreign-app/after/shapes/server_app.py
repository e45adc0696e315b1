"""The ServerApp."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from cafe_flwr import CafeDistill
from shapes.model import ShapeNet

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for some rounds, and say how accurate clients are."""
    rounds = int(context.run_config["num-server-rounds"])
    torch.manual_seed(0)
    initial = ArrayRecord(ShapeNet().state_dict())
    strategy = CafeDistill(fraction_evaluate=1.0, min_available_nodes=2)
    result = strategy.start(grid, initial_arrays=initial, num_rounds=rounds)
    metrics = {t: dict(record) for t, record in result.evaluate_metrics_clientapp.items()}
    print("accuracy:", metrics[rounds]["accuracy"])
    if path := str(context.run_config["metrics-file"]):
        Path(path).write_text(json.dumps(metrics))
