"""Clients, nodes and replies that go wrong: left out by name, the others' numbers are right, the run goes on."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from federations import (
    CLASSES,
    DeviceGrid,
    FaultyApp,
    Recorded,
    WatchedGrid,
    asked,
    run_small,
    same_arrays,
    same_tensors,
    small_settings,
    strict_json,
    toy_app,
    toy_data,
    toy_network,
    toy_split,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from cafe_flwr.core.options import options_of
from cafe_flwr.data import ClientData
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.methods import METHODS
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.server.directory import Directory
from cafe_flwr.server.strategy import FederatedStrategy

pytestmark = pytest.mark.usefixtures("no_report")

N = 4
BAD = 2  # the client that something is wrong with
T = 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Client 2 takes part in round 1 only, and nothing goes wrong."""
    settings = toy_settings(tmp_path_factory.mktemp("reference"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        patch.setattr(FederatedStrategy, "sample", lambda self, t, *_: [0, 1, 2, 3] if t == 1 else [0, 1, 3])
        arrays = run_small(settings, N, app=toy_app()).arrays
    return Recorded.read(settings.results), arrays


def toy_settings(folder, **changes):
    """All student exits train in every round, whoever takes part."""
    defaults = {"num_clients": N, "num_server_rounds": T, "batch_size": 8}
    options = options_of(METHODS[changes.get("method", "cafedistill")])
    defaults |= {o.key: "none" for o in options if o.field == "selection"}
    return small_settings(folder, **{**defaults, **changes})


def run_with(settings, fault, num_nodes=N, app=None):
    return run_small(settings, num_nodes, app=FaultyApp(app or toy_app(), fault))


def is_train(message, server_round):
    """Whether a message is the train message of a round."""
    return message.metadata.message_type == "train" and message.content["config"]["server-round"] == server_round


def lines_of(settings):
    return [strict_json(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]


def assert_left_out_in_round_2(settings, arrays, reference, reason, flower_log):
    """Client 2 is missing from round 2 in every record, with its reason; all others' numbers are those of a run in
    which it was not asked."""
    recorded, shared = Recorded.read(settings.results), reference[1]
    first, second = recorded.rounds
    assert first["left_out"] == {}
    assert list(second["left_out"]) == [str(BAD)]
    assert second["participants"] == [0, 1, 2, 3]
    assert reason in second["left_out"][str(BAD)]
    assert f"Round 2: client {BAD} is left out: {second['left_out'][str(BAD)]}" in flower_log.text()

    in_round_2 = recorded.rows[(recorded.rows["round"] == 2) & (recorded.rows.phase != "final")]
    assert sorted(in_round_2.client.unique()) == [0, 1, 3]
    for name in shared:
        np.testing.assert_allclose(arrays[name].numpy(), shared[name].numpy(), atol=1e-6)
    assert second["accuracy_per_exit"] == pytest.approx(reference[0].rounds[1]["accuracy_per_exit"], abs=1e-6)
    assert second["train_loss"] == pytest.approx(reference[0].rounds[1]["train_loss"], abs=1e-5)
    for client in (0, 1, 3):
        for name, tensor in recorded.networks[client].items():
            torch.testing.assert_close(tensor, reference[0].networks[client][name], rtol=0, atol=1e-6)
    state = Checkpoints(settings.results / "checkpoint").load()
    assert {client: record.seen for client, record in state.known.items()} == {0: 2, 1: 2, BAD: 1, 3: 2}


# --- replies that cannot be used ---


def flat_of(reply):
    return reply.content["arrays"]["flat"].numpy().copy()


def with_flat(change):
    def fault(reply):
        reply.content["arrays"] = ArrayRecord({"flat": Array(np.ascontiguousarray(change(flat_of(reply))))})

    return fault


def poke(index, value):
    def change(flat):
        flat[index] = value
        return flat

    return with_flat(change)


def with_arrays(change):
    def fault(reply):
        reply.content["arrays"] = ArrayRecord(change(reply.content["arrays"]["flat"]))

    return fault


def with_metrics(change):
    def fault(reply):
        metrics = dict(reply.content["metrics"])
        change(metrics)
        reply.content["metrics"] = MetricRecord(metrics)

    return fault


def with_config(change):
    def fault(reply):
        config = dict(reply.content["config"])
        change(config)
        reply.content["config"] = ConfigRecord(config)

    return fault


def without(record):
    def fault(reply):
        del reply.content[record]

    return fault


def broken_bytes(flat):
    return {"flat": Array(flat.dtype, flat.shape, flat.stype, flat.data[:-7])}


WIDTH = 4
HEAD = CLASSES * WIDTH + CLASSES
FAULTS = {
    "NaN": (poke(3, np.nan), "values in its array are NaN or infinite"),
    "infinity": (poke(-1, np.inf), "1 of the "),
    "double precision": (with_flat(lambda flat: flat.astype(np.float64)), "float64"),
    "half precision": (with_flat(lambda flat: flat.astype(np.float16)), "float16"),
    "whole numbers": (with_flat(lambda flat: flat.astype(np.int32)), "int32"),
    "text": (with_flat(lambda flat: flat.astype(str)), "float32, got <U"),
    "one value short": (with_flat(lambda flat: flat[:-1]), "values, expected "),
    "one value more": (with_flat(lambda flat: np.append(flat, flat[:1])), "values, expected "),
    "no values": (with_flat(lambda flat: flat[:0]), "its array has 0 values, expected "),
    "without the head": (with_flat(lambda flat: flat[:-HEAD]), "values, expected "),
    "two dimensions": (with_flat(lambda flat: flat[:, None]), "its array must be flat"),
    "half of the bytes": (with_arrays(broken_bytes), "its node's reply cannot be used"),
    "another name": (with_arrays(lambda flat: {"weights": flat}), "needs exactly one array, 'flat', found 'weights'"),
    "no array": (with_arrays(lambda flat: {}), "needs exactly one array, 'flat', found none"),
    "two arrays": (
        with_arrays(lambda flat: {"flat": flat, "more": flat}),
        "exactly one array, 'flat', found 'flat', 'm",
    ),
    "no arrays record": (without("arrays"), "needs a ArrayRecord named 'arrays', found 'metrics', 'config'"),
    "no metrics record": (without("metrics"), "needs a MetricRecord named 'metrics', found 'arrays', 'config'"),
    "no config record": (without("config"), "needs a ConfigRecord named 'config', found 'arrays', 'metrics'"),
    "no weight": (with_metrics(lambda m: m.pop("num-examples")), "its metrics need 1 values of 'num-examples', got []"),
    "no similarity": (with_metrics(lambda m: m.pop("similarity")), "its metrics need 2 values of 'similarity'"),
    "no accuracy": (with_metrics(lambda m: m.pop("accuracy-before")), "need 3 values of 'accuracy-before', got []"),
    "no loss": (with_metrics(lambda m: m.pop("train-loss")), "need 1 values of 'train-loss'"),
    "no seconds": (with_metrics(lambda m: m.pop("seconds-train")), "need 1 values of 'seconds-train'"),
    "an exit less": (
        with_metrics(lambda m: m.update({"ece-after": [0.1, 0.2]})),
        "need 3 values of 'ece-after', got [0",
    ),
    "a number for a list": (
        with_metrics(lambda m: m.update({"train-loss": 0.5})),
        "need 1 values of 'train-loss', got 0",
    ),
    "weight 0": (with_metrics(lambda m: m.update({"num-examples": [0]})), "'num-examples' must be"),
    "negative weight": (
        with_metrics(lambda m: m.update({"num-examples": [-5]})),
        "at least 1 for every client, got [-5]",
    ),
    "weight NaN": (with_metrics(lambda m: m.update({"num-examples": [float("nan")]})), "'num-examples' must be"),
    "weight infinite": (with_metrics(lambda m: m.update({"num-examples": [float("inf")]})), "'num-examples' must be"),
    "half an example": (with_metrics(lambda m: m.update({"num-examples": [20.5]})), "'num-examples' must be"),
    "more examples than it has": (with_metrics(lambda m: m.update({"num-examples": [10**6]})), "1000000"),
    "infinitely many test examples": (with_metrics(lambda m: m.update({"test-examples": [float("inf")]})), "infinity"),
    "similarity of two": (with_metrics(lambda m: m.update(similarity=[0.5, 2.0])), "must lie between −1 and 1"),
    "another network": (
        with_config(lambda c: c.update(digest="0" * 16)),
        "its network has fingerprint 0000000000000000,",
    ),
    "no fingerprint": (with_config(lambda c: c.pop("digest")), "its network has fingerprint None, expected "),
    "another round": (
        with_config(lambda c: c.update({"server-round": 1})),
        "round 1",
    ),
    "no round": (with_config(lambda c: c.pop("server-round")), "server-round"),
    "another client": (
        with_config(lambda c: c.update(clients=[3])),
        "reply cannot be used",
    ),
    "a client that is not there": (
        with_config(lambda c: c.update(clients=[77])),
        "reply cannot be used",
    ),
    "a failure of another": (
        with_config(lambda c: c.update({"failed-clients": [0], "failures": ["flood"]})),
        "it answers for clients [2, 0]",
    ),
    "nobody": (with_config(lambda c: c.pop("clients")), "it answers for clients []"),
    "a failure without reason": (with_config(lambda c: c.update({"failed-clients": [0]})), "reply cannot be used"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAULTS)
def test_a_reply_that_cannot_be_used_leaves_its_client_out(tmp_path, reference, flower_log, what):
    change, reason = FAULTS[what]

    def fault(answer, message, context):
        reply = answer(message, context)
        if is_train(message, 2) and asked(message) == [BAD]:
            change(reply)
        return reply

    settings = toy_settings(tmp_path)
    result = run_with(settings, fault)
    assert_left_out_in_round_2(settings, result.arrays, reference, reason, flower_log)


def test_an_exception_in_a_node_leaves_its_client_out(tmp_path, reference, flower_log):
    def fault(answer, message, context):
        if is_train(message, 2) and asked(message) == [BAD]:
            raise MemoryError("no more")
        return answer(message, context)

    settings = toy_settings(tmp_path)
    result = run_with(settings, fault)
    assert_left_out_in_round_2(settings, result.arrays, reference, "its node failed: MemoryError: no more", flower_log)


def test_a_reply_that_never_comes_leaves_its_client_out(tmp_path, reference, flower_log):
    settings = toy_settings(tmp_path)
    grid = WatchedGrid(toy_app(), N, settings.to_run_config())
    grid.lose = lambda message: is_train(message, 2) and asked(message) == [BAD]
    result = run_small(settings, grid=grid)
    reason = "no reply from its node"
    assert_left_out_in_round_2(settings, result.arrays, reference, reason, flower_log)


@pytest.mark.slow
def test_replies_lost_round_after_round_cost_only_those_rounds(tmp_path):
    """Client 2 trains in rounds 2, 3 and 4, but no reply arrives: each time, and in round 5, it starts from what it was
    last heard of, round 1, and that is still on its disk."""
    settings = toy_settings(tmp_path, num_server_rounds=6)
    grid = WatchedGrid(toy_app(), N, settings.to_run_config())
    grid.lose = lambda message: any(is_train(message, t) for t in (2, 3, 4)) and asked(message) == [BAD]
    run_small(settings, grid=grid)
    versions = [
        list(message.content["config"]["versions"]) for message, _ in grid.of_type("train") if asked(message) == [BAD]
    ]
    assert versions == [[0], [1], [1], [1], [1], [5]]
    assert [list(line["left_out"]) for line in lines_of(settings)] == [[], ["2"], ["2"], ["2"], [], []]
    kept = [name for name in Recorded.read(settings.results).versions if name.startswith(f"client-{BAD}/")]
    assert kept == [f"client-{BAD}/round-{t:06d}.safetensors" for t in (1, 5, 6)]


def test_an_error_that_the_server_reports_for_a_node_leaves_its_client_out(tmp_path, reference, flower_log):
    """Flower says so itself when a node is gone: the sender of that reply is the server, node 1."""

    class ServerReports(WatchedGrid):
        def _handle(self, message):
            if is_train(message, 2) and asked(message) == [BAD]:
                reply = Message(Error(5, "Node Unavailable"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1
                assert reply.metadata.src_node_id == 1
                return reply
            return super()._handle(message)

    settings = toy_settings(tmp_path)
    result = run_small(settings, grid=ServerReports(toy_app(), N, settings.to_run_config()))
    assert_left_out_in_round_2(settings, result.arrays, reference, "its node failed: Node Unavailable", flower_log)


def test_an_error_without_a_reason_is_reported_as_that(tmp_path, reference, flower_log):
    class Silent(WatchedGrid):
        def _handle(self, message):
            if is_train(message, 2) and asked(message) == [BAD]:
                return Message(Error(0), reply_to=message)
            return super()._handle(message)

    settings = toy_settings(tmp_path)
    result = run_small(settings, grid=Silent(toy_app(), N, settings.to_run_config()))
    assert_left_out_in_round_2(settings, result.arrays, reference, "its node failed: no reason given", flower_log)


@pytest.mark.slow
def test_a_reply_that_comes_twice_or_to_no_question_counts_once(tmp_path):
    class Echo(WatchedGrid):
        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            strays = [m for m, _ in self.traffic[:1]]
            for reply in list(replies):
                if reply.has_content() and "arrays" in reply.content and reply.metadata.message_type == "train":
                    stray = Message(reply.content, reply_to=strays[0])
                    stray.metadata.__dict__["_reply_to_message_id"] = "message-of-another-run"
                    replies += [reply, stray]
            return replies

    settings, plain = toy_settings(tmp_path), toy_settings(tmp_path, name="plain")
    echoed = run_small(settings, grid=Echo(toy_app(), N, settings.to_run_config()))
    assert same_arrays(echoed.arrays, run_small(plain, N, app=toy_app()).arrays)
    per_message = {"bytes_up", "bytes_up_per_client_round", "name"}
    Recorded.read(settings.results).assert_same(Recorded.read(plain.results), but=per_message)


# --- nodes that host several clients ---


def test_one_client_of_a_node_fails_and_the_others_of_it_count(tmp_path, reference, flower_log):
    """Two nodes: 0 and 2, 1 and 3. The data of client 2 cannot be read in round 2."""
    gone = []

    def load(client):
        if client == BAD and gone:
            raise OSError("disk full of holes")
        return toy_data(client)

    class Forgetful(WatchedGrid):
        """Every message meets a new process, as in deployment, so data is loaded anew."""

        def _handle(self, message):
            self.client_app = toy_app(load)
            if is_train(message, 2):
                gone.append(True)
            elif message.metadata.message_type == "evaluate":
                gone.clear()
            return super()._handle(message)

    settings = toy_settings(tmp_path)
    result = run_small(settings, grid=Forgetful(toy_app(load), 2, settings.to_run_config()))
    assert_left_out_in_round_2(settings, result.arrays, reference, "OSError: disk full of holes", flower_log)


def diverging(client):
    """Client 2 trains on what is no number."""
    data = toy_data(client)
    return replace(data, augment=lambda x, rng: x * torch.nan) if client == BAD else data


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [1, 2, N])
def test_a_client_whose_training_diverges_is_left_out_and_keeps_its_old_heads(tmp_path, flower_log, num_nodes):
    """Its reason names the tensors and says what may help; nothing of it is written or averaged; the others do as if it
    was not there, however they are hosted."""
    settings = toy_settings(tmp_path)
    result = run_small(settings, num_nodes, app=toy_app(diverging))
    for line in lines_of(settings):
        assert list(line["left_out"]) == [str(BAD)]
        reason = line["left_out"][str(BAD)]
        assert "training ended with NaN or infinite values in stages.0" in reason
        assert "lower learning-rate" in reason
        assert f"Round {line['round']}: client {BAD} is left out: {reason}" in flower_log.text()
    recorded = Recorded.read(settings.results)
    assert not [name for name in recorded.versions if name.startswith(f"client-{BAD}/")]
    without_it = toy_settings(tmp_path, name="without")
    other = run_small(without_it, N, app=toy_app(lambda client: refuse(client) or toy_data(client)))
    for name in result.arrays:
        np.testing.assert_allclose(result.arrays[name].numpy(), other.arrays[name].numpy(), atol=1e-6)


def refuse(client):
    if client == BAD:
        raise FileNotFoundError(f"no data of client {client} here")


def test_a_sum_that_no_float32_can_hold_is_like_an_infinite_one(tmp_path):
    """A node of two clients sends sums in float64: 1e300 is finite there, but not where it is used. Its clients are
    left out, the others go on."""

    def enlarge(flat):
        flat[:2].view(np.float64)[0] = 1e300
        return flat

    def fault(answer, message, context):
        reply = answer(message, context)
        if is_train(message, 1) and BAD in asked(message):
            with_flat(enlarge)(reply)
        return reply

    settings = toy_settings(tmp_path)
    run_with(settings, fault, num_nodes=2)
    first, second = lines_of(settings)
    assert sorted(first["left_out"]) == ["0", "2"]
    assert second["left_out"] == {}


# --- when all fail ---


@pytest.mark.slow
def test_when_all_clients_fail_the_run_ends_with_all_reasons_and_keeps_what_it_has(tmp_path, monkeypatch, flower_log):
    """Three rounds of four are on disk, in every file, and the run can be resumed when the fault is mended."""
    pages = []
    monkeypatch.setattr("cafe_flwr.app.run.write_page", lambda folder: pages.append(folder) or folder / "report.html")
    reasons = {0: "ValueError: node 0 burns", 1: "RuntimeError: node 1 drowns", 3: "KeyError: 'node 3'"}
    mended = []

    def fault(answer, message, context):
        if is_train(message, 4) and not mended:
            (client,) = asked(message)
            if client == 0:
                raise ValueError("node 0 burns")
            if client == 1:
                raise RuntimeError("node 1 drowns")
            if client == 3:
                raise KeyError("node 3")
            reply = answer(message, context)
            poke(0, np.nan)(reply)
            return reply
        return answer(message, context)

    settings = toy_settings(tmp_path, num_server_rounds=4)
    with pytest.raises(RuntimeError, match="round 4 failed for every client") as caught:
        run_with(settings, fault)
    for client, reason in reasons.items():
        assert f"client {client}: its node failed: {reason}" in str(caught.value)
        assert f"Round 4: client {client} is left out: its node failed: {reason}" in flower_log.text()
    assert f"client {BAD}: its node's reply cannot be used: 1 of the" in str(caught.value)

    assert [line["round"] for line in lines_of(settings)] == [1, 2, 3]
    table = pd.read_parquet(settings.results / "clients.parquet")
    assert table["round"].value_counts().to_dict() == dict.fromkeys((1, 2, 3), N * 2 * 3)
    assert Checkpoints(settings.results / "checkpoint").load().round == 3
    assert pages == [settings.results]

    mended.append(True)
    again = type(settings).from_run_config({**settings.to_run_config(), "resume": True})
    arrays = run_with(again, fault).arrays
    undisturbed = toy_settings(tmp_path, name="undisturbed", num_server_rounds=4)
    assert same_arrays(arrays, run_small(undisturbed, N, app=toy_app()).arrays)
    Recorded.read(settings.results).assert_same(Recorded.read(undisturbed.results), but=["name"])


def test_when_all_fail_in_the_first_round_there_is_still_a_record(tmp_path):
    def fault(answer, message, context):
        if message.metadata.message_type == "train":
            raise ValueError("never")
        return answer(message, context)

    settings = toy_settings(tmp_path)
    with pytest.raises(RuntimeError, match="round 1 failed for every client"):
        run_with(settings, fault)
    assert len(pd.read_parquet(settings.results / "clients.parquet")) == 0
    assert (settings.results / "rounds.jsonl").read_text() == ""


def test_when_no_node_can_start_the_run_ends_before_the_first_round_with_all_reasons(tmp_path):
    def fault(answer, message, context):
        raise ValueError(f"node {context.node_config['partition-id']} has no heart")

    settings = toy_settings(tmp_path, wait_seconds=0.0)
    with pytest.raises(RuntimeError, match="no client can take part") as caught:
        run_with(settings, fault, num_nodes=2)
    for node in (0, 1):
        assert f"a node failed to start: ValueError: node {node} has no heart" in str(caught.value)


def test_a_partition_that_the_data_cannot_serve_is_told_before_the_first_round(tmp_path):
    settings = small_settings(tmp_path, num_clients=30, examples_per_client=10, wait_seconds=0.0)
    with pytest.raises(RuntimeError, match=r"a node failed to start: ValueError: .* 30 clients .*lower num-clients"):
        run_small(settings)


# --- nodes that come, go, or are not what they should be ---


def device_run(tmp_path, hosted, there=None, app=None, **changes):
    settings = toy_settings(tmp_path, wait_seconds=0.0, **{"num_server_rounds": 4, **changes})
    grid = DeviceGrid(app or toy_app(), hosted, tmp_path / "state", there)
    return settings, grid, run_small(settings, grid=grid)


def test_nodes_that_register_late_join_when_they_are_there(tmp_path, flower_log):
    """Clients 0 and 1 are there from the start, 2 from round 2, 3 from round 4; all are evaluated in the end."""
    settings, _, _ = device_run(tmp_path, ["0,1", "2", "3"], {1: (2, 99), 2: (4, 99)})
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert "Starting without clients 2, 3" in flower_log.text()
    summary = strict_json((settings.results / "summary.json").read_text())
    assert [client["client"] for client in summary["clients"]] == [0, 1, 2, 3]


def test_the_summary_counts_clients_that_came_late(tmp_path):
    settings, _, _ = device_run(tmp_path, ["0,1", "2", "3"], {1: (2, 99), 2: (4, 99)})
    assert strict_json((settings.results / "summary.json").read_text())["num_clients"] == N


@pytest.mark.parametrize("method", ["cafedistill", "cafedistill-text"])
def test_a_late_client_starts_like_any_other_in_its_first_round(tmp_path, method):
    """It gets nothing from others yet, starts from the common initial heads, and is learnt from from then on.

    With cafedistill a round's weights are of those that took part in it, and what was mixed is sent in the next one.
    """
    plans = {}
    original = Recorder.on_round

    def watch(self, record, state):
        plans[record.server_round] = record.plan
        original(self, record, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "on_round", watch)
        device_run(tmp_path, ["0,1", "2", "3"], {1: (2, 99), 2: (99, 99)}, method=method)
    rows = {t: (list(plan.weight_rows), list(plan.weight_columns)) for t, plan in plans.items()}
    early, late = ([0, 1], [0, 1]), ([0, 1, 2], [0, 1, 2])
    assert [rows[t] for t in (1, 2, 3)] == [early, late, late] if method == "cafedistill" else [([], []), early, late]
    assert [sorted(plans[t].downloads) for t in (1, 2, 3)] == [[], [0, 1], [0, 1, 2]]


def test_a_node_that_leaves_is_named_and_comes_back(tmp_path, flower_log):
    """Client 2 is away in round 3, and returns under another node id; its heads still teach."""
    settings, grid, _ = device_run(tmp_path, ["0,1", "2", "3", "2"], {1: (0, 2), 3: (4, 99)})
    assert [line["participants"] for line in lines_of(settings)] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 3],
        [0, 1, 2, 3],
    ]
    assert "The node of clients 2 is gone" in flower_log.text()
    last = [m for m, _ in grid.of_type("train") if asked(m) == [2]][-1]
    assert list(last.content["config"]["downloads"]) == [2]
    versions = sorted(p.name for p in (tmp_path / "state" / "versions").rglob("client-2/*"))
    assert versions == ["round-000002.safetensors", "round-000004.safetensors"]


def test_when_all_nodes_leave_the_run_ends_and_keeps_what_it_has(tmp_path):
    settings = toy_settings(tmp_path, wait_seconds=0.0, num_server_rounds=4)
    grid = DeviceGrid(toy_app(), ["0,1", "2"], tmp_path / "state", {0: (0, 2), 1: (0, 2)})
    with pytest.raises(RuntimeError, match="no client can take part"):
        run_small(settings, grid=grid)
    assert [line["round"] for line in lines_of(settings)] == [1, 2]
    assert Checkpoints(settings.results / "checkpoint").load().round == 2


def test_when_all_nodes_leave_after_the_last_round_the_run_is_still_finished(tmp_path, flower_log):
    """Nobody is there to be evaluated; the rounds were run, and the summary says what it can."""
    there = {0: (0, 4), 1: (0, 4)}
    settings, _, _ = device_run(tmp_path, ["0,1", "2,3"], there)
    assert len(lines_of(settings)) == 4
    assert strict_json((settings.results / "summary.json").read_text())["accuracy"] is None


def test_two_nodes_that_host_the_same_client_the_first_has_it(tmp_path, flower_log):
    settings, grid, _ = device_run(tmp_path, ["0,1", "1,2", "3"], num_server_rounds=2)
    assert "the node of clients 1, 2: clients 1 are hosted by another node already" in flower_log.text()
    assert [asked(m) for m, _ in grid.of_type("train")] == [[0, 1], [2], [3]] * 2
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 2, 3]] * 2


def test_a_second_host_takes_over_when_the_first_fails(tmp_path):
    """Client 1 is on two nodes. The first fails in round 2: from round 3 on the second is asked, as long as it is
    well."""

    def fault(answer, message, context):
        if is_train(message, 2) and context.node_id == 1001:
            raise OSError("down")
        return answer(message, context)

    settings, grid, _ = device_run(tmp_path, ["0", "1", "1", "2,3"], app=FaultyApp(toy_app(), fault))
    by_round = {t: [] for t in (1, 2, 3, 4)}
    for message, _ in grid.of_type("train"):
        if asked(message) == [1]:
            by_round[message.content["config"]["server-round"]].append(message.metadata.dst_node_id)
    assert by_round == {1: [1001], 2: [1001], 3: [1002], 4: [1002]}
    assert [list(line["left_out"]) for line in lines_of(settings)] == [[], ["1"], [], []]


def test_a_second_host_takes_over_when_the_first_leaves(tmp_path):
    settings, _, _ = device_run(tmp_path, ["0", "1", "1,2", "3"], {1: (0, 2)})
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 2, 3]] * 4


