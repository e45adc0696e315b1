"""CafeDistill as a foreign Flower project uses it, and its numbers against docs/method.md written out by hand."""

import json
import logging
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import (
    CLASSES,
    WatchedGrid,
    asked,
    same_arrays,
    same_tensors,
    toy_app,
    toy_data,
    toy_network,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, Strategy
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import nn

from cafe_flwr import CafeDistill
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.methods import METHODS
from cafe_flwr.methods.cafedistill_text import CafeDistillText
from cafe_flwr.methods.pfedgraph import PFedGraph
from cafe_flwr.metrics import THRESHOLDS
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.training import LocalBudget
from cafe_flwr.wire.keys import Keys

FULL_BATCH = LocalBudget(batch_size=1000, steps=2, learning_rate=0.2)  # the order of examples does not matter
N = 3


class Notes:
    """A callback that keeps what it is told."""

    def __init__(self):
        self.run, self.records, self.reports = None, {}, None

    def on_start(self, run):
        self.run = run

    def on_round(self, record, state):
        self.records[record.server_round] = record

    def on_finish(self, reports):
        self.reports = reports


def grid_of(folder, num_nodes=N, app=None):
    return WatchedGrid(app or toy_app(), num_nodes, node_config={"state-dir": str(folder)})


def start(folder, *args, num_nodes=N, app=None, run=None, text=None, **kwargs):
    """Start a CafeDistill of T = 6 rounds on toys: its result, notes and messages.

    ``text``: settings of the reading from the text, which then runs in its place.
    """
    notes = Notes()
    kwargs = {
        "num_rounds": 6,
        "num_clients": N,
        "local": FULL_BATCH,
        "wait_seconds": 0.0,
        "callbacks": [notes],
    } | kwargs
    kwargs = {"min_available_nodes": 1} | kwargs if len(args) < 5 else kwargs
    grid = grid_of(folder, num_nodes, app)
    if text is None:
        strategy = CafeDistill(*args, **kwargs)
    else:
        strategy = FederatedStrategy(*args, method=CafeDistillText(**text), **kwargs)
    result = strategy.start(grid, **(run or {}))
    return result, notes, grid


def personal(folder, client, server_round):
    (path,) = (folder / "versions").glob(f"*/client-{client}/round-{server_round:06d}.safetensors")
    return load_file(path)


# --- the reading from the text, slowly (the released form: tests/test_released.py) ---


def slsqp(s, p, mu):
    """argmin over the simplex of −sᵀw + μ‖w − p‖², by sequential quadratic programming."""
    result = minimize(
        lambda w: -s @ w + mu * np.sum((w - p) ** 2),
        p,
        jac=lambda w: -s + 2 * mu * (w - p),
        method="SLSQP",
        bounds=[(0, 1)] * len(p),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    assert result.success
    return result.x


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


class ByHand:
    """The reading from the text, of toys in float64: tensors by name, loops, and no line of the package's training."""

    def __init__(self, n, T, mu, lam, tau, steps, lr, seed=0, max_staleness=None):
        torch.manual_seed(seed)
        start = {name: t.double() for name, t in toy_network().state_dict().items()}
        self.T, self.mu, self.lam, self.tau, self.steps, self.lr = T, mu, lam, tau, steps, lr
        self.m = 3
        self.shared = {name: t for name, t in start.items() if ".head." not in name}
        self.heads = [{name: t for name, t in start.items() if ".head." in name} for _ in range(n)]
        self.data = [toy_data(i).train for i in range(n)]
        self.known = {}  # client → (n_i, last head, similarity of the student heads), as last seen
        self.weights = {}
        self.losses = {}

    def logits(self, w, x):
        """Features of the last exit and logits of all."""
        h, z = x.double(), []
        for k in range(self.m):
            h = torch.tanh(h @ w[f"stages.{k}.0.weight"].T + w[f"stages.{k}.0.bias"])
            features = h @ w[f"exits.{k}.projection.weight"].T + w[f"exits.{k}.projection.bias"]
            z.append(features @ w[f"exits.{k}.head.weight"].T + w[f"exits.{k}.head.bias"])
        return features, z

    def flat_head(self, heads, k):
        return torch.cat([heads[f"exits.{k}.head.weight"].flatten(), heads[f"exits.{k}.head.bias"]]).numpy()

    def active(self, t, clients):
        """N_t = ⌈min(2t/T, 1)·(m−1)·n_t⌉ exits: exit 1 of all, then exit 2…; within a depth the most similar first."""
        budget = math.ceil(min(2 * t / self.T, 1) * (self.m - 1) * len(clients) - 1e-9)
        on = {client: [False] * (self.m - 1) for client in clients}
        for k in range(self.m - 1):
            similarity = {c: self.known[c][2][k] if c in self.known else -2.0 for c in clients}
            for client in sorted(clients, key=lambda c: (-similarity[c], c)):
                if budget > 0:
                    on[client][k] = True
                    budget -= 1
        return on

    def teacher(self, client):
        """h̄_i = Σ_j w_ij h_j over all clients known, present or not; None in the client's first round."""
        if client not in self.known:
            return None
        others = sorted(self.known)
        examples = np.array([self.known[j][0] for j in others], dtype=float)
        s = np.array([cosine(self.known[client][1], self.known[j][1]) for j in others])
        w = slsqp(s, examples / examples.sum(), self.mu)
        self.weights[client] = dict(zip(others, w, strict=True))
        return torch.from_numpy(sum(w_j * self.known[j][1] for w_j, j in zip(w, others, strict=True)))

    def loss(self, w, x, y, active, teacher):
        features, z = self.logits(w, x)

        def cross_entropy(z_k):
            return -sum(torch.log_softmax(row, 0)[label] for row, label in zip(z_k, y, strict=True)) / len(y)

        total = cross_entropy(z[-1])
        with torch.no_grad():
            if teacher is None:
                taught = z[-1].clone()
            else:
                weight, bias = teacher[:-CLASSES].reshape(CLASSES, -1), teacher[-CLASSES:]
                taught = features @ weight.T + bias
            q = torch.softmax(taught / self.tau, 1)
        for k in range(self.m - 1):
            if active[k]:
                log_p = torch.log_softmax(z[k] / self.tau, 1)
                divergence = (q * (torch.log(q) - log_p)).sum() / len(y)
                total = total + cross_entropy(z[k]) + self.lam * self.tau**2 * divergence
        return total

    def round(self, t, clients):
        active = self.active(t, clients)
        teachers = {client: self.teacher(client) for client in clients}
        after, reports = {}, {}
        for client in clients:
            w = {name: t.clone().requires_grad_() for name, t in (self.shared | self.heads[client]).items()}
            losses = []
            for _ in range(self.steps):
                data = self.data[client]
                value = self.loss(w, data.x, data.y, active[client], teachers[client])
                losses.append(value.item())
                gradients = torch.autograd.grad(value, list(w.values()), allow_unused=True)
                w = {
                    name: (p.detach() - self.lr * g).requires_grad_() if g is not None else p
                    for (name, p), g in zip(w.items(), gradients, strict=True)
                }
            w = {name: p.detach() for name, p in w.items()}
            after[client] = w
            self.losses[t, client] = np.mean(losses)
            self.heads[client] = {name: p for name, p in w.items() if ".head." in name}
            last = self.flat_head(w, self.m - 1)
            similarity = [cosine(self.flat_head(w, k), last) for k in range(self.m - 1)]
            reports[client] = (len(self.data[client]), last, similarity)
        total = sum(len(self.data[c]) for c in clients)
        self.shared = {name: sum(len(self.data[c]) * after[c][name] for c in clients) / total for name in self.shared}
        self.known |= reports


@pytest.mark.parametrize("num_nodes", [1, N])
@pytest.mark.parametrize(
    "participants",
    [{1: [0, 1, 2], 2: [0, 1, 2], 3: [0, 1, 2], 4: [0, 1, 2]}, {1: [0, 1], 2: [1, 2], 3: [0, 2], 4: [0, 1, 2]}],
    ids=["all", "some"],
)
def test_the_text_reading_is_the_method_written_out_by_hand(tmp_path, monkeypatch, participants, num_nodes):
    """Four rounds of T = 6 (R = 1/3, 2/3, 1, 1), with everything that it has: averaging by n_i, teacher heads by a QP
    over present and absent clients, students joining depth first and least conflicting first, the loss. Parameters,
    losses, similarities and teacher weights agree."""
    monkeypatch.setattr(FederatedStrategy, "sample", lambda self, server_round, *_: participants[server_round])
    mu, lam, tau = 0.15, 0.7, 2.0
    result, notes, _ = start(
        tmp_path,
        text={"mu": mu, "distill_weight": lam, "temperature": tau},
        num_nodes=num_nodes,
        run={"num_rounds": 4},
        learning_rate_schedule="exponential",  # by a factor of 1: constant
    )
    hand = ByHand(N, 6, mu, lam, tau, FULL_BATCH.steps, FULL_BATCH.learning_rate)
    for t, clients in participants.items():
        hand.weights.clear()
        expected_active = hand.active(t, clients)
        hand.round(t, clients)
        record = notes.records[t]
        assert record.participants == clients
        assert record.plan.active.tolist() == [expected_active[c] for c in clients]
        assert sorted(hand.weights) == list(record.plan.weight_rows)
        for row, client in enumerate(record.plan.weight_rows):
            weights = dict(zip(record.plan.weight_columns, record.plan.weights[row], strict=True))
            assert weights == pytest.approx(hand.weights[client], abs=2e-6)
        for report in record.reports:
            assert report.train_loss == pytest.approx(hand.losses[t, report.client], abs=1e-5)
            assert report.similarity == pytest.approx(hand.known[report.client][2], abs=1e-5)
            for name, tensor in personal(tmp_path, report.client, t).items() if t > 2 else ():
                torch.testing.assert_close(tensor.double(), hand.heads[report.client][name], rtol=0, atol=1e-5)
    for name, expected in hand.shared.items():
        np.testing.assert_allclose(result.arrays[name].numpy(), expected.numpy(), rtol=0, atol=1e-5)
    # It was a real test: the weights were neither equal nor all on one, and parameters have moved far.
    mixed = notes.records[4].plan.weights
    assert ((mixed > 0.01) & (mixed < 0.99)).any()
    torch.manual_seed(0)
    moved = toy_network().state_dict()
    assert max(np.abs(result.arrays[name].numpy() - moved[name].numpy()).max() for name in hand.shared) > 0.05


def test_the_learning_rate_falls_only_after_half_time(tmp_path):
    """T = 6: constant in rounds 1 to 3, then ½(1 + cos(π(t − 3)/4)) of it: .853553, .5, .146447."""
    _, notes, grid = start(tmp_path)
    factors = [1, 1, 1, 0.853553, 0.5, 0.146447]
    for t, factor in enumerate(factors, start=1):
        assert notes.records[t].learning_rate == pytest.approx(0.2 * factor, abs=1e-6)
    sent = [m.content["config"]["local.learning-rate"] for m, _ in grid.of_type("train")]
    assert sent == pytest.approx([0.2 * factor for factor in factors for _ in range(N)], abs=1e-6)


def test_the_exponential_schedule_shrinks_from_the_first_round_on(tmp_path):
    """0.2 · 0.9^t, t = 0…5; the records and the messages say the same."""
    _, notes, grid = start(tmp_path, learning_rate_schedule="exponential", learning_rate_decay=0.9)
    rates = [0.2 * 0.9**t for t in range(6)]
    assert [notes.records[t].learning_rate for t in range(1, 7)] == pytest.approx(rates)
    sent = [m.content["config"]["local.learning-rate"] for m, _ in grid.of_type("train")]
    assert sent == pytest.approx([rate for rate in rates for _ in range(N)])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate_decay": 0.9}, "learning-rate-decay = 0.9 is of train.learning-rate-schedule = 'exponential'"),
        ({"learning_rate_decay": 1.5}, "learning_rate_decay must be at most 1, got 1.5"),
        ({"learning_rate_schedule": "steps"}, "learning_rate_schedule must be one of cosine, exponential"),
        (
            {"learning_rate_schedule": "exponential", "learning_rate_decay": 1e-9, "num_rounds": 99},
            "learning-rate-decay = 1e-09 shrinks the learning rate to 0 within 99 rounds",
        ),
    ],
)
def test_an_impossible_schedule_is_refused(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        CafeDistill(**given)


# --- variants ---


def patch_participants(monkeypatch, participants):
    monkeypatch.setattr(FederatedStrategy, "sample", lambda self, server_round, *_: participants[server_round])


AWAY = {1: [0, 1, 2], 2: [0, 1], 3: [0, 1], 4: [0, 1], 5: [0, 1, 2], 6: [0, 1, 2]}


@pytest.mark.slow
@pytest.mark.parametrize(("max_staleness", "forgotten_in"), [(0, []), (1, [4, 5]), (2, [5]), (3, []), (4, [])])
def test_absent_clients_teach_until_they_are_forgotten(tmp_path, monkeypatch, max_staleness, forgotten_in):
    """Client 2 is seen in round 1 and then not until round 5: when round t is planned it has been away for t − 2."""
    patch_participants(monkeypatch, AWAY)
    _, notes, grid = start(tmp_path, text={"max_staleness": max_staleness, "mu": 5.0})
    for t in range(2, 7):
        columns = [0, 1] if t in forgotten_in else [0, 1, 2]
        plan = notes.records[t].plan
        assert list(plan.weight_columns) == columns
        assert (plan.weights > 0).all()  # μ is large: whoever is known teaches
        # Forgotten, it teaches nobody, and itself is taught by its own last exit when it is back.
        assert list(plan.weight_rows) == [c for c in AWAY[t] if c in columns]
    back = [m for m, _ in grid.of_type("train") if m.content["config"]["server-round"] == 5 and asked(m) == [2]]
    assert len(back) == 1
    assert list(back[0].content["config"].get("downloads", [])) == ([] if 5 in forgotten_in else [2])


def test_a_stale_head_teaches_as_it_was_last_seen(tmp_path, monkeypatch):
    """Where all teach alike the teacher is the mean of the heads; client 2's is that of round 1 in rounds 2 to 4."""
    patch_participants(monkeypatch, AWAY)
    _, _, grid = start(tmp_path, text={"teachers": "uniform"}, run={"num_rounds": 4})
    last = {}
    for message, reply in grid.of_type("train"):
        config = message.content["config"]
        if config["server-round"] > 1:
            teacher = message.content["arrays"]["flat"].numpy()[-15:]
            heads = [last[config["server-round"] - 1 if c < 2 else 1, c] for c in range(N)]
            expected = np.mean(heads, axis=0)
            np.testing.assert_allclose(teacher, expected, atol=1e-6)
        last[config["server-round"], asked(message)[0]] = reply.content["arrays"]["flat"].numpy()[-15:]


@pytest.mark.slow
def test_own_teachers_exchange_nothing_but_the_shared_part(tmp_path):
    """`teachers = own`: no classifier leaves a client, none comes down."""
    _, notes, grid = start(tmp_path, text={"teachers": "own"})
    shared = sum(t.numel() for name, t in toy_network().state_dict().items() if ".head." not in name)
    exchanges = grid.of_type("train")
    assert len(exchanges) == 6 * N
    for message, reply in exchanges:
        assert message.content["arrays"]["flat"].shape == (shared,)
        assert reply.content["arrays"]["flat"].shape == (shared,)
        assert "downloads" not in message.content["config"]
    assert all(record.plan.weights is None for record in notes.records.values())


@pytest.mark.slow
def test_own_teachers_are_mu_zero(tmp_path):
    """The limit μ → 0 (all weight on oneself) is local distillation, up to when the teacher is read: the own head at
    the start of the round against the own head of the moment. With one step a round there is no difference."""
    budget = LocalBudget(batch_size=1000, steps=1, learning_rate=0.2)
    own, _, _ = start(tmp_path / "own", text={"teachers": "own"}, local=budget)
    zero, notes, _ = start(tmp_path / "zero", text={"mu": 0.0}, local=budget)
    np.testing.assert_array_equal(notes.records[6].plan.weights, np.eye(N))
    for name in own.arrays:
        np.testing.assert_allclose(own.arrays[name].numpy(), zero.arrays[name].numpy(), atol=1e-6)


def test_the_last_matching_is_remembered(tmp_path, monkeypatch):
    """In round 3 only a newcomer takes part, who teaches itself: who teaches whom is still that of round 2."""
    patch_participants(monkeypatch, {1: [0, 1], 2: [0, 1], 3: [2]})
    plans = {}

    class Watch(Notes):
        def on_round(self, record, state):
            plans[record.server_round] = (record.plan, state.plan)

    start(tmp_path, text={}, callbacks=[Watch()], run={"num_rounds": 3})
    assert plans[3][0].weights is None
    assert plans[3][1] is plans[2][1]
    assert list(plans[3][1].weight_rows) == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "mu"), [(False, 2.0), (True, 0.2)], ids=["released", "from the text"])
