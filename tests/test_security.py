"""A hostile client among honest ones, in a real federation: named with the reason, and the others hardly notice."""

import re

import numpy as np
import pytest
from federations import CLASSES, FaultyApp, WatchedGrid, asked, small_settings, strict_json, toy_app
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from cafe_flwr.app.run import build_strategy, open_results_of
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.methods import CafeDistillMethod
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.server.shared import ask_initial
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.wire.bounds import MAX_NORM, check_norm, far_longer, room_for
from cafe_flwr.wire.keys import Keys
from cafe_flwr.wire.options import Bounds, Privacy
from cafe_flwr.wire.train import Expected, TrainReply, TrainRequest

N, T, BAD = 6, 4, 2
HEAD = CLASSES * 4 + CLASSES  # of the last exit, at the end of what a client sends


def federate(folder, fault=None, num_nodes=N, wire="float32", bounds=None, privacy=None, hosts=None, **changes):
    """The strategy after a run, and the lines of its rounds; ``fault`` changes the flat array of client 2's replies."""

    def meddle(answer, message, context):
        reply = answer(message, context)
        if message.metadata.message_type == "train" and BAD in asked(message) and fault is not None:
            flat = np.array(reply.content["arrays"]["flat"].numpy())
            reply.content["arrays"] = ArrayRecord({"flat": Array(np.ascontiguousarray(fault(flat)))})
        return reply

    defaults = {"num_clients": N, "num_server_rounds": T, "batch_size": 8}
    settings = small_settings(folder, **{**defaults, **changes})
    grid = WatchedGrid(FaultyApp(toy_app(), meddle), num_nodes, settings.to_run_config())
    results = open_results_of(settings)
    recorder = Recorder(results.folder, settings.to_run_config())
    try:
        strategy = build_strategy(settings, recorder)
        strategy.wire, strategy.privacy = wire, privacy or Privacy()
        strategy.bounds = bounds or Bounds()
        strategy.start(grid)
    finally:
        recorder.close()
        results.lock.close()
    lines = [strict_json(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    summary = strict_json((settings.results / "summary.json").read_text())
    return strategy, lines, summary, grid


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Nobody is hostile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        return federate(tmp_path_factory.mktemp("honest"))


@pytest.fixture(scope="module")
def honest_text(tmp_path_factory):
    """The same with the reading from the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        return federate(tmp_path_factory.mktemp("honest"), method="cafedistill-text")


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Client 2 is there, but nothing it sends is used: all its replies are half as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        return federate(tmp_path_factory.mktemp("without"), lambda flat: flat[: len(flat) // 2])


def change_head(factor):
    def fault(flat):
        flat[-HEAD:] *= np.float32(factor)
        return flat

    return fault


def set_all(value, start=0):
    def fault(flat):
        flat[start:] = value
        return flat

    return fault


# --- what is refused ---

REFUSED = {
    "NaN in the backbone": (lambda flat: np.where(np.arange(len(flat)) == 3, np.nan, flat).astype("f4"), "NaN or inf"),
    "infinite head": (set_all(np.inf, start=-1), "1 of the .*values in its array are NaN or infinite"),
    "wrong shape": (lambda flat: flat[:-HEAD], "its array has .* values, expected "),
    "update of 1e9": (set_all(1e9), "its update has norm .*, at most 1e\\+06 is allowed"),
    "update of 300": (lambda flat: flat + 300, "its update has norm .* times the median.*at most 10 times"),
    "head of 1e9": (set_all(1e9, start=-HEAD), "what client 2 sends of its own has norm .*at most 1e\\+06 is allowed"),
    # 10⁵: a client of which nothing is used begins every round at zero again, and the last rounds' steps are small
    "inverted head × 100000": (change_head(-1e5), "what client 2 sends of its own has norm .* times the median"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_no_honest_client_sends_is_refused_by_name_and_the_others_go_on(tmp_path, no_report, without, what):
    """In every round; the others' numbers are those of a run in which nothing of client 2 is used, to the bit."""
    fault, reason = REFUSED[what]
    strategy, lines, _, _ = federate(tmp_path, fault)
    for line in lines:
        assert list(line["left_out"]) == [str(BAD)]
        assert re.search(reason, line["left_out"][str(BAD)]), line["left_out"]
        assert line["suspicious"] == {}
    expected, expected_lines, _, _ = without
    assert strategy.state.shared.tobytes() == expected.state.shared.tobytes()
    assert sorted(strategy.state.known) == [0, 1, 3, 4, 5]
    for client, record in strategy.state.known.items():
        assert record.upload.tobytes() == expected.state.known[client].upload.tobytes()
    assert [line["accuracy_per_exit"] for line in lines] == [line["accuracy_per_exit"] for line in expected_lines]


@pytest.mark.slow
def test_the_bounds_are_the_strategys(tmp_path, no_report):
    """Without bounds on the ratio, the head ×1000 comes in; with a tight absolute one, nothing does."""
    options = {"bounds": Bounds(max_ratio=0), "method": "cafedistill-text"}
    _, lines, _, _ = federate(tmp_path / "a", change_head(-1000), **options)
    assert all(line["left_out"] == {} for line in lines)
    with pytest.raises(RuntimeError, match=r"round 1 failed for every client:(.|\n)*at most 0.0001 is allowed"):
        federate(tmp_path / "b", bounds=Bounds(max_norm=1e-4))


def test_on_a_node_of_several_clients_the_whole_reply_is_refused(tmp_path, no_report):
    """Its sum cannot be taken apart: clients 2 and 5 of node 2 of 3 are left out, client 2 is named."""

    def fault(flat):
        flat[-2 * HEAD : -HEAD] *= np.float32(-1e5)  # of client 2; client 5 comes after it
        return flat

    _, lines, _, _ = federate(tmp_path, fault, num_nodes=3)
    for line in lines:
        assert list(line["left_out"]) == ["2", "5"]
        assert "what client 2 sends of its own has norm" in line["left_out"]["5"]


def test_a_few_honest_clients_with_far_more_data_may_send_more():
    """The bound grows with the examples behind it; two cannot outvote each other; zeros are no measure."""
    assert far_longer([1, 1, 1, 150], 100, room_for([10, 10, 10, 10])) == [3]
    assert far_longer([1, 1, 1, 150], 100, room_for([10, 10, 10, 20])) == []
    assert far_longer([1, 1000], 100) == []
    assert far_longer([0, 0, 0, 5], 100) == []
    assert far_longer([1, 1, 1, 1e30], 0) == []
    assert far_longer([], 100, room_for([])) == []


@pytest.mark.parametrize("wrong", [{"max_norm": -1}, {"max_ratio": np.nan}, {"max_ratio": 0.5}, {"max_norm": np.inf}])
def test_impossible_bounds_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Bounds(**wrong)


def test_norms_are_measured_in_double_precision():
    check_norm(np.full(10**4, 3000.0, dtype=np.float16), 3.1e5, "it")  # squares are beyond float16
    with pytest.raises(ValueError, match="it has norm 3e"):
        check_norm(np.full(10**4, 3000.0, dtype=np.float16), 2.9e5, "it")


# --- what is bounded ---


@pytest.mark.slow
@pytest.mark.parametrize("factor", [-12.0, 12.0])
def test_a_long_head_is_in_nobodys_mixture_and_is_named_or_refused(tmp_path, no_report, honest, flower_log, factor):
    """Its client goes on from it, so that it is longer in every round it is used: then it is beyond the bounds."""
    strategy, lines, summary, _ = federate(tmp_path, change_head(factor))
    assert (lines[0]["left_out"], list(lines[0]["suspicious"])) == ({}, [str(BAD)])
    assert re.search("its norm .* times the median", lines[0]["suspicious"][str(BAD)])
    assert "client 2 gets almost no weight with other clients: its norm" in flower_log.text()
    for line in lines:
        assert [*line["left_out"], *line["suspicious"]] == [str(BAD)]
    for client in (0, 1, 3, 4, 5):
        mine, theirs = (run.state.known[client].upload for run in (strategy, honest[0]))
        assert np.linalg.norm(mine) < 1.5 * np.linalg.norm(theirs)
    assert summary["accuracy"] == pytest.approx(honest[2]["accuracy"], abs=0.08)


def test_an_inverted_head_does_little_harm(tmp_path, no_report, honest):
    """Its update points elsewhere, so that matching itself gives it little weight; of usual length, it is not named."""
    _, lines, summary, _ = federate(tmp_path, change_head(-1.0))
    assert all(line["left_out"] == line["suspicious"] == {} for line in lines)
    assert summary["accuracy"] == pytest.approx(honest[2]["accuracy"], abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [-1.0, -9.0, 9.0])
def test_an_unusual_head_teaches_next_to_nothing_and_is_named(tmp_path, no_report, honest_text, flower_log, factor):
    """Inverted or 9 times as long: within the bounds of messages. It is in no list of those left out, its backbone
    counts, and no honest client is taught more than 1 % by it."""
    strategy, lines, summary, _ = federate(tmp_path, change_head(factor), method="cafedistill-text")
    assert all(line["left_out"] == {} for line in lines)
    assert lines[0]["suspicious"] == {}  # nobody teaches yet
    for line in lines[1:]:
        assert list(line["suspicious"]) == [str(BAD)]
        expected = "largest cosine to any other is -" if factor < 0 else "its norm .* times the median"
        assert re.search(expected, line["suspicious"][str(BAD)])
    assert "client 2 gets almost no weight with other clients: its " in flower_log.text()
    plan = strategy.state.plan
    column = list(plan.weight_columns).index(BAD)
    others = [row for row, client in enumerate(plan.weight_rows) if client != BAD]
    assert plan.weights[others, column].max() <= 0.01
    # Honest clients learn about as well as with an honest client 2, and their heads are nearly those without one.
    assert summary["accuracy"] == pytest.approx(honest_text[2]["accuracy"], abs=0.08)
    for client in (0, 1, 3, 4, 5):
        mine, theirs = (run[0].state.known[client].upload for run in ((strategy,), honest_text))
        assert np.linalg.norm(mine - theirs) < 0.1 * np.linalg.norm(theirs)


def test_without_anything_unusual_nobody_is_named_and_the_record_says_so(honest):
    for line in honest[1]:
        assert line["suspicious"] == {}
        assert line["left_out"] == {}


# --- what a node refuses ---


def request_content(**changes):
    strategy_config = {
        "protocol": 1,
        "run": "ab" * 8,
        "seed": 0,
        "digest": "x",
        "server-round": 1,
        "num-rounds": 2,
        "resumable-from": 0,
        "clients": [0],
        "versions": [0],
        "active-exits": [True, False],
        "method": "cafedistill",
    }
    flat = changes.pop("flat", np.zeros(5, dtype=np.float32))
    config = {k: v for k, v in {**strategy_config, **changes}.items() if v != []}
    return RecordDict({"arrays": ArrayRecord({"flat": Array(flat)}), "config": ConfigRecord(config)})


def read_request(**changes):
    InProcessGrid(lambda message, context: message, 1)
    message = Message(request_content(**changes), 5, "train")
    return TrainRequest.from_message(message, Keys(), shared_size=5, download_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flat": np.float32([0, np.nan, 0, 0, 0])}, "the shared part received has values that are NaN"),
        ({"flat": np.full(5, 1e6, dtype=np.float32)}, "the shared part received has norm 2.236e.06, at most 1e.06"),
        ({"flat": np.zeros(5)}, "must be flat float32, got float64"),
        ({"flat": np.zeros(5, dtype=np.float16)}, "must be flat float32, got float16"),
        ({"wire-dtype": "float16"}, "must be flat float16, got float32"),
        ({"wire-dtype": "int8"}, "the server's values are 'int8', this node reads float32 and float16"),
        ({"versions": [0, 1]}, "names 1 clients, 2 versions of their state and 2 exits: they do not agree"),
        ({"versions": []}, "1 clients, 0 versions"),
        ({"clients": [0, 1], "versions": [0, 0], "active-exits": [True]}, "2 clients, 2 versions .* 1 exits"),
        ({"downloads": [0], "flat": np.float32([0] * 5 + [1e7, 0])}, "what client 0 is sent of its own has norm 1e.07"),
        ({"privacy.noise-multiplier": 2.0}, "need a clip_norm"),
    ],
)
def test_a_node_refuses_a_request_that_cannot_be_right(changes, message):
    assert read_request().clients == [0]
    with pytest.raises(ValueError, match=message):
        read_request(**changes)


def test_a_reply_of_another_protocol_is_refused():
    InProcessGrid(lambda message, context: message, 1)
    content = TrainReply(1, "x", np.zeros(0), [], {3: "no"}).to_content(Keys())
    content["config"]["protocol"] = 99
    content["metrics"] = MetricRecord()
    with pytest.raises(ValueError, match="it speaks message protocol 99, this server 1"):
        TrainReply.from_message(Message(content, 5, "train"), Keys(), Expected("x", 0, upload_size=0, num_exits=3))


# --- half precision ---


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [N, 2])
def test_float16_takes_half_of_the_bytes_and_keeps_the_numbers(tmp_path, no_report, honest, num_nodes):
    """Of every array, up and down; sums over a node's clients as well. Parameters agree to about 2⁻¹¹ of their size."""
    full, _, summary, wide = federate(tmp_path / "full", num_nodes=num_nodes)
    half, lines, half_summary, narrow = federate(tmp_path / "half", num_nodes=num_nodes, wire="float16")
    for a, b in zip(wide.of_type("train"), narrow.of_type("train"), strict=True):
        for one, two in zip(a, b, strict=True):
            first, second = (m.content["arrays"]["flat"].numpy() for m in (one, two))
            assert second.dtype == np.float16
            assert 2 * second.nbytes == first.nbytes
    np.testing.assert_allclose(half.state.shared, full.state.shared, atol=0.01)
    assert half.state.shared.dtype == np.float32
    assert half_summary["accuracy"] == pytest.approx(summary["accuracy"], abs=0.03)
    assert all(line["left_out"] == {} for line in lines)


