"""What a node does not do, keep or say, whatever the server asks: bounds on requests, and texts without its paths."""

import math
import re
import traceback
from pathlib import Path

import pytest
import torch
from federations import DeviceGrid, FaultyApp, run_small, small_settings, strict_json, toy_app, toy_data
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_flwr.client.node_bounds import NodeBounds
from cafe_flwr.client.node_config import hosted
from cafe_flwr.client.texts import without_paths
from cafe_flwr.data import ClientData, Split
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.methods import METHODS
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.server.strategy import FederatedStrategy

pytestmark = pytest.mark.usefixtures("no_report")


def asked_for(changes, node_config=None, num_rounds=2, kinds=("train",), **options):
    """The reasons for which clients are left out when a server's requests are changed; a run of two clients."""
    reasons = []

    def meddle(answer, message, context):
        if message.metadata.message_type in kinds:
            message.content["config"] = ConfigRecord({**message.content["config"], **changes})
        try:
            return answer(message, context)
        except Exception as error:
            reasons.append(str(error))
            raise

    grid = InProcessGrid(FaultyApp(toy_app(**options), meddle), 2, node_config=node_config or {})
    strategy = FederatedStrategy(
        method=METHODS["cafedistill"](), num_rounds=num_rounds, wait_seconds=0, round_retries=0
    )
    try:
        strategy.start(grid)
    except RuntimeError as error:
        reasons.append(str(error))
    return "\n".join(reasons)


# --- how much is done for one request ---


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"local.steps": 10**6}, "max-steps"),
        ({"local.epochs": 10**6}, "max-epochs"),
        ({"local.epochs": 10**4, "local.batch-size": 1}, "max-examples"),
        ({"num-rounds": 2**40}, "max-rounds"),
        ({"server-round": 2**40, "num-rounds": 2**40}, "max-rounds"),
        ({"num-clients": 2**40}, "max-clients"),
    ],
)
def test_a_request_for_more_than_a_node_does_is_refused_before_it_is_begun(tmp_path, changes, key):
    found = asked_for(changes, {"state-dir": str(tmp_path), "max-examples": 50_000, "max-steps": 10**5})
    assert f"({key} in its node-config)" in found
    assert not list(tmp_path.rglob("*.safetensors"))


def test_steps_within_a_step_are_bounded_too(tmp_path):
    assert "at most 1000 adversarial-steps" in asked_for(
        {"method.adversarial-steps": 2**40}, {"state-dir": str(tmp_path)}
    )


@pytest.mark.parametrize("bounds", [{"max-steps": 1}, {"max-steps": "1"}])
def test_a_node_may_set_its_own_bounds(tmp_path, bounds):
    config = {"state-dir": str(tmp_path)}
    assert asked_for({"local.steps": 2}, {**config, **bounds}).count("this node takes at most 1 steps in a request")
    assert asked_for({"local.steps": 1}, {**config, **bounds}, kinds=("train", "evaluate")) == ""


def test_a_request_that_takes_too_long_stops_and_leaves_the_state(tmp_path):
    found = asked_for({"local.steps": 10**4}, {"state-dir": str(tmp_path), "max-seconds": 0.05})
    assert "training took longer than this node allows (max-seconds in its node-config)" in found
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("value", [0, -1, "many", math.nan, "", 1.5])
@pytest.mark.parametrize("key", ["max-steps", "max-seconds"])
def test_bounds_that_are_none_are_told(key, value):
    if (key, value) == ("max-seconds", 1.5):
        return
    with pytest.raises(ValueError, match=f"node-config {key} must be a number greater than 0, got"):
        NodeBounds.of({key: value})


@pytest.mark.parametrize("number", [2**40, 2**62, 2**70, 0, -3, True, 2.0, "9", None])
def test_no_list_is_made_of_the_clients_that_a_server_speaks_of(number):
    if number is None:
        assert hosted({"partition-id": 0, "num-partitions": 2}, None) == [0]
        return
    with pytest.raises(ValueError, match=r"clients"):
        hosted({"partition-id": 0, "num-partitions": 2}, number)


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_too_many_clients_are_refused_in_every_message(tmp_path, kind):
    found = asked_for({"num-clients": 2**40}, {"state-dir": str(tmp_path)}, kinds=(kind,))
    assert "this node takes at most 1,000,000 clients in a request (max-clients in its node-config)" in found


