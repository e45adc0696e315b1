"""Mutated real messages of every kind, through Flower's serialisation: read or refused in words, and runs end."""

import json
import logging
import random
from functools import partial

import numpy as np
import pytest
from federations import FaultyApp, run_small, small_settings, strict_json, toy_app
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.hostile import Real, outcome
from benchmarks.mutations import delivered, mutated
from cafe_flwr.app.run import calibrate
from cafe_flwr.core.text import MAX_TEXT, shown
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.server.directory import last_line
from cafe_flwr.server.rounds import num_bytes
from cafe_flwr.wire.codec import read_flat
from cafe_flwr.wire.keys import Keys
from cafe_flwr.wire.reader import read, share, whole, words
from cafe_flwr.wire.train import TrainRequest

N, BAD = 4, 2


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Real messages by kind; the log of what is refused is of no interest."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    yield {case.kind: case for case in Real(tmp_path_factory.mktemp("real")).cases()}
    logging.getLogger("flwr").setLevel(logging.INFO)


@pytest.mark.parametrize(
    "kind",
    [
        *("query: request", "query: description", "query.initial: weights"),
        *(
            f"{name}: {way}, {n}"
            for name in ("train", "evaluate")
            for n in ("1 client", "2 clients")
            for way in ("request", "reply")
        ),
        *("query.calibrate: histogram", "query.calibrate: counts", "query.calibrate: certificate"),
    ],
)
def test_whatever_arrives_is_read_or_refused_in_words(cases, kind):
    case = cases[kind]
    assert outcome(case, case.content) == "read"

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(0, 2**32))
    def holds(seed):
        outcome(case, mutated(case.content, random.Random(seed)))

    holds()
    assert len(cases) == 14


# --- values that cannot be ---


def put(record, kind=ConfigRecord, **values):
    """Changes values of a record of a content."""
    values = {key.replace("_", "-"): value for key, value in values.items()}
    return lambda content: content.__setitem__(record, kind({**content[record], **values}))


def final(**values):
    """Changes values of the only report of an evaluation."""

    def change(content):
        (record,) = content.metric_records
        put(record, MetricRecord, **values)(content)

    return change


def renamed(content):
    (record,) = content.metric_records
    content["client-77"] = content.pop(record)


numbers = partial(put, "metrics", MetricRecord)
EVIL = "\x1b[2J\u202e\n[ROUND 9/9] all is well" + "y" * 5000
NAN, INF = float("nan"), float("inf")
SCHEMAS = ("null", "[" * 10**5, '[["a",[1e999]]]', '[["a",[-1]]]', '[["a",[1]],["a",[1]]]', 5)
IMPOSSIBLE = {
    "train: reply, 1 client": [
        *(numbers(test_examples=[n]) for n in (1e308, 2**62, -1, 2.0, NAN)),
        *(numbers(local_steps=[n]) for n in (2**62, -1)),
        *(numbers(**{key: [s]}) for key in ("seconds_train", "seconds_evaluate") for s in (-1.0, NAN, INF, 1e20)),
        *(numbers(train_loss=[loss]) for loss in (INF, -INF, 1e300)),
        *(numbers(similarity=[2.0] * m) for m in (1, 2)),
        *(put("config", **{key: value}) for key in ("clients", "server-round") for value in ("x", 2.0, [2**62], [-1])),
        put("config", noted_clients=[3, 3], notes=["a", "b"]),
        put("config", notes=["a"]),
        put("config", failed_clients=[0], failures=[5]),
    ],
    "query: description": [
        *({"clients": [2, 2]}, {"num_examples": [0]}, {"num_examples": [2.0]}, {"clients": "2"}, {"clients": [INF]}),
        *({"kinds": 5}, {"kinds": ["[" * 10**5]}, {"kind_of": ["a"]}, {"kind_of": [9]}, {"problems": 5}),
        *({"macs": []}, {"macs": "abc"}, {"macs": [-1, 2, 3]}, {"num_nodes": "abc"}, {"num_nodes": 2**62}),
        *({"num_exits": 2.5}, {"num_parameters": -1}, {"digest": 5}, {"version": [1]}, {"name": EVIL}),
        *({key: text} for key in ("shared", "upload", "download") for text in SCHEMAS),
    ],
    "evaluate: reply, 1 client": [
        *(final(**{key: [1, 2]}) for key in ("test_correct", "accuracy", "calibration_left", "adapted_ece")),
        *(final(**{key: n}) for key in ("test_examples", "train_examples", "classes") for n in (-1, 10**6, 2**62, 0.5)),
        *(final(**{key: [value] * m}) for key in ("accuracy", "ece", "loss") for m in (2, 3) for value in (-1.0, INF)),
        *(final(test_changed=[2**62] * 102), final(ensemble=1.5), final(local_steps=0.5), final(client=77), renamed),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "place"), [(kind, i) for kind, changes in IMPOSSIBLE.items() for i in range(len(changes))]
)
def test_values_that_cannot_be_are_refused(cases, kind, place):
    case, change = cases[kind], IMPOSSIBLE[kind][place]
    content = delivered(case.content)
    (change if callable(change) else put("config", **change))(content)
    assert outcome(case, content) == "refused"


