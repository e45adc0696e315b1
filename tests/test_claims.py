"""Nodes that claim others' clients, describe another network, or give bad weights to start from."""

import numpy as np
import pytest
from federations import DeviceGrid, FaultyApp, WatchedGrid, asked, digits_app, run_small, small_settings, toy_app
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_faults import is_train, lines_of, toy_settings

from cafe_flwr.app.run import own_description
from cafe_flwr.core.schema import Schema
from cafe_flwr.methods.registry import METHODS
from cafe_flwr.server.claims import Claims, check_claims
from cafe_flwr.server.directory import Directory, describe_request
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.wire.keys import Keys

pytestmark = pytest.mark.usefixtures("no_report")

N, BAD = 4, 2


def described(reply, **values):
    """A node's description with other values."""
    values = {key.replace("_", "-"): value for key, value in values.items()}
    reply.content["config"] = ConfigRecord({**reply.content["config"], **values})
    return reply


def claims_all(reply):
    return described(reply, clients=list(range(N)), num_examples=[12 + 5 * client for client in range(N)])


def hostile(answers, changes=claims_all, node=1000 + BAD, app=None):
    """An app whose node changes its description, and answers requests as ``answers(answer, message, context)`` says."""

    def fault(answer, message, context):
        if context.node_id != node:
            return answer(message, context)
        if message.metadata.message_type == "query":
            return changes(answer(message, context))
        return answers(answer, message, context)

    return FaultyApp(app or toy_app(), fault)


def raises(answer, message, context):
    raise OSError("gone")


def unusable(answer, message, context):
    reply = answer(message, context)
    reply.content.pop("arrays", None)
    return reply


def fails_for_them(answer, message, context):
    return answer(message, context)  # an honest app does not host them: it says so in its reply


def too_long(answer, message, context):
    reply = as_host(answer, message, context)
    if message.metadata.message_type == "train":
        flat = reply.content["arrays"]["flat"].numpy() + np.float32(1e9)
        reply.content["arrays"] = ArrayRecord({"flat": Array(flat)})
    return reply


def as_host(answer, message, context):
    """Answers soundly for all clients, as if it hosted them."""
    config = {**context.node_config, "clients": "0,1,2,3"}
    return answer(message, Context(1, context.node_id, config, context.state, context.run_config))


def silent(answer, message, context):
    return as_host(answer, message, context)  # the reply is lost, see below


@pytest.mark.parametrize("answers", [raises, unusable, fails_for_them, too_long, silent])
def test_who_claims_others_clients_and_answers_badly_loses_them_after_one_round(tmp_path, flower_log, answers):
    settings = toy_settings(tmp_path, num_server_rounds=3)
    grid = WatchedGrid(hostile(answers), N, settings.to_run_config())
    grid.lose = lambda message: (
        answers is silent and message.metadata.message_type == "train" and message.metadata.dst_node_id == 1002
    )
    run_small(settings, grid=grid)
    first, *others = [set(line["left_out"]) for line in lines_of(settings)]
    assert {"1", "3"} <= first
    assert all(left_out <= {str(BAD)} for left_out in others)
    assert "Clients 1, 3 are asked on the node of clients 1: " in flower_log.text() or (
        "Clients 1 are asked on the node of clients 1: that of clients 0, 1, 2, 3 failed" in flower_log.text()
    )


def test_the_first_to_answer_well_keeps_a_client_until_it_stops(tmp_path, flower_log):
    """The other claimant, on a disk of its own, does not have its state: it is asked again, and starts anew."""
    settings = toy_settings(tmp_path, num_server_rounds=7, wait_seconds=0.0)

    def fault(answer, message, context):
        if context.node_id == 1000 and any(is_train(message, t) for t in (3, 4, 5, 6, 7)):
            raise OSError("gone")
        return answer(message, context)

    grid = DeviceGrid(FaultyApp(toy_app(), fault), ["0,1", "1", "2,3"], tmp_path)
    for node, context in grid.contexts.items():
        context.node_config = {**context.node_config, "state-dir": str(tmp_path / str(node))}
    run_small(settings, grid=grid)
    hosts = [m.metadata.dst_node_id for m, _ in grid.of_type("train") if 1 in asked(m)]
    assert hosts == [1000, 1000, 1000, 1001, 1001, 1001, 1001]
    versions = [list(m.content["config"]["versions"]) for m, _ in grid.of_type("train") if asked(m) == [1]]
    assert versions == [[2], [0], [5], [6]]
    left_out = [set(line["left_out"]) for line in lines_of(settings)]
    assert left_out[:2] == [set(), set()]
    assert [("1" in names) for names in left_out[2:]] == [True, True, False, False, False]
    text = flower_log.text()
    assert "Of the nodes that claim clients 1, that of clients 0, 1 answered well" in text
    assert "Clients 1 are asked on the node of clients 1: that of clients 0, 1 failed" in text
    assert "Of the nodes that claim clients 1, that of clients 1 answered well" in text