def test_osqp_gives_the_same_run_as_the_closed_form(tmp_path, text, mu):
    def matching(**settings):
        return {"text": settings} if text else settings

    exact, one, _ = start(tmp_path / "exact", **matching(mu=mu))
    osqp, two, _ = start(tmp_path / "osqp", **matching(mu=mu, solver="osqp"))
    for name in exact.arrays:
        np.testing.assert_allclose(exact.arrays[name].numpy(), osqp.arrays[name].numpy(), atol=1e-4)
    for t in range(2, 7):
        np.testing.assert_allclose(one.records[t].plan.weights, two.records[t].plan.weights, atol=1e-4)
    assert not np.allclose(one.records[6].plan.weights, np.eye(N), atol=0.01)


@pytest.mark.parametrize("num_nodes", [1, N])
def test_gradient_similarity_is_what_autograd_says(tmp_path, num_nodes):
    """cos(∇CE_k, ∇CE_m) on stages 1..k, at the parameters each client has after training, on its whole data."""
    _, notes, grid = start(tmp_path, text={"similarity_proxy": "gradients"}, num_nodes=N, run={"num_rounds": 2})
    for message, reply in grid.of_type("train"):
        (client,) = asked(message)
        t = message.content["config"]["server-round"]
        network = toy_network()
        flat = torch.from_numpy(reply.content["arrays"]["flat"].numpy().copy())
        state = dict(personal(tmp_path, client, t))
        for name in network.shared_names():
            size = network.state_dict()[name].numel()
            state[name], flat = flat[:size].reshape(network.state_dict()[name].shape), flat[size:]
        network.load_state_dict(state)
        data = toy_data(client).train
        cross_entropy = nn.CrossEntropyLoss()
        expected = []
        for k in range(2):
            vectors = []
            for exit in (k, 2):
                network.zero_grad()
                cross_entropy(network(data.x)[exit], data.y).backward()
                stages = [p.grad.flatten() for j in range(k + 1) for p in network.stages[j].parameters()]
                vectors.append(torch.cat(stages).double().numpy())
            expected.append(cosine(*vectors))
        (report,) = (r for r in notes.records[t].reports if r.client == client)
        assert report.similarity == pytest.approx(expected, abs=1e-5)
        assert reply.content["metrics"]["similarity"] == report.similarity