# --- what a client has learnt ---


def test_a_hostile_server_does_not_erase_what_a_client_has_learnt(tmp_path):
    """Requests that start from an old version, of the last round that the node takes: all that is known is found."""
    seen = {}

    def meddle(answer, message, context):
        if message.metadata.message_type != "train":
            return answer(message, context)
        config = dict(message.content["config"])
        reply = answer(message, context)
        if config["server-round"] == 4:
            store = PersonalStore(tmp_path, config["run"])
            seen["learnt"] = store.load(0, 4)
            for changes in (
                {"versions": [2], "server-round": 10**6, "num-rounds": 10**6, "resumable-from": 10**6},
            ) * 3:
                again = Message(
                    RecordDict({**message.content, "config": ConfigRecord({**config, **changes})}), 1000, "train"
                )
                answer(again, context)
            seen["after"] = PersonalStore(tmp_path, config["run"]).load(0, 4)
        return reply

    grid = InProcessGrid(FaultyApp(toy_app(), meddle), 1, node_config={"state-dir": str(tmp_path)})
    FederatedStrategy(method=METHODS["cafedistill"](), num_rounds=5, wait_seconds=0).start(grid)
    assert all(torch.equal(seen["after"][name], tensor) for name, tensor in seen["learnt"].items())


def test_tensors_of_its_state_that_a_client_does_not_use_are_named(tmp_path):
    """Of another name, shape or kind of number: nothing is cast, nothing is dropped in silence."""

    def meddle(answer, message, context):
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            run = message.content["config"]["run"]
            store = PersonalStore(tmp_path, run, message.metadata.created_at)
            kept = store.load(0, 1)
            names = sorted(kept)
            kept[names[0]] = kept[names[0]].long()
            kept[names[1]] = kept[names[1]][:1]
            kept["other.weight"] = torch.ones(2)
            store.save(0, 1, kept, base=0, resumable_from=0)
        return answer(message, context)

    options = small_settings(tmp_path / "run", num_clients=1, num_server_rounds=2)
    grid = InProcessGrid(FaultyApp(toy_app(), meddle), 1, options.to_run_config(), {"state-dir": str(tmp_path)})
    run_small(options, grid=grid)
    lines = [strict_json(line) for line in (options.results / "rounds.jsonl").read_text().splitlines()]
    assert lines[0]["notes"] == {}
    said = lines[1]["notes"]["0"]
    assert "is not used: exits.0.head.bias, exits.0.head.weight, other.weight" in said
    assert "what its state lacks starts anew: " in said


# --- what leaves a node in words ---

FOLDERS = [
    "/home/{}/{}",
    "/Users/{} {}/data",
    "/srv/{}/a b/{}",
    "C:\\Users\\{}\\{}",
    "\\\\{}\\{}",
    "~{}/{}",
    "D:/{}/{}",
    "../{}/{}",
]
NAMES = st.text("abcdefghijklmnopqrstuvwxyzäß0123456789_-", min_size=6, max_size=10).filter(lambda n: n[0].isalpha())
SAID = [
    lambda path: str(FileNotFoundError(2, "No such file or directory", path)),
    lambda path: f"{path} is damaged: bring it back",
    lambda path: f"cannot read {path!r} (it is no picture)",
    lambda path: f"its state is not in {path}, which has rounds 1, 2",
    lambda path: f"(see {path})\nand {path}",
    lambda path: str(KeyError(path)),
    lambda path: f"dir={path};",
    lambda path: f'the file "{path}" is cut',
]


@settings(deadline=None, max_examples=250)
@given(
    folder=st.sampled_from(FOLDERS),
    words=st.lists(NAMES, min_size=4, max_size=4, unique=True),
    say=st.sampled_from(SAID),
    ending=st.sampled_from([".png", ".parquet", "", ".safetensors"]),
)
def test_no_part_of_a_path_leaves_a_node(folder, words, say, ending):
    path = folder.format(*words[:2]) + "/" + words[2] + ending
    text = say(path)
    found = without_paths(text)
    assert "<path>" in found
    for word in words[:3]:
        assert word not in found or word in say(""), (text, found)


