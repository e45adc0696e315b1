"""Poisoned shared parts: bounds hold two of ten, robust means stay in the honest range, an alarm blames nobody."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from federations import FaultyApp, asked, changed, results_of, run_small, run_until, small_settings, toy_app
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

from cafe_flwr.core.schema import Schema
from cafe_flwr.server.options import Aggregation
from cafe_flwr.server.robust import clipped_mean, trimmed_mean
from cafe_flwr.wire.options import Bounds

ROBUST = ("median", "trimmed-mean", "clipped-mean")
WHOLE = Schema((("a", (2, 3)), ("b", (4,)), ("c", (2,))))
PARTS = (WHOLE, Schema((("a", (1, 2)), ("b", (4,)))), Schema((("b", (2,)),)), Schema((("a", (2, 3)),)))


def positions_of(part):
    """Where a part's values lie in the whole, written down anew."""
    places, start, shapes = [], 0, dict(part.entries)
    for name, shape in WHOLE.entries:
        grid = start + np.arange(math.prod(shape)).reshape(shape)
        if name in shapes:
            places += grid[tuple(map(slice, shapes[name]))].ravel().tolist()
        start += math.prod(shape)
    return places


@settings(deadline=None, max_examples=150)
@given(
    kinds=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.1, 0.2, 0.34, 0.49, "median"]),
)
def test_it_is_the_library_s_value_by_value_over_those_that_hold_it(kinds, seed, share):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=WHOLE.size).astype("f4")
    clients = [(PARTS[k], (rng.normal(size=PARTS[k].size) * 10.0 ** rng.integers(-3, 4)).astype("f4")) for k in kinds]
    rule = Aggregation("median") if share == "median" else Aggregation("trimmed-mean", share)
    found = trimmed_mean(before, WHOLE, clients, rule.cut)
    held = [[] for _ in before]
    for part, values in clients:
        for place, value in zip(positions_of(part), values, strict=True):
            held[place].append(np.float64(value))
    library = np.median if share == "median" else lambda values: trim_mean(values, share)
    expected = [library(values) if values else old for values, old in zip(held, before, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-12)
    mixed = [clients[i] for i in rng.permutation(len(clients))]
    assert trimmed_mean(before, WHOLE, mixed, rule.cut).tobytes() == found.tobytes()


@settings(deadline=None, max_examples=150)
@given(n=st.integers(3, 15), seed=st.integers(0, 10**6), share=st.sampled_from([0.2, 0.4, "median"]), data=st.data())
def test_a_minority_cannot_leave_the_range_of_the_honest(n, seed, share, data):
    """Whatever they send: below the trimmed share, every value is between two honest ones."""
    rule = Aggregation("median") if share == "median" else Aggregation("trimmed-mean", share)
    liars = data.draw(st.integers(0, rule.cut(n)))
    rng = np.random.default_rng(seed)
    honest = rng.normal(size=(n - liars, WHOLE.size)).astype("f4")
    lies = (rng.normal(size=(liars, WHOLE.size)) * 10.0 ** rng.integers(-2, 30)).astype("f4")
    rows = [(WHOLE, row) for row in rng.permutation(np.concatenate([honest, lies]))]
    mean = trimmed_mean(np.zeros(WHOLE.size, "f4"), WHOLE, rows, rule.cut)
    assert (mean >= honest.min(axis=0)).all()
    assert (mean <= honest.max(axis=0)).all()


@settings(deadline=None, max_examples=100)
@given(kinds=st.lists(st.integers(0, 3), min_size=1, max_size=9), seed=st.integers(0, 10**6))
def test_clipped_updates_keep_their_direction_and_are_no_longer_than_the_median(kinds, seed):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=WHOLE.size).astype("f4")
    places = [positions_of(PARTS[k]) for k in kinds]
    ends = [
        (before[where] + rng.normal(size=len(where)) * 10.0 ** rng.integers(-2, 5)).astype("f4") for where in places
    ]
    updates = [end.astype("f8") - before[where] for end, where in zip(ends, places, strict=True)]
    lengths = [float(np.linalg.norm(update)) for update in updates]
    total, count = np.zeros(WHOLE.size), np.zeros(WHOLE.size)
    for where, update, length in zip(places, updates, lengths, strict=True):
        total[where] += update * min(1.0, np.median(lengths) / length)
        count[where] += 1
    found = clipped_mean(before, WHOLE, [(PARTS[k], end) for k, end in zip(kinds, ends, strict=True)])
    np.testing.assert_allclose(found, before + total / np.maximum(count, 1), rtol=2e-7, atol=1e-12)
    same = clipped_mean(before, WHOLE, [(WHOLE, before)] * 3)  # nobody moves: nothing is divided by zero
    assert same.tobytes() == before.tobytes()


