"""A new client joins a federation that has ended: it gets the shared part and a head to start from, and trains locally.

The server writes a *package* (:func:`package_run`): the shared part, and the mean of the heads that it knows of all
clients, weighted by their examples: last heads, or with ``cafedistill-plus`` those of every exit. No client's own head
is in it. The newcomer (:func:`join`) starts every exit from the mean of its heads, or else of the last ones, and trains
a few epochs on its own data by the method's own loss; where mixtures teach, the mean is its teacher. It publishes the
result in its own state folder. docs/after-the-run.md says what that is worth, and what the package tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from cafe_flwr import __version__
from cafe_flwr.app.finished_run import FinishedRun
from cafe_flwr.app.source import Source, check_fits
from cafe_flwr.client.app import Parts, Workplace, facts_of, final_report, seeded, with_offset
from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.core.random import rng_for
from cafe_flwr.core.schema import Schema
from cafe_flwr.data.federation import FederatedData
from cafe_flwr.data.split import ClientData
from cafe_flwr.methods.base import Method, settings_of
from cafe_flwr.methods.cafedistill import CafeDistillMethod
from cafe_flwr.methods.cafedistill_text import CafeDistillText
from cafe_flwr.methods.client import LocalTask
from cafe_flwr.methods.registry import METHODS, method_from
from cafe_flwr.methods.robust_teachers import suspicious_heads
from cafe_flwr.methods.server import ClientRecord
from cafe_flwr.metrics.exits import ExitMetrics, evaluate
from cafe_flwr.networks.capacity import Networks, networks_of
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.fingerprint import fingerprint_of
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.server.checkpoints import Checkpoints, ServerState
from cafe_flwr.training.loop import frozen, snapshot
from cafe_flwr.training.options import LocalBudget, learning_rate_at
from cafe_flwr.wire.evaluate import FinalReport

FORMAT, FORMAT_VERSION = "cafe-flwr-joining", 1
JOINABLE = (CafeDistillMethod, CafeDistillText)
EPOCHS = 10
_FEWEST = 2  # heads in a mean: that of one client is its own
_PATHS = ("results-dir", "federation.state-dir", "data.dir")
_SHARED, _TEACHER = "shared.", "teacher."


@dataclass(frozen=True)
class Package:
    """What a newcomer is given.

    Attributes
    ----------
    facts
        How the federation was trained, and what its network is; JSON values.
    shared
        The shared part after the last round, by name.
    teacher
        Mean of the heads that clients send, under their names; empty if it was left out, or where they send none.
    """

    facts: Mapping[str, Any]
    shared: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it to one safetensors file, whole or not at all."""
        tensors = {_SHARED + name: t for name, t in self.shared.items()}
        tensors |= {_TEACHER + name: t for name, t in self.teacher.items()}
        facts = {**self.facts, "fingerprint": fingerprint_of(tensors)}
        content = save_tensors({name: t.contiguous() for name, t in tensors.items()}, {"facts": to_json(facts)})
        write_atomically(path, content)

    @classmethod
    def load(cls, path: Path) -> Package:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If it is damaged, something else, or of another version of this package.
        """
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; the server makes it, cafe-flwr join-package")
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("facts", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or no joining package: {error}") from None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ValueError(f"{path} is no joining package: cafe-flwr join-package makes one")
        if (facts.get("format_version"), facts.get("version")) != (FORMAT_VERSION, __version__):
            raise ValueError(
                f"{path} was made by cafe-flwr {facts.get('version')} (format {facts.get('format_version')}), this is "
                f"{__version__} (format {FORMAT_VERSION}): install the same version"
            )
        if facts.get("fingerprint") != fingerprint_of(tensors):
            raise ValueError(f"{path} is damaged: its fingerprint is not that of what it holds; copy it again")
        if broken := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
            raise ValueError(f"{path}: {broken[0]} has NaN or infinite values")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        return cls(facts, part(_SHARED), part(_TEACHER))


def package_run(results: Path, *, head: bool = True) -> Package:
    """The package of a finished run, from its results folder (``settings.json`` and the last checkpoint).

    Parameters
    ----------
    results
        The folder.
    head
        As for :func:`package`.

    Raises
    ------
    ValueError
        If the run has not finished, or newcomers cannot join its method.
    """
    from cafe_flwr.app.parts import build_networks, federation
    from cafe_flwr.settings import Settings

    settings = Settings.from_run_config(FinishedRun(results).run_config)
    state = Checkpoints(results / "checkpoint").load()
    if state is None or state.round < settings.num_server_rounds:
        done = state.round if state else 0
        raise ValueError(
            f"{results} has finished {done} of {settings.num_server_rounds} rounds: let the run end (resume=true)"
        )
    with seeded(settings.seed):
        network = _only(build_networks(settings))
    data = federation(settings)
    run_config: dict[str, Any] = {k: v for k, v in settings.to_run_config().items() if k not in _PATHS}
    if settings.dataset.startswith("local:"):
        run_config |= _own_data(data)
    return package(
        network,
        settings.build_method(),
        state,
        budget=settings.build_budget(),
        num_rounds=settings.num_server_rounds,
        seed=settings.seed,
        run_config=run_config,
        class_names=data.class_names,
        input_shape=data.input_shape,
        head=head,
    )


def _own_data(data: FederatedData) -> dict[str, Any]:
    """Settings that say what a newcomer's own data must look like, in the place of a folder dealt out to all."""
    channels, height, width = data.input_shape
    if height != width:
        raise ValueError(
            f"newcomers' data is read as square images, this run's are {height}×{width}: use Python (package)"
        )
    return {
        "dataset": "local",
        "data.class-names": ",".join(data.class_names),
        "data.image-size": height,
        "data.image-channels": channels,
        "data.label-groups": 0,
        "data.rotations": 1,
        "data.test-shift": 0.0,
        "data.partition": "dirichlet",
        "data.partition-column": "",
        "data.natural-split": "even",
        "data.dirichlet-cap": False,
    }