def test_a_node_that_takes_longer_to_answer_than_a_round_waits_joins_when_it_has(tmp_path, monkeypatch):
    """A small device needs half a minute to start: its answer counts whenever it comes, and it is not asked twice.
    The answer of a node that has left in the meantime does not."""
    monkeypatch.setattr(Directory, "retry_seconds", 3600.0)

    class Slow(DeviceGrid):
        def questions(self, *nodes):
            return [m for m, _ in self.of_type("query") if m.metadata.dst_node_id in nodes]

        def pull_messages(self, message_ids):
            late = {m.metadata.message_id for m in self.questions(1001, 1002)} if self.round < 3 else set()
            return super().pull_messages([i for i in message_ids if i not in late])

    settings = toy_settings(tmp_path, wait_seconds=0.0, num_server_rounds=4)
    grid = Slow(toy_app(), ["0,3", "1", "2"], tmp_path / "state", {2: (0, 2)})
    run_small(settings, grid=grid)
    assert [line["participants"] for line in lines_of(settings)] == [[0, 3], [0, 3], [0, 1, 3], [0, 1, 3]]
    assert len(grid.questions(1001)) == 1


class ByNode:
    """Another app on every node."""

    def __init__(self, *apps):
        self.apps = apps

    def __call__(self, message, context):
        return self.apps[context.node_id - 1000](message, context)


