"""Clients that hold the first exits only: what they send, what is averaged over whom, and who teaches them."""

import json

import numpy as np
import pytest
import torch
from federations import (
    CLASSES,
    DeviceGrid,
    Recorded,
    WatchedGrid,
    results_of,
    run_small,
    run_until,
    same_arrays,
    small_settings,
    toy_app,
    toy_network,
)
from flwr.app import MetricRecord
from hypothesis import given
from hypothesis import strategies as st

from cafe_flwr import make_client_app
from cafe_flwr.app.joining import package_run
from cafe_flwr.app.run import build_strategy
from cafe_flwr.coordination import active_exits, student_budget
from cafe_flwr.core.schema import Schema
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.data import load_federation
from cafe_flwr.inference import EarlyExitRunner
from cafe_flwr.inference.policies import MaxProb
from cafe_flwr.methods import METHODS
from cafe_flwr.networks import ConvNet, ResNet18, SequenceNet
from cafe_flwr.networks.capacity import Capacity, drawn
from cafe_flwr.networks.preprocessing import Normalisation
from cafe_flwr.personal import FinishedRun
from cafe_flwr.personal.calibration import calibrate_run
from cafe_flwr.personal.evaluation import evaluate_run
from cafe_flwr.personal.export import export_client
from cafe_flwr.results.figures import pooled_accuracy
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.results.run import read_run
from cafe_flwr.risk.client_calibration import Request
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.training import LocalBudget
from cafe_flwr.wire.averaging import weighted
from cafe_flwr.wire.slices import SharedSlice, masked_mean

DEPTHS = [1, 2, 3, 3, 2]  # of the toys' clients
UNEQUAL = {"depth_shares": "1:0.2,2:0.4"}
N = len(DEPTHS)
TRAFFIC = {"bytes_up", "bytes_down", "bytes_up_per_client_round", "bytes_down_per_client_round"}


def devices(state, depths=DEPTHS, groups=None, app=None):
    """A node for every client (or group of clients of one depth), that says in its node-config how much it holds."""
    groups = groups or [[client] for client in range(len(depths))]
    grid = DeviceGrid(app or toy_app(), [",".join(map(str, group)) for group in groups], state)
    for context, group in zip(grid.contexts.values(), groups, strict=True):
        if depths[group[0]] != 3:
            context.node_config["max-exit"] = depths[group[0]]
    return grid


def toy_strategy(method="fedavg", rounds=1, **changes):
    return FederatedStrategy(
        method=METHODS[method](**changes.pop("settings", {})),
        num_rounds=rounds,
        local=LocalBudget(steps=3, batch_size=4, learning_rate=0.1),
        **changes,
    )


def shared_of(reply, depth, method="fedavg"):
    """The shared tensors of a reply of one client, by name, as its network has them."""
    network = toy_network().truncated(depth)
    names = METHODS[method]().shared_names(network)
    flat, tensors = torch.from_numpy(reply.content["arrays"]["flat"].numpy().copy()), network.state_dict()
    found = {}
    for name in names:
        size = tensors[name].numel()
        found[name], flat = flat[:size].reshape(tensors[name].shape), flat[size:]
    return found, flat


# --- the mean over those who hold ---


SHAPES = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@st.composite
def parts_of(draw, whole):
    """Some tensors of a schema, and of each the first rows and columns."""
    names = draw(st.sets(st.sampled_from(whole.names)))
    return Schema(
        tuple((n, tuple(draw(st.integers(0, size)) for size in shape)) for n, shape in whole.entries if n in names)
    )


def by_name(flat, schema):
    """Copies of the tensors of a flat array."""
    pieces = np.split(np.array(flat), np.cumsum(schema.sizes)[:-1]) if schema.names else []
    return {name: piece.reshape(shape) for (name, shape), piece in zip(schema.entries, pieces, strict=True)}


@pytest.mark.slow
@given(data=st.data())
def test_the_mean_of_every_value_is_that_of_its_holders(data):
    """Against a loop over all values, for any parts of clients on any nodes; what nobody holds stays as it was."""
    whole = Schema(
        tuple((f"t{i}", shape) for i, shape in enumerate(data.draw(st.lists(SHAPES, min_size=1, max_size=4))))
    )
    parts = [data.draw(parts_of(whole)) for _ in range(data.draw(st.integers(1, 5)))]
    examples = [data.draw(st.integers(1, 50)) for _ in parts]
    nodes = [data.draw(st.integers(0, 2)) for _ in parts]
    rng = np.random.default_rng(0)
    before = rng.normal(size=whole.size).astype(np.float32)
    values = [rng.normal(size=part.size) for part in parts]

    sums = []
    for node in sorted(set(nodes)):
        here = [i for i, at in enumerate(nodes) if at == node]
        view = SharedSlice(whole, [parts[i] for i in here])
        total = np.zeros(view.size)
        for i in here:
            view.add(total, parts[i], weighted(values[i], examples[i]))
        sums.append((view, total, view.weight([examples[i] for i in here])))
    mean = masked_mean(before, sums)

    expected = by_name(before, whole)
    for name, tensor in expected.items():
        for position in np.ndindex(tensor.shape):
            held = [
                (by_name(v, p)[name], n) for v, p, n in zip(values, parts, examples, strict=True) if name in p.names
            ]
            held = [
                (t[position], n) for t, n in held if all(i < size for i, size in zip(position, t.shape, strict=True))
            ]
            if held:
                tensor[position] = np.average([t for t, _ in held], weights=[n for _, n in held])
    for name, tensor in by_name(mean, whole).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-6, atol=1e-7)


