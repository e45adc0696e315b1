"""The ServerApp: CAFEDistill as it is for early exits. Narrow widths join first, the full one teaches."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cafe_flwr import CafeDistill
from cafe_flwr.training import LocalBudget

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and say how accurate the widths are on the clients' own test data."""
    config = context.run_config
    strategy = CafeDistill(
        num_clients=config["num-clients"],
        num_rounds=config["num-server-rounds"],
        local=LocalBudget(learning_rate=config["learning-rate"], momentum=0.9),
        seed=config["seed"],
    )
    result = strategy.start(grid)
    print("accuracy at 1/4, 1/2, 3/4, 1:", list(result.train_metrics_clientapp.values())[-1]["accuracy-after"])
