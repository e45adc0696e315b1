"""Mutations of the real messages of a run: what a hostile node or server may send is read, or refused in words.

Every mutation goes through Flower's serialisation, and is then read where its kind is read. Nothing else may be raised.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from benchmarks.mutations import delivered, mutated
from benchmarks.runs import ROOT
from cafe_flwr.app.run import build_strategy, calibrate, open_results_of
from cafe_flwr.core.files import to_json
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.results.summary import summarise
from cafe_flwr.risk.client_calibration import FoldCounts, decide, in_groups
from cafe_flwr.risk.client_calibration import Request as Asked
from cafe_flwr.risk.counts import pooled_path
from cafe_flwr.risk.options import Calibration
from cafe_flwr.server.aggregation import Aggregator
from cafe_flwr.server.calibration import Asker, kept
from cafe_flwr.server.callbacks import RunInfo
from cafe_flwr.server.directory import Directory
from cafe_flwr.server.evaluation import PersonalEvaluation
from cafe_flwr.server.replies import ReplyReader
from cafe_flwr.server.requests import PendingRequest
from cafe_flwr.server.rounds import num_bytes
from cafe_flwr.server.shared import ask_initial
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.settings import Settings
from cafe_flwr.wire.calibration import check_counts, counts_from_json, histogram_from_json, path_from_json
from cafe_flwr.wire.codec import check_server, prefixed, record_of
from cafe_flwr.wire.describe import QUERY
from cafe_flwr.wire.keys import Keys
from cafe_flwr.wire.reader import read
from cafe_flwr.wire.train import TrainRequest

MUTATIONS = 2000
LONGEST = 1200  # of a reason, in characters


@dataclass(frozen=True)
class Case:
    """A real message of a kind, and what reads it: the reasons of a refusal, none if it was read, or ValueError."""

    kind: str
    content: RecordDict
    read: Callable[[RecordDict], Mapping[Any, str]]


class _Listening(InProcessGrid):
    """Keeps the messages of a run with their replies."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.traffic: list[tuple[Message, Message]] = []

    def _handle(self, message: Message) -> Message:
        reply = super()._handle(message)
        self.traffic.append((message, reply))
        return reply


class _Answering(Grid):
    """A grid of one node, whose reply to any message has this content."""

    def __init__(self, content: RecordDict) -> None:
        self.content = content

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        for number, message in enumerate(sent):
            message.metadata.__dict__["_message_id"] = f"message-{number}"
        return [Message(self.content, reply_to=message) for message in sent]

    def get_node_ids(self) -> list[int]:
        return [1000]

    def set_run(self, run: Any) -> None: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return []

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return []

    @property
    def run(self) -> Any:
        return None