@given(data=st.data())
def test_what_a_client_gets_of_a_nodes_message_is_its_part_of_the_whole(data):
    whole = Schema(
        tuple((f"t{i}", shape) for i, shape in enumerate(data.draw(st.lists(SHAPES, min_size=1, max_size=4))))
    )
    parts = [data.draw(parts_of(whole)) for _ in range(3)]
    flat = np.arange(whole.size, dtype=np.float32)
    view = SharedSlice(whole, parts)
    sent = view.take(flat)
    assert len(sent) == view.size <= whole.size
    for part in parts:
        got = by_name(view.part(sent, part), part)
        for name, tensor in got.items():
            assert np.array_equal(tensor, by_name(flat, whole)[name][tuple(map(slice, tensor.shape))])


# --- what travels ---


def test_a_client_sends_and_receives_its_blocks_only(tmp_path):
    """Sizes of the arrays on the wire, both ways, against those of the first blocks and exits of the network."""
    grid = devices(tmp_path)
    toy_strategy().start(grid, num_rounds=1)
    sent = {}
    for request, reply in grid.of_type("train"):
        (client,) = request.content["config"]["clients"]
        sent[client] = len(reply.content["arrays"]["flat"].numpy())
        assert len(request.content["arrays"]["flat"].numpy()) == sent[client]
    blocks = [5 * 8 + 8, 8 * 8 + 8, 8 * 8 + 8]
    exits = [8 * 4 + 4 + 4 * CLASSES + CLASSES] * 3
    assert sent == {client: sum(blocks[:d]) + sum(exits[:d]) for client, d in enumerate(DEPTHS)}


@pytest.mark.parametrize("method", ["fedavg", "depthfl"])
def test_every_block_is_averaged_over_those_who_hold_it(tmp_path, method):
    """From the replies themselves: by examples; DepthFL, as published, takes the plain mean."""
    grid = devices(tmp_path)
    strategy = toy_strategy(method)
    arrays = strategy.start(grid, num_rounds=1).arrays
    replies = {}
    for request, reply in grid.of_type("train"):
        (client,) = request.content["config"]["clients"]
        replies[client] = shared_of(reply, DEPTHS[client])[0]
    for name in toy_network().state_dict():
        holders = [client for client in range(N) if name in replies[client]]
        assert holders == [client for client in range(N) if DEPTHS[client] > int(name.split(".")[1])]
        weights = torch.tensor([1.0 if method == "depthfl" else 12.0 + 5 * client for client in holders])
        expected = torch.einsum(
            "i,i...->...", weights / weights.sum(), torch.stack([replies[c][name] for c in holders])
        )
        torch.testing.assert_close(torch.from_numpy(arrays[name].numpy().copy()), expected, rtol=1e-5, atol=1e-6)


def test_depthfl_of_equal_clients_counts_examples(tmp_path):
    grid = devices(tmp_path, [3, 3])
    arrays = toy_strategy("depthfl").start(grid, num_rounds=1).arrays
    first, second = (shared_of(reply, 3)[0] for _, reply in grid.of_type("train"))
    name = "stages.0.0.weight"
    expected = (12 * first[name] + 17 * second[name]) / 29
    torch.testing.assert_close(torch.from_numpy(arrays[name].numpy().copy()), expected)


def test_a_block_whose_holders_are_all_away_stays_as_it_was(tmp_path):
    """Client 0, that holds exit 1, is the only one in round 2: the other blocks keep the values of round 1."""
    grid = devices(tmp_path, [1, 3])
    grid.there = {1: (0, 1)}
    first = toy_strategy(rounds=2, wait_seconds=0).start(devices(tmp_path / "other", [1, 3]), num_rounds=1).arrays
    both = toy_strategy(rounds=2, wait_seconds=0).start(grid).arrays
    deep = [name for name in both if int(name.split(".")[1]) > 0]
    shallow = [name for name in both if name not in deep and not name.endswith("bias")]
    assert all(both[name].data == first[name].data for name in deep)
    assert not any(both[name].data == first[name].data for name in shallow)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cafedistill", "cafedistill-text", "depthfl"])
def test_numbers_do_not_depend_on_how_unequal_clients_are_grouped_on_nodes(tmp_path, no_report, method):
    """Bit for bit, but for the bytes: a block travels once a node."""
    for n in (N, 1, 3):
        settings = small_settings(tmp_path / str(n), method=method, **UNEQUAL)
        run_small(settings, n)
    one, *others = (Recorded.read((tmp_path / str(n)) / "small") for n in (N, 1, 3))
    for other in others:
        one.assert_same(other, but=TRAFFIC)