# --- in a federation -------------------------------------------------------------------------------------------------

HOSTILE = (2, 5)


def poisoned(update=lambda u: u, examples=lambda n: n, app=None, hostile=HOSTILE):
    """An app some of whose clients, one on a node, send another update and another number of examples."""
    sizes = {}

    def lie(answer, message, context):
        reply = answer(message, context)
        if context.node_config["partition-id"] not in hostile:
            return reply
        content = reply.content
        if message.metadata.message_type == "query":
            config = dict(content["config"])
            sizes["shared"] = sum(math.prod(shape) for _, shape in json.loads(config["shared"]))
            content["config"] = ConfigRecord({**config, "num-examples": [examples(n) for n in config["num-examples"]]})
        if message.metadata.message_type == "train":
            flat, size = content["arrays"]["flat"].numpy().copy(), sizes["shared"]
            sent = message.content["arrays"]["flat"].numpy()[:size]
            flat[:size] = sent + update(flat[:size] - sent)
            content["arrays"] = ArrayRecord({"flat": Array(flat)})
            metrics = dict(content["metrics"])
            content["metrics"] = MetricRecord(
                {**metrics, "num-examples": [examples(n) for n in metrics["num-examples"]]}
            )
        return reply

    return FaultyApp(app or toy_app(), lie)


def federate(folder, app=None, **changes):
    """Lines of the rounds of ten toys, one on each node, and the mean accuracy of those that are never hostile."""
    kept = {"num_clients": 10, "num_server_rounds": 6, "batch_size": 8, "round_retries": 0, "evaluate_every": 6}
    run = small_settings(folder, **{**kept, **changes})
    run_small(run, num_nodes=10, app=app or toy_app())
    lines = [json.loads(line) for line in (run.results / "rounds.jsonl").read_text().splitlines()]
    rows = pd.read_parquet(run.results / "clients.parquet")
    honest = rows[(rows.phase == "final") & ~rows.client.isin(HOSTILE)]
    assert honest.client.nunique() == 8
    return lines, float(honest.accuracy.mean())


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Accuracy when nobody is hostile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        lines, accuracy = federate(tmp_path_factory.mktemp("honest"))
    assert all(line["left_out"] == {} and "alarm" not in line for line in lines)
    return accuracy


def of_size(times):
    """The examples of a client that says it has so many times as many; 2⁴⁰ for 0."""
    return lambda n: n * times if times else 2**40