@pytest.mark.parametrize(("text", "last"), [(None, 6), ({}, 1)], ids=["released", "from the text"])
def test_parameter_similarity_is_the_cosine_of_the_classifiers(tmp_path, text, last):
    """A measurement in the released form, what students are ordered by in the other."""
    _, notes, _ = start(tmp_path, text=text, run={"num_rounds": last})
    for report in notes.records[last].reports:
        heads = personal(tmp_path, report.client, last)
        flat = [np.concatenate([heads[f"exits.{k}.head.{p}"].flatten() for p in ("weight", "bias")]) for k in range(3)]
        assert report.similarity == pytest.approx([cosine(flat[k], flat[2]) for k in range(2)], abs=1e-6)


def test_an_exit_that_has_not_trained_is_like_no_other(tmp_path):
    """Its classifier is still 0, in round 1 that of exit 2."""
    _, notes, _ = start(tmp_path, run={"num_rounds": 1})
    for report in notes.records[1].reports:
        assert report.similarity[0] != 0
        assert report.similarity[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("shallow-first", [[3, 0], [3, 1], [3, 3]]),
        ("deep-first", [[0, 3], [1, 3], [3, 3]]),
        ("none", [[3, 3]] * 3),
    ],
)
def test_selection_of_the_text_reading_is_what_clients_are_told(tmp_path, selection, expected):
    """T = 6, hosts of one client each: R = 1/3, 2/3, 1 of 6 student exits is 2, 4, 6; here 9 clients on 3 nodes, so
    that active exits of several clients travel in one message."""
    expected = [[3 * a for a in pair] for pair in expected]
    if selection != "none":
        expected = {"shallow-first": [[6, 0], [9, 3], [9, 9]], "deep-first": [[0, 6], [3, 9], [9, 9]]}[selection]
    _, notes, grid = start(tmp_path, text={"selection": selection}, num_clients=9, run={"num_rounds": 3})
    assert [notes.records[t].active_exits for t in (1, 2, 3)] == expected
    for t in (1, 2, 3):
        told = {}
        for message, _ in grid.of_type("train"):
            config = message.content["config"]
            if config["server-round"] == t:
                flags = np.array(config["active-exits"]).reshape(3, 2)
                told |= dict(zip(asked(message), flags.tolist(), strict=True))
        assert [told[c] for c in range(9)] == notes.records[t].plan.active.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("selection", "first"), [("shallow-first", [9, 0]), ("none", [9, 9])])
def test_levels_are_what_clients_are_told(tmp_path, selection, first):
    """All begin with exit 1, or with all. Exits are told as far as the level, which the server keeps for the client."""
    levels = {}

    class Watch(Notes):
        def on_round(self, record, state):
            super().on_round(record, state)
            levels[record.server_round] = [state.known[c].level for c in range(9)]

    notes = Watch()
    _, _, grid = start(tmp_path, selection=selection, num_clients=9, callbacks=[notes])
    assert notes.records[1].active_exits == first
    assert notes.records[6].active_exits == [9, 9]
    for t in range(1, 7):
        told = {}
        for message, _ in grid.of_type("train"):
            config = message.content["config"]
            if config["server-round"] == t:
                flags = np.array(config["active-exits"]).reshape(3, 2)
                told |= dict(zip(asked(message), flags.tolist(), strict=True))
        assert [told[c] for c in range(9)] == notes.records[t].plan.active.tolist()
        assert [told[c] for c in range(9)] == [[level >= 0, level >= 1] for level in levels[t]]


# --- Flower's interface ---


def test_it_is_a_flower_strategy():
    strategy = CafeDistill()
    assert isinstance(strategy, Strategy)
    assert isinstance(strategy, FedAvg)


def test_positional_arguments_of_fedavg_mean_what_they_mean():
    def fn(records, key):
        return MetricRecord({})

    arguments = (0.5, 0.25, 3, 4, 5, "weight", "a", "c", fn, fn)
    ours, flowers = vars(CafeDistill(*arguments)), vars(FedAvg(*arguments))
    assert {key: ours[key] for key in flowers} == flowers
    assert ours["fraction_evaluate"] == 0.25


