"""What every method promises, whichever it is: this suite runs for all of METHODS. A new method needs no new test here.

A federation of toys runs with real messages; what is checked is what travels, what stays, and what survives.
"""

import itertools
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from federations import FaultyApp, WatchedGrid, asked, same_arrays, toy_app, toy_data, toy_network
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from safetensors.torch import load_file

from cafe_flwr import methods as package
from cafe_flwr import strategy as strategy_module
from cafe_flwr.methods import METHODS, ClientRecord, LocalTask, settings_of
from cafe_flwr.participation import rng_for
from cafe_flwr.settings import Settings
from cafe_flwr.state import Checkpoints
from cafe_flwr.strategy import FederatedStrategy
from cafe_flwr.training import LocalBudget

N, T = 4, 4
BUDGET = LocalBudget(batch_size=8, steps=2, learning_rate=0.1)

# Every method as it is, and with each of its settings at another value.
OTHERS = {
    "mu": [0.0, 0.05],
    "distill_weight": [0.0],
    "temperature": [1.5],
    "selection": ["deep-first", "random", "none"],
    "teachers": ["uniform", "own"],
    "similarity_proxy": ["gradients"],
    "solver": ["osqp"],
    "max_staleness": [1],
}
PLAIN = [(name, {}) for name in sorted(METHODS)]
VARIANTS = [
    (name, {key: value}) for name in METHODS for key in settings_of(METHODS[name]()) for value in OTHERS.get(key, [])
]
# Variants for which other things travel, or other code trains.
SPECIAL = [v for v in VARIANTS if v[1] in ({"teachers": "own"}, {"similarity_proxy": "gradients"})]


def described(variant):
    return " ".join([variant[0], *(f"{key}={value}" for key, value in variant[1].items())])


@pytest.fixture(params=[*PLAIN, *VARIANTS], ids=described)
def any_method(request):
    """Every method, and every other value of each of its settings."""
    return METHODS[request.param[0]](**request.param[1])


@pytest.fixture(params=[*PLAIN, *SPECIAL], ids=described)
def method(request):
    """Every method as it is, and a few variants."""
    return METHODS[request.param[0]](**request.param[1])


@pytest.fixture(params=PLAIN, ids=described)
def plain(request):
    """Every method as it is."""
    return METHODS[request.param[0]]()


class Save:
    """A callback that checkpoints, and keeps the plans."""

    def __init__(self, folder):
        self.checkpoints, self.records, self.reports = Checkpoints(folder / "checkpoint"), {}, None

    def on_start(self, run):
        pass

    def on_round(self, record, state):
        self.checkpoints.save(state)
        self.records[record.server_round] = record

    def on_finish(self, reports):
        self.reports = reports


def federate(folder, method, num_nodes=2, rounds=T, app=None, exits=3, **options):
    """Result, messages and notes of a federation of toys."""
    notes = Save(folder)
    grid = WatchedGrid(
        app or toy_app(build=lambda: toy_network(exits)), num_nodes, node_config={"state-dir": str(folder / "personal")}
    )
    options = {"num_clients": N, "num_rounds": T, "local": BUDGET, "wait_seconds": 0.0, "callbacks": [notes]} | options
    result = FederatedStrategy(method=method, **options).start(grid, num_rounds=rounds)
    return result, grid, notes


def personal(folder, client, server_round):
    paths = list((folder / "personal" / "versions").glob(f"*/client-{client}/round-{server_round:06d}.safetensors"))
    assert len(paths) == 1
    return load_file(paths[0])


def size_of(network, names):
    tensors = network.state_dict()
    return sum(tensors[name].numel() for name in names)


# --- what a method is ---


def test_methods_are_registered_under_their_names_and_can_be_set():
    for name, cls in METHODS.items():
        assert cls.name == name
        assert Settings.from_run_config({"method": name}).method == name
        assert cls.__name__ in vars(package)


def test_settings_are_scalars_that_survive_the_wire(any_method):
    """A client builds the same object from what it is sent."""
    values = settings_of(any_method)
    assert all(type(value) in (int, float, bool, str) for value in values.values())
    assert list(values) == [f.name for f in fields(any_method)]
    record = RecordDict({"config": ConfigRecord(values)})
    back = recorddict_from_proto(recorddict_to_proto(record))["config"]
    assert type(any_method)(**dict(back)) == any_method
    assert {key: type(value) for key, value in back.items()} == {key: type(value) for key, value in values.items()}


def test_a_method_does_not_change(plain):
    for f in fields(plain):
        with pytest.raises(FrozenInstanceError):
            setattr(plain, f.name, getattr(plain, f.name))


