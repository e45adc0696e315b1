"""A client that joins after the run: it trains a personal network from the federation's package, on its own node.

Every exit starts from the package's mean head for it, or else from that of the last exit, and trains a few epochs on
the client's own data with the method's loss; where mixtures teach, the mean is the teacher (docs/after-the-run.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cafe_flwr.client.description import check_fits
from cafe_flwr.client.evaluation import evaluate_personal, publish_personal
from cafe_flwr.client.model import ClientModel
from cafe_flwr.core.random import rng_for
from cafe_flwr.data.split import ClientData
from cafe_flwr.methods.client import LocalTask
from cafe_flwr.methods.registry import method_from
from cafe_flwr.metrics.exits import ExitMetrics, evaluate
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.personal.package import Package
from cafe_flwr.personal.published import Metadata
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.training.loop import frozen, snapshot
from cafe_flwr.training.options import LocalBudget, learning_rate_at
from cafe_flwr.training.trainer import train_task
from cafe_flwr.wire.evaluate import FinalReport

EPOCHS = 10


@dataclass(frozen=True)
class Newcomer:
    """A client that is to join, and how.

    Attributes
    ----------
    client
        Its number, which no client of the federation has.
    folder
        Its state folder; ``client-<client>.safetensors`` and ``.json`` are written there.
    epochs
        Passes over its training split; the learning rate is constant for half of them, then falls to 0.
    replace_existing
        Overwrite a personal network that is in the folder already.
    """

    client: int
    folder: Path
    epochs: int = EPOCHS
    replace_existing: bool = False

    def check(self, federation: Mapping[str, Any]) -> None:
        """ValueError if it may not join the federation of a package, or if its folder has something to lose."""
        client = self.client
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if client < 0:
            raise ValueError(f"a client's number is 0 or more, got {client}")
        if client in federation["clients"]:
            taken = ", ".join(map(str, federation["clients"]))
            raise ValueError(
                f"client {client} took part in the federation: its personal network is in its own state folder. A "
                f"newcomer needs a number of its own, not one of {taken}"
            )
        there = [*self.folder.glob(f"client-{client}.safetensors"), *self.folder.glob(f"versions/*/client-{client}")]
        if there and not self.replace_existing:
            raise ValueError(
                f"client {client} has a personal network or state already, {there[0]}: joining again would replace "
                "the network. Say so (--force), or choose another state folder"
            )


@dataclass(frozen=True)
class Joined:
    """Test metrics of a newcomer before training (``start``), and the ``report`` of its published network."""

    start: ExitMetrics
    report: FinalReport


def join(
    package: Package,
    newcomer: Newcomer,
    network: EarlyExitNetwork,
    data: ClientData,
    context: Mapping[str, Any] | None = None,
) -> Joined:
    """Make a newcomer's personal network and publish it in its state folder.

    Parameters
    ----------
    network
        As the clients of the federation build it, from the same seed; trained in place.
    context
        Origin of network and data, for the published metadata; by default the run-config of the package.

    Raises
    ------
    ValueError
        Before any training, if the parts do not fit together or a network would be overwritten.
    """
    run, client = package.metadata, newcomer.client
    newcomer.check(run)
    model = ClientModel(network, method_from(run["method"], run["method_settings"]), snapshot(network))
    if model.digest != run["digest"]:
        raise ValueError(
            f"the federation's network has fingerprint {run['digest']}, this one {model.digest}: network, number of "
            "classes and method must be the same"
        )
    check_fits(data, run["input_shape"] or data.train.x.shape[1:], network.num_classes)
    start, task = train_newcomer(model, package, client, data, newcomer.epochs)
    metadata = Metadata(
        **{key: run[key] for key in ("run", "round", "method", "digest", "seed", "class_names")},
        joined={"epochs": newcomer.epochs, "local_steps": task.steps, "teachers": run["teachers"]},
        context=dict(context or {"run_config": run["run_config"], "node_config": {}}),
    )
    with model.deployed(task) as personal:
        evaluated = evaluate_personal(client, personal, data, task.steps)
        publish_personal(PersonalStore(newcomer.folder, run["run"]), personal, data, evaluated, metadata)
    return Joined(start, evaluated.report)


def mean_heads(teacher: Mapping[str, Tensor], network: EarlyExitNetwork) -> dict[str, Tensor]:
    """Initial classifiers of a newcomer: the exit's mean head, else that of the last exit if the widths are equal."""
    if not teacher:
        return {}
    last, widths = network.head_names(network.num_exits - 1), network.feature_widths
    return {
        name: teacher.get(name, teacher[of_last])
        for k in range(network.num_exits)
        for name, of_last in zip(network.head_names(k), last, strict=True)
        if name in teacher or widths[k] == widths[-1]
    }


def train_newcomer(
    model: ClientModel, package: Package, client: int, data: ClientData, epochs: int
) -> tuple[ExitMetrics, LocalTask]:
    """Train the classifiers from the package's; returns the metrics before training, and the finished task.

    Every epoch is a round of local training by the method, all exits active. The backbone stays that of the federation.
    """
    metadata, network = package.metadata, model.network
    classifiers = network.classifier_names()
    backbone = model.spread({name: t for name, t in package.shared.items() if name not in classifiers})
    means = model.spread(mean_heads(model.spread(package.teacher), network))
    tensors = {**model.initial, **backbone, **model.classifiers_at_start(metadata["seed"], client), **means}
    task = _epoch(model, package, client, data, epoch=0, epochs=epochs)
    model.put(task, tensors)
    network.offset = model.method.offset(data.train, network.num_classes)
    with model.deployed(task) as untrained:
        start = evaluate(untrained, data.test)
    steps, momentum = 0, dict[str, Tensor]()
    for epoch in range(1, epochs + 1):
        task = _epoch(model, package, client, data, epoch=epoch, epochs=epochs)
        task.momentum = momentum
        model.put(task, tensors)
        with frozen(network, classifiers):
            train_task(model.method, task)
        tensors = {**{name: t.clone() for name, t in model.take(task).items()}, **backbone}  # norms' statistics, too
        steps, momentum = steps + task.steps, task.momentum
    model.put(task, tensors)
    task.steps = steps
    return start, task


def _epoch(
    model: ClientModel, package: Package, client: int, data: ClientData, *, epoch: int, epochs: int
) -> LocalTask:
    """The task of an epoch, before it has tensors."""
    metadata, budget = package.metadata, LocalBudget(**package.metadata["budget"])
    rate = learning_rate_at(budget.learning_rate, epoch, epochs)
    return LocalTask(
        network=model.network,
        data=data.train,
        active=[True] * (model.network.num_exits - 1),
        download=model.spread(package.teacher),
        budget=replace(budget, epochs=1, learning_rate=rate),
        rng=partial(rng_for, metadata["seed"], metadata["num_rounds"] + epoch, client),
        server_round=metadata["num_rounds"],
        num_rounds=metadata["num_rounds"],
        initial=model.weights,
    )