def test_keyword_arguments_of_fedavg_mean_what_they_mean():
    """Three defaults differ from FedAvg's: clients are not evaluated once more, and one client or node is enough."""
    assert {k: v for k, v in vars(CafeDistill()).items() if k in vars(FedAvg())} == {
        **vars(FedAvg()),
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_available_nodes": 1,
    }
    assert CafeDistill(0.3).fraction_evaluate == 0.0
    assert CafeDistill(fraction_evaluate=0.5).fraction_evaluate == 0.5
    assert CafeDistill(0.3, 0.5).fraction_evaluate == 0.5
    assert CafeDistill(min_train_nodes=7).min_train_nodes == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fraction", "minimum", "expected"), [(1.0, 1, 9), (0.5, 1, 4), (0.1, 3, 3), (0.1, 1, 1), (0.5, 100, 9)]
)
def test_fractions_and_minima_are_of_clients_whoever_hosts_them(tmp_path, fraction, minimum, expected):
    for num_nodes in (1, 9):
        _, notes, _ = start(
            tmp_path / str(num_nodes),
            fraction_train=fraction,
            min_train_nodes=minimum,
            num_clients=9,
            num_nodes=num_nodes,
            run={"num_rounds": 2},
        )
        assert [len(notes.records[t].participants) for t in (1, 2)] == [expected] * 2


def test_one_node_that_hosts_all_clients_is_enough(tmp_path):
    """`Counts and fractions are of clients`, says the docstring; so three clients on a node are three."""
    grid = grid_of(tmp_path, num_nodes=1)
    CafeDistill(num_rounds=1, num_clients=3, local=FULL_BATCH, wait_seconds=0.0).start(grid)


class Subclass(CafeDistill):
    """What users of Flower override: who takes part, what is sent along, what becomes of the average."""

    def sample(self, server_round, available, purpose="participants"):
        return available[:2]

    def configure_train(self, server_round, arrays, config, grid):
        config["mine"] = server_round
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        halved = ArrayRecord({name: Array(array.numpy() * 0.5) for name, array in arrays.items()})
        self.halved[server_round] = np.concatenate([array.numpy().ravel() for array in halved.values()])
        return halved, metrics


def test_a_subclass_overrides_what_it_likes(tmp_path):
    """The halved average is what clients are sent next, and what the run ends with."""
    notes, grid = Notes(), grid_of(tmp_path)
    strategy = Subclass(num_rounds=2, num_clients=N, local=FULL_BATCH, wait_seconds=0.0, callbacks=[notes])
    strategy.halved = {}
    result = strategy.start(grid)
    assert [record.participants for record in notes.records.values()] == [[0, 1], [0, 1]]
    sent = [message.content for message, _ in grid.of_type("train")]
    assert [content["config"]["mine"] for content in sent] == [1, 1, 2, 2]
    np.testing.assert_array_equal(sent[2]["arrays"]["flat"].numpy()[: len(strategy.halved[1])], strategy.halved[1])
    final = np.concatenate([array.numpy().ravel() for array in result.arrays.values()])
    np.testing.assert_array_equal(final, strategy.halved[2])


def test_without_training_nothing_changes(tmp_path):
    """`fraction_train = 0` skips training in Flower's strategies, and evaluates only."""
    result, _, grid = start(tmp_path, fraction_train=0.0, fraction_evaluate=1.0, run={"num_rounds": 2})
    assert grid.of_type("train") == []
    torch.manual_seed(0)
    initial = toy_network().state_dict()
    for name, array in result.arrays.items():
        np.testing.assert_array_equal(array.numpy(), initial[name].numpy())
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2]


def test_without_num_clients_every_node_is_a_client(tmp_path):
    """The simple case of a foreign project: partition-id is the client."""
    _, notes, _ = start(tmp_path, num_clients=None, num_nodes=4, run={"num_rounds": 1})
    assert notes.run.clients == [0, 1, 2, 3]
    assert notes.records[1].participants == [0, 1, 2, 3]


@pytest.mark.slow
def test_evaluation_by_clients_when_asked_for(tmp_path):
    """`fraction_evaluate = 1`: accuracy and loss per exit, averaged by test examples; in the last round the same as the
    final evaluation of the personal networks."""
    sizes = {c: 3 + 4 * c for c in range(N)}

    def load(client):
        data = toy_data(client)
        return type(data)(data.train, data.calibration, type(data.test)(*(p[: sizes[client]] for p in data.test)))

    sizes = {0: 3, 1: 6, 2: 9}
    result, notes, grid = start(tmp_path, fraction_evaluate=1.0, min_evaluate_nodes=1, app=toy_app(load))
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2, 3, 4, 5, 6]
    weights = [report.test_examples for report in notes.reports]
    assert weights == [3, 6, 9]
    for key in ("accuracy", "loss"):
        expected = np.average([getattr(r.exits, key) for r in notes.reports], axis=0, weights=weights)
        assert result.evaluate_metrics_clientapp[6][key] == pytest.approx(expected)
    assert len(grid.of_type("evaluate")) == 7 * N
    assert not list(tmp_path.glob("client-*")) or sorted(p.stem for p in tmp_path.glob("client-*.json")) == [
        "client-0",
        "client-1",
        "client-2",
    ]


@pytest.mark.slow
def test_a_client_without_test_data_does_not_spoil_the_evaluation(tmp_path):
    """Its accuracy is unknown and counts nothing; where nobody has test data there is no metric."""

    def load_without(missing):
        def load(client):
            data = toy_data(client)
            nothing = type(data.test)(*(part[:0] for part in data.test))
            return type(data)(data.train, data.calibration, nothing if client in missing else data.test)

        return toy_app(load)

    some, notes, _ = start(tmp_path / "some", app=load_without({1}), fraction_evaluate=1.0)
    known = [report for report in notes.reports if report.client != 1]
    expected = np.average([r.exits.accuracy for r in known], axis=0, weights=[r.test_examples for r in known])
    assert some.evaluate_metrics_clientapp[6]["accuracy"] == pytest.approx(expected)
    nobody, _, _ = start(tmp_path / "nobody", app=load_without({0, 1, 2}), fraction_evaluate=1.0)
    assert nobody.evaluate_metrics_clientapp == {}
    assert nobody.train_metrics_clientapp == {}


@pytest.mark.slow
def test_evaluation_of_some_clients_is_seeded(tmp_path):
    def evaluated(folder, seed):
        _, _, grid = start(tmp_path / folder, fraction_evaluate=0.4, min_evaluate_nodes=1, num_clients=5, seed=seed)
        return [(m.content["config"]["server-round"], asked(m)) for m, _ in grid.of_type("evaluate")][:-N]

    first = evaluated("a", 0)
    assert first == evaluated("b", 0)
    assert first != evaluated("c", 1)
    per_round = [sum(len(clients) for t, clients in first if t == server_round) for server_round in range(1, 7)]
    assert per_round == [2] * 6


def test_who_evaluates_is_drawn_apart_from_who_trains(tmp_path):
    """Else the evaluation would be of those alone that have just trained."""
    _, notes, grid = start(
        tmp_path, fraction_train=0.4, fraction_evaluate=0.4, min_evaluate_nodes=1, num_clients=5, num_nodes=5
    )
    evaluated = {t: [] for t in range(1, 7)}
    for message, _ in grid.of_type("evaluate")[:-5]:
        evaluated[message.content["config"]["server-round"]] += asked(message)
    assert any(sorted(evaluated[t]) != notes.records[t].participants for t in range(1, 7))


def test_clients_are_not_asked_to_evaluate_unless_wanted(tmp_path):
    """One message a round and node; one more at the end."""
    result, _, grid = start(tmp_path)
    assert result.evaluate_metrics_clientapp == {}
    assert len(grid.of_type("train")) == 6 * N
    assert len(grid.of_type("evaluate")) == N


def test_metrics_functions_get_a_record_for_every_client(tmp_path):
    """Five clients on two nodes: five records, each with the weight under the chosen key; what the function returns is
    Flower's result of the round."""
    calls = {"train": [], "evaluate": []}

    def collect(kind):
        def function(records, key):
            calls[kind].append((records, key))
            return MetricRecord({"rounds-so-far": len(calls[kind])})

        return function

    result, notes, _ = start(
        tmp_path,
        train_metrics_aggr_fn=collect("train"),
        evaluate_metrics_aggr_fn=collect("evaluate"),
        fraction_evaluate=1.0,
        num_clients=5,
        num_nodes=2,
        run={"num_rounds": 2},
    )
    assert {t: dict(m) for t, m in result.train_metrics_clientapp.items()} == {
        1: {"rounds-so-far": 1},
        2: {"rounds-so-far": 2},
    }
    assert dict(result.evaluate_metrics_clientapp[2]) == {"rounds-so-far": 2}
    for t, (records, key) in enumerate(calls["train"], start=1):
        assert key == "num-examples"
        assert len(records) == 5
        for record, report in zip(records, notes.records[t].reports, strict=True):
            (metrics,) = record.metric_records.values()
            assert metrics["num-examples"] == len(toy_data(report.client).train)
            assert metrics["train-loss"] == report.train_loss
            assert metrics["accuracy-after"] == report.after.accuracy
            assert metrics["loss-before"] == report.before.loss
    for records, _ in calls["evaluate"]:
        assert [r.metric_records["metrics"]["num-examples"] for r in records] == [9] * 5


