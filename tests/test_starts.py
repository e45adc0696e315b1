"""What personal classifiers start from: the same for client and server, for every method that keeps some."""

import numpy as np
import pytest
import torch
from federations import WatchedGrid, asked, same_tensors, toy_app, toy_network

from cafe_flwr.methods import METHODS
from cafe_flwr.methods.starts import STARTS, classifier_start
from cafe_flwr.methods.whole_model import WholeModel
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.training import LocalBudget

N, SEED = 3, 5
LAST = [("exits.1.head.weight", (3, 4)), ("exits.1.head.bias", (3,))]
ENTRIES = [("exits.0.head.weight", (3, 4)), ("exits.0.head.bias", (3,)), *LAST]


# --- the draw ---


def test_zeros_are_zeros_of_every_shape():
    start = classifier_start(ENTRIES, "zero", SEED, 0)
    assert {name: tuple(t.shape) for name, t in start.items()} == dict(ENTRIES)
    assert all(t.dtype == torch.float32 and not t.any() for t in start.values())


def test_a_common_draw_is_alike_on_all_clients_and_an_own_one_on_none():
    common, own = ([classifier_start(ENTRIES, start, SEED, client) for client in range(4)] for start in STARTS[1:3])
    assert all(same_tensors(common[0], other) for other in common)
    for i in range(4):
        assert not any(torch.equal(own[i][name], common[0][name]) for name, _ in ENTRIES)
        assert same_tensors(own[i], classifier_start(ENTRIES, "own", SEED, i))
        for j in range(i):
            assert not any(torch.equal(own[i][name], own[j][name]) for name, _ in ENTRIES)


@pytest.mark.parametrize("start", ["common", "own"])
def test_another_seed_or_exit_is_another_draw(start):
    first, other = (classifier_start(ENTRIES, start, seed, 1) for seed in (0, 1))
    assert not any(torch.equal(first[name], other[name]) for name, _ in ENTRIES)
    assert not torch.equal(first["exits.0.head.weight"], first["exits.1.head.weight"])


@pytest.mark.parametrize("start", STARTS[:3])
def test_the_server_which_knows_the_last_exit_alone_draws_the_same_for_it(start):
    """As of cafedistill; and whatever was drawn before, of this or anything else."""
    every = classifier_start(ENTRIES, start, SEED, 2)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    last = classifier_start(LAST, start, SEED, 2)
    assert same_tensors(last, {name: every[name] for name, _ in LAST})


def test_a_draw_is_that_of_torchs_linear_layers():
    """Uniform in ±1/√features, weights and biases: bounds are kept and reached, and the variance is b²/3."""
    entries = [("head.weight", (200, 25)), ("head.bias", (200,))]
    drawn = classifier_start(entries, "own", SEED, 0)
    for name, bound in (("head.weight", 0.2), ("head.bias", 0.2)):
        t = drawn[name]
        assert 0.95 * bound < t.abs().max() <= bound
        assert t.mean().abs() < 0.1 * bound
        assert t.var().item() == pytest.approx(bound**2 / 3, rel=0.15)


@pytest.mark.parametrize("start", ["built", "random", ""])
def test_what_cannot_be_drawn_is_refused(start):
    with pytest.raises(ValueError, match=f"start must be zero, common or own, got '{start}'"):
        classifier_start(ENTRIES, start, SEED, 0)


# --- in a federation ---


def built():
    """The weights of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return {name: t.clone() for name, t in toy_network(exits=2).state_dict().items()}


def first_round(folder, method, monkeypatch):
    """What training finds in the network of every client in round 1; the grid, and the server's state after it."""
    found, states, train = {}, [], type(method).train

    def watched(self, task):
        client = (len(task.data) - 12) // 5  # as toy_data sizes them
        found[client] = {name: t.detach().clone() for name, t in task.network.state_dict().items()}
        return train(self, task)

    class Keep:
        def on_start(self, run):
            pass

        def on_round(self, record, state):
            states.append(state)

    monkeypatch.setattr(type(method), "train", watched)
    grid = WatchedGrid(toy_app(build=lambda: toy_network(exits=2)), 2, node_config={"state-dir": str(folder)})
    FederatedStrategy(
        method=method,
        num_rounds=2,
        num_clients=N,
        seed=SEED,
        evaluate_every=2,
        local=LocalBudget(batch_size=8, steps=2, learning_rate=0.1),
        wait_seconds=0.0,
        callbacks=[Keep()],
    ).start(grid, num_rounds=1)
    return found, grid, states[0]


DEFAULTS = {"fedbabu": "built", "cafedistill-text": "built", "cafedistill-prior": "built"}
CASES = [
    (name, start)
    for name, cls in METHODS.items()
    for start in ("", "common", "own")
    if not start or start in cls.__dataclass_fields__["classifier_start"].metadata["choices"]
    if not (start == "own" and issubclass(cls, WholeModel))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start"), CASES)
def test_every_method_starts_its_personal_classifiers_so_and_shared_ones_as_built(tmp_path, monkeypatch, name, start):
    """At zero unless told otherwise; those that nobody would train, and of older methods, as the network was built."""
    method = METHODS[name](**({"classifier_start": start} if start else {}))
    found, _, _ = first_round(tmp_path, method, monkeypatch)
    network, seeds = toy_network(exits=2), built()
    personal = set(network.classifier_names()) & set(method.personal_names(network))
    asked_for = start or DEFAULTS.get(name, "zero")
    assert sorted(found) == list(range(N))
    for client, tensors in found.items():
        begun = {} if asked_for == "built" else classifier_start(ENTRIES, asked_for, SEED, client)
        for key, tensor in tensors.items():
            assert torch.equal(tensor, begun.get(key, seeds[key]) if key in personal else seeds[key]), key


@pytest.mark.parametrize("name", ["fedamp", "pfedgraph"])
def test_updates_since_a_common_start_need_one(name):
    with pytest.raises(ValueError, match=f"classifier_start = 'own' is not for {name}.* zero, common or built"):
        METHODS[name](classifier_start="own")


@pytest.mark.parametrize("start", STARTS[:3])
@pytest.mark.parametrize("name", ["cafedistill", "cafedistill-plus"])
def test_the_server_knows_without_a_message_what_clients_made_of_their_start(tmp_path, monkeypatch, name, start):
    """S after round 1 is the cosine of last classifiers as they came up, less what training found on the clients."""
    method = METHODS[name](classifier_start=start)
    found, grid, state = first_round(tmp_path, method, monkeypatch)
    moves = {}
    for message, reply in grid.of_type("train"):
        size, here = 15, asked(message)
        flat = reply.content["arrays"]["flat"].numpy()
        for position, client in enumerate(here):
            end = len(flat) - (len(here) - 1 - position) * size * (2 if name == "cafedistill-plus" else 1)
            begun = np.concatenate([found[client][key].numpy().ravel() for key, _ in LAST])
            moves[client] = (flat[end - size : end] - begun).astype(np.float64)
    pairs = state.pairs.among(range(N))
    for i in range(N):
        for j in range(N):
            cosine = moves[i] @ moves[j] / np.sqrt((moves[i] @ moves[i]) * (moves[j] @ moves[j]))
            assert pairs[i, j] == pytest.approx(0.0 if i == j else cosine, abs=1e-5)
    assert np.abs(pairs).max() > 0.1
