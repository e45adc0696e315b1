"""From settings to the parts of a run: data, network, strategy, results."""

from __future__ import annotations

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from cafe_flwr.data import FederatedData, load_federation
from cafe_flwr.log import logger
from cafe_flwr.networks import ConvNet, EarlyExitNetwork
from cafe_flwr.recording import Recorder, open_results
from cafe_flwr.settings import Settings
from cafe_flwr.state import ServerState
from cafe_flwr.strategy import FederatedStrategy
from cafe_flwr.training import LocalBudget


def federation(settings: Settings) -> FederatedData:
    """The data set of the settings, dealt out to its clients."""
    return load_federation(
        settings.dataset,
        settings.num_clients,
        partition=settings.partition,
        alpha=settings.dirichlet_alpha,
        classes_per_client=settings.classes_per_client,
        examples_per_client=settings.examples_per_client,
        shares=settings.shares,
        image_size=settings.image_size,
        image_column=settings.image_column,
        label_column=settings.label_column,
        validation_share=settings.validation_share,
        label_groups=settings.label_groups,
        rotations=settings.rotations,
        test_shift=settings.test_shift,
        seed=settings.seed,
    )


def build_network(settings: Settings) -> EarlyExitNetwork:
    """The network of the settings, for their data set."""
    data = federation(settings)
    return ConvNet(data.input_shape, data.num_classes, features=settings.feature_width)


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
        local=LocalBudget(
            batch_size=settings.batch_size,
            steps=settings.local_steps,
            epochs=settings.local_epochs,
            optimizer=settings.optimizer,
            learning_rate=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        ),
        bounds=settings.build_bounds(),
        privacy=settings.build_privacy(),
        wire=settings.wire_dtype,
        num_clients=settings.num_clients,
        seed=settings.seed,
        evaluate_every=settings.evaluate_every,
        wait_seconds=settings.wait_seconds,
        round_timeout=settings.round_timeout,
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
    if unread := settings.unread():
        logger.warning("%s does not read %s", settings.method, ", ".join(unread))
    results = open_results(settings)
    recorder = Recorder(results.folder, settings, results.state)
    try:
        return build_strategy(settings, recorder, results.state).start(grid)
    finally:
        recorder.close()
        results.lock.close()