@pytest.mark.slow
def test_records_may_have_other_names_on_both_sides(tmp_path):
    names = {"weighted_by_key": "samples", "arrayrecord_key": "model", "configrecord_key": "orders"}
    app = toy_app(keys=Keys(arrays="model", config="orders", weight="samples"))
    result, notes, grid = start(tmp_path / "renamed", app=app, fraction_evaluate=1.0, **names)
    plain, _, _ = start(tmp_path / "plain", fraction_evaluate=1.0)
    assert same_arrays(result.arrays, plain.arrays)
    for message, reply in grid.of_type("train"):
        assert set(message.content) == {"model", "orders"}
        assert set(reply.content) == {"model", "orders", "metrics"}
        assert len(reply.content["metrics"]["samples"]) == 1
    assert dict(result.evaluate_metrics_clientapp[6]) == dict(plain.evaluate_metrics_clientapp[6])
    assert sorted(notes.records) == [1, 2, 3, 4, 5, 6]


def test_names_on_one_side_only_are_an_error_that_says_which(tmp_path):
    with pytest.raises(RuntimeError, match="no client can take part"):
        start(tmp_path, configrecord_key="orders")


def test_configs_of_the_user_travel_along(tmp_path):
    """Flower's train_config and evaluate_config reach the clients; ours cannot be overwritten by them."""
    _, _, grid = start(
        tmp_path,
        fraction_evaluate=1.0,
        run={
            "num_rounds": 1,
            "train_config": ConfigRecord({"lr": 0.5, "note": "hello"}),
            "evaluate_config": ConfigRecord({"batch": 7}),
        },
    )
    for message, _ in grid.of_type("train"):
        config = message.content["config"]
        assert (config["lr"], config["note"], config["seed"]) == (0.5, "hello", 0)
    assert all(m.content["config"]["batch"] == 7 for m, _ in grid.of_type("evaluate"))


@pytest.mark.parametrize(
    "key", ["seed", "clients", "active-exits", "digest", "evaluate", "publish", "method", "method.mu", "local.steps"]
)
@pytest.mark.parametrize("which", ["train_config", "evaluate_config"])
def test_configs_of_the_user_cannot_take_our_keys(tmp_path, key, which):
    """Told before anything is sent, not by every client, nor after the last round."""
    grid = grid_of(tmp_path)
    strategy = CafeDistill(num_rounds=1, num_clients=N, local=FULL_BATCH, wait_seconds=0.0)
    with pytest.raises(ValueError, match=f"must not hold keys of the strategy's own: {key}"):
        strategy.start(grid, **{which: ConfigRecord({key: 1})})
    assert grid.of_type("train") == []


def test_evaluation_on_the_server(tmp_path):
    """evaluate_fn sees the shared parameters before the first and after every round."""
    seen = {}

    def evaluate(server_round, arrays):
        seen[server_round] = {name: array.numpy().copy() for name, array in arrays.items()}
        return MetricRecord({"norm": float(server_round)}) if server_round != 2 else None

    result, _, _ = start(tmp_path, run={"num_rounds": 3, "evaluate_fn": evaluate})
    assert sorted(seen) == [0, 1, 2, 3]
    assert {t: dict(m) for t, m in result.evaluate_metrics_serverapp.items()} == {
        0: {"norm": 0.0},
        1: {"norm": 1.0},
        3: {"norm": 3.0},
    }
    assert list(seen[0]) == toy_network().shared_names()
    torch.manual_seed(0)
    initial = toy_network().state_dict()
    for name, value in seen[0].items():
        np.testing.assert_array_equal(value, initial[name].numpy())
        np.testing.assert_array_equal(seen[3][name], result.arrays[name].numpy())
        if name.startswith("stages.0."):
            assert not np.array_equal(seen[0][name], seen[1][name])


# --- evaluation in some rounds only ---


def by(method, folder, *, app=None, num_nodes=N, num_rounds=4, run=None, **kwargs):
    """Start any method on toys: its result, notes and messages."""
    notes = Notes()
    strategy = FederatedStrategy(
        method=method,
        num_rounds=num_rounds,
        num_clients=N,
        local=LocalBudget(batch_size=8, steps=4, learning_rate=0.2),
        wait_seconds=0.0,
        callbacks=[notes],
        **kwargs,
    )
    grid = grid_of(folder, num_nodes, app)
    return strategy.start(grid, **(run or {})), notes, grid


@pytest.mark.parametrize(("every", "evaluated"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (50, [6])])
def test_clients_evaluate_in_the_rounds_asked_for_and_the_last_one(tmp_path, every, evaluated):
    """In the others they say that they do not know, and Flower's averages have no such round."""
    result, notes, grid = start(tmp_path, evaluate_every=every)
    for message, _ in grid.of_type("train"):
        config = message.content["config"]
        assert config["evaluate"] == (config["server-round"] in evaluated)
    for t, record in notes.records.items():
        assert record.evaluated == (t in evaluated)
        for report in record.reports:
            for metrics in (report.before, report.after):
                values = [v for part in vars(metrics).values() for v in part]
                assert len(values) == 9
                assert np.isnan(values).all() == (t not in evaluated)
            assert math.isfinite(report.train_loss)
            assert report.local_steps == FULL_BATCH.steps
    assert sorted(result.train_metrics_clientapp) == evaluated
    assert all(np.isfinite(report.exits.accuracy).all() for report in notes.reports)


def test_the_last_round_is_that_of_the_schedule_not_of_the_start(tmp_path):
    """A run that is stopped after round 3 of 6 goes on later: round 3 is one like any other."""
    _, notes, _ = start(tmp_path, evaluate_every=4, run={"num_rounds": 3})
    assert not any(record.evaluated for record in notes.records.values())


def test_clients_that_need_not_evaluate_do_not(tmp_path):
    """No pass in evaluation mode: it is a quarter of the time of a run."""
    passes = []

    def watched():
        network = toy_network()
        network.register_forward_hook(lambda module, x, z: passes.append(module.training))
        return network

    start(tmp_path / "never", app=toy_app(build=watched), evaluate_every=4, run={"num_rounds": 3})
    assert False not in passes
    start(tmp_path / "once", app=toy_app(build=watched), evaluate_every=3, run={"num_rounds": 3})
    assert passes.count(False) == 2 * N  # before and after, in round 3