def test_a_node_that_a_client_comes_back_to_goes_on_from_its_own_state():
    claims = Claims()
    claims.assign({7: [0], 8: [0]})
    for server_round, fails in enumerate([False, False, True], start=1):
        claims.note({claims.hosts[0]: [0]}, {0: "gone"} if fails else {}, server_round)
    claims.assign({7: [0], 8: [0]})
    assert (claims.hosts, claims.version(0, 2)) == ({0: 8}, 2)  # it may be the same machine, or share its disk
    claims.note({8: [0]}, {0: "its personal state of round 2 is not there"}, 4)
    claims.assign({7: [0], 8: [0]})
    assert (claims.hosts, claims.version(0, 2)) == ({0: 8}, 0)
    claims.note({8: [0]}, {}, 5)
    assert claims.version(0, 5) == 5
    claims.note({8: [0]}, {0: "gone"}, 6)
    claims.assign({7: [0], 8: [0]})
    assert (claims.hosts, claims.version(0, 5)) == ({0: 7}, 2)


def test_a_node_that_lost_its_own_state_does_not_start_anew():
    claims = Claims()
    claims.assign({7: [0]})
    claims.note({7: [0]}, {}, 1)
    claims.assign({8: [0]})  # restarted under another id
    for server_round in (2, 3):
        claims.note({8: [0]}, {0: "its personal state of round 1 is not there"}, server_round)
        assert claims.version(0, 1) == 1


@examples(deadline=None, max_examples=60)
@given(
    claimed=st.dictionaries(st.integers(0, 6), st.sets(st.integers(0, 5), min_size=1).map(sorted), min_size=2),
    honest=st.integers(0, 6),
    bad=st.lists(st.booleans(), min_size=200, max_size=200),
)
def test_a_node_that_always_answers_well_waits_for_others_failures_only(claimed, honest, bad):
    """It is asked for a client as soon as every other claimant has failed for it once; then it keeps it."""
    claims, coin = Claims(), iter(bad)
    failed = {client: set() for client in range(6)}
    for server_round in range(1, 9):
        claims.assign(claimed)
        for client, host in claims.hosts.items():
            rivals = {node for node, clients in claimed.items() if client in clients} - {honest}
            if client in claimed.get(honest, []) and failed[client] >= rivals:
                assert host == honest
            fails = host != honest and next(coin, True)
            failed[client] |= {host} if fails else set()
            claims.note({host: [client]}, {client: "gone"} if fails else {}, server_round)


# --- bounds of claims ---


@pytest.mark.parametrize(
    "clients", [range(200_000), [0, 4], [2**40], [-1], [1, 1], [True], ["1"], [10**5000], [2**63 - 1], [0.5]]
)
def test_impossible_claims_refuse_the_node_in_one_line(tmp_path, flower_log, clients):
    settings = toy_settings(tmp_path)
    change = lambda reply: described(reply, clients=list(clients), num_examples=[5] * len(clients), name="mallory")  # noqa: E731
    try:
        run_small(settings, N, app=hostile(raises, change))
    except (TypeError, ValueError) as error:  # Flower itself does not carry it
        pytest.skip(str(error)[:80])
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 3]] * 2
    (line,) = [line for line in flower_log.text().splitlines() if "was refused" in line]
    assert len(line) < 700