class Real:
    """A run of two rounds and its calibration: four clients on three nodes, one with two, not all as deep."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(ROOT))
        from client_app import app

        config = {"name": "x", "dataset": "digits", "num-clients": 4, "num-server-rounds": 2, "local-steps": 1}
        config |= {"data.examples-per-client": 60, "heterogeneity.depth-shares": "2:0.5,3:0.5"}
        config |= {"results-dir": str(folder)}
        settings = Settings.from_run_config(config)
        grid = self.grid = _Listening(app, 3, settings.to_run_config())
        results = open_results_of(settings)
        with results.lock:
            recorder = Recorder(results.folder, settings.to_run_config())
            self.strategy: FederatedStrategy = build_strategy(settings, recorder)
            self.strategy.start(grid)
            recorder.close()
        self.settings = settings
        calibrate(grid, settings)

    def last(self, message_type: str, clients: int = 0, step: str = "") -> tuple[Message, Message]:
        """The last message of a type, for this many clients and step if given, and its reply."""
        for message, reply in reversed(self.grid.traffic):
            config: Any = message.content["config"]
            known = not clients or len(config.get("clients", [])) == clients
            if message.metadata.message_type == message_type and known and config.get("step", step) == step:
                return message, reply
        raise LookupError(f"the run has no {message_type} {step}")

    def cases(self) -> list[Case]:
        """A case of every kind of message."""
        request, reply = self.last("query")
        found = [Case("query: request", request.content, self._query)]
        found.append(Case("query: description", reply.content, self._description))
        found.append(Case("query.initial: weights", self.last("query.initial")[1].content, self._initial))
        for kind in ("train", "evaluate"):
            for clients in (1, 2):
                request, reply = self.last(kind, clients)
                on = f"{clients} client{'s' * (clients > 1)}"
                found.append(Case(f"{kind}: request, {on}", request.content, self._request(request)))
                found.append(Case(f"{kind}: reply, {on}", reply.content, getattr(self, f"_{kind}")(request)))
        steps = ("histogram", "counts", "certificate")
        return found + [Case(f"query.calibrate: {step}", *self._calibration(step)) for step in steps]

    def _query(self, content: RecordDict) -> Mapping[Any, str]:
        config = record_of(Message(content, 5, "query"), "config", ConfigRecord)
        check_server(config)
        read(config, QUERY)
        return {}

    def _description(self, content: RecordDict) -> Mapping[Any, str]:
        directory = Directory(Keys(), self.strategy.directory.request)
        directory.refresh(_Answering(content))
        if not directory.nodes:
            return dict(enumerate(directory.problems))
        clients = list(directory.hosts)
        directory.note_held()
        _ = directory.agreement.macs, directory.unequal, directory.by_node(clients), directory.view(clients).size
        return {}

    def _initial(self, content: RecordDict) -> Mapping[Any, str]:
        try:
            ask_initial(_Answering(content), self.strategy.directory, 1.0)
        except RuntimeError as error:  # with the reasons of all nodes asked
            return {0: str(error).splitlines()[0]}
        return {}

    def _request(self, request: Message) -> Callable[[RecordDict], Mapping[Any, str]]:
        values: Any = request.content["config"]
        directory = self.strategy.directory
        kinds = {client: directory.kind(client) for client in values["clients"]}

        def reads(content: RecordDict) -> Mapping[Any, str]:
            TrainRequest.from_message(
                Message(content, 5, request.metadata.message_type),
                Keys(),
                shared_size=directory.view(values["clients"]).size,
                download_size={client: kind.download.size for client, kind in kinds.items()},
                num_exits=max(kind.num_exits for kind in kinds.values()),
            )
            return {}

        return reads

    def _pending(self, request: Message) -> list[PendingRequest]:
        values: Any = request.content["config"]
        return [PendingRequest(request, request.metadata.dst_node_id, list(values["clients"]))]

    def _train(self, request: Message) -> Callable[[RecordDict], Mapping[Any, str]]:
        strategy, state = self.strategy, self.strategy.state
        run, directory = strategy.constants, strategy.directory
        assert state is not None

        def reads(content: RecordDict) -> Mapping[Any, str]:
            message = Message(content, reply_to=request)
            num_bytes(message)
            replies = ReplyReader(run, directory).read(state, 2, self._pending(request), [message])
            if replies.good:
                assert np.isfinite(Aggregator(run, directory).shared(state, replies.good)).all()
                Aggregator(run, directory).training_metrics(strategy.train_metrics_aggr_fn, 2, replies.reports)
            return {**replies.left_out, **replies.notes}

        return reads

    def _evaluate(self, request: Message) -> Callable[[RecordDict], Mapping[Any, str]]:
        strategy, state = self.strategy, self.strategy.state
        assert state is not None
        info = RunInfo.of(strategy.directory, state, 2)

        def reads(content: RecordDict) -> Mapping[Any, str]:
            message = Message(content, reply_to=request)
            evaluation = PersonalEvaluation(strategy.constants, strategy.directory)
            replies = evaluation.read(self._pending(request), [message])
            to_json(summarise(self.settings.to_run_config(), info, replies.reports, [], None, 1.0))
            return replies.left_out

        return reads

    def _calibration(self, step: str) -> tuple[RecordDict, Callable[[RecordDict], Mapping[Any, str]]]:
        request, reply = self.last("query.calibrate", step=step)
        texts = {int(client): str(text) for client, text in prefixed(request.content["config"], "client.").items()}
        (_, first), calibration = self.last("query.calibrate", step="histogram"), Calibration()
        told = {c: histogram_from_json(str(first.content["config"][f"client.{c}"])) for c in texts}

        def counted(client: int, text: str) -> FoldCounts:
            counts, path = counts_from_json(text), path_from_json(texts[client])
            check_counts(counts, path, told[client])
            decide({client: counts}, path, Asked(calibration.risk, calibration.confidence_level))
            return counts

        def reads(content: RecordDict) -> Mapping[Any, str]:
            asker = Asker(_Answering(content), self.strategy.directory, 1.0)
            understood = {"histogram": asker.histogram, "counts": counted, "certificate": kept}[step]
            found = asker.ask(step, texts, understood)
            if step == "histogram" and found:
                for clients, _ in in_groups(found, Asked()):
                    pooled_path([found[client] for client in clients])
            return dict.fromkeys(texts.keys() - found.keys(), "is in the log")

        return reply.content, reads


def outcome(case: Case, content: RecordDict) -> str:
    """``"read"`` or ``"refused"``, after Flower's serialisation; any error but a ValueError in words is raised."""
    arrived = delivered(content)
    try:
        reasons = list(case.read(arrived).values())
    except ValueError as error:
        reasons = [str(error)]
    if not all(reason.isprintable() and 0 < len(reason) < LONGEST for reason in reasons):
        raise AssertionError(f"a reason is no line of text: {reasons!r:.200}")
    return "refused" if reasons else "read"


def main() -> None:
    """Print, per kind, how many mutations were refused, read and raised; fail if any raised."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    raised = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in Real(Path(folder)).cases():
            assert outcome(case, case.content) == "read", case.kind
            found: Counter[str] = Counter()
            for seed in range(MUTATIONS):
                try:
                    found[outcome(case, mutated(case.content, random.Random(seed)))] += 1
                except Exception as error:
                    found["raised"] += 1
                    print(f"  seed {seed}: {type(error).__name__}: {str(error)[:200]}")
            counts = ", ".join(f"{found[words]} {words}" for words in ("refused", "read", "raised"))
            print(f"{case.kind}: {MUTATIONS} mutations, {counts}")
            raised += found["raised"]
    print(f"hostile messages: {raised} raised (bound 0)")
    sys.exit(raised > 0)


if __name__ == "__main__":
    main()