def test_a_line_without_accuracies_says_so_by_leaving_them_out(tmp_path, flower_log):
    _, notes, _ = start(tmp_path, evaluate_every=4)
    lines = [r.getMessage() for r in flower_log.records if r.getMessage().startswith("[ROUND ")]
    assert ["accuracy" in line for line in lines] == [False, False, False, True, False, True]
    assert lines[0].startswith("[ROUND 1/6] 3 clients · students 3/0 · ")
    assert "nan" not in "".join(lines).lower()
    for t in (1, 4):
        line = notes.records[t].to_json()
        for key in ("accuracy_per_exit", "accuracy_per_exit_after"):
            assert len(line[key]) == 3
            assert np.isnan(line[key]).all() == (t == 1)
        assert line["local_steps"] == FULL_BATCH.steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cafedistill", {}),
        ("cafedistill-plus", {}),
        ("cafedistill-text", {"similarity_proxy": "gradients"}),
        ("fedper", {"prior": True}),
        ("fedrep", {}),
        ("fedrod", {}),
        ("ditto", {}),
        ("pfedgraph", {}),
    ],
)
def test_how_often_clients_evaluate_changes_no_network(tmp_path, name, settings):
    """Bit for bit, also where the network that is evaluated is another than the one that trains, and where evaluating
    could draw random numbers or move running statistics."""
    outcomes = []
    for every in (1, 3, 100):
        folder = tmp_path / str(every)
        result, notes, _ = by(
            METHODS[name](**settings), folder, app=toy_app(build=drawing_network), evaluate_every=every
        )
        networks = [load_file(folder / f"client-{c}.safetensors") for c in range(N)]
        losses = [[r.train_loss for r in notes.records[t].reports] for t in range(1, 5)]
        finals = [(r.exits, r.ensemble, r.test.correct.tolist()) for r in notes.reports]
        last = [(r.before, r.after) for r in notes.records[4].reports]
        outcomes.append((result.arrays, networks, losses, finals, last))
    for arrays, networks, *numbers in outcomes[1:]:
        assert same_arrays(arrays, outcomes[0][0])
        assert all(same_tensors(a, b) for a, b in zip(networks, outcomes[0][1], strict=True))
        assert numbers == list(outcomes[0][2:])


# --- what clients are sent for an evaluation ---


def simplex_by_bisection(v):
    """Projection onto the simplex."""
    low, high = v.max() - 1.0, v.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - high, 0)


def flat_state(state):
    return np.concatenate([t.double().numpy().ravel() for t in state.values()])


def test_the_final_evaluation_is_of_what_the_server_would_send_next(tmp_path, monkeypatch):
    """pFedGraph's personal model is the mixture it is sent: after round T = 4 the server plans round 5 from what came
    up in round 4, and that mixture is published and evaluated. Written out: u_i = θ_0 + Σ_j w_ij Δ_j."""
    planned = []
    plan = PFedGraph.plan
    monkeypatch.setattr(PFedGraph, "plan", lambda self, task: planned.append(task.server_round) or plan(self, task))
    method = PFedGraph(mu=2.0, same_above=0.999)
    _, notes, grid = by(method, tmp_path)
    assert planned == [1, 2, 3, 4, 5]

    came_up = {asked(m)[0]: r.content["arrays"]["flat"].numpy() for m, r in grid.of_type("train")[-N:]}
    updates = np.stack([came_up[c] for c in range(N)]).astype(np.float64)
    examples = np.array([len(toy_data(c).train) for c in range(N)])
    initial = flat_state({n: torch.zeros_like(t) if ".head." in n else t for n, t in seeded_state().items()})
    for client in range(N):
        s = np.array([cosine(updates[client], other) for other in updates])
        s[s > 0.999] = 1.0
        w = simplex_by_bisection(examples / examples.sum() + s / (2 * 2.0))
        assert 0.01 < w[client] < 0.99
        published = load_file(tmp_path / f"client-{client}.safetensors")
        flat = flat_state({name: published[name] for name in seeded_state()})
        np.testing.assert_allclose(flat, initial + w @ updates, atol=1e-5)
        trained = initial + updates[client]
        assert np.abs(flat - trained).max() > 1e-3  # not the model as it was left

        network = toy_network().eval()
        network.load_state_dict(published)
        test = toy_data(client).test
        with torch.no_grad():
            accuracy = [(z.argmax(1) == test.y).float().mean().item() for z in network(test.x)]
        assert notes.reports[client].exits.accuracy == pytest.approx(accuracy)


def test_every_evaluation_has_the_downloads_of_the_round_to_come(tmp_path):
    """With `fraction_evaluate = 1`: what is evaluated after round t is what round t + 1 starts from."""
    _, _, grid = by(PFedGraph(), tmp_path, fraction_evaluate=1.0)

    def sent(kind):
        messages = [m for m, _ in grid.of_type(kind)]
        return {(m.content["config"]["server-round"], asked(m)[0]): m.content["arrays"]["flat"] for m in messages}

    evaluated, trained = sent("evaluate"), sent("train")
    for t in (1, 2, 3):
        for client in range(N):
            assert evaluated[t, client].data == trained[t + 1, client].data
            assert len(evaluated[t, client].numpy()) > 0
    assert not np.array_equal(evaluated[4, 0].numpy(), trained[4, 0].numpy())


def test_teachers_are_not_sent_for_an_evaluation_at_the_end(tmp_path):
    """Those of the text reading are for training alone: after the last round they would be sent in vain."""
    _, _, grid = start(tmp_path, text={})
    shared = sum(t.numel() for name, t in toy_network().state_dict().items() if ".head." not in name)
    for message, _ in grid.of_type("evaluate"):
        assert "downloads" not in message.content["config"]
        assert message.content["arrays"]["flat"].shape == (shared,)


@pytest.mark.parametrize("away", [None, 2], ids=["all", "one away"])
def test_mixtures_are_what_is_evaluated_and_published_at_the_end(tmp_path, monkeypatch, away):
    """They wait at the server until their client is asked again: h̄_i = Σ_j w_ij h_j of the last classifiers that came
    up in the round a client last took part in is its own after round T, also of a client that was away since."""
    patch_participants(monkeypatch, {t: [c for c in range(N) if t < 6 or c != away] for t in range(1, 7)})
    _, notes, grid = start(tmp_path, mu=2.0)
    came, last = {}, {c: 5 if c == away else 6 for c in range(N)}
    for message, reply in grid.of_type("train"):
        (client,) = asked(message)
        came[message.content["config"]["server-round"], client] = reply.content["arrays"]["flat"].numpy()[-15:]
    for client in range(N):
        plan = notes.records[last[client]].plan
        weights = plan.weights[list(plan.weight_rows).index(client)]
        heads = np.stack([came[last[client], other] for other in plan.weight_columns])
        mixture = weights @ heads
        published = load_file(tmp_path / f"client-{client}.safetensors")
        found = np.concatenate([published[f"exits.2.head.{part}"].numpy().ravel() for part in ("weight", "bias")])
        np.testing.assert_allclose(found, mixture, atol=1e-5)
        assert np.abs(mixture - came[last[client], client]).max() > 1e-3  # not as training left it
        network, test = toy_network().eval(), toy_data(client).test
        network.load_state_dict(published)
        with torch.no_grad():
            accuracy = [(z.argmax(1) == test.y).float().mean().item() for z in network(test.x)]
        assert notes.reports[client].exits.accuracy == pytest.approx(accuracy)


def test_a_level_that_there_is_not_is_refused_before_anything_is_sent(tmp_path):
    """In a state to resume from, of a network of other depth, say: levels are 0 to m − 2 = 1."""

    class Keep(Notes):
        def on_round(self, record, state):
            self.state = state

    keep = Keep()
    start(tmp_path, callbacks=[keep], run={"num_rounds": 2})
    for level in (2, -1):
        known = {c: replace(record, level=level if c == 1 else 0) for c, record in keep.state.known.items()}
        grid = grid_of(tmp_path)
        strategy = CafeDistill(
            num_rounds=6,
            num_clients=N,
            local=FULL_BATCH,
            wait_seconds=0.0,
            resume_from=replace(keep.state, known=known),
        )
        with pytest.raises(ValueError, match=rf"levels must lie in 0\.\.1 \(exits - 2\), got .*{level}"):
            strategy.start(grid)
        assert grid.of_type("train") == []


