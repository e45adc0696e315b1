"""The coordination on widths in the place of exits: the example, what it costs, and that CAFEDistill runs on it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from apps import App, load_app
from safetensors.torch import load_file

from cafe_flwr import CafeDistill
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.data import load_federation
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.inference import EarlyExitRunner, MaxProb, PerExit
from cafe_flwr.training import LocalBudget

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "slimmable-widths"
ROUNDS, CLIENTS = 16, 6


@pytest.fixture(scope="module")
def example() -> App:
    return load_app(FOLDER)


class Watch:
    """Keeps the record of every round, and who was in conflict with whom before it."""

    def __init__(self):
        self.records = []
        self.conflicts = [np.zeros((CLIENTS, CLIENTS))]

    def on_start(self, run):
        """Before the first round."""

    def on_round(self, record, state):
        self.records.append(record)
        self.conflicts.append(np.minimum(state.pairs.among(range(CLIENTS)), 0.0))

    def on_finish(self, reports):
        """After the last round."""


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory):
    """What was watched of a run of the example, and the folder of the clients' networks."""
    state, watch = tmp_path_factory.mktemp("state"), Watch()
    grid = InProcessGrid(example.client, 3, example.config, {"state-dir": str(state)})
    local = LocalBudget(learning_rate=0.1, momentum=0.9)
    CafeDistill(num_clients=CLIENTS, num_rounds=ROUNDS, local=local, callbacks=[watch]).start(grid)
    return watch, state


def network_of(weights=None):
    """The network of the example."""
    spec = importlib.util.spec_from_file_location("slimmable", FOLDER / "widths" / "network.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    network = module.SlimmableConvNet(1, 10)
    if weights is not None:
        network.load_state_dict(weights)
    return network.eval()


def test_the_example_takes_forty_lines():
    assert len((FOLDER / "widths" / "network.py").read_text().splitlines()) <= 40


def test_a_narrow_network_is_a_slice_of_the_full_one_and_knows_nothing_of_the_rest():
    network, x = network_of(), torch.rand(5, 1, 16, 16)
    before = [z.clone() for z in network(x)]
    with torch.no_grad():
        network.convolutions[0].weight[4:] += 1  # beyond a quarter of 16 channels
        network.convolutions[1].weight[8:, 4:] += 1
    after = network(x)
    assert torch.equal(before[0], after[0])
    assert not any(torch.equal(b, a) for b, a in zip(before[1:], after[1:], strict=True))
    with torch.no_grad():
        network.convolutions[0].weight[:4] += 1
    assert not any(torch.equal(a, b) for a, b in zip(after, network(x), strict=True))


@pytest.mark.slow
def test_narrow_widths_join_first_and_with_the_least_conflict(trained):
    """⌊R·m·n⌋ of the widths, R = clip( (2(t − 1)/T)·(3/4) + ΣC/n², 0, 3/4 ); the narrowest trains in any case."""
    records, conflicts = trained[0].records, trained[0].conflicts
    partly = 0
    for record, conflict in zip(records, conflicts, strict=False):
        active = record.plan.active
        joined = active.sum(axis=0)
        share = np.clip(2 * (record.server_round - 1) / ROUNDS * 0.75 + conflict.sum() / CLIENTS**2, 0, 0.75)
        budget = int(np.floor(share * 4 * CLIENTS + 1e-9))
        assert joined[0] == CLIENTS
        assert (np.diff(joined) <= 0).all()
        if budget < CLIENTS:
            continue
        assert joined.sum() == budget
        assert ((joined == 0) | (joined == CLIENTS)).sum() >= 2  # at most one width is partly there
        for k in np.flatnonzero((joined > 0) & (joined < CLIENTS)):
            agreement, chosen = conflict.sum(axis=0), active[:, k]
            assert agreement[chosen].min() >= agreement[~chosen].max()
            partly += 1
    assert partly > 0
    assert records[-1].plan.active.all()
    assert not records[0].plan.active[:, 1:].any()


@pytest.mark.slow
def test_classifiers_stay_at_home_and_the_full_width_teaches(trained):
    watch, state = trained
    records = watch.records
    shapes = [load_file(state / f"client-{c}.safetensors") for c in range(CLIENTS)]
    for k in range(4):
        heads = [weights[f"exits.{k}.head.weight"] for weights in shapes]
        assert {tuple(head.shape) for head in heads} == {(10, 24)}
        assert not torch.equal(heads[0], heads[1])
    weights = records[-1].plan.weights
    assert weights.shape == (CLIENTS, CLIENTS)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert (np.diag(weights) > 1 / CLIENTS).all()
    first, last = records[0], records[-1]
    for k in range(4):
        assert last.accuracy_per_exit("after")[k] > first.accuracy_per_exit("before")[k] + 0.2


@pytest.mark.slow
def test_macs_of_widths_add_up_on_the_way_and_a_width_chosen_beforehand_costs_itself_only(trained):
    _, state = trained
    network = network_of(load_file(state / "client-0.safetensors"))
    x = load_federation("digits", CLIENTS, alpha=0.3).load(0).test.x
    alone = []
    for k in range(4):
        a, b = 4 * (k + 1), 8 * (k + 1)
        alone.append(a * 9 * 256 + a * b * 9 * 64 + b * 16 * 24 + 24 * 10)
    assert macs_per_exit(network, x[:2]) == np.cumsum(alone).tolist()

    computed: list[int] = []
    widths, inner = [], network.exit
    network.exit = lambda k, h: widths.append(k) or computed.append(len(h)) or inner(k, h)
    result = EarlyExitRunner(network, PerExit((float("inf"), 0.0, 0.0))).predict(x)
    assert set(result.exits.tolist()) == set(widths) == {1}
    widths.clear()
    computed.clear()
    result = EarlyExitRunner(network, MaxProb(0.6)).predict(x)
    assert computed == [int((result.exits >= k).sum()) for k in widths]
    with torch.no_grad():
        logits = torch.stack([inner(k, x)[1] for k in range(4)])
    assert result.labels.tolist() == [int(logits[k, i].argmax()) for i, k in enumerate(result.exits)]
    assert len(set(result.exits.tolist())) > 1


@pytest.mark.slow
def test_the_app_runs_as_it_stands(example, tmp_path, capsys):
    example.run(2, {"state-dir": str(tmp_path)}, num_server_rounds=2)
    assert "accuracy at 1/4, 1/2, 3/4, 1: [" in capsys.readouterr().out
    assert len(list(tmp_path.glob("client-*.safetensors"))) == CLIENTS