@pytest.mark.parametrize("exits", [1, 2, 4])
def test_shared_and_personal_are_the_whole_network_once(any_method, exits):
    network = toy_network(exits)
    shared, own = any_method.shared_names(network), any_method.personal_names(network)
    names = [*shared, *own]
    assert len(names) == len(set(names))
    assert set(names) == set(network.state_dict())


@pytest.mark.parametrize("exits", [1, 2, 4])
def test_what_is_sent_as_its_own_is_personal_and_named_once(any_method, exits):
    network = toy_network(exits)
    for names in (any_method.upload_names(network), any_method.download_names(network)):
        assert len(names) == len(set(names))
        assert set(names) <= set(network.state_dict())
    assert not set(any_method.upload_names(network)) & set(any_method.shared_names(network))


# --- what travels ---


@pytest.mark.parametrize("num_nodes", [N, 2])
def test_what_travels_is_what_the_method_names_and_no_more(tmp_path, method, num_nodes):
    """Down: the shared part and one download for each client that has one. Up: the shared part once per node (as sums
    in double precision where it is of several clients) and the upload of every client. Nothing else is an array, and
    lists of numbers are metrics: a few for every client."""
    network = toy_network()
    shared, up, down = (
        size_of(network, names(network)) for names in (method.shared_names, method.upload_names, method.download_names)
    )
    _, grid, notes = federate(tmp_path, method, num_nodes)
    exchanges = grid.of_type("train")
    assert len(exchanges) == T * num_nodes
    for message, reply in exchanges:
        clients = asked(message)
        config = message.content["config"]
        plan = notes.records[config["server-round"]].plan
        with_download = [c for c in clients if c in plan.downloads]
        assert list(config.get("downloads", [])) == with_download
        assert set(message.content) == {"arrays", "config"}
        assert list(message.content["arrays"]) == ["flat"]
        flat = message.content["arrays"]["flat"].numpy()
        assert flat.dtype == np.float32
        assert flat.shape == (shared + len(with_download) * down,)
        for i, client in enumerate(with_download):
            start = shared + i * down
            np.testing.assert_array_equal(flat[start : start + down], plan.downloads[client])
        long = {key: value for key, value in config.items() if isinstance(value, list) and len(value) > 8}
        assert not long

        assert set(reply.content) == {"arrays", "config", "metrics"}
        assert list(reply.content["arrays"]) == ["flat"]
        flat = reply.content["arrays"]["flat"].numpy()
        bytes_shared = 4 * shared if len(clients) == 1 else 8 * shared
        assert flat.nbytes == bytes_shared + 4 * len(clients) * up
        assert all(len(value) <= 3 * len(clients) for value in reply.content["metrics"].values())
        assert not any(isinstance(value, bytes) for value in reply.content["config"].values())


def test_what_a_client_sends_is_its_own_state_by_name(tmp_path, method):
    """The upload is, name for name, what is on the client's disk after the round; the shared part is not."""
    network = toy_network()
    _, _, notes = federate(tmp_path, method, num_nodes=N)
    for server_round in (T - 1, T):
        for report in notes.records[server_round].reports:
            state = personal(tmp_path, report.client, server_round)
            assert sorted(state) == sorted(method.personal_names(network))
            parts = [state[name].flatten() for name in method.upload_names(network)]
            expected = torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)
            assert report.upload.tobytes() == expected.tobytes()


def test_the_shared_part_is_the_average_by_examples(tmp_path, method):
    """Whatever the method: θ ← Σ n_i θ_i / Σ n_i over the clients that took part, and that is what is sent next."""
    network = toy_network()
    size = size_of(network, method.shared_names(network))
    result, grid, _ = federate(tmp_path, method, num_nodes=N)
    for server_round in range(1, T + 1):
        exchanges = [(m, r) for m, r in grid.of_type("train") if m.content["config"]["server-round"] == server_round]
        weights = [len(toy_data(asked(m)[0]).train) for m, _ in exchanges]
        parts = [r.content["arrays"]["flat"].numpy()[:size].astype(np.float64) for _, r in exchanges]
        mean = np.average(parts, axis=0, weights=weights)
        if server_round < T:
            sent = [m for m, _ in grid.of_type("train") if m.content["config"]["server-round"] == server_round + 1]
            following = [m.content["arrays"]["flat"].numpy()[:size] for m in sent]
        else:
            following = [np.concatenate([result.arrays[n].numpy().ravel() for n in method.shared_names(network)])]
        for flat in following:
            np.testing.assert_allclose(flat, mean, rtol=1e-6, atol=1e-7)


# --- what stays ---


