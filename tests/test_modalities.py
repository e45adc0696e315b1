"""Clients of several modalities: backbones averaged among their kind, classifiers compared across."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from federations import (
    CLASSES,
    INPUTS,
    DeviceGrid,
    Recorded,
    WatchedGrid,
    run_small,
    run_until,
    same_arrays,
    small_settings,
    toy_data,
    toy_network,
)
from torch import nn

from cafe_flwr import EarlyExitNetwork, make_client_app
from cafe_flwr.app.joining import package_run
from cafe_flwr.app.parts import build_networks, federation, modality_of
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.data import ClientData, Split
from cafe_flwr.data.modalities import in_rows
from cafe_flwr.methods import METHODS
from cafe_flwr.networks import ConvNet, Exit, SequenceNet
from cafe_flwr.networks.capacity import networks_of, start_alike
from cafe_flwr.personal import FinishedRun
from cafe_flwr.personal.evaluation import evaluate_run
from cafe_flwr.personal.export import export_client
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.training import LocalBudget

BOTH = {"modalities": "image,rows"}
N = 5
TRAFFIC = {"bytes_up", "bytes_down", "bytes_up_per_client_round", "bytes_down_per_client_round"}
BUDGET = LocalBudget(steps=3, batch_size=4, learning_rate=0.1)


def other_network(width=4):
    """Another family for the toys' inputs: two exits, other layers, classifiers of the same width."""
    layers = [nn.Linear(INPUTS, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6))]
    return EarlyExitNetwork(layers, [Exit(nn.Linear(6, width), width, CLASSES) for _ in layers])


def toy_modalities(**changes):
    """Clients 0, 2, 4 have the toys' network, 1 and 3 another."""
    given = {
        "build_network": lambda context: {"a": toy_network(), "b": other_network()},
        "load_data": lambda client, context: toy_data(client),
        "modality_of": lambda client, context: "ab"[client % 2],
    }
    return make_client_app(**{**given, **changes}, state_dir=lambda context: str(context.run_config["state"]))


def toy_grid(folder, num_nodes=N, **changes):
    return WatchedGrid(toy_modalities(**changes), num_nodes, {"state": str(folder)})


def strategy_of(method="fedavg", rounds=2, **settings):
    method = METHODS[method](**settings)
    return FederatedStrategy(method=method, num_rounds=rounds, local=BUDGET, num_clients=N, wait_seconds=0)


def test_a_backbone_is_averaged_among_its_own_kind(tmp_path):
    """From the replies: the shared part of every modality is the mean over its clients, by examples."""
    grid = toy_grid(tmp_path)
    arrays = strategy_of(rounds=1).start(grid).arrays
    networks = {"a": toy_network(), "b": other_network()}
    names = [f"{modality}/{name}" for modality, network in networks.items() for name in network.state_dict()]
    assert list(arrays) == names
    replies = {}
    for request, reply in grid.of_type("train"):
        (client,) = request.content["config"]["clients"]
        flat = reply.content["arrays"]["flat"].numpy()
        assert flat.size == request.content["arrays"]["flat"].numpy().size
        assert flat.size == sum(t.numel() for t in networks["ab"[client % 2]].state_dict().values())
        replies[client] = flat
    for modality, clients in (("a", (0, 2, 4)), ("b", (1, 3))):
        weights = [12 + 5 * client for client in clients]
        expected = np.average([replies[client] for client in clients], axis=0, weights=weights)
        got = np.concatenate([array.numpy().ravel() for name, array in arrays.items() if name.startswith(modality)])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_classifiers_of_all_modalities_teach_or_only_ones_own(tmp_path):
    same = np.equal.outer(np.arange(N) % 2, np.arange(N) % 2)
    for peers in ("all", "alike"):
        strategy = strategy_of("cafedistill-text", rounds=4, peers=peers)
        strategy.start(toy_grid(tmp_path / peers), num_rounds=3)
        weights = strategy.state.plan.weights
        np.testing.assert_allclose(weights.sum(axis=1), 1.0)
        assert (weights[~same] > 0).any() == (peers == "all")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cafedistill", "cafedistill-plus"])
