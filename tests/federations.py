"""Small federations with real Flower parts, for the system tests: digits as settings name them, or toys made here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cafe_flwr import EarlyExitNetwork, make_client_app
from cafe_flwr.app.parts import build_networks, federation, modality_of
from cafe_flwr.app.run import build_strategy, open_results_of
from cafe_flwr.app.run import run as run_federation
from cafe_flwr.data import ClientData, Split
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.networks import Exit
from cafe_flwr.results.folder import Results
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.settings import OPTIONS, Settings

SMALL = {
    "name": "small",
    "dataset": "digits",
    "num-clients": 5,
    "num-server-rounds": 4,
    "data.examples-per-client": 40,
    "dirichlet-alpha": 1.0,
    "local-steps": 2,
}


def small_settings(folder: Path, **changes: Any) -> Settings:
    """Settings of a run of about a tenth of a second, in a folder; changes as Python names, see :func:`key_of`."""
    changes = {key_of(name): value for name, value in changes.items()}
    settings = Settings.from_run_config({**SMALL, "results-dir": str(folder), **changes})
    unread = settings.unread().keys() - changes.keys()
    if unread:  # such as how data are dealt out, where clients have their own
        used = {key: value for key, value in SMALL.items() if key not in unread}
        return Settings.from_run_config({**used, "results-dir": str(folder), **changes})
    return settings


def key_of(name: str) -> str:
    """The key of a setting by its name with underscores, its table's too, or alone where one is meant: ``train_prior``
    or ``prior``; ``text_mu`` for one of ``cafedistill-text``."""
    name = name.replace("_", "-")
    spelt = {key: {key, key.replace(".", "-"), key.replace(".", "-").removeprefix("cafedistill-")} for key in OPTIONS}
    places = [key for key, names in spelt.items() if name in names]
    places = places or [key for key in OPTIONS if key.rpartition(".")[2] == name]
    return next((key for key in places if key.startswith(("train.", "cafedistill."))), next(iter(places), name))


def value_of(settings: Settings, name: str) -> Any:
    """The value of a setting by its name as for :func:`key_of`."""
    return settings.value(key_of(name))


def changed(settings: Settings, changes: dict[str, Any]) -> Settings:
    """Settings with other values for some keys."""
    return Settings.from_run_config({**settings.to_run_config(), **changes})


def digits_app() -> ClientApp:
    """The ClientApp of the settings, as ``client_app.py`` makes it; with caches of its own, like a new process."""
    return make_client_app(
        lambda context: build_networks(Settings.from_run_config(context.run_config)),
        lambda client, context: federation(Settings.from_run_config(context.run_config)).load(client),
        modality_of=lambda client, context: modality_of(Settings.from_run_config(context.run_config), client),
        state_dir=personal_of_the_run,
    )


def personal_of_the_run(context: Context) -> str:
    """Folder of the personal state of a run that has settings."""
    if not context.run_config:
        return ""
    return str(Settings.from_run_config(context.run_config).results / "personal")


# --- toys: networks and data of a few numbers, under the control of a test -------------------------------------------

INPUTS, CLASSES = 5, 3


def toy_network(exits: int = 3, width: int = 4, widths: Sequence[int] = ()) -> EarlyExitNetwork:
    """An MLP with an exit after every layer, of one width or of widths of their own."""
    widths = widths or [width] * exits
    layers = [nn.Sequential(nn.Linear(8 if k else INPUTS, 8), nn.Tanh()) for k in range(len(widths))]
    return EarlyExitNetwork(layers, [Exit(nn.Linear(8, width), width, CLASSES) for width in widths])


def toy_split(client: int, size: int, salt: int, classes: int = CLASSES) -> Split:
    """Examples of one client: every class around its own centre, one of them more often than the others."""
    rng = np.random.default_rng([client, salt])
    y = np.arange(size) % classes
    y[size // 2 :] = client % classes
    centres = np.random.default_rng(99).normal(size=(CLASSES, INPUTS)) * 1.5
    x = centres[y] + rng.normal(size=(size, INPUTS)) + 0.2 * client
    return Split(torch.from_numpy(x).float(), torch.from_numpy(y), torch.arange(size)[:, None])


def toy_data(client: int) -> ClientData:
    """Client i has 12 + 5i training, 6 calibration and 9 test examples."""
    return ClientData(toy_split(client, 12 + 5 * client, 0), toy_split(client, 6, 1), toy_split(client, 9, 2))


def toy_app(
    load: Callable[[int], ClientData] = toy_data, build: Callable[[], EarlyExitNetwork] = toy_network, **options: Any
) -> ClientApp:
    """A ready ClientApp of toy clients."""
    options.setdefault("state_dir", personal_of_the_run)
    return make_client_app(lambda context: build(), lambda client, context: load(client), **options)


# --- a run, and what it leaves behind --------------------------------------------------------------------------------


def run_small(settings: Settings, num_nodes: int = 2, app: Any = None, grid: InProcessGrid | None = None) -> Any:
    """Run the settings' federation in this process."""
    grid = grid or InProcessGrid(app or digits_app(), num_nodes, settings.to_run_config())
    return run_federation(grid, settings)