@pytest.mark.slow
def test_float16_does_not_lose_steps_smaller_than_its_own(tmp_path, no_report):
    """Updates of 1e-5 of parameters of 0.3, where float16 has steps of 2e-4: as differences they arrive, so that after
    some rounds the average has moved as far as in float32."""
    moved = []
    for wire in ("float32", "float16"):
        settings = {"learning_rate": 1e-3, "num_server_rounds": 6, "classifier_start": "common"}
        strategy, _, _, grid = federate(tmp_path / wire, wire=wire, **settings)
        start = np.concatenate([a.numpy().ravel() for a in ask_initial(grid, strategy.directory, 5).values()])
        moved.append(strategy.state.shared - start)
    assert 0 < np.abs(moved[0]).max() < 2e-3
    assert np.linalg.norm(moved[1] - moved[0]) < 0.05 * np.linalg.norm(moved[0])


def test_values_beyond_float16_are_an_error_that_names_the_tensor(tmp_path, no_report):
    """Up: the client is left out. Down: the run stops before the round."""
    with pytest.raises(
        ValueError, match=r"the shared part of stages\.0\.0\.weight has a value of 70000, beyond float16"
    ):
        federate_from(tmp_path, 7e4)


def federate_from(folder, value):
    """A run in float16 whose first shared parameter begins at a value."""
    strategy = FederatedStrategy(
        method=CafeDistillMethod(), num_rounds=1, num_clients=2, wire="float16", bounds=Bounds(max_norm=1e9)
    )
    grid = InProcessGrid(toy_app(state_dir=lambda context: str(folder)), 2)
    strategy.directory.wait(grid, min_nodes=1, num_clients=2, seconds=5)
    arrays = ask_initial(grid, strategy.directory, 5)
    name = next(iter(arrays))
    first = arrays[name].numpy().copy()
    first.flat[0] = value
    strategy.start(grid, initial_arrays=ArrayRecord({**arrays, name: Array(first)}))


def test_a_client_whose_head_is_beyond_float16_is_left_out_by_name(tmp_path, no_report):
    """Noise of σC = 10⁶ is. Every client has it, so the run ends with the reason."""
    with pytest.raises(RuntimeError, match=r"the update of stages\.\d.* beyond float16 \(±65504\): set wire-dtype"):
        federate(
            tmp_path,
            wire="float16",
            privacy=Privacy(1e6, noise_multiplier=1.0),
            bounds=Bounds(max_norm=0, max_ratio=0),
        )


@pytest.mark.slow
def test_half_precision_and_privacy_agree(tmp_path, no_report):
    """Rounding comes after the noise: the server reads what the client released, to 11 bits."""
    strategy, lines, _, _ = federate(tmp_path, wire="float16", privacy=Privacy(1.0, noise_multiplier=0.01))
    assert all(line["left_out"] == {} for line in lines)
    assert np.isfinite(strategy.state.shared).all()
    assert strategy.bounds.max_norm == MAX_NORM