def test_where_the_number_of_clients_is_unknown_claims_have_a_bound_too():
    check_claims(range(10_000), None)
    with pytest.raises(ValueError, match="claims 10001 clients, at most 10000"):
        check_claims(range(10_001), None)
    with pytest.raises(ValueError, match="their numbers are 0 to 2147483647"):
        check_claims([2**31], None)


def test_clients_with_data_of_their_own_may_have_any_numbers():
    check_claims([4, 7], 2, own_numbers=True)
    with pytest.raises(ValueError, match="claims 3 clients, at most 2"):
        check_claims([4, 7, 8], 2, own_numbers=True)
    with pytest.raises(ValueError, match="their numbers are 0 to 1"):
        check_claims([0, 7], 2)


# --- the reference ---

SCHEMA = Schema((("alien", (3,)),)).to_json()
HUGE = Schema(tuple((f"t{i}", (10**6,)) for i in range(200))).to_json()
LIES = [
    *({"num_exits": m, "macs": [1] * min(m, 10**5)} for m in (1, 2, 10**6)),
    *({name: text} for name in ("shared", "upload", "download") for text in (SCHEMA, HUGE, "[]", "null", "[" * 10**5)),
    *({"num_parameters": n} for n in (0, 10**15)),
    *({"num_nodes": n} for n in (0, 1, 10**4)),
    {"digest": "0" * 16},
    {"digest": 5},
    {"macs": [10**15] * 3},
    {"macs": "x"},
    {"version": "0.0.1"},
    {"kinds": ["{}"], "kind_of": [0]},
    {"problems": ["x"] * 1000},
    {"num_examples": [0]},
]


def name_of(lie):
    return "-".join(f"{key}={str(value)[:12]}" for key, value in lie.items())


@pytest.mark.parametrize("lie", LIES[::6], ids=name_of)
def test_what_the_lowest_clients_node_says_of_the_network_does_not_end_the_run(tmp_path, lie):
    app = hostile(raises, lambda reply: described(reply, **lie), node=1000)
    settings = toy_settings(tmp_path, wait_seconds=0.0, num_server_rounds=1)
    run_small(settings, grid=DeviceGrid(app, ["0", "1", "2", "3"], tmp_path / "state"))
    (line,) = lines_of(settings)
    assert set(line["participants"]) >= {1, 2, 3}
    assert set(line["left_out"]) <= {"0"}
    assert str(10**15) not in (settings.results / "summary.json").read_text()


@pytest.fixture(scope="module")
def descriptions(tmp_path_factory):
    """A grid of four nodes that describe themselves as they once did, the first one as ``grid.lie`` says."""

    class Repeating(DeviceGrid):
        def _handle(self, message):
            node = message.metadata.dst_node_id
            if node not in self.known:
                self.known[node] = dict(super()._handle(message).content["config"])
            values = {**self.known[node], **(self.lie if node == 1000 else {})}
            return Message(RecordDict({"config": ConfigRecord(values)}), reply_to=message)

    grid = Repeating(toy_app(), ["0", "1", "2", "3"], tmp_path_factory.mktemp("state"))
    grid.known, grid.lie = {}, {}
    honest = directory_of(grid)
    assert sorted(honest.hosts) == [0, 1, 2, 3]
    return grid, honest


def directory_of(grid, late=False):
    method = METHODS["cafedistill"]()
    directory = Directory(Keys(), describe_request(0, method, N))
    grid.there, grid.round = {0: (2 * late, 99)}, 0
    directory.wait(grid, min_nodes=1, num_clients=N, seconds=0.0)
    grid.round = 2
    directory.refresh(grid)
    return directory


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("lie", LIES, ids=name_of)
def test_what_the_lowest_clients_node_says_of_the_network_refuses_nobody_else(descriptions, lie, late):
    grid, honest = descriptions
    grid.lie = {key.replace("_", "-"): value for key, value in lie.items()}
    directory = directory_of(grid, late)
    assert {1, 2, 3} <= set(directory.hosts)
    for field in ("digest", "shared", "upload", "download", "num_exits", "num_parameters"):
        assert getattr(directory.reference, field) == getattr(honest.reference, field)
    assert (directory.agreement.macs, directory.kinds) == (honest.agreement.macs, honest.kinds)
    assert len(directory.problems) <= 21