ATTACKS = {
    "tenfold": (lambda u: -10 * u, of_size(1)),
    "10⁴ × the examples": (lambda u: -u, of_size(10**4)),
    "2⁴⁰ examples": (lambda u: -u, of_size(0)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_default_bounds_hold_two_of_ten(tmp_path, no_report, honest, attack):
    """Who is hostile is left out, or counts as one of median length; who is honest never is, and keeps its accuracy."""
    lines, accuracy = federate(tmp_path, poisoned(*ATTACKS[attack]))
    bad = {str(client) for client in HOSTILE}
    said = {}
    for line in lines:
        assert set(line["left_out"]) <= bad
        assert "alarm" not in line
        said |= line["left_out"] | line["notes"]
    assert said.keys() >= bad
    assert all(re.search("examples, the median is|times the median", said[client]) for client in bad), said
    assert accuracy > honest - 0.08


@pytest.mark.parametrize("rule", ROBUST)
def test_robust_rules_hold_two_of_ten_whatever_the_bounds(tmp_path, no_report, honest, rule):
    off = {"max_update_norm": 0.0, "max_update_ratio": 0.0, "max_examples_ratio": 0.0}
    app = poisoned(lambda u: -10 * u, of_size(10**4))
    lines, accuracy = federate(tmp_path, app, aggregation=rule, **off)
    assert all(line["left_out"] == {} for line in lines)
    assert accuracy > honest - 0.12


def test_a_grown_shared_part_is_an_alarm_and_nobody_s_fault(tmp_path, no_report, flower_log):
    """Without bounds against it, it grows: log and record say so, and the error names that cause for every client."""
    off = {"max_update_ratio": 0.0, "long_update_ratio": 0.0, "num_server_rounds": 12, "evaluate_every": 12}
    app = poisoned(lambda u: np.full_like(u, 8e5 / math.sqrt(len(u))), hostile=(2, 5, 7, 9))
    with pytest.raises(RuntimeError, match="failed for every client: the shared part itself has grown") as error:
        federate(tmp_path, app, **off)
    for line in str(error.value).splitlines()[1:]:
        assert "the shared part itself has grown" in line or "the shared part received has norm" in line, line
    assert "Round 1: the shared part itself has grown to norm" in flower_log.text()
    for line in (tmp_path / "small" / "rounds.jsonl").read_text().splitlines():
        assert "federation.aggregation = 'median'" in json.loads(line)["alarm"]


FORMS = {"alike": {}, "unequal": {"depth_shares": "1:0.2,2:0.4"}, "float16": {"wire_dtype": "float16"}}


@pytest.mark.parametrize(
    ("rule", "form"),
    [("median", "unequal"), ("trimmed-mean", "float16"), ("clipped-mean", "alike")],
)
def test_robust_numbers_do_not_depend_on_which_node_hosts_whom(tmp_path, no_report, rule, form):
    """A node sends its clients one by one: the same bits on 1, 2 and 5 nodes, and after a restart on another number."""
    runs = []
    for nodes in (1, 2, 5):
        run = small_settings(tmp_path / str(nodes), aggregation=rule, num_server_rounds=3, **FORMS[form])
        if nodes == 2:
            run_until(run, 2, num_nodes=3)
            run = changed(run, {"resume": True})
        run_small(run, num_nodes=nodes)
        with results_of(changed(run, {"resume": True})) as results:
            runs.append(results.state.shared)
    assert runs[0].tobytes() == runs[1].tobytes() == runs[2].tobytes()


def test_on_a_node_of_several_a_robust_rule_looks_at_every_client_alone(tmp_path, no_report):
    """The neighbours of a client beyond the bounds are not left out with it, as they are with a mean."""

    def lie(answer, message, context):
        reply = answer(message, context)
        if message.metadata.message_type == "train" and 2 in asked(message):
            flat = reply.content["arrays"]["flat"].numpy().copy()
            flat[-15:] *= np.float32(1e5)  # the head of the node's last client, 8
            reply.content["arrays"] = ArrayRecord({"flat": Array(flat)})
        return reply

    found = {}
    for rule in ("mean", "median"):
        run = small_settings(
            tmp_path / rule, aggregation=rule, num_clients=9, num_server_rounds=1, batch_size=8, evaluate_every=1
        )
        run_small(run, num_nodes=3, app=FaultyApp(toy_app(), lie))
        (line,) = (run.results / "rounds.jsonl").read_text().splitlines()
        found[rule] = sorted(json.loads(line)["left_out"])
    assert found == {"mean": ["2", "5", "8"], "median": ["8"]}


def test_a_robust_rule_for_a_method_that_shares_nothing_is_refused_before_round_1(tmp_path, no_report):
    run = small_settings(tmp_path, method="local", aggregation="median")
    with pytest.raises(ValueError, match=r"aggregation = 'median' combines .* local shares nothing"):
        run_small(run, app=toy_app())
    assert not (run.results / "rounds.jsonl").exists() or not (run.results / "rounds.jsonl").read_text()


def test_a_share_that_nothing_reads_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"federation\.trim-share = 0\.1 would change nothing"):
        small_settings(tmp_path, trim_share=0.1).check_read()


@pytest.mark.parametrize("wrong", [{"long_ratio": 0.5}, {"max_examples_ratio": 1.0}, {"long_ratio": math.nan}])
def test_impossible_bounds_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Bounds(**wrong)