def package(
    network: EarlyExitNetwork,
    method: Method,
    state: ServerState,
    *,
    budget: LocalBudget,
    num_rounds: int,
    seed: int = 0,
    run_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    input_shape: Sequence[int] = (),
    head: bool = True,
) -> Package:
    """The package of any federation, from the parts of its server: ``strategy.method``, ``strategy.state``, …

    Parameters
    ----------
    network
        As the clients build it, from the same seed.
    method, state
        Of the strategy, after its last round.
    budget
        Local training of the run; a newcomer trains with its batch size, optimiser and learning rate.
    num_rounds, seed
        Of the run.
    run_config
        Settings that clients build network and data from.
    class_names, input_shape
        Where they are known.
    head
        Whether the mean head goes with it. Without, newcomers start from the classifiers that all started from.

    Raises
    ------
    ValueError
        If the state is of another network, the method is not CAFEDistill, or the mean would be of a single head.
    """
    check_joinable(method)
    work = Workplace(network, method, snapshot(network))
    if state.digest != work.digest:
        raise ValueError(
            f"the checkpoint was made with another network or method (fingerprint {state.digest}, this one's is "
            f"{work.digest})"
        )
    deep = {client: record for client, record in state.known.items() if not record.kind}
    if head and state.known and not deep:
        raise ValueError("no client of the federation holds the last exit: there is no head to give to newcomers")
    teacher, teachers = mean_head(deep, work.schemas["upload"]) if head else ({}, 0)
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "run": state.run,
        "round": state.round,
        "num_rounds": num_rounds,
        "seed": seed,
        "method": method.name,
        "method_settings": settings_of(method),
        "budget": asdict(budget),
        "digest": state.digest,
        "clients": sorted(state.known),
        "teachers": teachers,
        "num_classes": network.num_classes,
        "class_names": list(class_names),
        "input_shape": list(input_shape),
        "run_config": dict(run_config or {}),
    }
    return Package(facts, work.schemas["shared"].unpack(state.shared), teacher)


def check_joinable(method: Method) -> None:
    """ValueError unless the method says how a client learns heads for a backbone that others have trained."""
    if not isinstance(method, JOINABLE):
        names = ", ".join(sorted(name for name, known in METHODS.items() if issubclass(known, JOINABLE)))
        raise ValueError(f"only a federation of {names} can be joined when it has ended, not of {method.name}")