# --- whole runs ---


def hostile_run(folder, kind, change, **more):
    """A run in which client 2's replies of a kind are changed: its settings, the lines of its rounds, the summary."""

    def meddle(answer, message, context):
        reply = answer(message, context)
        if message.metadata.message_type == kind and context.node_config["partition-id"] == BAD:
            change(reply.content)
        return reply

    of = small_settings(folder, num_clients=N, num_server_rounds=2, wait_seconds=0.0, **more)
    run_small(of, N, app=FaultyApp(toy_app(), meddle))
    lines = [strict_json(line) for line in (of.results / "rounds.jsonl").read_text().splitlines()]
    return of, lines, strict_json((of.results / "summary.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        numbers(test_examples=[1e308]),
        numbers(accuracy_after=[NAN] * 3),
        numbers(ece_before=[-0.5, 0.0, 0.0]),
        put("config", failed_clients=[BAD], failures=[EVIL]),
    ],
)
def test_impossible_figures_of_a_round_leave_their_client_out(tmp_path, no_report, change):
    _, lines, summary = hostile_run(tmp_path, "train", change)
    for line in lines:
        assert list(line["left_out"]) == [str(BAD)]
        assert line["left_out"][str(BAD)].isprintable()
        assert len(line["left_out"][str(BAD)]) < 2 * MAX_TEXT
    assert "not_evaluated" not in summary


def test_an_empty_list_changes_nothing_and_a_note_is_one_line(tmp_path, no_report):
    _, lines, _ = hostile_run(tmp_path, "train", put("config", zzz=[], noted_clients=[BAD], notes=[EVIL]))
    assert lines[0]["left_out"] == {}
    assert lines[0]["notes"][str(BAD)].startswith("\\x1b[2J\\u202e\\n[ROUND")
    assert len(lines[0]["notes"][str(BAD)]) == MAX_TEXT


@pytest.mark.parametrize(
    "change", [final(accuracy=[0.5, 0.5]), final(test_correct=[1, 2]), final(train_examples=10**6)]
)
def test_a_run_that_has_trained_ends_with_its_summary_and_says_who_is_missing(tmp_path, no_report, change):
    _, _, summary = hostile_run(tmp_path, "evaluate", change)
    assert summary["not_evaluated"] == [BAD]
    assert [line["client"] for line in summary["clients"]] == [0, 1, 3]
    assert 0 <= summary["accuracy"] <= 1


def test_a_description_that_cannot_be_leaves_its_node_out(tmp_path, no_report, flower_log):
    _, lines, summary = hostile_run(tmp_path, "query", put("config", shared="[" * 10**5))
    assert [line["participants"] for line in lines] == [[0, 1, 3]] * 2
    assert "was refused: it says what cannot be: not JSON" in flower_log.text()
    assert summary["num_clients"] == 3


# --- calibration ---


def lies(which, **figures):
    """Changes of an answer to a step of calibration: counts of n examples of which none is wrong, for these clients."""

    def change(content):
        config = content["config"]
        (mine,) = [value for key, value in config.items() if key.startswith("client.")]
        if '"left"' not in mine:
            return
        n, size = figures["n"], len(json.loads(mine)[0]["left"])
        lie = json.dumps([{"n": n, "left": [n] * size, "wrong": [0] * size, "ever_wrong": [0] * size}] * 2)
        put("config", **{f"client.{client}": lie for client in which})(content)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lies(range(N), n=10**6),
        lies([0, BAD], n=3),
        lies([BAD], n=10**6),
        *(
            put("config", **{f"client.{BAD}": text})
            for text in ("xx", "[" * 10**5, "null", "[]", '{"edges": 5}', "[1, 2]")
        ),
        put("config", **{"client.77": "xx"}),
        put("config", **{"client.x": "xx"}),
        put("config", failed_clients=[0], failures=["no"]),
        lambda content: content.pop("config"),
    ],
)
def test_a_node_speaks_in_calibration_for_the_clients_it_was_asked_for(finished, change):
    of, expected = finished

    def meddle(answer, message, context):
        reply = answer(message, context)
        if message.metadata.message_type == "query.calibrate" and context.node_config["partition-id"] == BAD:
            change(reply.content)
        return reply

    grid = InProcessGrid(FaultyApp(toy_app(), meddle), N, of.to_run_config())
    found = {line["client"]: line["basis"] for line in calibrate(grid, of)["clients"]}
    assert found == {client: basis for client, basis in expected.items() if client != BAD}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and the basis of each client's certificate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        of, _, _ = hostile_run(tmp_path_factory.mktemp("finished"), "none", lambda content: None)
    grid = InProcessGrid(toy_app(), N, of.to_run_config())
    return of, {line["client"]: line["basis"] for line in calibrate(grid, of)["clients"]}