def test_a_node_with_another_network_is_refused_by_name(tmp_path, flower_log):
    app = ByNode(toy_app(), toy_app(build=lambda: toy_network(width=5)), toy_app())
    settings, grid, _ = device_run(tmp_path, ["0,3", "1", "2"], app=app, num_server_rounds=2)
    assert "the node of clients 1 was refused: its network" in flower_log.text()
    assert [line["participants"] for line in lines_of(settings)] == [[0, 2, 3]] * 2
    assert not [m for m, _ in grid.traffic if asked(m) == [1]]


def test_a_node_that_asks_for_another_network_than_the_servers_trains_nothing(tmp_path):
    """The fingerprint goes both ways: a node that has been set up anew since it was asked refuses the request."""
    apps = [toy_app(), toy_app(), toy_app(), toy_app(build=lambda: toy_network(width=5))]

    def fault(answer, message, context):
        changed = message.metadata.message_type != "query" and context.node_config["partition-id"] == 3
        return (apps[3] if changed else answer)(message, context)

    settings = toy_settings(tmp_path)
    run_with(settings, fault)
    for line in lines_of(settings):
        assert list(line["left_out"]) == ["3"]
        assert "values, this node's network needs" in line["left_out"]["3"]


def test_a_node_whose_network_has_changed_names_but_not_size_trains_nothing(tmp_path):
    """As many values, other names: without the fingerprint, tensors would be taken for others."""

    def renamed():
        network = toy_network()
        network.stages[1] = torch.nn.Sequential(torch.nn.Tanh(), network.stages[1][0])  # 'stages.1.1', not 'stages.1.0'
        return network

    after = toy_app(build=renamed)

    def fault(answer, message, context):
        changed = message.metadata.message_type != "query" and context.node_config["partition-id"] == 3
        return (after if changed else answer)(message, context)

    settings = toy_settings(tmp_path)
    run_with(settings, fault)
    for line in lines_of(settings):
        assert list(line["left_out"]) == ["3"]
        assert "the server's network has fingerprint" in line["left_out"]["3"]