@pytest.mark.slow
def test_half_precision_costs_half_and_gives_nearly_the_same(tmp_path, no_report):
    found = {}
    for wire in ("float32", "float16"):
        settings = small_settings(tmp_path / wire, method="fedavg", learning_rate=0.05, wire_dtype=wire, **UNEQUAL)
        arrays = run_small(settings, 2).arrays
        lines = Recorded.read(settings.results).rounds
        found[wire] = (np.concatenate([a.numpy().ravel() for a in arrays.values()]), lines[-1]["bytes_up"])
    (full, bytes_full), (half, bytes_half) = found.values()
    np.testing.assert_allclose(full, half, atol=2e-3)
    assert np.abs(full - half).max() > 0
    assert bytes_half < 0.65 * bytes_full  # metrics keep their size


# --- narrower layers ---


@pytest.mark.parametrize(
    ("network", "x"),
    [
        (ConvNet((1, 16, 16), 10), torch.rand(2, 1, 16, 16)),
        (ConvNet((1, 16, 16), 10, norm="batch"), torch.rand(2, 1, 16, 16)),
        (SequenceNet((16, 16), 10), torch.rand(2, 16, 16)),
        (ResNet18((3, 32, 32), 10, features=8, width=8), torch.rand(2, 3, 32, 32)),
    ],
)
def test_a_narrower_network_has_the_first_parts_of_all_tensors_and_costs_less(network, x):
    whole, narrow = network.state_dict(), network.narrowed(0.5)
    assert list(narrow.state_dict()) == list(whole)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, whole[name][tuple(map(slice, tensor.shape))]), name
    assert [z.shape for z in narrow(x)] == [z.shape for z in network(x)]
    full, half = macs_per_exit(network, x), macs_per_exit(narrow, x)
    assert all(b < 0.6 * a for a, b in zip(full, half, strict=True))
    assert network.narrowed(0.5).truncated(1).num_exits == network.truncated(1).narrowed(0.5).num_exits == 1
    assert network.narrowed(1.0) is network