# --- what a node refuses ---

REQUEST = {
    "protocol": 1,
    "run": "ab" * 8,
    "seed": 0,
    "digest": "x",
    "server-round": 3,
    "num-rounds": 9,
    "resumable-from": 1,
    "clients": [0],
    "versions": [2],
    "active-exits": [True, False],
    "method": "cafedistill",
    "evaluate": True,
}


@pytest.mark.parametrize(
    "changes",
    [
        *({"num-rounds": n} for n in (0, -1, 2, 2.0, "x")),
        *({"server-round": t} for t in (0, -1, 10, 2**62, True)),
        *({"resumable-from": t} for t in (-5, 4, "1")),
        *({"local.momentum": 5.0}, {"local.momentum": "x"}, {"local.max-grad-norm": -1.0}, {"local.new": 1}),
        *({"active-exits": [True]}, {"active-exits": ["a", "b"]}, {"active-exits": [1, 0]}),
        *({"evaluate": "x"}, {"evaluate": 1}, {"publish": "x"}, {"plain-mean": 0}, {"wire-dtype": 5}),
        *({"versions": [3]}, {"versions": [-1]}, {"versions": [1.0]}, {"clients": [-1]}, {"clients": ["0"]}),
        *({"downloads": [1]}, {"downloads": [0, 0]}, {"seed": -1}, {"run": 5}, {"method": [1]}),
        *({"privacy.clip-norm": -1.0}, {"privacy.new": 1}),
    ],
)
def test_a_node_refuses_senseless_requests(changes):
    InProcessGrid(lambda message, context: message, 1)

    def received(values):
        flat = ArrayRecord({"flat": Array(np.zeros(5, dtype=np.float32))})
        message = Message(delivered(RecordDict({"arrays": flat, "config": ConfigRecord(values)})), 5, "train")
        return TrainRequest.from_message(message, Keys(), shared_size=5, download_size=2, num_exits=3)

    assert received(REQUEST).versions == [2]
    with pytest.raises(ValueError, match=r".{8,}"):
        received({**REQUEST, **changes})


# --- the reader ---


def test_texts_are_cut_and_made_printable_where_they_enter():
    assert shown("späßchen ✓") == "späßchen ✓"
    assert shown("a\tb\u2066\x7f\u2028") == "a\\tb\\u2066\\x7f\\u2028"
    assert len(shown("\u202e" * 10**6)) == MAX_TEXT
    assert last_line(f"Traceback\n  {EVIL}").isprintable()
    assert read({"why": [EVIL]}, {"why": words("k")})["why"] == [shown(EVIL)]


def test_lists_of_one_size_are_equally_long_and_missing_ones_are_empty():
    declared = {"clients": whole("n"), "accuracy": share("n")}
    assert read({}, declared) == {"clients": [], "accuracy": []}
    with pytest.raises(ValueError, match="its lists need 2 values of 'accuracy', got "):
        read({"clients": [0, 1]}, declared)
    with pytest.raises(ValueError, match=r"'clients' must be a whole number .* for every client, got \[True\]"):
        read({"clients": [True]}, declared)
    assert np.isnan(read({"clients": [0], "accuracy": [float("nan")]}, declared)["accuracy"]).all()


def test_an_array_that_says_it_is_huge_takes_no_memory():
    array = Array(np.zeros(3, dtype=np.float32))
    lie = Array(array.dtype, array.shape, array.stype, array.data.replace(b"(3,)", b"(10000000000000,)"[:4]))
    InProcessGrid(lambda message, context: message, 1)
    huge = Array(
        array.dtype,
        array.shape,
        array.stype,
        array.data.replace(b"'shape': (3,), }            ", b"'shape': (300000000000,), } "),
    )
    for one in (lie, huge):
        message = Message(RecordDict({"arrays": ArrayRecord({"flat": one})}), 5, "train")
        with pytest.raises(ValueError, match="its array"):
            read_flat(message, "arrays", "float32")


def test_bytes_of_empty_lists_are_counted_as_none():
    InProcessGrid(lambda message, context: message, 1)
    full, empty = (
        Message(RecordDict({"config": ConfigRecord({"a": 1, **more})}), 5, "train") for more in ({}, {"b": []})
    )
    assert num_bytes(empty) == num_bytes(full)
