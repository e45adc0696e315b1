"""Joining after the run: the package that the server writes, and how a new client builds its network and data.

A *package* (:func:`package_run`) holds the shared part and the mean of the clients' heads, weighted by their examples:
last heads, or with ``cafedistill-plus`` those of every exit. It holds no single client's head.
:mod:`cafe_flwr.client.newcomer` trains from it; docs/after-the-run.md says what it reveals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cafe_flwr import __version__
from cafe_flwr.app.finished_run import FinishedRun
from cafe_flwr.app.source import Source
from cafe_flwr.client.model import ClientModel
from cafe_flwr.client.newcomer import Joined, Newcomer, join
from cafe_flwr.client.process import Parts
from cafe_flwr.core.random import seeded
from cafe_flwr.core.schema import Schema
from cafe_flwr.data.federation import FederatedData
from cafe_flwr.methods.base import Method, settings_of
from cafe_flwr.methods.cafedistill import CafeDistillMethod
from cafe_flwr.methods.cafedistill_text import CafeDistillText
from cafe_flwr.methods.registry import METHODS
from cafe_flwr.methods.robust_teachers import suspicious_heads
from cafe_flwr.methods.server import ClientRecord
from cafe_flwr.networks.capacity import Networks, networks_of
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.personal.package import FORMAT, FORMAT_VERSION, Package
from cafe_flwr.server.checkpoints import Checkpoints, ServerState
from cafe_flwr.training.loop import snapshot
from cafe_flwr.training.options import LocalBudget

JOINABLE = (CafeDistillMethod, CafeDistillText)
_FEWEST = 2  # heads in a mean: the mean of one would be that client's own
_PATHS = ("results-dir", "federation.state-dir", "data.dir")


def package_run(results: Path, *, head: bool = True) -> Package:
    """The :func:`package` of a finished run, from its results folder (``settings.json`` and the last checkpoint).

    Raises ValueError as :func:`package`, and if the run has not finished.
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
    metadata = RunMetadata(
        budget=settings.build_budget(),
        num_rounds=settings.num_server_rounds,
        seed=settings.seed,
        run_config=run_config,
        class_names=data.class_names,
        input_shape=data.input_shape,
    )
    return package(network, settings.build_method(), state, metadata, head=head)


def _own_data(data: FederatedData) -> dict[str, Any]:
    """Settings for a newcomer's own data, in place of a folder that is dealt out to all clients."""
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


@dataclass(frozen=True)
class RunMetadata:
    """A package's entries on its run.

    A newcomer trains with batch size, optimiser and learning rate of ``budget``, and builds network and data from
    ``run_config``. ``class_names`` and ``input_shape`` are empty where they are unknown.
    """

    budget: LocalBudget
    num_rounds: int
    seed: int = 0
    run_config: Mapping[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    input_shape: Sequence[int] = ()


def package(
    network: EarlyExitNetwork, method: Method, state: ServerState, run: RunMetadata, *, head: bool = True
) -> Package:
    """The package of any federation, from the parts of its server.

    Parameters
    ----------
    network
        As the clients build it, from the same seed.
    method, state
        ``strategy.method`` and ``strategy.state`` after the last round.
    run
        Further entries on the run.
    head
        Whether to include the mean head. Without it, newcomers start from the initial classifiers.

    Raises
    ------
    ValueError
        If the state is of another network, the method is not CAFEDistill, or the mean would be of a single head.
    """
    check_joinable(method)
    model = ClientModel(network, method, snapshot(network))
    if state.digest != model.digest:
        raise ValueError(
            f"the checkpoint was made with another network or method (fingerprint {state.digest}, this one's is "
            f"{model.digest})"
        )
    deep = {client: record for client, record in state.known.items() if not record.kind}
    if head and state.known and not deep:
        raise ValueError("no client of the federation holds the last exit: there is no head to give to newcomers")
    teacher, teachers = mean_head(deep, model.schemas["upload"]) if head else ({}, 0)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "run": state.run,
        "round": state.round,
        "num_rounds": run.num_rounds,
        "seed": run.seed,
        "method": method.name,
        "method_settings": settings_of(method),
        "budget": asdict(run.budget),
        "digest": state.digest,
        "clients": sorted(state.known),
        "teachers": teachers,
        "num_classes": network.num_classes,
        "class_names": list(run.class_names),
        "input_shape": list(run.input_shape),
        "run_config": dict(run.run_config),
    }
    return Package(metadata, model.schemas["shared"].unpack(state.shared), teacher)


def check_joinable(method: Method) -> None:
    """ValueError unless newcomers can train heads on the shared backbone by this method."""
    if not isinstance(method, JOINABLE):
        names = ", ".join(sorted(name for name, known in METHODS.items() if issubclass(known, JOINABLE)))
        raise ValueError(f"only a federation of {names} can be joined when it has ended, not of {method.name}")


def mean_head(known: Mapping[int, ClientRecord], upload: Schema) -> tuple[dict[str, Tensor], int]:
    """Mean of the heads that clients upload, weighted by their examples, by name; and the number of heads in it.

    Heads unlike all others (:mod:`cafe_flwr.methods.robust_teachers`) are left out. Empty where clients upload nothing;
    ValueError if it would be a single client's head.

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


def join_from(
    package: Package,
    newcomer: Newcomer,
    *,
    parts: Parts | None = None,
    data_dir: Path | None = None,
    node_config: Mapping[str, Any] | None = None,
) -> Joined:
    """:func:`join` with network and data as the package's settings, or a project's own functions, build them.

    Parameters
    ----------
    package, newcomer
        As for :func:`join`.
    parts, node_config
        For a project of one's own (:func:`cafe_flwr.app.source.parts_of`).
    data_dir
        Folder of the newcomer's own data; by default its part of the data set that the settings name.

    Raises
    ------
    ValueError
        As :func:`join`, and if there is no data: a path that the server names is not read.
    """
    metadata, client = package.metadata, newcomer.client
    newcomer.check(metadata)
    run_config, own = dict(metadata["run_config"]), {"clients": str(client), **(node_config or {})}
    if parts is None:
        if not run_config:
            raise ValueError("the federation had a network of its own: name its ClientApp (--app module:app)")
        if data_dir is None and run_config.get("dataset") == "local":
            raise ValueError("the federation learned from local data: say where this client's is (--data)")
    if data_dir is not None:
        data_dir = data_dir.expanduser().resolve()
    source = Source(run_config, own, int(metadata["seed"]), parts, data_dir)
    context = {"run_config": run_config, "node_config": own, "data_dir": str(data_dir or "")}
    return join(package, newcomer, _only(source.network()), source.data(client), context)


def _only(networks: EarlyExitNetwork | Networks) -> EarlyExitNetwork:
    """The network of a federation of one modality."""
    found = networks_of(networks)
    if len(found) > 1:
        raise ValueError(f"nobody can join a federation of several modalities yet ({', '.join(found)})")
    return next(iter(found.values()))
