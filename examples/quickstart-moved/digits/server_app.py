"""The ServerApp."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cafe_flwr import CafeDistill
from cafe_flwr.training import LocalBudget

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and say how accurate clients are."""
    config = context.run_config
    local = LocalBudget(
        epochs=config["local-epochs"], learning_rate=config["learning-rate"], batch_size=config["batch-size"]
    )
    strategy = CafeDistill(
        fraction_train=config["fraction-train"],
        min_available_nodes=2,
        num_rounds=config["num-server-rounds"],
        local=local,
        mu=config["mu"],
        seed=config["seed"],
    )
    result = strategy.start(grid=grid)
    print("accuracy:", list(result.train_metrics_clientapp.values())[-1]["accuracy-after"])