def test_the_odd_one_out_does_not_depend_on_node_ids(tmp_path, flower_log):
    """Ids are random: of nodes that register together, the one that hosts the first client is who the others must agree
    with."""
    app = ByNode(toy_app(build=lambda: toy_network(width=5)), toy_app(), toy_app())
    settings, _, _ = device_run(tmp_path, ["3", "1,2", "0"], app=app, num_server_rounds=1)
    assert "the node of clients 3 was refused: its network" in flower_log.text()
    assert lines_of(settings)[0]["participants"] == [0, 1, 2]


@pytest.mark.parametrize("swap", ["transposed", "renamed"])
def test_a_network_of_the_same_size_but_other_shapes_is_noticed(tmp_path, flower_log, swap):
    """As many values as the others': only names and shapes tell. 4×8 and 8×4, or two layers with swapped names."""

    def build():
        network = toy_network()
        if swap == "renamed":
            network.stages[1], network.stages[2] = torch.nn.ModuleDict({"a": network.stages[1][0]}), network.stages[2]
            return network
        network.exits[0].projection = torch.nn.Linear(4, 8)
        return network

    def total(network):
        return sum(t.numel() for t in network.state_dict().values())

    other = build()
    assert swap == "transposed" or total(other) == total(toy_network())
    app = ByNode(toy_app(), toy_app(build=build), toy_app())
    device_run(tmp_path, ["0,3", "1", "2"], app=app, num_server_rounds=1)
    refused = "the node of clients 1 was refused" in flower_log.text() or "client 1 is left out" in flower_log.text()
    assert refused


