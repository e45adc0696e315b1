"""The Flower ServerApp of this package: settings → strategy → start → results."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cafe_flwr.app.run import calibrate, run
from cafe_flwr.settings import Settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run's settings describe, or calibrate the networks that it has left."""
    settings = Settings.from_run_config(context.run_config)
    if settings.mode == "calibrate":
        calibrate(grid, settings)
    else:
        run(grid, settings)