@pytest.mark.slow
def test_fine_tuning_after_the_last_round_teaches_what_the_rounds_did_not(tmp_path):
    """FedBABU's classifiers are as they began until the end; then five rounds' worth of steps must bring the loss on
    the client's own examples down, not in name only: the schedule's last learning rate is next to nothing."""
    losses = {}
    for rounds in (0, 5):
        folder = tmp_path / str(rounds)
        _, notes, _ = by(METHODS["fedbabu"](finetune_rounds=rounds), folder, num_rounds=20)
        assert [report.local_steps for report in notes.reports] == [4 * rounds] * N
        losses[rounds] = 0.0
        for client in range(N):
            network = toy_network()
            network.load_state_dict(load_file(folder / f"client-{client}.safetensors"))
            train = toy_data(client).train
            with torch.no_grad():
                losses[rounds] += sum(nn.functional.cross_entropy(z, train.y).item() for z in network(train.x))
            heads_moved = not torch.equal(network.exits[0].head.weight, seeded_state()["exits.0.head.weight"])
            assert heads_moved == (rounds > 0)
    assert losses[5] < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cafedistill", "cafedistill-plus", "cafedistill-prior", "cafedistill-text", "fedrod", "fedamp", "ditto"]
)
def test_what_ran_before_on_the_same_nodes_does_not_matter(tmp_path, name):
    """A method after another one in the same process starts from the weights of the seed, like anywhere else."""
    fresh, _, _ = by(METHODS[name](), tmp_path / "fresh", num_rounds=2)
    app = toy_app()
    by(METHODS["fedavg"](), tmp_path / "before", app=app, num_rounds=2)
    after, _, _ = by(METHODS[name](), tmp_path / "after", app=app, num_rounds=2)
    assert same_arrays(fresh.arrays, after.arrays)
    for client in range(N):
        networks = [load_file(tmp_path / f / f"client-{client}.safetensors") for f in ("fresh", "after")]
        assert same_tensors(*networks)


# --- initial arrays ---


def seeded_state(seed=0):
    torch.manual_seed(seed)
    return toy_network().state_dict()


@pytest.mark.slow
def test_initial_arrays_of_the_seed_are_the_same_as_none(tmp_path):
    """All of the network or its shared part: names that are not shared do not matter."""
    none, _, _ = start(tmp_path / "none", seed=5)
    state = seeded_state(5)
    shared = {name: t for name, t in state.items() if ".head." not in name}
    for folder, tensors in (("all", state), ("shared", shared), ("reversed", dict(reversed(shared.items())))):
        given, _, _ = start(tmp_path / folder, seed=5, run={"initial_arrays": ArrayRecord(tensors)})
        assert same_arrays(none.arrays, given.arrays)


@pytest.mark.slow
def test_initial_arrays_are_where_the_clients_start(tmp_path):
    """Weights of another seed: they are what travels in round 1, and the outcome differs."""
    other = seeded_state(77)
    given, _, grid = start(tmp_path / "given", run={"initial_arrays": ArrayRecord(other)})
    message, _ = grid.of_type("train")[0]
    shared = [name for name in other if ".head." not in name]
    expected = np.concatenate([other[name].numpy().ravel() for name in shared])
    np.testing.assert_array_equal(message.content["arrays"]["flat"].numpy(), expected)
    none, _, _ = start(tmp_path / "none")
    assert not same_arrays(given.arrays, none.arrays)


def test_initial_arrays_that_lack_names_or_have_other_shapes_are_refused(tmp_path):
    state = seeded_state()
    lacking = {name: t for name, t in state.items() if not name.startswith("stages.1.0.")}
    with pytest.raises(ValueError, match=r"lack shared parameters .*: stages\.1\.0\.weight, stages\.1\.0\.bias"):
        start(tmp_path, run={"initial_arrays": ArrayRecord(lacking)})
    turned = {**state, "stages.0.0.weight": state["stages.0.0.weight"].T.contiguous()}
    with pytest.raises(ValueError, match=r"stages.0.0.weight has shape \(5, 8\), the clients' network needs \(8, 5\)"):
        start(tmp_path, run={"initial_arrays": ArrayRecord(turned)})


def test_initial_arrays_that_are_not_finite_end_the_run_with_the_reason(tmp_path):
    state = {name: t.clone() for name, t in seeded_state().items()}
    state["stages.0.0.bias"][2] = torch.nan
    with pytest.raises((RuntimeError, ValueError), match="NaN or infinite"):
        start(tmp_path, run={"initial_arrays": ArrayRecord(state)})


@pytest.mark.slow
def test_initial_arrays_in_double_precision_are_taken(tmp_path):
    state = seeded_state()
    arrays = ArrayRecord({name: Array(t.double().numpy()) for name, t in state.items()})
    none, _, _ = start(tmp_path / "none")
    given, _, _ = start(tmp_path / "given", run={"initial_arrays": arrays})
    assert same_arrays(none.arrays, given.arrays)


def test_every_node_answers_with_the_initial_weights_of_the_seed(tmp_path):
    """The server need not have the network; but what it starts from is what torch gives for the seed."""
    result, _, grid = start(tmp_path, seed=9, run={"num_rounds": 1})
    (question, answer), *more = grid.of_type("query.initial")
    assert not more
    state = seeded_state(9)
    expected = np.concatenate([state[name].numpy().ravel() for name in state if ".head." not in name])
    np.testing.assert_array_equal(answer.content["arrays"]["flat"].numpy(), expected)
    assert question.content["config"]["seed"] == 9
    assert list(result.arrays) == [name for name in state if ".head." not in name]


# --- rounds ---


def test_num_rounds_of_start_stops_earlier(tmp_path):
    """Schedules span the strategy's own T; the final evaluation comes after round T only."""
    _, notes, _ = start(tmp_path, run={"num_rounds": 2})
    assert sorted(notes.records) == [1, 2]
    assert [notes.records[t].num_rounds for t in (1, 2)] == [6, 6]
    assert notes.records[1].active_exits == [3, 0]
    assert notes.reports is None
    for rounds in (0, 7):
        with pytest.raises(
            ValueError, match=rf"num_rounds must be in 1..6, for which the strategy was made, got {rounds}"
        ):
            start(tmp_path, run={"num_rounds": rounds})


@pytest.mark.slow
def test_num_rounds_of_start_alone_is_what_schedules_span(tmp_path):
    """As with Flower's own strategies, which are told only here."""
    told, one, _ = start(tmp_path / "start", num_rounds=None, run={"num_rounds": 6})
    made, two, _ = start(tmp_path / "constructor")
    assert same_arrays(told.arrays, made.arrays)
    assert [one.records[t].active_exits for t in range(1, 7)] == [two.records[t].active_exits for t in range(1, 7)]
    assert one.reports is not None


def test_a_strategy_can_be_started_again(tmp_path):
    """Every start is a run of its own, with a token of its own, and the same numbers."""
    notes = Notes()
    strategy = CafeDistill(num_rounds=3, num_clients=N, local=FULL_BATCH, wait_seconds=0.0, callbacks=[notes])
    grid = grid_of(tmp_path)
    first = strategy.start(grid).arrays
    token = notes.run.run
    assert same_arrays(first, strategy.start(grid).arrays)
    assert notes.run.run != token
    assert notes.run.first_round == 1


@pytest.mark.slow
def test_a_foreign_project_resumes_from_a_checkpoint(tmp_path):
    """`resume_from` takes what Checkpoints gives, without any of the package's settings."""

    class Save:
        def on_start(self, run):
            pass

        def on_round(self, record, state):
            Checkpoints(tmp_path / "checkpoint").save(state)

    start(tmp_path / "personal", run={"num_rounds": 3}, callbacks=[Save()])
    state = Checkpoints(tmp_path / "checkpoint").load()
    resumed, notes, _ = start(tmp_path / "personal", resume_from=state)
    assert notes.run.first_round == 4
    whole, _, _ = start(tmp_path / "whole")
    assert same_arrays(resumed.arrays, whole.arrays)


@pytest.mark.slow
def test_callbacks_are_told_the_run_every_round_and_the_end(tmp_path):
    _, notes, _ = start(tmp_path, num_clients=4, num_nodes=2)
    network = toy_network()
    assert (notes.run.first_round, notes.run.num_rounds, notes.run.clients) == (1, 6, [0, 1, 2, 3])
    assert (notes.run.num_exits, len(notes.run.macs_per_exit)) == (3, 3)
    assert notes.run.num_parameters == sum(t.numel() for t in network.state_dict().values())
    # 5·8 and twice 8·8 in the layers; 8·4 and 4·3 in each exit: 84, 192, 300 multiply-adds.
    assert list(notes.run.macs_per_exit) == [84, 192, 300]
    assert sorted(notes.records) == [1, 2, 3, 4, 5, 6]
    assert [report.client for report in notes.reports] == [0, 1, 2, 3]