def test_a_node_that_can_serve_nobody_says_nothing_about_the_network_of_others(tmp_path, flower_log):
    """It comes first, with another network, and without the data of its client."""

    def missing(client):
        raise OSError("no such folder")

    app = ByNode(toy_app(missing, build=lambda: toy_network(width=5)), toy_app(), toy_app())
    settings, _, _ = device_run(tmp_path, ["0", "1", "2"], app=app, num_server_rounds=1)
    assert "client 0 is left out: no such folder" in flower_log.text()
    assert "was refused" not in flower_log.text()
    assert lines_of(settings)[0]["participants"] == [1, 2]


@pytest.mark.parametrize("version", ["0.0.9", "99.0"])
def test_a_node_with_another_version_of_the_package_is_refused_by_name(tmp_path, flower_log, version):
    def fault(answer, message, context):
        reply = answer(message, context)
        if message.metadata.message_type == "query" and context.node_id == 1001:
            with_config(lambda c: c.update(version=version))(reply)
        return reply

    settings, _, _ = device_run(tmp_path, ["0,3", "1", "2"], app=FaultyApp(toy_app(), fault), num_server_rounds=2)
    assert f"the node of clients 1 was refused: it runs cafe-flwr {version}, the server " in flower_log.text()
    assert [line["participants"] for line in lines_of(settings)] == [[0, 2, 3]] * 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(protocol=7), "speaks message protocol 7, this server speaks 1: install the same version"),
        (lambda c: c.pop("digest"), "answered without digest"),
        (lambda c: c.pop("shared"), "answered without shared"),
        (lambda c: c.clear(), "speaks message protocol None"),
    ],
)
def test_a_node_that_answers_in_another_language_is_refused(tmp_path, flower_log, change, reason):
    def fault(answer, message, context):
        reply = answer(message, context)
        if message.metadata.message_type == "query" and context.node_id == 1001:
            with_config(change)(reply)
        return reply

    settings, _, _ = device_run(tmp_path, ["0,3", "1", "2"], app=FaultyApp(toy_app(), fault), num_server_rounds=1)
    assert f"a node was refused: it {reason}" in flower_log.text()
    assert lines_of(settings)[0]["participants"] == [0, 2, 3]


