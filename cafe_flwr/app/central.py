"""Training in one place, without a federation: the same objectives, and the same results folder."""

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
from cafe_flwr.client.app import final_report, seeded
from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.core.random import rng_for
from cafe_flwr.core.schema import Schema, digest
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.data.augmentation import Augmentation
from cafe_flwr.data.split import Split
from cafe_flwr.metrics.exits import evaluate
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.statistics import evaluating
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.results.summary import summarise
from cafe_flwr.server.callbacks import RunInfo
from cafe_flwr.settings import Settings, todays
from cafe_flwr.training.loop import snapshot, train
from cafe_flwr.training.objectives.base import Objective
from cafe_flwr.training.objectives.registry import objective_named
from cafe_flwr.training.options import LocalBudget

# What a run in one place begins with where nothing else is said: SAFE-KD's recipe (arXiv 2602.03043).
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
    """A pass over the training data: mean loss, and accuracy per exit on the data to watch (empty without any)."""

    epoch: int
    loss: float
    accuracy_per_exit: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes
    ----------
    network
        The trained network, in evaluation mode.
    history
        One entry per epoch.
    steps
        Gradient steps taken.
    seconds
        Wall clock.
    teacher
        The EMA teacher of the objective as it ended, None if it has none.
    """

    network: EarlyExitNetwork
    history: list[Epoch]
    steps: int
    seconds: float
    teacher: EarlyExitNetwork | None = None


def train_central(
    network: EarlyExitNetwork,
    data: Split,
    *,
    objective: Objective | str = "safe-kd",
    epochs: int = 30,
    optimizer: str = "adamw",
    learning_rate: float = 3e-4,
    weight_decay: float = 0.05,
    momentum: float = 0.0,
    max_grad_norm: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
    watch: Split | None = None,
    augment: Augmentation | None = None,
    progress: bool = False,
) -> Trained:
    """Train a network on one data set, at a constant learning rate; the EMA teacher lives through the whole training.

    Parameters
    ----------
    network
        Trained in place, on the device where it and the data are.
    data
        Training examples.
    objective
        What every exit minimises, or its name.
    epochs
        Passes over the data, 1 or more.
    optimizer, learning_rate, weight_decay, momentum, max_grad_norm, batch_size
        As in :class:`cafe_flwr.training.LocalBudget`; the defaults are SAFE-KD's.
    seed
        Of the order of the examples, of dropout, and of adversarial inputs.
    watch
        Examples on which every epoch's accuracy is taken.
    augment
        Varies the inputs of every mini-batch.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        If a setting cannot be, or training ends with NaN or infinite values.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> data = Split(torch.zeros(8, 1, 16, 16), torch.tensor([0, 1] * 4))
    >>> trained = train_central(ConvNet((1, 16, 16), num_classes=2), data, epochs=2, batch_size=4)
    >>> trained.steps, len(trained.history)
    (4, 2)
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    own = objective_named(objective)
    budget = LocalBudget(
        batch_size=batch_size,
        epochs=epochs,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        optimizer=optimizer,
    )
    size = min(batch_size, max(len(data), 1))
    state = own.init(network, rng_for(seed, 0, 0, "objective"))
    weights = torch.tensor(own.exit_weights(network.num_exits), device=data.x.device)
    losses: list[Tensor] = []
    history: list[Epoch] = []
    steps = 0
    start = time.perf_counter()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value = own.losses(state, (x, y), network(x)) @ weights
        losses.append(value.detach())
        return value

    with _bar(epochs if progress else 0) as show:

        def after_step() -> None:
            nonlocal steps
            state.update()
            steps += 1
            if steps * size < len(data) * (len(history) + 1):  # a batch may reach over the end of an epoch
                return
            with evaluating(network):
                accuracy = evaluate(network, watch).accuracy if watch is not None else []
            history.append(Epoch(len(history) + 1, torch.stack(losses).mean().item(), accuracy))
            losses.clear()
            show(history[-1])

        with seeded(int(rng_for(seed, 0, 0, "torch").integers(2**63))):  # for networks that draw, e.g. dropout
            rng = rng_for(seed, 0, 0, "batches")
            train(network, data, loss, budget, rng, after_step=after_step, augment=augment)
    network.eval()
    if broken := [name for name, t in network.state_dict().items() if not t.isfinite().all()]:
        raise ValueError(f"training ended with NaN or infinite values in {', '.join(broken[:3])}: lower learning_rate")
    return Trained(network, history, steps, time.perf_counter() - start, state.teacher)


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
    """Settings of a run in one place: SAFE-KD's recipe where nothing else is said, and one client with all the data.

    Parameters
    ----------
    run_config
        Settings in kebab-case, as in a federation. ``local-epochs`` are the epochs. The examples of the embedded data
        sets are as many as those of ``num-clients`` clients together.

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
        From :func:`central_settings`: one client, which holds all the data.
    folder
        Of the results; ``settings.results`` is the usual one. It must not hold a run.
    progress
        Show a bar.

    Returns
    -------
    Contents of ``summary.json``: those of a federation's, with ``method`` ``"central"``, ``objective`` and ``history``.

    Raises
    ------
    ValueError
        If the folder holds a run, or the settings are not those of training in one place.
    """
    for switch in ("prior", "distill"):
        if getattr(settings.train, switch):
            raise ValueError(f"train.{switch} is of a client in a federation: training in one place does not take it")
    if settings.train.learning_rate_schedule != "cosine":
        raise ValueError(
            "train.learning-rate-schedule is of a federation's rounds, which training in one place has not"
        )
    if settings.num_clients != 1 or not settings.local_epochs:
        raise ValueError("training in one place has one client and counts epochs: make settings by central_settings")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another name, or remove it")
    data = federation(settings).load(0)
    with seeded(settings.seed):
        network = build_network(settings)
    trained = train_central(
        network,
        data.train,
        objective=settings.build_method().objective,
        epochs=settings.local_epochs,
        optimizer=settings.train.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.train.weight_decay,
        momentum=settings.build_budget().momentum,
        max_grad_norm=settings.train.max_grad_norm,
        batch_size=settings.train.batch_size,
        seed=settings.seed,
        watch=data.calibration if len(data.calibration) else None,
        augment=data.augment,
        progress=progress,
    )
    report, temperatures = final_report(0, network, data, trained.steps)
    token, tensors = secrets.token_hex(8), snapshot(network)
    facts = {
        "run": token,
        "round": 1,
        "method": "central",
        "digest": digest(Schema.of(tensors, list(tensors))),
        "num_exits": network.num_exits,
        "num_classes": network.num_classes,
        "personal": network.personal_names(),
        "accuracy_per_exit": report.exits.accuracy,
        "temperatures": temperatures,
    }
    asked, size = settings.to_run_config() | {"name": settings.run_name}, sum(t.numel() for t in tensors.values())
    info = RunInfo(token, 1, 1, [0], network.num_exits, size, macs_per_exit(network, data.train.x[:1]))
    summary = summarise(asked, info, [report], [], None, trained.seconds) | {
        "method": "central",
        "objective": settings.build_method().objective.name,
        "history": [asdict(epoch) for epoch in trained.history],
    }
    write_atomically(folder / "settings.json", to_json(settings.to_run_config(), indent=2))
    PersonalStore(folder / "personal", token).publish(0, tensors, facts)
    write_atomically(folder / "summary.json", to_json(summary, indent=2))
    return summary