def mean_head(known: Mapping[int, ClientRecord], upload: Schema) -> tuple[dict[str, Tensor], int]:
    """Mean of what clients send of their heads, weighted by their examples, by name; and of how many it is.

    Heads unlike any other (:mod:`cafe_flwr.methods.robust_teachers`) are left out. Nothing where clients upload
    nothing.

    Raises
    ------
    ValueError
        If it would be a single client's head.

    Examples
    --------
    >>> heads = {0: np.array([1, 0, 1], np.float32), 1: np.array([5, 4, 1], np.float32)}
    >>> known = {c: ClientRecord([10, 30][c], 1, head, np.zeros(1)) for c, head in heads.items()}
    >>> mean_head(known, Schema((("weight", (1, 2)), ("bias", (1,)))))
    ({'weight': tensor([[4., 3.]]), 'bias': tensor([1.])}, 2)
    """
    if not upload.size:
        return {}, 0
    clients = sorted(known)
    heads = np.stack([known[c].upload for c in clients]) if clients else np.zeros((0, upload.size), dtype=np.float32)
    doubtful = suspicious_heads(heads)
    rows = [row for row in range(len(clients)) if row not in doubtful]
    if len(rows) < _FEWEST:
        raise ValueError(
            f"the server knows the heads of {len(rows)} clients that are like others: the mean of one would be that "
            "client's own head, which no other client may get"
        )
    examples = np.array([known[clients[row]].num_examples for row in rows], dtype=np.float64)
    mean = examples / examples.sum() @ heads[rows].astype(np.float64)
    return upload.unpack(mean.astype(np.float32)), len(rows)


@dataclass(frozen=True)
class Joined:
    """What became of a newcomer.

    Attributes
    ----------
    start
        Its test examples under the shared part and the mean head, before it has trained.
    report
        Of the network that was published.
    """

    start: ExitMetrics
    report: FinalReport


def join(
    package: Package,
    client: int,
    network: EarlyExitNetwork,
    data: ClientData,
    folder: Path,
    *,
    epochs: int = EPOCHS,
    context: Mapping[str, Any] | None = None,
    replace_existing: bool = False,
) -> Joined:
    """Make a newcomer's personal network and publish it in its state folder.

    Parameters
    ----------
    package
        What the server gave.
    client
        The newcomer's number; none of those that took part.
    network
        As the clients of the federation build it, from the same seed; trained in place.
    data
        The newcomer's own.
    folder
        Its state folder; ``client-<client>.safetensors`` and ``.json`` are written there.
    epochs
        Passes over its training split; the learning rate is constant for half of them, then falls to 0.
    context
        What the published facts say of where network and data come from.
    replace_existing
        Overwrite a personal network that the client has there already.

    Raises
    ------
    ValueError
        Before any training, if something does not fit, or would be overwritten.
    """
    facts = package.facts
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    check_new(facts, client, folder, replace_existing)
    work = Workplace(network, method_from(facts["method"], facts["method_settings"]), snapshot(network))
    if work.digest != facts["digest"]:
        raise ValueError(
            f"the federation's network has fingerprint {facts['digest']}, this one {work.digest}: network, number of "
            "classes and method must be the same"
        )
    check_fits(data, facts["input_shape"] or data.train.x.shape[1:], network.num_classes)
    start, task = train_newcomer(work, package, client, data, epochs)
    with work.deployed(task) as personal:
        report, temperatures = final_report(client, personal, data, task.steps)
        published = {
            **{key: facts[key] for key in ("run", "round", "method", "digest", "seed")},
            **facts_of(personal, data, report, temperatures),
            **({"class_names": facts["class_names"]} if facts["class_names"] else {}),
            "joined": {"epochs": epochs, "local_steps": task.steps, "teachers": facts["teachers"]},
            "context": dict(context or {"run_config": facts["run_config"], "node_config": {}}),
        }
        PersonalStore(folder, facts["run"]).publish(client, with_offset(personal), published)
    return Joined(start, report)