def test_a_late_node_that_is_refused_is_named_too(tmp_path, flower_log):
    app = ByNode(toy_app(), toy_app(build=lambda: toy_network(width=5)))
    device_run(tmp_path, ["0,3", "1"], {1: (2, 99)}, app=app)
    assert "the node of clients 1 was refused" in flower_log.text()


def test_a_late_client_without_data_is_named_too(tmp_path, flower_log):
    app = toy_app(lambda client: refuse(client) or toy_data(client))
    device_run(tmp_path, ["0,3", "1,2"], {1: (2, 99)}, app=app)
    assert f"client {BAD} is left out: no data of client {BAD} here" in flower_log.text()


def test_a_first_node_that_is_refused_does_not_end_the_wait_for_the_others(tmp_path, monkeypatch):
    """The nodes of clients 1 and 2 register within wait-seconds, just after a broken one."""
    monkeypatch.setattr(Directory, "poll_seconds", 0.01)

    def fault(answer, message, context):
        if context.node_id == 1000:
            raise ValueError("broken")
        return answer(message, context)

    class Slow(DeviceGrid):
        looked = 0

        def get_node_ids(self):
            self.looked += 1
            return list(self.contexts)[: min(self.looked, 3)]

    settings = toy_settings(tmp_path, num_clients=3, wait_seconds=0.5)
    run_small(settings, grid=Slow(FaultyApp(toy_app(), fault), ["0", "1", "2"], tmp_path / "state"))
    assert lines_of(settings)[-1]["participants"] == [1, 2]


def test_it_waits_for_nodes_that_come_in_time(tmp_path, monkeypatch, flower_log):
    """Nodes register one by one; round 1 has them all."""
    monkeypatch.setattr(Directory, "poll_seconds", 0.01)

    class Slow(DeviceGrid):
        looked = 0

        def get_node_ids(self):
            self.looked += 1
            return list(self.contexts)[: self.looked // 3]

    settings = toy_settings(tmp_path, wait_seconds=30.0)
    run_small(settings, grid=Slow(toy_app(), ["3", "1", "0", "2"], tmp_path / "state"))
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 2, 3]] * T
    assert "Waiting for nodes: 0 here, 0 of 4 clients" in flower_log.text(level=0)


def test_simulated_nodes_are_waited_for_too(tmp_path, monkeypatch):
    """In simulation a node says how many there will be, so also those without clients are waited for."""
    monkeypatch.setattr(Directory, "poll_seconds", 0.01)

    class Slow(WatchedGrid):
        looked = 0

        def get_node_ids(self):
            self.looked += 1
            return list(self.contexts)[: self.looked // 2]

    settings = toy_settings(tmp_path, wait_seconds=30.0)
    run_small(settings, grid=Slow(toy_app(), 6, settings.to_run_config()))
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 2, 3]] * T


def test_too_few_nodes_are_an_error_that_says_what_to_do(tmp_path):
    settings = toy_settings(tmp_path, wait_seconds=0.0, min_available_nodes=3)
    grid = DeviceGrid(toy_app(), ["0,1", "2,3"], tmp_path / "state")
    with pytest.raises(RuntimeError, match=r"only 2 of the 3 nodes .*min-available-nodes.*raise wait-seconds"):
        run_small(settings, grid=grid)


# --- clients whose data is unusual ---


def nothing_of(split):
    return type(split)(*(part[:0] for part in split))


def test_a_client_without_training_data_is_left_out_by_name(tmp_path, flower_log):
    def load(client):
        data = toy_data(client)
        return ClientData(nothing_of(data.train), data.calibration, data.test) if client == BAD else data

    settings = toy_settings(tmp_path)
    result = run_small(settings, 2, app=toy_app(load))
    assert f"client {BAD} is left out: its training split is empty" in flower_log.text()
    assert f"Starting without clients {BAD}" in flower_log.text()
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 3]] * T
    other = toy_settings(tmp_path, name="without")
    without_it = run_small(other, N, app=toy_app(lambda client: refuse(client) or toy_data(client)))
    assert same_arrays(result.arrays, without_it.arrays)
    assert sorted(Recorded.read(settings.results).networks) == [0, 1, 3]


def test_a_client_whose_data_cannot_be_loaded_is_left_out_by_name(tmp_path, flower_log):
    settings = toy_settings(tmp_path)
    run_small(settings, 2, app=toy_app(lambda client: refuse(client) or toy_data(client)))
    assert f"client {BAD} is left out: no data of client {BAD} here" in flower_log.text()
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 3]] * T


@pytest.mark.parametrize("split", ["train", "calibration", "test"])
@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_that_are_not_classes_leave_their_client_out(tmp_path, flower_log, split, label):
    def load(client):
        data = toy_data(client)
        if client == BAD:
            getattr(data, split).y[1] = label
        return data

    settings = toy_settings(tmp_path)
    run_small(settings, 2, app=toy_app(load))
    low, high = (-1, 2) if label == -1 else (0, 3)
    assert f"client 2 is left out: its {split} split has labels {low}..{high}, expected 0..2" in flower_log.text()
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 3]] * T