def test_final_reports_count_what_the_published_networks_do(tmp_path):
    """Dynamic inference on calibration and test splits, with each exit at the temperature fitted on the calibration
    split; everything else of the report from the network as it is."""
    _, notes, _ = start(tmp_path, num_nodes=2)
    assert [report.client for report in notes.reports] == [0, 1, 2]
    for report in notes.reports:
        network, data = toy_network().eval(), toy_data(report.client)
        network.load_state_dict(load_file(tmp_path / f"client-{report.client}.safetensors"))
        metadata = json.loads((tmp_path / f"client-{report.client}.json").read_text())
        temperatures = metadata["temperatures"]
        assert any(temperature != 1.0 for temperature in temperatures)
        sizes = (report.train_examples, report.calibration_examples, report.test_examples, report.classes)
        assert sizes == (len(data.train), len(data.calibration), len(data.test), len(data.train.y.unique()))
        for name in ("calibration", "test"):
            split, counts = getattr(data, name), getattr(report, name)
            with torch.no_grad():
                p = torch.stack([(z / t).softmax(1) for z, t in zip(network(split.x), temperatures, strict=True)])
            for position in (0, 40, 60, 75, 90, 101):
                left = [0, 0, 0]
                correct = 0
                for i in range(len(split)):
                    k = next((k for k in range(2) if p[k, i].max() >= THRESHOLDS[position]), 2)
                    left[k] += 1
                    correct += (p[k, i].argmax() == split.y[i]).item()
                assert counts.left[position].tolist() == left
                assert counts.correct[position] == correct
        with torch.no_grad():
            accuracy = [(z.argmax(1) == data.test.y).float().mean().item() for z in network(data.test.x)]
        assert report.exits.accuracy == pytest.approx(accuracy)
        assert metadata["accuracy_per_exit"] == report.exits.accuracy


# --- settings and summary ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 0.0}, "mu must be greater than 0, got 0.0"),
        ({"mu": -0.1}, "mu must be greater than 0, got -0.1"),
        ({"mu": math.nan}, "mu must be greater than 0, got nan"),
        ({"mu": math.inf}, "mu must be a finite number, got inf"),
        ({"mu": "0.5"}, "mu must be a number, got '0.5'"),
        ({"distill_weight": -1.0}, "distill_weight must be at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"selection": "random"}, "selection must be one of shallow-first, none; got 'random'"),
        ({"conflict": "layers"}, "conflict must be one of clients, exits; got 'layers'"),
        ({"match_by": "features"}, "match_by must be one of updates, parameters; got 'features'"),
        ({"write_back": 1}, "write_back must be true or false, got 1"),
        ({"classifier_start": "one"}, "classifier_start must be one of zero, common, own, built; got 'one'"),
        ({"classifier_start": "built"}, "classifier_start = 'built' is not for cafedistill: .* Set it to zero, common"),
        ({"learning_rate_decay": 0.0}, "learning_rate_decay must be greater than 0, got 0.0"),
        ({"learning_rate_decay": 1.01}, "learning_rate_decay must be at most 1, got 1.01"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"evaluate_every": 2.0}, "evaluate_every must be a whole number, got 2.0"),
        ({"solver": "osqpp"}, "solver must be 'exact' or one of: .*osqp.*; got 'osqpp'"),
        ({"num_rounds": 0}, "num_server_rounds must be at least 1, got 0"),
        ({"num_clients": 0}, "num_clients must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"wait_seconds": -1.0}, "wait_seconds must be at least 0"),
        ({"round_timeout": 0.0}, "round_timeout must be greater than 0"),
        ({"fraction_train": 1.5}, "fraction_train must lie between 0 and 1, got 1.5"),
        ({"fraction_evaluate": -0.5}, "fraction_evaluate must lie between 0 and 1, got -0.5"),
        ({"mu": -1.0, "temperature": -1.0}, "mu must .*; temperature must"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        CafeDistill(**settings)


def test_summary_shows_our_settings_and_flowers(flower_log):
    CafeDistill(
        0.5, mu=0.125, selection="none", num_rounds=12, seed=3, local=LocalBudget(epochs=2, learning_rate=0.05)
    ).summary()
    text = flower_log.text(logging.INFO)
    for part in (
        "Settings of cafedistill",
        "mu: 0.125",
        "distill-weight: 1.0",
        "selection: none",
        "conflict: clients",
        "classifier-start: zero",
        "2 epochs of 16, SGD at 0.05",
        "Seed: 3",
        "Fraction: train (0.50)",
        "ArrayRecord key: 'arrays'",
    ):
        assert part in text


def test_a_line_a_round_and_not_a_wall_of_dictionaries(tmp_path, flower_log):
    start(tmp_path)
    lines = [r.getMessage() for r in flower_log.records if r.levelno == logging.INFO]
    rounds = [line for line in lines if line.startswith("[ROUND ")]
    assert len(rounds) == 6
    assert rounds[0].startswith("[ROUND 1/6] 3 clients · students 3/0 · accuracy 0.")
    assert len(lines) < 6 + 35
    assert "{" not in "".join(lines)


# --- one exit, many exits ---


@pytest.mark.parametrize("exits", [1, 2, 5])
def test_any_number_of_exits(tmp_path, exits):
    """One exit has no students: plain federated learning with a personal head."""
    app = toy_app(build=lambda: toy_network(exits=exits))
    result, notes, _ = start(tmp_path, app=app, num_clients=4, num_nodes=2)
    assert len(notes.reports[0].exits.accuracy) == exits
    assert all(len(record.active_exits) == exits - 1 for record in notes.records.values())
    assert notes.records[6].active_exits == [4] * (exits - 1)
    assert len(result.arrays) == 4 * exits


def drawing_network():
    """Layers that draw random numbers and keep running statistics."""
    network = toy_network()
    network.stages[0].append(nn.Dropout(0.3))
    network.stages[1].append(nn.BatchNorm1d(8))
    return network


@pytest.mark.slow
def test_networks_that_draw_random_numbers_are_seeded_by_client(tmp_path):
    """Dropout draws from torch's global generator: seeded for each client and round, whoever trains before it in the
    same process, and left as it was."""
    app = toy_app(build=drawing_network)
    torch.manual_seed(1)
    one, _, _ = start(tmp_path / "one", app=app, num_nodes=1)
    number = torch.rand(1)
    torch.manual_seed(2)
    torch.rand(17)
    three, _, _ = start(tmp_path / "three", app=app, num_nodes=3)
    assert same_arrays(one.arrays, three.arrays)
    other, _, _ = start(tmp_path / "other", app=app, num_nodes=3, seed=1)
    assert not same_arrays(one.arrays, other.arrays)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), number)
    assert one.arrays["stages.1.2.running_mean"].numpy().any()


def test_clients_and_rounds_draw_their_own_random_numbers(tmp_path):
    """Clients of one and the same example: only what dropout draws tells them apart, and one round from another."""

    def load(client):
        data = toy_data(0)
        return type(data)(type(data.train)(*(part[[0] * 8] for part in data.train)), data.calibration, data.test)

    def dropped(folder, build):
        masks = {}

        def watched():
            network = build()

            def look(module, x, h):
                if module.training:
                    masks[len(masks)] = h == 0

            network.stages[0].register_forward_hook(look)
            return network

        app = toy_app(load, build=watched)
        budget = LocalBudget(batch_size=8, steps=1, learning_rate=0.1)
        start(tmp_path / folder, app=app, num_nodes=1, local=budget, run={"num_rounds": 2})
        return [tuple(mask.flatten().tolist()) for mask in masks.values()]

    masks = dropped("drawing", drawing_network)
    assert len(masks) == 2 * N  # a step a client and round
    assert len(set(masks)) == 2 * N
    assert not any(any(mask) for mask in dropped("plain", toy_network))


def test_the_engine_can_be_used_as_its_docstring_says(tmp_path):
    grid = InProcessGrid(toy_app(), num_nodes=4, node_config={"state-dir": str(tmp_path)})
    result = CafeDistill(num_rounds=2).start(grid)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