def test_classifiers_are_mixed_across_modalities_where_they_are_of_the_same_exits(tmp_path, method):
    """Exit k is mixed with exit k: networks of two and of three exits have no last one in common."""
    same = np.equal.outer(np.arange(N) % 2, np.arange(N) % 2)
    for other in (other_network, toy_network):
        strategy = strategy_of(method, rounds=4)
        networks = {"build_network": lambda context, other=other: {"a": toy_network(), "b": other()}}
        strategy.start(toy_grid(tmp_path / other.__name__, **networks), num_rounds=3)
        weights = strategy.state.plan.weights
        np.testing.assert_allclose(weights.sum(axis=1), 1.0)
        assert (weights[~same] > 0).any() == (other is toy_network)


def test_all_modalities_start_from_the_same_classifiers():
    """The last exits' alike, and those before them as far as there are any."""
    networks = networks_of({"a": toy_network(), "b": other_network()})
    start_alike(networks)
    a, b = (network.state_dict() for network in networks.values())
    for k in (1, 2):
        mine, theirs = networks["a"].head_names(3 - k), networks["b"].head_names(2 - k)
        assert all(torch.equal(a[m], b[t]) for m, t in zip(mine, theirs, strict=True))


def test_students_of_a_modality_with_fewer_exits(tmp_path):
    """Two exits have one student: of 3·2 + 2·1 students the first of each client trains at once, all in the end."""
    seen = []

    class Watch:
        def on_start(self, run):
            pass

        def on_round(self, record, state):
            seen.append(record)

        def on_finish(self, reports):
            seen.append(reports)

    strategy = strategy_of("cafedistill", rounds=4)
    strategy.callbacks = [Watch()]
    strategy.start(toy_grid(tmp_path))
    *rounds, reports = seen
    assert [record.students for record in rounds] == [8] * 4
    assert (rounds[0].active_exits, rounds[-1].active_exits) == ([5, 0], [5, 3])
    assert [len(r.exits.accuracy) - sum(np.isnan(r.exits.accuracy)) for r in reports] == [3, 2, 3, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_numbers_do_not_depend_on_how_modalities_are_grouped_on_nodes(tmp_path, no_report, num_nodes):
    for n in (N, num_nodes):
        run_small(small_settings(tmp_path / str(n), **BOTH), n)
    one, other = (Recorded.read(tmp_path / str(n) / "small") for n in (N, num_nodes))
    one.assert_same(other, but=TRAFFIC)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_clients_of_two_modalities(tmp_path, no_report, method):
    """Nobody is left out, and clients that have trained are better than they were; resumed it is the same run, which
    is seen by one method of every family."""
    given = {"method": method, "learning_rate": 0.05, "local_steps": 4, "num_server_rounds": 4, **BOTH}
    whole = small_settings(tmp_path / "whole", **given)
    arrays = run_small(whole).arrays
    rounds = [json.loads(line) for line in (whole.results / "rounds.jsonl").read_text().splitlines()]
    assert [line["left_out"] for line in rounds] == [{}] * 4
    assert np.mean(rounds[-1]["accuracy_per_exit_after"]) > np.mean(rounds[0]["accuracy_per_exit"])
    if method not in ("fedavg", "fedper", "ditto", "pfedgraph", "fedpac", "fedrod") and "cafedistill" not in method:
        return
    parts = small_settings(tmp_path / "parts", **given)
    run_until(parts, 2)
    again = type(parts).from_run_config({**parts.to_run_config(), "resume": True})
    assert same_arrays(run_small(again).arrays, arrays)


# --- images, and the same row by row ---


def test_rows_hold_the_pixels_of_the_image(tmp_path):
    settings = small_settings(tmp_path)
    data = federation(settings).load(1)
    rows = in_rows(data)
    x, image = rows.test.x[3], data.test.x[3]
    assert x.shape == (16, 16)
    for t in range(16):
        assert torch.equal(x[:, t], image[0, t])
    assert torch.equal(rows.train.y, data.train.y)


def test_clients_take_turns_and_have_the_network_of_their_modality(tmp_path):
    settings = small_settings(tmp_path, **BOTH)
    assert [modality_of(settings, client) for client in range(4)] == ["image", "rows", "image", "rows"]
    networks = build_networks(settings)
    assert [type(network) for network in networks.values()] == [ConvNet, SequenceNet]
    for client in range(2):
        x = federation(settings).load(client).train.x
        networks[modality_of(settings, client)].check_inputs(x)
    with pytest.raises(ValueError, match=r"sequences must be \(N, 16, 16\), float32; got torch.float32 of shape"):
        networks["rows"].check_inputs(torch.zeros(2, 1, 16, 16))


def test_a_sequence_net_counts_its_macs_and_refuses_what_is_too_short():
    costs = macs_per_exit(SequenceNet((16, 16), 10), torch.zeros(1, 16, 16))
    assert costs == sorted(costs)
    assert costs[0] == 16 * 8 * 3 * 16 + 4 * 8 * 24 + 24 * 10  # convolution, projection, classifier
    with pytest.raises(ValueError, match="at least 8 steps for 3 blocks"):
        SequenceNet((16, 7), 10)
    with pytest.raises(ValueError, match="multiples of 4"):
        SequenceNet((16, 16), 10, widths=(6, 8))
    assert len(SequenceNet((16, 16), 10, norm="batch")(torch.zeros(2, 16, 16))) == 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = small_settings(tmp_path_factory.mktemp("modalities"), **BOTH)
    run_small(settings, 2)
    return settings


@pytest.mark.slow
def test_personal_networks_are_of_the_clients_modality_and_as_good_as_recorded(finished, tmp_path):
    run = FinishedRun(finished.results)
    for client, kind in enumerate([ConvNet, SequenceNet] * 2):
        personal, test = run.personal(client), run.data(client).test
        assert isinstance(personal.network, kind)
        accuracy = [(z.argmax(dim=1) == test.y).float().mean().item() for z in personal.network(test.x)]
        assert accuracy == pytest.approx(personal.metadata["accuracy_per_exit"])
    assert export_client(run, 1, tmp_path / "exported", max_prob=0.5).folder.exists()


def test_summary_and_report_say_how_good_each_modality_is_and_who_teaches_it(finished):
    summary = json.loads((finished.results / "summary.json").read_text())
    image, rows = summary["kinds"]
    assert (image["name"], image["clients"], rows["name"], rows["clients"]) == ("image", [0, 2, 4], "rows", [1, 3])
    assert image["macs_per_exit"] > rows["macs_per_exit"]
    weights = np.array(summary["teacher_weights"]["weights"])
    own = weights[np.ix_([1, 3], [1, 3])].sum(axis=1).mean()
    assert rows["weight_of_own_kind"] == pytest.approx(own, abs=1e-3)
    page = (finished.results / "report.html").read_text()
    assert "Clients that are not alike" in page
    assert "<td>rows</td>" in page


def test_the_cost_of_leaving_early_is_that_of_each_clients_own_network(finished):
    """Where nobody leaves: the full cost of the clients' networks, weighted by their test examples."""
    summary = json.loads((finished.results / "summary.json").read_text())
    tests = {line["client"]: line["test"] for line in summary["clients"]}
    costs = {client: kind["macs_per_exit"][-1] for kind in summary["kinds"] for client in kind["clients"]}
    expected = sum(tests[c] * costs[c] for c in tests) / sum(tests.values())
    assert summary["curve"]["macs"][-1] == pytest.approx(expected)


def test_what_needs_one_modality_says_so(finished):
    run = FinishedRun(finished.results)
    with pytest.raises(ValueError, match=r"image, 3 exits: 0,2,4; rows, 3 exits: 1,3"):
        evaluate_run(run, corruptions=())
    assert len(evaluate_run(run, clients=[1, 3], corruptions=())["clients"]) == 2
    with pytest.raises(ValueError, match=r"join a federation of several modalities yet \(image, rows\)"):
        package_run(finished.results)


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modalities": "image,row"},
            "heterogeneity.modalities should be among image, rows, got 'row'; did you mean 'rows'",
        ),
        ({"modalities": "rows,rows"}, "heterogeneity.modalities names one twice"),
        ({"modalities": "image,rows", "network": "resnet18"}, "is for network = 'conv', got 'resnet18'"),
        ({"modalities": "image,rows", "dataset": "cifar10"}, "is for digits and digit-pairs"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality_of": None}, "there are networks for a, b: say which client has which (modality_of)"),
        ({"modality_of": lambda client, context: "c"}, "its modality is 'c', there are networks for a, b"),
        (
            {"build_network": lambda context: {"a": toy_network(), "b": other_network(width=7)}},
            "the classifiers of all modalities must have the same (classes, width), got a: (3, 4), b: (3, 7)",
        ),
        ({"build_network": lambda context: {}}, "networks of modalities need names without '/'; got none"),
        ({"build_network": lambda context: {"a/b": toy_network()}}, "need names without '/'; got ['a/b']"),
    ],
)
def test_networks_that_do_not_fit_end_the_run_before_the_first_round(tmp_path, changes, message):
    with pytest.raises(RuntimeError, match="no client can take part") as error:
        strategy_of().start(toy_grid(tmp_path, 2, **changes))
    assert message in str(error.value)