@pytest.mark.parametrize("what", ["float64", "int32"])
def test_data_of_another_type_leaves_its_client_out(tmp_path, flower_log, what):
    """Inputs in double precision or labels in 32 bits would fail in the middle of training, in words of torch."""

    def load(client):
        data = toy_data(client)
        if client != BAD:
            return data
        x, y, source = data.train
        train = type(data.train)(x.double() if what == "float64" else x, y.int() if what == "int32" else y, source)
        return ClientData(train, data.calibration, data.test)

    settings = toy_settings(tmp_path)
    run_small(settings, 2, app=toy_app(load))
    assert f"client {BAD} is left out: its inputs must be float32 (" in flower_log.text()
    assert what in flower_log.text()
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 3]] * T


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"clients": "1,b"}, "node-config clients must be numbers like '3' or '3,7', got '1,b'"),
        ({"clients": ""}, "node-config clients must be numbers like '3' or '3,7', got ''"),
        ({}, "this node's node-config names no clients: give clients=<number> or partition-id=<number>"),
        ({"partition-id": 9, "num-partitions": 3}, "partition-id must be in 0..2 (num-partitions is 3), got 9"),
    ],
)
def test_a_node_config_that_names_no_clients_is_told_in_words(tmp_path, flower_log, config, reason):
    settings = toy_settings(tmp_path, wait_seconds=0.0)
    grid = DeviceGrid(toy_app(), ["0,2,3", "1"], tmp_path / "state")
    grid.contexts[1001].node_config = {"state-dir": str(tmp_path / "state"), **config}
    run_small(settings, grid=grid)
    assert f"a node failed to start: ValueError: {reason}" in flower_log.text()
    assert [line["participants"] for line in lines_of(settings)] == [[0, 2, 3]] * T


def test_a_node_trains_only_clients_it_hosts(tmp_path):
    """Whatever a server asks: clients' data is that of the node's own configuration."""
    loaded = []

    def load(client):
        loaded.append(client)
        return toy_data(client)

    app = toy_app(load)

    def fault(answer, message, context):
        if message.metadata.message_type == "train":
            config = dict(message.content["config"])
            config["clients"] = [c + 1 for c in config["clients"]]
            message.content["config"] = ConfigRecord(config)
        return answer(message, context)

    grid = DeviceGrid(FaultyApp(app, fault), ["0", "7"], tmp_path / "state")
    settings = toy_settings(tmp_path, num_clients=9, wait_seconds=0.0)
    with pytest.raises(RuntimeError, match="failed for every client"):
        run_small(settings, grid=grid)
    assert set(loaded) == {0, 7}


@pytest.mark.parametrize("which", ["test", "calibration", "both"])
def test_a_client_without_test_or_calibration_data_takes_part_and_its_unknowns_do_not_count(
    tmp_path, flower_log, which
):
    def load(client):
        data = toy_data(client)
        if client != BAD:
            return data
        calibration = data.calibration if which == "test" else nothing_of(data.calibration)
        return ClientData(data.train, calibration, data.test if which == "calibration" else nothing_of(data.test))

    settings, plain = toy_settings(tmp_path), toy_settings(tmp_path, name="plain")
    result = run_small(settings, 2, app=toy_app(load))
    assert same_arrays(result.arrays, run_small(plain, 2, app=toy_app()).arrays)
    recorded, usual = Recorded.read(settings.results), Recorded.read(plain.results)
    noted = f"client {BAD} has an empty test split; it takes part, but its accuracy is unknown" in flower_log.text()
    assert noted == (which != "calibration")
    if which == "calibration":
        assert recorded.summary["accuracy_per_exit"] == usual.summary["accuracy_per_exit"]
        return
    for server_round in (1, 2):
        of_others = usual.rows[
            (usual.rows["round"] == server_round) & (usual.rows.phase == "before") & (usual.rows.client != BAD)
        ]
        mean = of_others.groupby("exit").accuracy.mean().tolist()
        assert recorded.rounds[server_round - 1]["accuracy_per_exit"] == pytest.approx(mean)
        assert recorded.rounds[server_round - 1]["left_out"] == {}
    mine = recorded.rows[recorded.rows.client == BAD]
    assert len(mine) == 15
    assert mine.accuracy.isna().all()
    assert (mine.examples == 0).all()
    final = usual.rows[(usual.rows.phase == "final") & (usual.rows.client != BAD)]
    assert recorded.summary["accuracy_per_exit"] == pytest.approx(final.groupby("exit").accuracy.mean().tolist())
    assert sum(recorded.summary["dynamic"]["exit_shares"]) == pytest.approx(1.0)


def without_test_data(client):
    data = toy_data(client)
    return ClientData(data.train, data.calibration, nothing_of(data.test)) if client == BAD else data


def test_unknown_accuracies_do_not_spoil_flowers_averages(tmp_path):
    settings = toy_settings(tmp_path)
    result = run_small(settings, 2, app=toy_app(without_test_data))
    for metrics in result.train_metrics_clientapp.values():
        assert np.isfinite(metrics["accuracy-before"]).all()
        assert np.isfinite(metrics["loss-after"]).all()


def test_facts_of_a_client_without_test_data_are_json(tmp_path):
    settings = toy_settings(tmp_path)
    run_small(settings, 2, app=toy_app(without_test_data))
    metadata = strict_json((settings.results / "personal" / f"client-{BAD}.json").read_text())
    assert metadata["accuracy_per_exit"] == [None] * 3


def test_a_client_of_a_single_class_takes_part(tmp_path, flower_log):
    def load(client):
        if client == BAD:
            return ClientData(*(toy_split(client, n, salt, classes=1) for salt, n in enumerate((20, 6, 9))))
        return toy_data(client)

    settings = toy_settings(tmp_path)
    run_small(settings, 2, app=toy_app(load))
    assert f"client {BAD} has a single class in its training split; it takes part" in flower_log.text()
    recorded = Recorded.read(settings.results)
    assert [line["left_out"] for line in recorded.rounds] == [{}] * T
    assert [c["classes"] for c in recorded.summary["clients"]] == [3, 3, 1, 3]


def test_clients_of_one_or_two_examples_take_part(tmp_path):
    def load(client):
        return ClientData(*(toy_split(client, max(1, client), salt) for salt in range(3)))

    settings = toy_settings(tmp_path)
    run_small(settings, 2, app=toy_app(load))
    assert [line["left_out"] for line in lines_of(settings)] == [{}] * T


@pytest.mark.slow
def test_more_nodes_than_clients(tmp_path):
    """Seven nodes, four clients: three nodes have nothing to do and are not asked to do it."""
    settings = toy_settings(tmp_path)
    grid = WatchedGrid(toy_app(), 7, settings.to_run_config())
    arrays = run_small(settings, grid=grid).arrays
    assert len(grid.of_type("train")) == N * T
    other = toy_settings(tmp_path, name="four")
    assert same_arrays(arrays, run_small(other, N, app=toy_app()).arrays)