def run_until(settings: Settings, last_round: int, num_nodes: int = 2, app: Any = None) -> None:
    """Run the first rounds only, as a run that is stopped there would leave it."""
    with results_of(settings) as results:
        recorder = Recorder(results.folder, settings.to_run_config())
        grid = InProcessGrid(app or digits_app(), num_nodes, settings.to_run_config())
        try:
            build_strategy(settings, recorder, results.state).start(grid, num_rounds=last_round)
        finally:
            recorder.close()


@contextmanager
def results_of(settings: Settings) -> Iterator[Results]:
    """The results folder of a run, locked inside."""
    results = open_results_of(settings)
    with results.lock:
        yield results


def strict_json(text: str) -> Any:
    """JSON as the standard has it, without NaN."""

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


@dataclass
class Recorded:
    """The files of a run, without what may differ between equal runs: times, and the run's random token."""

    rounds: list[dict[str, Any]]
    summary: dict[str, Any]
    rows: pd.DataFrame
    networks: dict[int, dict[str, Tensor]]
    metadata: dict[int, dict[str, Any]]
    versions: dict[str, tuple[dict[str, str], dict[str, Tensor]]]
    run: str

    @classmethod
    def read(cls, folder: Path) -> Recorded:
        """Read a results folder."""
        rounds = [strict_json(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        summary = strict_json((folder / "summary.json").read_text())
        for line in [*rounds, summary]:
            del line["seconds"]
        paths = sorted((folder / "personal").glob("client-*.json"))
        metadata = {int(path.stem.split("-")[1]): json.loads(path.read_text()) for path in paths}
        tokens = {fact.pop("run") for fact in metadata.values()}
        for fact in metadata.values():
            fact.pop("context", None)  # names folders, and the node of many that hosted the client
        (versions,) = (folder / "personal" / "versions").iterdir()
        assert tokens <= {versions.name}
        return cls(
            rounds=rounds,
            summary=summary,
            rows=pd.read_parquet(folder / "clients.parquet"),
            networks={c: load_file(folder / "personal" / f"client-{c}.safetensors") for c in metadata},
            metadata=metadata,
            versions={
                str(path.relative_to(versions)): facts_and_tensors(path)
                for path in sorted(versions.rglob("*.safetensors"))
            },
            run=versions.name,
        )

    def assert_same(self, other: Recorded, *, but: Iterable[str] = ()) -> None:
        """Equal bit for bit, apart from keys of rounds and summary that are named."""
        but = set(but)

        def kept(line: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in line.items() if key not in but}

        assert [kept(line) for line in self.rounds] == [kept(line) for line in other.rounds]
        assert kept(self.summary) == kept(other.summary)
        pd.testing.assert_frame_equal(self.rows, other.rows, check_exact=True)
        assert list(self.networks) == list(other.networks)
        for client, tensors in self.networks.items():
            assert same_tensors(tensors, other.networks[client]), f"client {client}"
        assert self.metadata == other.metadata
        assert list(self.versions) == list(other.versions)
        for name, (metadata, tensors) in self.versions.items():
            assert metadata == other.versions[name][0], name
            assert same_tensors(tensors, other.versions[name][1]), name


def facts_and_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a safetensors file holds, but run and time; the order of its facts is left to chance by the library."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    for fact in ("run", "asked-at"):
        metadata.pop(fact, None)
    return metadata, load_file(path)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the tensors are equal bit for bit."""
    return sorted(a) == sorted(b) and all(torch.equal(a[name], b[name]) for name in a)


def same_arrays(a: Any, b: Any) -> bool:
    """Whether two of Flower's array records are equal bit for bit."""
    return list(a) == list(b) and all(a[name].data == b[name].data for name in a)


# --- apps and grids that misbehave -----------------------------------------------------------------------------------

Answer = Callable[[Message, Context], Message]


class FaultyApp:
    """A ClientApp in whose place ``fault(answer, message, context)`` is called; ``answer`` is the real app."""

    def __init__(self, app: ClientApp, fault: Callable[[Answer, Message, Context], Message]) -> None:
        self.app = app
        self.fault = fault

    def __call__(self, message: Message, context: Context) -> Message:
        """Handle a message, badly."""
        return self.fault(self.app, message, context)


class WatchedGrid(InProcessGrid):
    """Keeps every message with its reply; ``lose(message)`` says which messages never get one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.traffic: list[tuple[Message, Message]] = []
        self.lose: Callable[[Message], bool] = lambda message: False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push, and remember."""
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message, message_id in zip(messages, ids, strict=True):
            self.traffic.append((message, self._replies[message_id]))
            if self.lose(message):
                del self._replies[message_id]
        return ids

    def of_type(self, message_type: str) -> list[tuple[Message, Message]]:
        """Messages of a type, with their replies."""
        return [(m, r) for m, r in self.traffic if m.metadata.message_type == message_type]


class Killed(BaseException):
    """Ends the run at once, as kill -9 does: nobody catches it."""


class DyingGrid(InProcessGrid):
    """Dies at a message, counted from 1, before or after the clients have handled it."""

    def __init__(self, *args: Any, dies_at: int, handled: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left, self.handled = dies_at, handled

    def _handle(self, message: Message) -> Message:
        self.left -= 1
        if self.left == 0 and not self.handled:
            raise Killed
        reply = super()._handle(message)
        if self.left == 0:
            raise Killed
        return reply


class DeviceGrid(WatchedGrid):
    """Nodes as in deployment: node-config names their clients, and they come and go.

    ``hosted`` has the clients of every node; ``there`` the rounds (from, to) in which a node is registered, all if it
    is not named.
    """

    def __init__(
        self, app: Any, hosted: list[str], state: Path, there: dict[int, tuple[float, float]] | None = None
    ) -> None:
        super().__init__(app, len(hosted))
        for context, clients in zip(self.contexts.values(), hosted, strict=True):
            context.node_config = {"clients": clients, "state-dir": str(state)}
        self.there = there or {}
        self.round = 0

    def is_there(self, position: int) -> bool:
        """Whether the node at a position of ``hosted`` is registered now."""
        first, last = self.there.get(position, (0, float("inf")))
        return first <= self.round <= last

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are there in the round that is about to begin."""
        return [node for position, node in enumerate(self.contexts) if self.is_there(position)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push; when the messages of a round are under way, the next one is about to begin."""
        messages = list(messages)
        ids = super().push_messages(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                self.round = int(message.content["config"]["server-round"]) + 1
            else:
                self.round = max(self.round, 1)
        return ids

    def _handle(self, message: Message) -> Message:
        if not self.is_there(list(self.contexts).index(message.metadata.dst_node_id)):
            raise AssertionError("a message to a node that is not there")
        return super()._handle(message)


def asked(message: Message) -> list[int]:
    """Clients that a message is for."""
    return [int(client) for client in message.content["config"].get("clients", [])]