def test_where_as_many_nodes_say_one_thing_as_another_the_server_builds_the_network_itself(tmp_path, flower_log):
    settings = small_settings(tmp_path, num_clients=2, num_server_rounds=1)
    app = hostile(raises, lambda reply: described(reply, num_parameters=7), node=1000, app=digits_app())
    run_small(settings, 2, app=app)
    assert lines_of(settings)[0]["participants"] == [1]
    assert "the node of clients 0 was refused: its network or method differs" in flower_log.text()


def test_the_servers_own_description_is_that_of_an_honest_node(tmp_path):
    settings = small_settings(tmp_path, num_clients=2, num_server_rounds=1)
    grid = WatchedGrid(digits_app(), 1, settings.to_run_config())
    run_small(settings, grid=grid)
    (_, reply), own = grid.of_type("query")[0], own_description(settings)
    said = reply.content["config"]
    assert (said["digest"], said["num-parameters"]) == (own.digest, own.num_parameters)
    assert [said[name] for name in ("shared", "upload")] == [own.shared.to_json(), own.upload.to_json()]


def test_a_large_data_set_is_not_read_to_settle_what_nodes_say(tmp_path):
    with pytest.raises(ValueError, match="it would have to read cifar10"):
        own_description(small_settings(tmp_path, dataset="cifar10"))


# --- weights to start from ---


def flat_of(reply):
    return reply.content["arrays"]["flat"].numpy()


def with_flat(change):
    def changed(reply):
        reply.content["arrays"] = ArrayRecord({"flat": Array(np.ascontiguousarray(change(flat_of(reply))))})

    return changed


BAD_WEIGHTS = {
    "missing": lambda reply: reply.content.pop("arrays"),
    "another name": lambda reply: reply.content.__setitem__("arrays", ArrayRecord({"x": Array(flat_of(reply))})),
    "short": with_flat(lambda flat: flat[:-1]),
    "none": with_flat(lambda flat: flat[:0]),
    "NaN": with_flat(lambda flat: np.where(np.arange(len(flat)) == 3, np.nan, flat).astype("f4")),
    "infinite": with_flat(lambda flat: flat + np.float32(np.inf)),
    "1e300": with_flat(lambda flat: flat.astype("f8") + 1e300),
    "1e30": with_flat(lambda flat: flat + np.float32(1e30)),
    "texts": with_flat(lambda flat: flat.astype("S8")),
    "complex": with_flat(lambda flat: flat.astype(complex)),
    "whole": with_flat(lambda flat: flat.astype(int)),
    "objects": lambda reply: setattr(reply.content["arrays"]["flat"], "data", b"\x93NUMPY garbage"),
}


def with_bad_weights(what, nodes):
    def fault(answer, message, context):
        reply = answer(message, context)
        if message.metadata.message_type == "query.initial" and context.node_id in nodes:
            BAD_WEIGHTS[what](reply)
        return reply

    return FaultyApp(toy_app(), fault)


@pytest.fixture(scope="module")
def honest_start(tmp_path_factory):
    return run_start(tmp_path_factory.mktemp("honest"), toy_app())


def run_start(folder, app):
    grid = WatchedGrid(app, 3, toy_settings(folder, num_clients=3).to_run_config())
    FederatedStrategy(method=toy_settings(folder).build_method(), num_rounds=1, num_clients=3, seed=3).start(grid)
    return [m.content["arrays"]["flat"].numpy() for m, _ in grid.of_type("train")]


@pytest.mark.parametrize("what", BAD_WEIGHTS)
def test_bad_weights_to_start_from_are_asked_of_another_node(tmp_path, honest_start, flower_log, what):
    sent = run_start(tmp_path, with_bad_weights(what, {1000, 1001}))
    assert len(sent) == 3
    assert all(np.array_equal(one, other) for one, other in zip(sent, honest_start, strict=True))
    for client in (0, 1):
        assert f"the node of client {client} gave no initial parameters: " in flower_log.text()


def test_if_no_node_gives_weights_the_run_ends_with_all_reasons(tmp_path):
    with pytest.raises(RuntimeError) as error:
        run_start(tmp_path, with_bad_weights("NaN", {1000, 1001, 1002}))
    for client in range(3):
        assert f"the node of client {client} gave no initial parameters: " in str(error.value)
