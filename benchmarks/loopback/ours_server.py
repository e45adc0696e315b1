"""ServerApp of this package."""

from clock import Clock
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cafe_flwr import CafeDistill
from cafe_flwr.training import LocalBudget

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of CAFEDistill, timed."""
    config = context.run_config
    strategy = CafeDistill(min_available_nodes=3, local=LocalBudget(steps=1))
    strategy.start(grid, num_rounds=int(config["rounds"]), evaluate_fn=Clock(str(config["times"])))