@settings(deadline=None, max_examples=100)
@given(words=st.lists(NAMES, min_size=3, max_size=3, unique=True), spaced=st.booleans(), say=st.sampled_from(SAID))
def test_a_file_of_the_data_is_named_relative_to_their_folder(words, spaced, say):
    folder = f"/srv/{words[0]}{' ' * spaced}{words[1]}"
    found = without_paths(say(f"{folder}/{words[2]}/7.png"), folder)
    assert f"{words[2]}/7.png" in found
    assert words[0] not in found
    assert words[1] not in found
    assert words[0] not in without_paths(Path(f"{folder}/7.png").as_uri(), folder)


@pytest.mark.parametrize(
    "text",
    [
        "train/test and/or 1/2",
        "n/a",
        "https://example.org/a/b",
        "exits.0.head.weight: (3, 2)",
        "a ratio of 3:4",
        "",
        "/",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert without_paths(text) == text


def broken(client):
    if client == 1:
        raise FileNotFoundError(2, "No such file or directory", "/home/dr-who/patients/scan 7.png")
    return toy_data(client)


def test_reasons_and_errors_of_a_node_are_without_paths(tmp_path, flower_log):
    """In the first answer, in a round (its state is not there), and where the whole message fails."""
    options = small_settings(tmp_path, num_clients=4, num_server_rounds=2, wait_seconds=0.0)
    replies = []

    def meddle(answer, message, context):
        config = message.content["config"]
        if message.metadata.message_type == "train" and config["server-round"] == 2:
            if 0 in config["clients"]:
                for path in (tmp_path / "state").rglob("client-0/round-*"):
                    path.unlink()
            elif 2 in config["clients"]:
                context.node_config["state-dir"] = "not/absolute/dr-who"
        try:
            replies.append(answer(message, context))
        except Exception:
            replies.append(traceback.format_exc().splitlines()[-1])
            raise
        return replies[-1]

    grid = DeviceGrid(FaultyApp(toy_app(broken), meddle), ["0", "1", "2", "3"], tmp_path / "state")
    run_small(options, grid=grid)
    texts = [str(reply if isinstance(reply, str) else [*reply.content.config_records.values()]) for reply in replies]
    assert not [text for text in texts if "dr-who/" in text or "/home" in text or str(tmp_path) in text]
    assert "client 1 is left out: [Errno 2] No such file or directory: '<path>'" in flower_log.text()
    lines = [strict_json(line) for line in (options.results / "rounds.jsonl").read_text().splitlines()]
    assert "its personal state of round 1 is not in <path>" in lines[1]["left_out"]["0"]


@pytest.mark.parametrize("where", ["node", "run"])
def test_where_metrics_are_withheld_nothing_is_said_about_the_data(tmp_path, flower_log, where):
    """Neither how many classes there are, nor which labels are wrong."""

    def odd(client):
        whole = toy_data(client)
        x, y, rows = whole.train
        if client == 0:
            y = torch.zeros_like(y)
        if client == 1:
            y = y + 7
        test = Split(whole.test.x[:0], whole.test.y[:0], whole.test.meta[:0]) if client == 0 else whole.test
        return ClientData(Split(x, y, rows), whole.calibration, test)

    changes = {"report_metrics": False} if where == "run" else {}
    options = small_settings(tmp_path, num_clients=3, num_server_rounds=1, **changes)
    own = {"report-metrics": "false"} if where == "node" else {}
    run_small(options, grid=InProcessGrid(toy_app(odd), 3, options.to_run_config(), own))
    assert "client 1 is left out: its data cannot be used: the node's own log says why" in flower_log.text()
    said = re.sub(r"client 1 cannot serve:.*", "", flower_log.text())  # the node's own log
    assert "single class" not in said
    assert "empty test split" not in said


def test_a_node_that_withholds_metrics_gives_no_counts_for_calibration(tmp_path):
    InProcessGrid(toy_app(), 1)
    message = Message(RecordDict({"config": ConfigRecord({"protocol": 1, "seed": 0})}), 1000, "query.calibrate")
    message.metadata.__dict__["_message_id"] = "1"
    grid = InProcessGrid(toy_app(), 1, node_config={"report-metrics": "false", "state-dir": str(tmp_path)})
    with pytest.raises(ValueError, match="this node reports no metrics"):
        grid.client_app(message, grid.contexts[1000])
