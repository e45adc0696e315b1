"""Central training, without a federation, with the same objectives and the same results folder."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cafe_flwr.app.parts import build_network, federation
from cafe_flwr.client.evaluation import evaluate_personal, publish_personal
from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.core.random import rng_for, seeded
from cafe_flwr.core.schema import Schema, schema_hash
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.data.split import ClientData
from cafe_flwr.metrics.exits import evaluate
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.statistics import evaluating
from cafe_flwr.networks.weights import weights_of
from cafe_flwr.personal.published import Metadata
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.results.summary import summarise
from cafe_flwr.server.callbacks import RunInfo
from cafe_flwr.settings import Settings, todays
from cafe_flwr.training.loop import LoopOptions, check_finite, train
from cafe_flwr.training.objectives.base import Objective
from cafe_flwr.training.objectives.registry import objective_named
from cafe_flwr.training.options import LocalBudget

# Defaults of central training: SAFE-KD's recipe (arXiv 2602.03043).
DEFAULTS: Mapping[str, Any] = {
    "objective": "safe-kd",
    "train.optimizer": "adamw",
    "learning-rate": 3e-4,
    "train.weight-decay": 0.05,
    "train.batch-size": 64,
    "local-epochs": 30,
}


@dataclass(frozen=True)
class Epoch:
    """A pass over the training data: mean loss, and accuracy per exit on the calibration split (empty without one)."""

    epoch: int
    loss: float
    accuracy_per_exit: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """A trained network in evaluation mode, an entry per epoch, gradient steps, and seconds of wall clock.

    ``teacher`` is the EMA teacher of the objective after the last step, None if it has none.
    """

    network: EarlyExitNetwork
    history: list[Epoch]
    steps: int
    seconds: float
    teacher: EarlyExitNetwork | None = None


SAFE_KD = LocalBudget(batch_size=64, epochs=30, learning_rate=3e-4, weight_decay=0.05, optimizer="adamw")
"""How SAFE-KD trains, as :data:`DEFAULTS` say it in settings."""


def train_central(
    network: EarlyExitNetwork,
    data: ClientData,
    budget: LocalBudget = SAFE_KD,
    *,
    objective: Objective | str = "safe-kd",
    seed: int = 0,
    progress: bool = False,
) -> Trained:
    """Train a network on one data set, at a constant learning rate and with one EMA teacher for the whole training.

    Parameters
    ----------
    network
        Trained in place, on the device where it and the data are.
    data
        Training examples and their augmentation; every epoch's accuracy is measured on the calibration split, if it
        has examples.
    budget
        Batch size, passes over the data (1 or more), and optimiser.
    objective
        What every exit minimises, or its name.
    seed
        Of the order of the examples, of dropout, and of adversarial inputs.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        If the budget counts steps, or training ends with NaN or infinite values.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> from cafe_flwr.data import Split
    >>> none = Split(torch.zeros(0, 1, 16, 16), torch.zeros(0, dtype=torch.int64))
    >>> data = ClientData(Split(torch.zeros(8, 1, 16, 16), torch.tensor([0, 1] * 4)), none, none)
    >>> budget = LocalBudget(epochs=2, batch_size=4)
    >>> trained = train_central(ConvNet((1, 16, 16), num_classes=2), data, budget)
    >>> trained.steps, len(trained.history)
    (4, 2)
    """
    if budget.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {budget.epochs}")
    own = objective_named(objective)
    state = own.init(network, rng_for(seed, 0, 0, "objective"))
    weights = torch.tensor(own.exit_weights(network.num_exits), device=data.train.x.device)
    start = time.perf_counter()
    with _bar(budget.epochs if progress else 0) as show:
        history = _History(network, data, budget.batch_size, show)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            value = own.losses(state, (x, y), network(x)) @ weights
            history.losses.append(value.detach())
            return value

        def after_step() -> None:
            state.update()
            history.after_step()

        options = LoopOptions(after_step=after_step, augment=data.augment)
        with seeded(int(rng_for(seed, 0, 0, "torch").integers(2**63))):  # for networks that draw, e.g. dropout
            train(network, data.train, loss, budget, rng_for(seed, 0, 0, "batches"), options)
    network.eval()
    check_finite(weights_of(network))
    return Trained(network, history.epochs, history.steps, time.perf_counter() - start, state.teacher)


class _History:
    """Counts steps, and evaluates the network after every epoch."""

    def __init__(
        self, network: EarlyExitNetwork, data: ClientData, batch_size: int, show: Callable[[Epoch], None]
    ) -> None:
        self.network, self.data, self.show = network, data, show
        self.size = min(batch_size, max(len(data.train), 1))
        self.steps = 0
        self.losses: list[Tensor] = []  # of the steps since the last epoch
        self.epochs: list[Epoch] = []

    def after_step(self) -> None:
        self.steps += 1
        if self.steps * self.size < len(self.data.train) * (len(self.epochs) + 1):
            return  # the last batch of an epoch may reach into the next
        watched = self.data.calibration
        with evaluating(self.network):
            accuracy = evaluate(self.network, watched).accuracy if len(watched) else []
        self.epochs.append(Epoch(len(self.epochs) + 1, torch.stack(self.losses).mean().item(), accuracy))
        self.losses.clear()
        self.show(self.epochs[-1])


@contextmanager
def _bar(epochs: int) -> Iterator[Callable[[Epoch], None]]:
    """A progress bar over epochs, none for 0; call it with every epoch that ends."""
    if not epochs:
        yield lambda epoch: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("epoch {task.completed}/{task.total}", BarColumn(), "{task.description}", TimeRemainingColumn())
    with Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns)) as bar:
        task = bar.add_task("", total=epochs)

        def show(epoch: Epoch) -> None:
            accuracy = " ".join(f"{a:.3f}" for a in epoch.accuracy_per_exit)
            bar.update(task, completed=epoch.epoch, description=f"loss {epoch.loss:.3f} accuracy {accuracy or '–'}")

        yield show


def central_settings(run_config: Mapping[str, Any]) -> Settings:
    """Settings of central training: one client with all the data, and by default SAFE-KD's recipe.

    ``run_config`` has settings in kebab-case, as in a federation; ``local-epochs`` are the epochs. Embedded data sets
    have as many examples as ``num-clients`` clients together.

    Examples
    --------
    >>> settings = central_settings({"num-clients": 20, "data.examples-per-client": 100})
    >>> settings.num_clients, settings.data.examples_per_client, settings.objective, settings.local_epochs
    (1, 2000, 'safe-kd', 30)
    """
    asked = Settings.from_run_config(run_config)
    pooled = asked.num_clients * asked.data.examples_per_client
    one = {"method": "local", "num-clients": 1, "data.examples-per-client": pooled, "num-server-rounds": 1}
    settings = Settings.from_run_config({**DEFAULTS, **todays(run_config), **one})
    if "name" not in run_config:
        settings = settings.model_copy(
            update={"name": f"{settings.dataset.partition(':')[0]}-central-seed{settings.seed}"}
        )
    return settings


def run_central(settings: Settings, folder: Path, *, progress: bool = False) -> dict[str, Any]:
    """Train on a named data set and leave a results folder that :class:`cafe_flwr.personal.FinishedRun` reads.

    Parameters
    ----------
    settings
        From :func:`central_settings`.
    folder
        Of the results, new or empty; usually ``settings.results``.
    progress
        Show a bar.

    Returns
    -------
    Contents of ``summary.json``: those of a federation's, with ``method`` ``"central"``, ``objective`` and ``history``.

    Raises
    ------
    ValueError
        If the folder is not empty, or the settings are not those of central training.
    """
    _check(settings, folder)
    data = federation(settings).load(0)
    with seeded(settings.seed):
        network = build_network(settings)
    objective = settings.build_method().objective
    trained = train_central(
        network, data, settings.build_budget(), objective=objective, seed=settings.seed, progress=progress
    )
    evaluated = evaluate_personal(0, network, data, trained.steps)
    token, tensors = secrets.token_hex(8), network.state_dict()
    size = sum(t.numel() for t in tensors.values())
    info = RunInfo(token, 1, 1, [0], network.num_exits, size, macs_per_exit(network, data.train.x[:1]))
    asked = settings.to_run_config() | {"name": settings.run_name}
    summary = summarise(asked, info, [evaluated.report], [], None, trained.seconds) | {
        "method": "central",
        "objective": objective.name,
        "history": [asdict(epoch) for epoch in trained.history],
    }
    write_atomically(folder / "settings.json", to_json(settings.to_run_config(), indent=2))
    which = schema_hash(Schema.of(tensors, list(tensors)))
    metadata = Metadata(run=token, round=1, method="central", digest=which, seed=settings.seed)
    publish_personal(PersonalStore(folder / "personal", token), network, data, evaluated, metadata)
    write_atomically(folder / "summary.json", to_json(summary, indent=2))
    return summary


def _check(settings: Settings, folder: Path) -> None:
    """ValueError if the folder is not empty, or the settings are not those of central training."""
    for switch in ("prior", "distill"):
        if getattr(settings.train, switch):
            raise ValueError(f"train.{switch} is of a client in a federation: central training does not support it")
    if settings.train.learning_rate_schedule != "cosine":
        raise ValueError(
            "train.learning-rate-schedule is for a federation's rounds: central training has a constant learning rate"
        )
    if settings.num_clients != 1 or not settings.local_epochs:
        raise ValueError("central training has one client and counts epochs: make its settings by central_settings")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another name, or remove it")