def test_personal_state_is_taken_up_again_where_it_was_left(tmp_path, method):
    """What a client evaluates before training in round t is the shared part it is sent with its own heads of the last
    round it took part in."""
    network = toy_network()
    _, grid, notes = federate(tmp_path, method, num_nodes=N)
    for message, _ in grid.of_type("train"):
        (client,), server_round = asked(message), message.content["config"]["server-round"]
        if server_round < T - 1:
            continue
        flat = torch.from_numpy(message.content["arrays"]["flat"].numpy().copy())
        state = dict(personal(tmp_path, client, server_round - 1))
        for name in method.shared_names(network):
            size = network.state_dict()[name].numel()
            state[name], flat = flat[:size].reshape(network.state_dict()[name].shape), flat[size:]
        network.load_state_dict(state)
        test = toy_data(client).test
        with torch.no_grad():
            accuracy = [(z.argmax(1) == test.y).float().mean().item() for z in network(test.x)]
        (report,) = (r for r in notes.records[server_round].reports if r.client == client)
        assert report.before.accuracy == pytest.approx(accuracy)


def test_clients_start_alike_and_become_their_own(tmp_path, plain):
    """Before the first round all have the network of the seed; after it, personal parameters differ."""
    federate(tmp_path, plain, rounds=1)
    network = toy_network()
    states = [personal(tmp_path, client, 1) for client in range(N)]
    last = network.head_names(network.num_exits - 1)[0]
    if last in plain.personal_names(network):
        for a, b in itertools.combinations(states, 2):
            assert not torch.equal(a[last], b[last])


# --- what does not matter ---


@pytest.mark.parametrize(("num_nodes", "exits"), [(1, 3), (3, 1), (3, 5)])
def test_the_grouping_of_clients_on_nodes_does_not_matter(tmp_path, method, num_nodes, exits):
    one, _, _ = federate(tmp_path / "grouped", method, num_nodes, rounds=3, exits=exits)
    other, _, _ = federate(tmp_path / "alone", method, N, rounds=3, exits=exits)
    assert same_arrays(one.arrays, other.arrays)
    for client in range(N):
        a, b = (personal(tmp_path / folder, client, 3) for folder in ("grouped", "alone"))
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_same_seed_gives_the_same_and_another_seed_another(tmp_path, method):
    results = [federate(tmp_path / str(i), method, rounds=3, seed=seed)[0] for i, seed in enumerate((7, 7, 8))]
    assert same_arrays(results[0].arrays, results[1].arrays)
    assert not same_arrays(results[0].arrays, results[2].arrays)


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, method):
    """2 + 2 rounds are 4, with partial participation and a checkpoint on disk in between."""
    options = {"fraction_train": 0.6, "min_train_nodes": 2}
    whole, _, notes = federate(tmp_path / "whole", method, **options)
    _, _, first = federate(tmp_path / "parts", method, rounds=2, **options)
    state = first.checkpoints.load()
    assert state.round == 2
    resumed, _, second = federate(tmp_path / "parts", method, resume_from=state, **options)
    assert same_arrays(resumed.arrays, whole.arrays)
    for server_round in (3, 4):
        a, b = notes.records[server_round], second.records[server_round]
        assert a.participants == b.participants
        np.testing.assert_array_equal(a.plan.active, b.plan.active)
        for r, s in zip(a.reports, b.reports, strict=True):
            assert (r.before, r.after, r.similarity, r.train_loss) == (s.before, s.after, s.similarity, s.train_loss)
            assert r.upload.tobytes() == s.upload.tobytes()


# --- what goes wrong ---


def test_absent_clients_neither_stop_nor_change_their_own(tmp_path, monkeypatch, method):
    """Client 3 is away in rounds 2 and 3; it comes back with the personal state of round 1."""
    participants = {1: [0, 1, 2, 3], 2: [0, 1, 2], 3: [1, 2], 4: [0, 1, 2, 3]}
    monkeypatch.setattr(strategy_module, "sample_clients", lambda *_, server_round, **__: participants[server_round])
    _, grid, notes = federate(tmp_path, method, num_nodes=N)
    for server_round, clients in participants.items():
        record = notes.records[server_round]
        assert [r.client for r in record.reports] == clients
        assert record.plan.active.shape == (len(clients), 2)
        assert set(record.plan.downloads) <= set(clients)
        for values in record.plan.downloads.values():
            assert np.isfinite(values).all()
    (back,) = (m for m, _ in grid.of_type("train") if asked(m) == [3] and m.content["config"]["server-round"] == 4)
    assert back.content["config"]["versions"] == [1]
    versions = sorted(p.name for p in (tmp_path / "personal" / "versions").glob("*/client-3/*"))
    assert versions == ["round-000001.safetensors", "round-000004.safetensors"]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_reply_that_is_not_a_number_is_left_out_and_forgotten(tmp_path, method, broken):
    """In round 2 client 1's array is broken: the others go on, nothing of it reaches anybody, and in round 3 it starts
    from what it last reported well."""

    def fault(answer, message, context):
        reply = answer(message, context)
        kind, config = message.metadata.message_type, message.content["config"]
        if kind == "train" and config["server-round"] == 2 and asked(message) == [1]:
            flat = reply.content["arrays"]["flat"].numpy().copy()
            flat[-1] = broken
            reply.content["arrays"] = ArrayRecord({"flat": Array(flat)})
        return reply

    result, grid, notes = federate(tmp_path, method, num_nodes=N, app=FaultyApp(toy_app(), fault))
    assert [list(notes.records[t].left_out) for t in range(1, T + 1)] == [[], [1], [], []]
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())
    for message, _ in grid.of_type("train"):
        assert np.isfinite(message.content["arrays"]["flat"].numpy()).all()
        if asked(message) == [1] and message.content["config"]["server-round"] == 3:
            assert message.content["config"]["versions"] == [1]
    assert [r.client for r in notes.reports] == [0, 1, 2, 3]