# --- the final evaluation ---


def final_fault(change):
    """Something goes wrong when client 2's node is asked for its final evaluation, after all the work is done."""

    def fault(answer, message, context):
        reply = answer(message, context)
        if message.metadata.message_type == "evaluate" and BAD in asked(message):
            change(reply)
        return reply

    return fault


def without_metric(reply):
    record = dict(reply.content[f"client-{BAD}"])
    del record["accuracy"]
    reply.content[f"client-{BAD}"] = MetricRecord(record)


def blow_up(reply):
    raise OSError("lightning")


@pytest.mark.parametrize("num_nodes", [2, N])
def test_a_node_that_fails_in_the_final_evaluation_is_named_and_the_rest_is_reported(tmp_path, flower_log, num_nodes):
    settings = toy_settings(tmp_path)
    run_with(settings, final_fault(blow_up), num_nodes)
    missing = [0, 2] if num_nodes == 2 else [2]
    for client in missing:
        assert f"no evaluation of client {client}: its node failed: OSError: lightning" in flower_log.text()
    summary = strict_json((settings.results / "summary.json").read_text())
    assert [c["client"] for c in summary["clients"]] == sorted({0, 1, 2, 3} - set(missing))


@pytest.mark.parametrize(
    "change",
    [
        without_metric,
        lambda reply: reply.content.update({f"client-{BAD}": MetricRecord({"nonsense": 1})}),
        lambda reply: reply.content[f"client-{BAD}"].update({"test-left": [1, 2, 3, 4, 5]}),
    ],
    ids=["no accuracy", "nonsense", "another length"],
)
def test_a_final_evaluation_that_cannot_be_used_is_left_out(tmp_path, flower_log, change):
    """A hundred rounds are not lost because of one report."""
    settings = toy_settings(tmp_path)
    run_with(settings, final_fault(change))
    summary = strict_json((settings.results / "summary.json").read_text())
    assert [c["client"] for c in summary["clients"]] == [0, 1, 3]


def test_a_client_that_fails_in_the_final_evaluation_does_not_take_its_neighbours_with_it(tmp_path):
    """Its personal state belongs to somebody else: a mistake in one folder."""
    settings = toy_settings(tmp_path)

    def fault(answer, message, context):
        if message.metadata.message_type == "evaluate" and BAD in asked(message):
            versions = next((settings.results / "personal" / "versions").iterdir())
            newest = "round-000002.safetensors"
            (versions / f"client-{BAD}" / newest).write_bytes((versions / "client-0" / newest).read_bytes())
        return answer(message, context)

    run_with(settings, fault, num_nodes=1)
    summary = strict_json((settings.results / "summary.json").read_text())
    assert [c["client"] for c in summary["clients"]] == [0, 1, 3]


def test_a_personal_state_of_another_client_is_refused_with_what_to_do(tmp_path):
    """Two clients that share a folder by mistake must not train each other's heads."""
    settings = toy_settings(tmp_path)

    def fault(answer, message, context):
        if is_train(message, 2):
            versions = next((settings.results / "personal" / "versions").iterdir())
            one = "round-000001.safetensors"
            (versions / f"client-{BAD}" / one).write_bytes((versions / "client-0" / one).read_bytes())
        return answer(message, context)

    run_with(settings, fault, num_nodes=1)
    left_out = lines_of(settings)[1]["left_out"]
    assert list(left_out) == [str(BAD)]
    assert "holds the state of client 0 in format 1, expected client 2" in left_out[str(BAD)]
    assert "give every client its own state folder" in left_out[str(BAD)]


# --- the engine itself ---


def test_the_engine_needs_a_node():
    with pytest.raises(ValueError, match="num_nodes must be at least 1, got 0"):
        InProcessGrid(toy_app(), 0)


@pytest.mark.slow
def test_what_a_client_does_to_a_message_does_not_reach_the_server(tmp_path):
    """In Flower every message is a copy; so it is here."""

    def fault(answer, message, context):
        reply = answer(message, context)
        if "config" in message.content:
            message.content["config"]["seed"] = 666
            message.content["config"]["clients"] = [9]
        message.content.clear()
        return reply

    settings, plain = toy_settings(tmp_path), toy_settings(tmp_path, name="plain")
    grid = WatchedGrid(FaultyApp(toy_app(), fault), 2, settings.to_run_config())
    arrays = run_small(settings, grid=grid).arrays
    assert same_arrays(arrays, run_small(plain, 2, app=toy_app()).arrays)
    for message, _ in grid.of_type("train"):
        assert message.content["config"]["seed"] == 0
        assert asked(message) in ([0, 2], [1, 3])
        assert set(message.content) == {"arrays", "config"}


def test_records_are_valid_flower_records(tmp_path):
    """Every message survives Flower's own serialisation, which refuses what its records may not hold."""
    settings = toy_settings(tmp_path)
    grid = WatchedGrid(toy_app(), 2, settings.to_run_config())
    run_small(settings, grid=grid)
    assert len(grid.traffic) > 6
    for exchange in grid.traffic:
        for message in exchange:
            wire = recorddict_to_proto(message.content).SerializeToString()
            back = recorddict_from_proto(RecordDictProto.FromString(wire))
            assert list(back) == list(message.content)
            for key, record in message.content.items():
                assert type(back[key]) is type(record)
                assert {name: repr(value) for name, value in back[key].items()} == {
                    name: repr(value) for name, value in record.items()
                }


def test_heads_of_others_never_travel_to_a_client(tmp_path):
    """What a node gets for a client is the shared part and a mixture, never another client's head bit for bit."""
    settings = toy_settings(tmp_path, num_server_rounds=3, mu=1.0)
    grid = WatchedGrid(toy_app(), N, settings.to_run_config())
    run_small(settings, grid=grid)
    heads = {}
    for message, reply in grid.of_type("train"):
        server_round = message.content["config"]["server-round"]
        (client,) = asked(message)
        if server_round > 1:
            down = message.content["arrays"]["flat"].numpy()[-HEAD:]
            for other in range(N):
                assert other == client or not np.array_equal(down, heads[server_round - 1, other])
        heads[server_round, client] = flat_of(reply)[-HEAD:]
    assert len(heads) == 3 * N
    one, two = (Recorded.read(settings.results).networks[c] for c in (0, 1))
    assert not same_tensors(one, two)
