"""From settings to a run: strategy, results."""

from __future__ import annotations

from pathlib import Path

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from cafe_flwr.app.page import write_page
from cafe_flwr.core.log import logger
from cafe_flwr.results.folder import Results, open_results
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.settings import Settings


def build_strategy(
    settings: Settings, recorder: Recorder | None = None, resume_from: ServerState | None = None
) -> FederatedStrategy:
    """The strategy of the settings."""
    return FederatedStrategy(
        method=settings.build_method(),
        fraction_train=settings.fraction_train,
        min_train_nodes=settings.min_train_nodes,
        min_available_nodes=settings.min_available_nodes,
        num_rounds=settings.num_server_rounds,
        local=settings.build_budget(),
        learning_rate_schedule=settings.learning_rate_schedule,
        learning_rate_decay=settings.learning_rate_decay,
        bounds=settings.build_bounds(),
        privacy=settings.build_privacy(),
        wire=settings.wire_dtype,
        num_clients=settings.num_clients,
        seed=settings.seed,
        evaluate_every=settings.evaluate_every,
        wait_seconds=settings.wait_seconds,
        round_timeout=settings.round_timeout,
        round_retries=settings.round_retries,
        callbacks=[recorder] if recorder else [],
        resume_from=resume_from,
    )


def open_results_of(settings: Settings) -> Results:
    """The results folder of the settings, made ready: see :func:`cafe_flwr.results.folder.open_results`."""
    defaults = Settings.from_run_config({}).to_run_config()
    return open_results(settings.results, settings.to_run_config(), defaults=defaults)


def run(grid: Grid, settings: Settings) -> Result:
    """Run a federation from its settings and leave the results folder behind.

    Raises
    ------
    ValueError
        Before the first round, if the settings cannot be used.
    RuntimeError
        If no client can take part, or all fail in a round. What was recorded until then is kept.
    """
    if unread := settings.unread():
        logger.warning("%s does not read %s", settings.method, ", ".join(unread))
    results = open_results_of(settings)
    recorder = Recorder(results.folder, settings.to_run_config(), results.state)
    try:
        return build_strategy(settings, recorder, results.state).start(grid)
    finally:
        if recorder.close():
            _report(results.folder)
        results.lock.close()


def _report(folder: Path) -> None:
    """Write the page, also after a run that failed."""
    try:
        logger.info("Report: %s", write_page(folder))
    except Exception:  # the run's own outcome, or error, counts more than its page
        logger.exception("No report could be written; try: cafe-flwr report %s", folder)
