"""From settings to a run: strategy, results."""

from __future__ import annotations

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from cafe_flwr.results.folder import open_results
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.options import Federation
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.settings import Settings
from cafe_flwr.training.options import Schedule
from cafe_flwr.wire.options import Bounds, Privacy


def build_strategy(
    settings: Settings, recorder: Recorder | None = None, resume_from: ServerState | None = None
) -> FederatedStrategy:
    """The strategy of the settings."""
    federation = settings.of(Federation)
    return FederatedStrategy(
        method=settings.build_method(),
        fraction_train=federation.fraction_train,
        min_train_nodes=federation.min_train_nodes,
        min_available_nodes=federation.min_available_nodes,
        num_rounds=federation.num_server_rounds,
        local=settings.build_budget(),
        **vars(settings.of(Schedule)),
        bounds=settings.of(Bounds),
        privacy=settings.of(Privacy),
        wire=federation.wire_dtype,
        num_clients=federation.num_clients,
        seed=settings.seed,
        evaluate_every=federation.evaluate_every,
        wait_seconds=federation.wait_seconds,
        round_timeout=federation.round_timeout,
        round_retries=federation.round_retries,
        callbacks=[recorder] if recorder else [],
        resume_from=resume_from,
    )


def run(grid: Grid, settings: Settings) -> Result:
    """Run a federation from its settings and leave the results folder behind.

    Raises
    ------
    ValueError
        Before the first round, if the settings cannot be used.
    RuntimeError
        If no client can take part, or all fail in a round. What was recorded until then is kept.
    """
    settings.check_read()
    results = open_results(settings)
    recorder = Recorder(results.folder, settings, results.state)
    try:
        return build_strategy(settings, recorder, results.state).start(grid)
    finally:
        recorder.close()
        results.lock.close()
