"""Runs, or calibrates, a federation from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from cafe_flwr.app.page import write_page
from cafe_flwr.core.log import logger
from cafe_flwr.core.older_settings import of_saved_run
from cafe_flwr.core.random import seeded
from cafe_flwr.data.options import HUB_IMAGES, HUB_TEXTS
from cafe_flwr.results.folder import Results, open_results
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.risk.options import Calibration
from cafe_flwr.server.calibration import calibrate_federation
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.options import Federation
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.settings import FREE_ON_RESUME, Settings, todays
from cafe_flwr.training.options import Schedule
from cafe_flwr.wire.describe import NodeInfo
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
        own_description=lambda: own_description(settings),
        own_numbers=settings.dataset == "local",
    )


def own_description(settings: Settings) -> NodeInfo:
    """The network of the settings as a node describes it; ValueError where a large data set would be read for it."""
    from cafe_flwr.app.parts import build_networks
    from cafe_flwr.client.description import describe_network
    from cafe_flwr.client.process import ProcessCache
    from cafe_flwr.networks.placement import Placement

    if settings.dataset in (*HUB_IMAGES, *HUB_TEXTS) or settings.dataset.startswith("local:"):
        raise ValueError(f"it would have to read {settings.dataset}")
    with seeded(settings.seed):
        built = ProcessCache(build_networks(settings), settings.build_method(), Placement("cpu"))
    return describe_network(built)


def open_results_of(settings: Settings) -> Results:
    """Open the results folder of the settings, see :func:`cafe_flwr.results.folder.open_results`."""
    defaults = Settings().to_run_config()  # for settings that an earlier version did not have
    return open_results(
        settings.results,
        settings.to_run_config(),
        read=lambda saved: {**defaults, **todays(of_saved_run(saved))},
        free={*FREE_ON_RESUME, *settings.not_read()},
    )


def run(grid: Grid, settings: Settings) -> Result:
    """Run a federation from its settings and write its results folder.

    Raises ValueError before the first round if the settings cannot be used, and RuntimeError if no client can take part
    or all fail in a round; earlier records are kept.
    """
    settings.check_read()
    results = open_results_of(settings)
    recorder = Recorder(results.folder, settings.to_run_config(), results.state)
    with results.lock:
        try:
            result = build_strategy(settings, recorder, results.state).start(grid)
        except BaseException:
            try:
                _close(recorder)
            except Exception:  # what stopped the run, such as a full disk, counts more
                logger.exception("clients.parquet could not be written")
            raise
        _close(recorder)
    return result


def calibrate(grid: Grid, settings: Settings) -> dict[str, Any]:
    """Calibrate the networks that the run of these settings has left, see :func:`calibrate_federation`."""
    settings.check_read()
    return calibrate_federation(
        grid,
        settings.build_method(),
        settings.of(Calibration),
        settings.of(Federation),
        seed=settings.seed,
        output=settings.results / "calibration.json",
        own_numbers=settings.dataset == "local",
    )


def _close(recorder: Recorder) -> None:
    if recorder.close():
        _report(recorder.folder)


def _report(folder: Path) -> None:
    """Write the page, also after a run that failed."""
    try:
        logger.info("Report: %s", write_page(folder))
    except Exception:  # the run's own outcome, or error, counts more than its page
        logger.exception("No report could be written; try: cafe-flwr report %s", folder)