def test_a_narrower_network_is_as_the_whole_one_in_all_else():
    network = ConvNet((1, 16, 16), 10, norm="batch")
    network.statistics, network.pixels, network.autocast = "personal", Normalisation((0.1,), (0.2,)), torch.bfloat16
    before = torch.random.get_rng_state()
    narrow = network.narrowed(0.5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (narrow.statistics, narrow.pixels, narrow.autocast) == ("personal", network.pixels, torch.bfloat16)


NARROW = {"depth_shares": "1x0.5:0.2,3x0.5:0.4", "learning_rate": 0.05, "local_steps": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["scalefl", "cafedistill", "cafedistill-plus", "cafedistill-text", "cafedistill-prior", "fedamp"]
)
def test_clients_with_narrower_layers_train_wherever_they_are_hosted(tmp_path, no_report, method):
    """ScaleFL's original form, and others: bit for bit the same on one node and on many, and stopped and resumed;
    nobody is left out, and the networks are as deep and as wide as they should be."""
    whole = small_settings(tmp_path / "5", method=method, **NARROW)
    arrays = run_small(whole, N).arrays
    one = Recorded.read(whole.results)
    assert [line["left_out"] for line in one.rounds] == [{}] * 4
    assert np.mean(one.rounds[-1]["accuracy_per_exit_after"]) > np.mean(one.rounds[0]["accuracy_per_exit"])
    parts = small_settings(tmp_path / "1", method=method, **NARROW)
    run_until(parts, 2, num_nodes=1)
    again = type(parts).from_run_config({**parts.to_run_config(), "resume": True})
    assert same_arrays(run_small(again, 1).arrays, arrays)
    one.assert_same(Recorded.read(parts.results), but=TRAFFIC)
    kinds = {kind["name"]: kind for kind in one.summary["kinds"]}
    assert list(kinds) == ["1 exit at width 0.5", "3 exits at width 0.5", "all 3 exits"]
    narrow, full = (kinds[name] for name in ("3 exits at width 0.5", "all 3 exits"))
    assert narrow["macs_per_exit"][-1] < 0.6 * full["macs_per_exit"][-1]
    run = FinishedRun(whole.results)
    for kind in kinds.values():
        for client in kind["clients"]:
            personal = run.personal(client)
            assert personal.network.num_exits == kind["num_exits"]
            assert personal.network.stages[0][0].out_channels == (8 if kind is full else 4)
            test = run.data(client).test
            accuracy = [(z.argmax(dim=1) == test.y).float().mean().item() for z in personal.network(test.x)]
            assert accuracy == pytest.approx(personal.metadata["accuracy_per_exit"])


def test_every_value_of_a_layer_is_averaged_over_those_who_hold_it(tmp_path):
    """From the replies of a round of FedAvg, client 1 at half the width: the other channels are client 0's."""
    network = ConvNet((1, 16, 16), 10)
    app = make_client_app(
        lambda context: ConvNet((1, 16, 16), 10), lambda client, context: load_federation("digits", 2).load(client)
    )
    grid = DeviceGrid(app, ["0", "1"], tmp_path)
    list(grid.contexts.values())[1].node_config["max-width"] = 0.5
    arrays = toy_strategy().start(grid).arrays
    schemas = [Schema.of(held.state_dict(), list(held.state_dict())) for held in (network, network.narrowed(0.5))]
    flat = [reply.content["arrays"]["flat"].numpy() for _, reply in grid.of_type("train")]
    wide, narrow = (schema.unpack(values) for schema, values in zip(schemas, flat, strict=True))
    n, k = (len(load_federation("digits", 2).load(client).train) for client in (0, 1))
    for name, array in arrays.items():
        where = tuple(map(slice, narrow[name].shape))
        expected = wide[name].clone()
        expected[where] = (n * wide[name][where] + k * narrow[name]) / (n + k)
        torch.testing.assert_close(torch.from_numpy(array.numpy().copy()), expected)


def test_a_network_that_cannot_be_narrowed_says_so_before_the_first_round(tmp_path):
    grid = devices(tmp_path, [3])
    next(iter(grid.contexts.values())).node_config["max-width"] = 0.5
    with pytest.raises(RuntimeError, match="EarlyExitNetwork does not say what it is at a share of its width"):
        toy_strategy(wait_seconds=0).start(grid)


@pytest.mark.parametrize("width", [0, 1.5, "half"])
def test_a_width_that_is_none_is_refused_before_the_first_round(tmp_path, width):
    grid = devices(tmp_path, [3])
    next(iter(grid.contexts.values())).node_config["max-width"] = width
    with pytest.raises(
        RuntimeError, match=f"max-width must be a share of the width, above 0 and at most 1, got {width!r}"
    ):
        toy_strategy(wait_seconds=0).start(grid)


# --- depths of a simulation ---


def test_depths_are_dealt_by_their_shares_and_the_seed():
    dealt = [
        [drawn(client, 20, {Capacity(1): 0.3, Capacity(2): 0.25}, 4, seed).exits for client in range(20)]
        for seed in (0, 0, 1)
    ]
    assert [dealt[0].count(depth) for depth in (1, 2, 3, 4)] == [6, 5, 0, 9]
    assert dealt[0] == dealt[1] != dealt[2]


@pytest.mark.parametrize("selection", ["shallow-first", "deep-first", "random", "none"])
def test_students_that_are_not_there_never_train_and_take_no_place(selection):
    there = np.arange(1, 4) < np.array([1, 2, 3, 4, 4])[:, None]
    similarity = np.where(there, np.random.default_rng(0).uniform(-1, 1, there.shape), np.nan)
    for t in range(1, 9):
        active = active_exits(t, 8, similarity, selection=selection, rng=np.random.default_rng(t), there=there)
        assert not (active & ~there).any()
        assert active.sum() == (there.sum() if selection == "none" else student_budget(t, 8, int(there.sum())))


# --- a run, and what it leaves behind ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = small_settings(tmp_path_factory.mktemp("unequal"), method="cafedistill", **UNEQUAL)
    run_small(settings, 2)
    depths = {client: drawn(client, N, {Capacity(1): 0.2, Capacity(2): 0.4}, 3, 0).exits for client in range(N)}
    assert sorted(depths.values()) == [1, 2, 2, 3, 3]
    return settings, depths


@pytest.mark.slow
def test_a_personal_network_has_the_exits_its_client_holds(finished):
    settings, depths = finished
    run = FinishedRun(settings.results)
    for client, depth in depths.items():
        personal = run.personal(client)
        assert personal.network.num_exits == depth == len(personal.temperatures)
        test = run.data(client).test
        logits = personal.network(test.x)
        assert len(logits) == depth
        accuracy = [(z.argmax(dim=1) == test.y).float().mean().item() for z in logits]
        assert accuracy == pytest.approx(personal.metadata["accuracy_per_exit"])


@pytest.mark.slow
def test_the_summary_has_accuracy_by_depth(finished):
    """Against the personal networks; an exit's own accuracy is the mean over those who hold it."""
    settings, depths = finished
    summary = json.loads((settings.results / "summary.json").read_text())
    run = FinishedRun(settings.results)
    metadata = {client: run.personal(client).metadata["accuracy_per_exit"] for client in depths}
    by_depth = {kind["num_exits"]: kind for kind in summary["kinds"]}
    assert [kind["name"] for kind in summary["kinds"]] == ["1 exit", "2 exits", "all 3 exits"]
    for depth, kind in by_depth.items():
        clients = [client for client in depths if depths[client] == depth]
        assert kind["clients"] == clients
        np.testing.assert_allclose(kind["accuracy_per_exit"], np.mean([metadata[c] for c in clients], axis=0))
        assert kind["macs_per_exit"] == summary["macs_per_exit"][:depth]
    for k in range(3):
        mean = np.mean([metadata[client][k] for client in depths if depths[client] > k])
        assert summary["accuracy_per_exit"][k] == pytest.approx(mean)
    sizes = [by_depth[depth]["bytes_up_per_client_round"] for depth in (1, 2, 3)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.5 * sizes[2]


def test_students_of_a_round_are_those_that_clients_hold(finished):
    settings, depths = finished
    rounds = [json.loads(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    students = sum(depth - 1 for depth in depths.values())
    assert [line["students"] for line in rounds] == [students] * 4
    with_students = sum(depth > 1 for depth in depths.values())
    assert [line["active_exits"] for line in rounds[:2]] == [[with_students, 0]] * 2  # R·m·n is n at most
    holders = [sum(depth > k for depth in depths.values()) for k in (1, 2)]
    assert rounds[-1]["active_exits"] == holders


@pytest.mark.slow
def test_the_text_s_budget_counts_the_students_that_there_are(finished, tmp_path, no_report):
    students = sum(depth - 1 for depth in finished[1].values())
    settings = small_settings(tmp_path, method="cafedistill-text", **UNEQUAL)
    run_small(settings, 2)
    rounds = [json.loads(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    assert [sum(line["active_exits"]) for line in rounds] == [student_budget(t, 4, students) for t in (1, 2, 3, 4)]


def test_the_report_says_who_holds_what(finished):
    page = (finished[0].results / "report.html").read_text()
    assert "Clients that are not alike" in page
    assert "<td>1 exit</td>" in page


@pytest.mark.slow
def test_networks_of_all_depths_are_calibrated_exported_and_leave_early(finished, tmp_path):
    settings, depths = finished
    run = FinishedRun(settings.results)
    found = calibrate_run(run, Request(risk=0.3, simultaneous=True))
    assert [line["client"] for line in found["clients"]] == sorted(c for c in depths if depths[c] > 1)
    assert all(len(line["thresholds"]) == depths[line["client"]] - 1 for line in found["clients"])
    for client, depth in depths.items():
        written = export_client(
            run, client, tmp_path / str(client), max_prob=0.5 if depth > 1 else None, format="torch"
        )
        assert written.folder.exists()
        personal = run.personal(client)
        left = EarlyExitRunner(personal.network, MaxProb(0.0)).predict(run.data(client).test.x)
        assert set(left.exits.tolist()) == {0}


def test_networks_of_a_kind_are_evaluated_together_and_no_others(finished):
    settings, depths = finished
    run = FinishedRun(settings.results)
    deep = [client for client in depths if depths[client] == 2]
    listed = ",".join(map(str, deep))
    with pytest.raises(ValueError, match=rf"hold different networks.*2 exits: {listed}"):
        evaluate_run(run, corruptions=())
    found = evaluate_run(run, clients=deep, corruptions=())
    assert [line["client"] for line in found["clients"]] == deep
    assert len(found["macs_per_exit"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["cafedistill", "cafedistill-plus", "cafedistill-text", "cafedistill-prior", "pfedgraph"]
)
def test_two_and_two_rounds_are_four_for_unequal_clients(tmp_path, no_report, method):
    """What clients upload differs in size: the checkpoint keeps it all the same."""
    whole = small_settings(tmp_path / "whole", method=method, learning_rate=0.1, **UNEQUAL)
    arrays = run_small(whole).arrays
    parts = small_settings(tmp_path / "parts", method=method, learning_rate=0.1, **UNEQUAL)
    run_until(parts, 2)
    again = type(parts).from_run_config({**parts.to_run_config(), "resume": True})
    assert same_arrays(run_small(again).arrays, arrays)
    Recorded.read(parts.results).assert_same(Recorded.read(whole.results))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_unequal_clients(tmp_path, no_report, method):
    """Nobody is left out, every network has the exits of its client, and learns."""
    settings = small_settings(
        tmp_path, method=method, num_clients=N, num_server_rounds=6, local_steps=4, learning_rate=0.05, batch_size=4
    )
    run_small(settings, app=None, grid=devices(tmp_path / "state"))
    rounds = [json.loads(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    assert [line["left_out"] for line in rounds] == [{}] * 6
    assert np.mean(rounds[-1]["accuracy_per_exit_after"]) > np.mean(rounds[0]["accuracy_per_exit"])
    metadata = [json.loads((tmp_path / "state" / f"client-{c}.json").read_text()) for c in range(N)]
    assert [fact["num_exits"] for fact in metadata] == DEPTHS


# --- who teaches ---


def teacher_weights_of(tmp_path, peers):
    grid = devices(tmp_path)
    strategy = toy_strategy("cafedistill-text", rounds=4, settings={"peers": peers})
    strategy.start(grid, num_rounds=3)
    plan = strategy.state.plan
    assert list(plan.weight_rows) == list(plan.weight_columns) == list(range(N))
    np.testing.assert_allclose(plan.weights.sum(axis=1), 1.0)
    same = np.equal.outer(DEPTHS, DEPTHS)
    return plan.weights, same


@pytest.mark.slow
def test_all_may_teach_or_only_those_that_hold_the_same(tmp_path):
    weights, same = teacher_weights_of(tmp_path / "alike", "alike")
    assert (weights[~same] == 0).all()
    assert weights[0, 0] == 1.0  # the only one with exit 1 alone learns from its own
    weights, same = teacher_weights_of(tmp_path / "all", "all")
    assert weights[0, 0] < 1.0


def test_deeper_clients_teach_by_the_exit_that_a_client_holds(tmp_path):
    """By hand from what the clients sent: every teacher is the weights' mixture of classifiers of the pupil's own last
    exit, and a client with fewer exits has no weight."""
    grid = devices(tmp_path)
    strategy = toy_strategy("cafedistill-text", rounds=4, settings={"peers": "deeper"})
    strategy.start(grid, num_rounds=2)
    weights, heads = strategy.state.plan.weights, {}
    per_exit = 4 * CLASSES + CLASSES
    for request, reply in grid.of_type("train")[:N]:
        (client,) = request.content["config"]["clients"]
        flat = reply.content["arrays"]["flat"].numpy()
        heads[client] = flat[-per_exit * DEPTHS[client] :].reshape(DEPTHS[client], per_exit)
    for request, _ in grid.of_type("train")[N:]:
        (client,) = request.content["config"]["clients"]
        depth = DEPTHS[client]
        able = [c for c in range(N) if DEPTHS[c] >= depth]
        assert set(np.flatnonzero(weights[client])) <= set(able)
        expected = sum(weights[client, c] * heads[c][depth - 1] for c in able)
        np.testing.assert_allclose(request.content["arrays"]["flat"].numpy()[-per_exit:], expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    assert weights[0, 1:].max() > 0


@pytest.mark.slow
def test_of_equal_clients_the_choice_of_peers_changes_nothing(tmp_path, no_report):
    peers = ("all", "alike", "deeper")
    runs = [small_settings(tmp_path / each, method="cafedistill-text", text_peers=each) for each in peers]
    arrays = [run_small(settings).arrays for settings in runs]
    assert same_arrays(arrays[0], arrays[1])
    assert same_arrays(arrays[0], arrays[2])


@pytest.mark.parametrize("method", ["cafedistill", "cafedistill-plus"])
def test_classifiers_are_mixed_among_those_that_hold_the_same_exits(tmp_path, method):
    strategy = toy_strategy(method, rounds=3)
    strategy.start(devices(tmp_path))
    plan = strategy.state.plan
    assert list(plan.weight_rows) == list(plan.weight_columns) == list(range(N))
    np.testing.assert_allclose(plan.weights.sum(axis=1), 1.0)
    same = np.equal.outer(DEPTHS, DEPTHS)
    assert (plan.weights[~same] == 0).all()
    assert (plan.weights[same & ~np.eye(N, dtype=bool)] > 0).any()


def test_whole_models_are_mixed_among_those_that_hold_the_same(tmp_path):
    """FedAMP: a model of two blocks cannot be mixed with one of three."""
    strategy = toy_strategy("fedamp", rounds=3)
    strategy.start(devices(tmp_path))
    plan = strategy.state.plan
    same = np.equal.outer(DEPTHS, DEPTHS)
    assert (plan.weights[~same] == 0).all()
    assert (plan.weights[same & ~np.eye(N, dtype=bool)] > 0).all()


def test_a_client_that_can_hold_more_goes_on_with_what_it_has(tmp_path):
    """After round 2 its node comes back with room for all exits: it keeps its first head, and nobody is left out."""
    grid = DeviceGrid(toy_app(), ["0", "0", "1"], tmp_path, there={0: (0, 2), 1: (3, 9)})
    small, _, _ = grid.contexts.values()
    small.node_config["max-exit"] = 1
    strategy = toy_strategy("fedper", rounds=4, wait_seconds=5)
    seen = []
    strategy.callbacks = [Watch(seen)]
    strategy.start(grid)
    assert [record.left_out for record in seen] == [{}] * 4
    assert [np.isfinite(r.reports[0].before.accuracy).tolist() for r in seen] == [
        [True, False, False],
        [True, False, False],
        [True, True, True],
        [True, True, True],
    ]
    losses = [record.reports[0].before.loss[0] for record in seen]
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ditto", "cafedistill", "cafedistill-plus", "cafedistill-text"])
def test_a_client_that_can_hold_wider_layers_goes_on_with_what_still_fits(tmp_path, method):
    """Ditto keeps a whole model of its own, whose layers have other shapes then; classifiers fit as they are."""
    app = make_client_app(
        lambda context: ConvNet((1, 16, 16), 10), lambda client, context: load_federation("digits", 2).load(client)
    )
    grid = DeviceGrid(app, ["0", "0", "1"], tmp_path, there={0: (0, 2), 1: (3, 9)})
    next(iter(grid.contexts.values())).node_config["max-width"] = 0.5
    strategy = toy_strategy(method, rounds=4, wait_seconds=5)
    seen = []
    strategy.callbacks = [Watch(seen)]
    strategy.start(grid)
    assert [record.left_out for record in seen] == [{}] * 4
    assert [len(record.reports) for record in seen] == [2] * 4


class Watch:
    """Keeps what a run tells its callbacks."""

    def __init__(self, seen):
        self.seen = seen

    def on_start(self, run):
        self.run = run

    def on_round(self, record, state):
        self.seen.append(record)

    def on_finish(self, reports):
        pass


def test_metrics_that_flower_shows_are_of_those_that_hold_an_exit(tmp_path):
    strategy = toy_strategy()
    seen = []
    strategy.callbacks = [Watch(seen)]
    metrics = strategy.start(devices(tmp_path)).train_metrics_clientapp[1]
    reports = seen[0].reports
    for k in range(3):
        held = [r for r in reports if DEPTHS[r.client] > k]
        expected = np.average([r.after.accuracy[k] for r in held], weights=[r.num_examples for r in held])
        assert metrics["accuracy-after"][k] == pytest.approx(expected)


class Lying:
    """A client app whose node's answer to the first question is changed by ``lie(config)`` on node ``where``."""

    def __init__(self, app, where, lie):
        self.app, self.where, self.lie = app, where, lie

    def __call__(self, message, context):
        reply = self.app(message, context)
        if message.metadata.message_type == "query" and context.node_config["clients"] == self.where:
            self.lie(reply.content["config"])
        return reply


def change_kind(**changes):
    def lie(config):
        config["kinds"] = [json.dumps({**json.loads(config["kinds"][0]), **changes})]

    return lie


def put(**values):
    return lambda config: config.update({key.replace("_", "-"): value for key, value in values.items()})


NEGATIVE = json.dumps([["stages.0.0.weight", [-1, 5]]])
ALIEN = json.dumps([["stages.0.0.weight", [9, 9]]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (put(kinds=["[1]"]), "names a kind of clients that cannot be read"),
        (put(kinds=["null"]), "names a kind of clients that cannot be read"),
        (put(kinds=["{"]), "names a kind of clients that cannot be read"),
        (change_kind(macs=5), "names a kind of clients that cannot be read"),
        (change_kind(more=1), "names a kind of clients that cannot be read"),
        (change_kind(num_exits="2"), "with numbers that are not whole"),
        (change_kind(name=7), "whose name is no text"),
        (change_kind(num_exits=9), "names a kind of clients with 9 exits and 2 numbers of MACs"),
        (change_kind(num_exits=0, macs=[]), "names a kind of clients with 0 exits"),
        (change_kind(shared=ALIEN), "shared tensors are not among the federation's"),
        (change_kind(shared=NEGATIVE), "shared tensors are not among the federation's"),
        (put(kind_of=[1]), "names kinds of clients that do not fit its clients"),
        (put(kind_of=[0, 0]), "names kinds of clients that do not fit its clients"),
        (change_kind(upload=ALIEN), "what it says of clients with 2 exits differs from what other nodes say"),
        (change_kind(name=""), "what it says of clients with the whole network differs from what other nodes say"),
    ],
)
def test_a_node_that_names_impossible_kinds_is_refused_and_the_others_go_on(tmp_path, flower_log, lie, message):
    """Clients 1 and 4 hold two exits; the node of client 4 says something else of it."""
    grid = devices(tmp_path, app=Lying(toy_app(), "4", lie))
    toy_strategy("cafedistill", rounds=2, wait_seconds=0).start(grid)
    assert message in flower_log.text()
    assert {request.content["config"]["clients"][0] for request, _ in grid.of_type("train")} == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cafedistill", "cafedistill-text", "depthfl"])
def test_a_resumed_run_knows_what_clients_held_that_are_away(tmp_path, no_report, method):
    """Clients 1 and 4, the only ones of two exits, and client 0 are gone after round 2: with cafedistill-text their
    last exits still teach, and DepthFL still takes the plain mean, as in a run that was not stopped."""
    settings = {"method": method, "num_clients": N, "num_server_rounds": 4, "batch_size": 4, "local_steps": 3}
    settings |= {"learning_rate": 0.1, "wait_seconds": 0.0}
    leaving = {0: (0, 2), 1: (0, 2), 4: (0, 2)}
    whole = small_settings(tmp_path / "whole", **settings)
    grid = devices(tmp_path / "whole" / "state")
    grid.there = leaving
    arrays = run_small(whole, grid=grid).arrays
    parts = small_settings(tmp_path / "parts", **settings)
    grid = devices(tmp_path / "parts" / "state")
    with results_of(parts) as results:
        recorder = Recorder(results.folder, parts.to_run_config())
        build_strategy(parts, recorder, results.state).start(grid, num_rounds=2)
        recorder.close()
    again = type(parts).from_run_config({**parts.to_run_config(), "resume": True})
    grid = devices(tmp_path / "parts" / "state")
    grid.there, grid.round = dict.fromkeys(leaving, (99, 99)), 3
    assert same_arrays(run_small(again, grid=grid).arrays, arrays)
    if method == "cafedistill-text":
        summary = json.loads((parts.results / "summary.json").read_text())
        assert summary["teacher_weights"]["clients"] == list(range(N))


@pytest.mark.slow
def test_where_nobody_holds_the_last_exit_there_is_nothing_to_say_of_it(tmp_path, flower_log):
    settings = small_settings(tmp_path, depth_shares="2:1.0")
    run_small(settings, 2)
    summary = json.loads((settings.results / "summary.json").read_text())
    assert summary["accuracy_last_exit"] is None
    assert np.isfinite([summary["accuracy"], *summary["accuracy_per_exit"][:2]]).all()
    page = (settings.results / "report.html").read_text()
    assert "taken from the other records" not in page
    with pytest.raises(ValueError, match="no client of the federation holds the last exit"):
        package_run(settings.results)


def test_marks_of_exits_in_the_report_are_over_those_that_hold_them(finished):
    settings, depths = finished
    run = read_run(settings.results)
    tests = {line["client"]: line["test"] for line in run.get("clients")}
    for k, accuracy in enumerate(pooled_accuracy(run), start=1):
        held = [client for client in depths if depths[client] >= k]
        expected = np.average([run.accuracy[k][c] for c in held], weights=[tests[c] for c in held])
        assert accuracy == pytest.approx(expected)


def test_a_users_own_average_is_left_alone(tmp_path):
    def median(records, weight_key):
        rows = np.array([record["metrics"]["accuracy-after"] for record in records])
        return MetricRecord({"accuracy-after": np.nanmedian(rows, axis=0).tolist(), "clients": len(rows)})

    seen = []
    strategy = toy_strategy(train_metrics_aggr_fn=median)
    strategy.callbacks = [Watch(seen)]
    metrics = strategy.start(devices(tmp_path)).train_metrics_clientapp[1]
    assert metrics["clients"] == N
    assert metrics["accuracy-after"] == np.nanmedian([r.after.accuracy for r in seen[0].reports], axis=0).tolist()


# --- bad input ---


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (0, "client 1 is left out: node-config max-exit must be the number of an exit, 1 or more, got 0"),
        ("deep", "max-exit must be the number of an exit, 1 or more, got 'deep'"),
        (4, "client 1 is left out: node-config max-exit asks for 4 exits, and this network has 3"),
    ],
)
def test_a_depth_that_is_not_there_is_said_before_the_first_round(tmp_path, flower_log, depth, message):
    """Alone it ends the run; beside others the client is left out."""
    alone = devices(tmp_path / "alone", [3, depth])
    alone.there = {0: (99, 99)}
    with pytest.raises(RuntimeError, match="no client can take part") as error:
        toy_strategy(wait_seconds=0).start(alone)
    assert message in str(error.value)
    grid = devices(tmp_path / "both", [3, depth])
    toy_strategy(wait_seconds=0).start(grid)
    assert message in flower_log.text()
    assert [request.content["config"]["clients"] for request, _ in grid.of_type("train")] == [[0]]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("0:0.5", "a client holds one exit at least, got 0"),
        ("1", "must look like '1:0.3,2:0.3'"),
        ("1:x", "must look like '1:0.3,2:0.3'"),
        ("1:0.7,2:0.7", "must sum to 1 at most, got 1.4"),
        ("1:0.2,1:0.3", "names 1 twice"),
        ("1:0", "shares lie above 0 and at most at 1, got '1:0'"),
        ("1x0:0.5", "shares lie above 0 and at most at 1, got '1x0:0.5'"),
        ("1x2:0.5", "shares lie above 0 and at most at 1, got '1x2:0.5'"),
        ("1xa:0.5", "must look like '1:0.3,2:0.3'"),
    ],
)
def test_shares_that_are_none_are_refused(tmp_path, shares, message):
    with pytest.raises(ValueError, match=message):
        small_settings(tmp_path, depth_shares=shares)


def test_shares_of_a_deeper_network_end_the_run_before_the_first_round(tmp_path, no_report):
    with pytest.raises(ValueError, match=r"depth-shares asks for 4 exits, and this network has 3"):
        small_settings(tmp_path, depth_shares="4:0.2")
    grid = WatchedGrid(toy_app(), 2, {"heterogeneity.depth-shares": "4:0.5"})
    with pytest.raises(RuntimeError, match=r"no client can take part(.|\n)*depth-shares asks for 4 exits"):
        toy_strategy(num_clients=2, wait_seconds=0).start(grid)


def test_shares_need_a_number_of_clients(tmp_path):
    grid = WatchedGrid(toy_app(), 2, {"heterogeneity.depth-shares": "1:0.5"})
    with pytest.raises(RuntimeError, match="depth-shares is for runs with num-clients: give every node a max-exit"):
        toy_strategy(wait_seconds=0).start(grid)