def join_from(
    package: Package,
    client: int,
    folder: Path,
    *,
    epochs: int = EPOCHS,
    parts: Parts | None = None,
    data_dir: Path | None = None,
    node_config: Mapping[str, Any] | None = None,
    replace_existing: bool = False,
) -> Joined:
    """:func:`join` with network and data as the package's settings, or a project's own functions, build them.

    Parameters
    ----------
    package, client, folder, epochs, replace_existing
        As for :func:`join`.
    parts
        Of a project of one's own (:func:`cafe_flwr.app.source.parts_of`).
    data_dir
        Folder of the newcomer's own data; without it, its part of a data set that the settings name.
    node_config
        For a project of one's own.

    Raises
    ------
    ValueError
        As :func:`join`, and if there is no data: a path that the server names is not read.
    """
    facts = package.facts
    check_new(facts, client, folder, replace_existing)
    run_config, own = dict(facts["run_config"]), {"clients": str(client), **(node_config or {})}
    if parts is None:
        if not run_config:
            raise ValueError("the federation had a network of its own: name its ClientApp (--app module:app)")
        if data_dir is None and run_config.get("dataset") == "local":
            raise ValueError("the federation learned from local data: say where this client's is (--data)")
    if data_dir is not None:
        data_dir = data_dir.expanduser().resolve()
    source = Source(run_config, own, int(facts["seed"]), parts, data_dir)
    context = {"run_config": run_config, "node_config": own, "data_dir": str(data_dir or "")}
    return join(
        package,
        client,
        _only(source.network()),
        source.data(client),
        folder,
        epochs=epochs,
        context=context,
        replace_existing=replace_existing,
    )


def _only(networks: EarlyExitNetwork | Networks) -> EarlyExitNetwork:
    """The network of a federation of one modality."""
    found = networks_of(networks)
    if len(found) > 1:
        raise ValueError(f"nobody can join a federation of several modalities yet ({', '.join(found)})")
    return next(iter(found.values()))


def check_new(facts: Mapping[str, Any], client: int, folder: Path, replace_existing: bool) -> None:
    """ValueError if the client is none that may join, or has something in the folder that would be lost."""
    if client < 0:
        raise ValueError(f"a client's number is 0 or more, got {client}")
    if client in facts["clients"]:
        raise ValueError(
            f"client {client} took part in the federation: its personal network is in its own state folder. A newcomer "
            f"needs a number of its own, not one of {', '.join(map(str, facts['clients']))}"
        )
    there = [*folder.glob(f"client-{client}.safetensors"), *folder.glob(f"versions/*/client-{client}")]
    if there and not replace_existing:
        raise ValueError(
            f"client {client} has a personal network or state already, {there[0]}: joining again would replace the "
            "network. Say so (--force), or choose another state folder"
        )


def mean_heads(teacher: Mapping[str, Tensor], network: EarlyExitNetwork) -> dict[str, Tensor]:
    """What a newcomer's classifiers start from: the mean of the exit's own if there is one, else of the last exit's.

    Nothing for exits without one whose width is not the last one's.
    """
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
    work: Workplace, package: Package, client: int, data: ClientData, epochs: int
) -> tuple[ExitMetrics, LocalTask]:
    """Start from the package and train the classifiers; how good the start was, and the finished task.

    Every epoch is a round of local training by the method, all exits active. The backbone stays as the federation left
    it, as it does for the clients that took part.
    """
    facts, network = package.facts, work.network
    classifiers = network.classifier_names()
    backbone = {name: t for name, t in package.shared.items() if name not in classifiers}
    heads = {**work.classifiers_at_start(facts["seed"], client), **mean_heads(package.teacher, network)}
    budget, tensors = LocalBudget(**facts["budget"]), {**work.initial, **package.shared, **heads}
    start, steps, momentum = None, 0, dict[str, torch.Tensor]()
    for epoch in range(1, epochs + 1):
        rate = learning_rate_at(budget.learning_rate, epoch, epochs)
        task = LocalTask(
            network=network,
            data=data.train,
            active=[True] * (network.num_exits - 1),
            download=package.teacher,
            budget=replace(budget, epochs=1, learning_rate=rate),
            rng=partial(rng_for, facts["seed"], facts["num_rounds"] + epoch, client),
            server_round=facts["num_rounds"],
            num_rounds=facts["num_rounds"],
            initial=work.weights,
            momentum=momentum,
        )
        work.put(task, tensors)
        network.offset = work.method.offset(data.train, network.num_classes)
        if start is None:
            with work.deployed(task) as untrained:
                start = evaluate(untrained, data.test)
        with seeded(int(task.rng("torch").integers(2**63))), frozen(network, classifiers):
            work.method.train(task)
        tensors = {**{name: t.clone() for name, t in work.take(task).items()}, **backbone}  # statistics of norms, too
        steps, momentum = steps + task.steps, task.momentum
    work.put(task, tensors)
    task.steps = steps
    if broken := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
        raise ValueError(f"training ended with NaN or infinite values in {broken[0]}: nothing was published")
    assert start is not None
    return start, task
