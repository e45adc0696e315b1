"""The ServerApp that Flower's quickstart shows."""

from clock import Clock
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from network import build

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of FedAvg, timed."""
    config = context.run_config
    network = build(int(config["tensors"]), float(config["megabytes"]))
    strategy = FedAvg(
        fraction_evaluate=float(config["evaluate"]), min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3
    )
    strategy.start(
        grid, ArrayRecord(network.state_dict()), int(config["rounds"]), evaluate_fn=Clock(str(config["times"]))
    )