# --- the two halves by themselves ---


def known(method, clients, seed=0, exits=3):
    """What the server knows of clients that have reported."""
    network = toy_network(exits)
    rng = np.random.default_rng(seed)
    size = size_of(network, method.upload_names(network))
    return {
        c: ClientRecord(
            num_examples=int(rng.integers(5, 50)),
            seen=3,
            upload=rng.normal(size=size).astype(np.float32),
            similarity=rng.uniform(-1, 1, size=exits - 1),
        )
        for c in clients
    }


@pytest.mark.parametrize("exits", [1, 2, 5])
@pytest.mark.parametrize("reported", [[], [4], [1, 4, 9], [2, 3]])
def test_a_plan_is_for_the_participants_in_their_order(any_method, exits, reported):
    participants = [1, 4, 9]
    network = toy_network(exits)
    plan = any_method.plan(
        4, 20, participants, exits, known(any_method, reported, exits=exits), np.random.default_rng(0)
    )
    assert plan.active.shape == (3, exits - 1)
    assert plan.active.dtype == bool
    assert set(plan.downloads) <= set(participants)
    for values in plan.downloads.values():
        assert values.shape == (size_of(network, any_method.download_names(network)),)
        assert values.dtype == np.float32
    if plan.weights is not None:
        assert plan.weights.shape == (len(plan.weight_rows), len(plan.weight_columns))
        np.testing.assert_allclose(plan.weights.sum(axis=1), 1.0, atol=1e-6)
        assert (plan.weights >= 0).all()


def test_a_plan_does_not_depend_on_the_order_of_what_is_known_and_changes_none_of_it(any_method):
    participants = [0, 1, 2, 3]
    records = known(any_method, range(6))
    before = {c: (r.upload.copy(), r.similarity.copy()) for c, r in records.items()}
    plans = [
        any_method.plan(3, 10, participants, 3, dict(sorted(records.items(), key=key)), np.random.default_rng(1))
        for key in (lambda kv: kv[0], lambda kv: -kv[0])
    ]
    np.testing.assert_array_equal(plans[0].active, plans[1].active)
    assert list(plans[0].downloads) == list(plans[1].downloads)
    for client, values in plans[0].downloads.items():
        np.testing.assert_array_equal(values, plans[1].downloads[client])
    for client, (upload, similarity) in before.items():
        np.testing.assert_array_equal(records[client].upload, upload)
        np.testing.assert_array_equal(records[client].similarity, similarity)


def test_training_changes_the_network_it_is_given_and_reports_finite_numbers(any_method):
    """With all exits active everything trains; the same generator gives the same outcome bit for bit."""
    outcomes = []
    for _ in range(2):
        torch.manual_seed(0)
        network = toy_network()
        before = {name: t.clone() for name, t in network.state_dict().items()}
        task = LocalTask(
            network=network,
            data=toy_data(1).train,
            active=[True, True],
            download={},
            budget=BUDGET,
            rng=lambda purpose: rng_for(0, 1, 1, purpose),
        )
        result = any_method.train(task)
        assert np.isfinite(result.loss)
        assert len(result.similarity) == 2
        assert all(-1.001 <= s <= 1.001 for s in result.similarity)
        assert [name for name, t in network.state_dict().items() if torch.equal(t, before[name])] == []
        outcomes.append((result, torch.cat([t.flatten() for t in network.state_dict().values()])))
    assert outcomes[0][0] == outcomes[1][0]
    assert torch.equal(outcomes[0][1], outcomes[1][1])
