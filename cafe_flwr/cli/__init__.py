"""The command line: ``cafe-flwr``."""

from __future__ import annotations

import typer

from cafe_flwr.cli import compare, node, personal, runs, settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Personalised federated early-exit networks.")


@app.callback()
def main() -> None:
    """Personalised federated early-exit networks on Flower."""


app.add_typer(node.node, name="node")
for command in (
    *(runs.run, settings.settings, runs.show, runs.report),
    *(personal.calibrate, personal.evaluate, personal.export, personal.predict),
    *(node.join_package, node.join, runs.train_central, compare.compare),
):
    app.command(command.__name__.replace("_", "-"))(command)