def test_a_single_modality_is_a_federation_like_any_other(tmp_path):
    one = {"build_network": lambda context: {"a": toy_network()}, "modality_of": None}
    named = strategy_of().start(toy_grid(tmp_path / "one", **one)).arrays
    plain = strategy_of().start(toy_grid(tmp_path / "two", build_network=lambda context: toy_network())).arrays
    assert same_arrays(named, plain)


def test_the_network_of_each_modality_is_told_with_its_own_cost(tmp_path):
    """Also where the first node hosts nobody of the deeper one, and knows no cost of it."""
    told = []

    class Watch:
        def on_start(self, run):
            told.append(run)

        def on_round(self, record, state):
            pass

        def on_finish(self, reports):
            pass

    swapped = {"modality_of": lambda client, context: "ba"[client % 2]}
    strategy = strategy_of(rounds=1)
    strategy.callbacks = [Watch()]
    strategy.start(toy_grid(tmp_path, **swapped))
    (run,) = told
    assert list(run.macs_per_exit) == list(run.kinds[1].macs)
    assert 0 < run.kinds[0].macs[0] != run.macs_per_exit[0]


def test_the_example_of_the_page_runs(tmp_path):
    """docs/modalities.md, with data of the shapes it names: client 11 has images, client 12 a sensor."""
    page = (Path(__file__).parent.parent / "docs" / "modalities.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)

    def load(client):
        rng = np.random.default_rng(client)
        shape = (1, 16, 16) if client == 11 else (6, 128)
        x = torch.from_numpy(rng.normal(size=(20, *shape))).float()
        split = Split(x, torch.arange(20) % 10)
        return ClientData(split, split, split)

    names = {"make_client_app": make_client_app, "ConvNet": ConvNet, "SequenceNet": SequenceNet, "load": load}
    exec(code, names)
    grid = DeviceGrid(names["app"], ["11", "12"], tmp_path)
    result = FederatedStrategy(method=METHODS["cafedistill"](), num_rounds=2, local=BUDGET, wait_seconds=0).start(grid)
    assert {name.partition("/")[0] for name in result.arrays} == {"image", "sensor"}
    assert {path.name for path in tmp_path.glob("client-*.safetensors")} == {
        f"client-{c}.safetensors" for c in (11, 12)
    }
