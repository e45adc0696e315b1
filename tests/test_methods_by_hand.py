"""One round of every method by hand, on a network of a few numbers, against the method itself.

The network has one input, features of width 1 and two classes. It starts from

    stage w = 1, classifier W = (1, −1), biases b = (−1, 1),   so that x = 1 has φ = w·x = 1 and z = φW + b = (0, 0).

There softmax is (½, ½), and for label 0 the cross-entropy's gradient by z is (−½, ½). One step at rate ½ therefore goes

    label 0:  w = 1 + ½ = 1.5,  W = (1.25, −1.25),  b = (−0.75, 0.75)
    label 1:  w = 1 − ½ = 0.5,  W = (0.75, −0.75),  b = (−1.25, 1.25)

Vectors below are (w, W₀, W₁, b₀, b₁).
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import WatchedGrid, same_tensors, toy_app
from flwr.common.serde import recorddict_to_proto
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from cafe_flwr import EarlyExitNetwork
from cafe_flwr.core.random import rng_for
from cafe_flwr.core.schema import Schema
from cafe_flwr.data import ClientData, Split
from cafe_flwr.methods import METHODS, ClientRecord, LocalTask, RoundPlan, ServerRound
from cafe_flwr.methods.cafedistill_prior import class_means, match_classes, noised
from cafe_flwr.methods.depthfl import mutual_divergence
from cafe_flwr.methods.fedpac import combinations
from cafe_flwr.methods.pairs import Pairs
from cafe_flwr.networks import Exit
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.teaching import simplex_qp
from cafe_flwr.training import LocalBudget

START = [1.0, 1.0, -1.0, -1.0, 1.0]
STEP_0 = [1.5, 1.25, -1.25, -0.75, 0.75]  # after one step with label 0
STEP_1 = [0.5, 0.75, -0.75, -1.25, 1.25]  # … with label 1
NAMES = ["stages.0.weight", "exits.0.head.weight", "exits.0.head.bias"]
HEAD = NAMES[1:]
SIGMOID_MINUS_1 = 0.2689414213699951  # 1/(1 + e)


def tiny_network(exits=1):
    """w, then a classifier at every exit; further stages multiply by 1."""
    stages = [nn.Linear(1, 1, bias=False) for _ in range(exits)]
    network = EarlyExitNetwork(stages, [Exit(nn.Identity(), 1, 2) for _ in range(exits)])
    network.load_state_dict(
        {name: torch.ones(1, 1) for name in network.state_dict() if name.startswith("stages")}
        | {f"exits.{k}.head.weight": torch.tensor([[1.0], [-1.0]]) for k in range(exits)}
        | {f"exits.{k}.head.bias": torch.tensor([-1.0, 1.0]) for k in range(exits)}
    )
    return network


def examples(labels, x=1.0):
    return Split(torch.full((len(labels), 1), x), torch.tensor(labels))


def tensors_of(values, prefix=""):
    """(w, W₀, W₁, b₀, b₁) by name."""
    w, w0, w1, b0, b1 = values
    parts = [torch.tensor([[w]]), torch.tensor([[w0], [w1]]), torch.tensor([b0, b1])]
    return {prefix + name: part for name, part in zip(NAMES, parts, strict=True)}


def vector(tensors, prefix=""):
    """The tensors of a network with one exit as (w, W₀, W₁, b₀, b₁)."""
    return torch.cat([torch.as_tensor(tensors[prefix + name]).flatten() for name in NAMES]).tolist()


def local_task(method, labels=(0,), *, steps=1, network=None, exits=1, **options):
    """One client's work: full batches at rate ½."""
    network = network or tiny_network(exits)
    options = {"download": {}, "state": method.extra_tensors(network), "server_round": 1, "num_rounds": 1} | options
    return LocalTask(
        network=network,
        data=options.pop("data", examples(list(labels))),
        active=options.pop("active", [True] * (network.num_exits - 1)),
        budget=LocalBudget(batch_size=99, steps=steps, learning_rate=0.5),
        rng=lambda purpose: rng_for(0, 1, 0, purpose),
        initial={name: t.clone() for name, t in tiny_network(network.num_exits).state_dict().items()},
        **options,
    )


def trained(method, **options):
    """(w, W₀, W₁, b₀, b₁) after local training, and the task."""
    task = local_task(method, **options)
    method.train(task)
    return vector(task.network.state_dict()), task


def server_round(method, uploads, examples, *, participants=None, exits=1, t=2, num_rounds=4):
    """What the server knows: a dict of tensors and a number of examples of every client."""
    network = tiny_network(exits)
    schema = Schema.of({**network.state_dict(), **method.extra_tensors(network)}, method.upload_names(network))
    known = {
        c: ClientRecord(n, 1, schema.pack(tensors), np.full(exits - 1, 0.5))
        for c, (tensors, n) in enumerate(zip(uploads, examples, strict=True))
    }
    participants = list(known) if participants is None else participants
    return ServerRound(t, num_rounds, participants, exits, known, schema, np.random.default_rng(0))


def downloads(method, plan, exits=1):
    """What a plan sends to every client, by name."""
    network = tiny_network(exits)
    schema = Schema.of({**network.state_dict(), **method.extra_tensors(network)}, method.download_names(network))
    return {c: schema.unpack(flat) for c, flat in plan.downloads.items()}


LABELS = {0: [0], 1: [1, 1, 1]}  # of two clients, one example and three


def federate(folder, method, rounds, *, labels=LABELS, exits=1, num_rounds=4, steps=1, lose=lambda message: False):
    """Real messages; the learning rate is ½ in the first two of four rounds. Result, and personal networks."""
    data = {c: ClientData(*[examples(y)] * 3) for c, y in labels.items()}
    app = toy_app(data.__getitem__, lambda: tiny_network(exits))
    grid = WatchedGrid(app, len(labels), node_config={"state-dir": str(folder)})
    grid.lose = lose
    strategy = FederatedStrategy(
        method=method,
        num_rounds=num_rounds,
        num_clients=len(labels),
        local=LocalBudget(batch_size=99, steps=steps, learning_rate=0.5),
        wait_seconds=0.0,
    )
    result = strategy.start(grid, num_rounds=rounds)
    personal = {
        c: load_file(max((folder / "versions").glob(f"*/client-{c}/*.safetensors")))
        for c in labels
        if method.personal_names(tiny_network(exits))
    }
    return {name: array.numpy() for name, array in result.arrays.items()}, personal, grid


# --- Local, FedAvg, FedProx, FedPer ----------------------------------------------------------------------------------


def test_local(tmp_path):
    """Both clients go their own way; nothing is averaged, nothing is sent."""
    shared, personal, grid = federate(tmp_path, METHODS["local"](classifier_start="built"), rounds=1)
    assert shared == {}
    assert vector(personal[0]) == pytest.approx(STEP_0)
    assert vector(personal[1]) == pytest.approx(STEP_1)
    for message, reply in grid.of_type("train"):
        assert message.content["arrays"]["flat"].numpy().size == reply.content["arrays"]["flat"].numpy().size == 0


def test_fedavg(tmp_path):
    """Client 0 has one example of class 0, client 1 three of class 1: weights ¼ and ¾.

    w = ¼·1.5 + ¾·0.5 = 0.75;  W₀ = ¼·1.25 + ¾·0.75 = 0.875;  b₀ = −¼·0.75 − ¾·1.25 = −1.125
    """
    shared, personal, _ = federate(tmp_path, METHODS["fedavg"](), rounds=1)
    assert vector(shared) == pytest.approx([0.75, 0.875, -0.875, -1.125, 1.125])
    assert personal == {}


def test_fedprox():
    """Two steps. In the first the client is where it was sent: no pull. The second differs from FedAvg's by the pull
    alone, −½·μ·(θ₁ − θ₀) with μ = ½ and θ₁ − θ₀ = (½, ¼, −¼, ¼, −¼):  −(⅛, 1/16, −1/16, 1/16, −1/16)
    """
    one, _ = trained(METHODS["fedprox"](mu=0.5), steps=1)
    assert one == pytest.approx(STEP_0)
    free, _ = trained(METHODS["fedavg"](), steps=2)
    held, _ = trained(METHODS["fedprox"](mu=0.5), steps=2)
    assert np.subtract(held, free) == pytest.approx([-0.125, -0.0625, 0.0625, -0.0625, 0.0625], abs=1e-6)


def test_fedper(tmp_path):
    """All train together; w = ¼·1.5 + ¾·0.5 is averaged, W and b stay where each client took them."""
    shared, personal, _ = federate(tmp_path, METHODS["fedper"](classifier_start="built"), rounds=1)
    assert list(shared) == ["stages.0.weight"]
    assert shared["stages.0.weight"].item() == pytest.approx(0.75)
    for client, expected in ((0, STEP_0), (1, STEP_1)):
        assert vector({**shared, **personal[client]})[1:] == pytest.approx(expected[1:])


# --- Ditto -----------------------------------------------------------------------------------------------------------


def test_ditto_trains_a_global_and_a_personal_model(tmp_path):
    """Two steps, one for each model. Round 1: both start from θ, where there is no pull, and go the same step.

    Round 2, client 0: the global model is now that of FedAvg, θ = (0.75, 0.875, −0.875, −1.125, 1.125); the personal
    one goes on from v = (1.5, 1.25, …). With λ = 0.2 it differs from that with λ = 0 by the pull alone,
    −½·λ·(v − θ) = −0.1·(0.75, 0.375, −0.375, 0.375, −0.375). The global models do not differ.
    """
    one, after_one, _ = federate(tmp_path / "one", METHODS["ditto"](), rounds=1, steps=2)
    assert vector(one) == pytest.approx([0.75, 0.875, -0.875, -1.125, 1.125])
    assert vector(after_one[0], "personal.") == pytest.approx(STEP_0)
    assert vector(after_one[1], "personal.") == pytest.approx(STEP_1)
    free, after_free, _ = federate(tmp_path / "free", METHODS["ditto"](pull=0.0), rounds=2, steps=2)
    held, after_held, _ = federate(tmp_path / "held", METHODS["ditto"](pull=0.2), rounds=2, steps=2)
    assert vector(free) == vector(held)
    pull = np.subtract(vector(after_held[0], "personal."), vector(after_free[0], "personal."))
    assert pull == pytest.approx([-0.075, -0.0375, 0.0375, -0.0375, 0.0375], abs=1e-6)


# --- FedRep, FedBABU -------------------------------------------------------------------------------------------------


def test_fedrep_trains_the_classifiers_first():
    """Two steps. The first moves W and b only, to (1.25, −1.25) and (−0.75, 0.75), with w = 1.

    Then z = (0.5, −0.5), p₁ = σ(−1) = 0.268941, and w alone moves: by ½·(1.25 + 1.25)·0.268941 = 0.336177.
    The other way round w would be 1.5.
    """
    after, _ = trained(METHODS["fedrep"](), steps=2)
    assert after == pytest.approx([1.336177, 1.25, -1.25, -0.75, 0.75], abs=1e-6)


def test_fedrep_as_published_takes_all_steps_for_each():
    """One step for each is what the two steps of above are."""
    once, _ = trained(METHODS["fedrep"](equal_steps=False), steps=1)
    assert once == pytest.approx([1.0 + 1.25 * SIGMOID_MINUS_1, 1.25, -1.25, -0.75, 0.75], abs=1e-6)


def test_fedbabu_leaves_the_classifiers_alone_until_the_end():
    """A round: w = 1.5, W and b as all clients have them. Fine-tuning goes on from there, W and b included:

    z = (1.5 − 1, −1.5 + 1) = (0.5, −0.5), p₁ = σ(−1) = 0.268941 = q
    w = 1.5 + ½·(1 + 1)·q = 1.768941;  W₀ = 1 + ½·1.5·q = 1.201706;  b₀ = −1 + ½·q = −0.865529
    """
    method = METHODS["fedbabu"](finetune_rounds=1)
    after, task = trained(method)
    assert after == pytest.approx([1.5, 1.0, -1.0, -1.0, 1.0])
    method.finish(task)
    expected = [1.768941, 1.201706, -1.201706, -0.865529, 0.865529]
    assert vector(task.network.state_dict()) == pytest.approx(expected, abs=1e-6)
    assert task.steps == 2
    METHODS["fedbabu"](finetune_rounds=0).finish(task)
    assert task.steps == 2
    assert vector(task.network.state_dict()) == pytest.approx(expected, abs=1e-6)


def test_fedbabu_fine_tunes_at_the_runs_learning_rate(tmp_path):
    """In the last round the learning rate has fallen to almost 0 (in round 4 of 4 to ¼ of its value, in round 100 of
    100 to 1/1000); fine-tuning with that would leave the classifiers as they were initialised. One client, fine-tuned
    for one step at rate ½, from where four rounds have brought w:

    q = softmax(w − 1, 1 − w)₁ = σ(2 − 2w);  W₀ = 1 + ½·w·q;  b₀ = −1 + ½·q
    """
    shared, _, _ = federate(tmp_path, METHODS["fedbabu"](finetune_rounds=1), rounds=4, labels={0: [0]})
    w = shared["stages.0.weight"].item()
    q = 1 / (1 + math.exp(2 * w - 2))
    published = load_file(tmp_path / "client-0.safetensors")
    assert vector(published)[1:4:2] == pytest.approx([1 + 0.5 * w * q, -1 + 0.5 * q], abs=1e-6)


def test_fedbabu_fine_tunes_on_all_of_a_clients_data():
    """Eight examples, two steps of two a round: four rounds' worth of fine-tuning are one sequence of two passes over
    the data, so that every example is seen twice, not the same four examples four times; drawn for a purpose of its
    own, not as the last round's batches were."""
    seen, purposes = [], []
    method = METHODS["fedbabu"](finetune_rounds=4)
    data = Split(torch.arange(8.0)[:, None], torch.tensor([0, 1] * 4))
    task = local_task(method, data=data)
    task.budget = LocalBudget(batch_size=2, steps=2, learning_rate=1e-3)
    task.rng = lambda purpose: purposes.append(purpose) or rng_for(0, 1, 0, purpose)
    task.network.stages[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].flatten().tolist()))
    method.finish(task)
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert [purpose for purpose in purposes if purpose != "objective 0"] == ["fine-tuning"]
    assert task.steps == 8


# --- FedAMP, pFedGraph: mixtures of models ---------------------------------------------------------------------------


def updates(*vectors):
    return [tensors_of(v, "update.") for v in vectors]


def test_fedamp_mixes_by_the_cosine_of_updates():
    """Updates Δ₀ = 2e, Δ₁ = 4e, Δ₂ = 8f with e ⊥ f, σ = ln 3, self weight 0.3. For client 0: cos = 1 and 0, so
    exp(σ·cos) = 3 and 1 share 0.7 as 0.525 and 0.175:  0.3·2e + 0.525·4e + 0.175·8f = 2.7e + 1.4f.
    For client 2 both cosines are 0: 0.35 each:  0.35·2e + 0.35·4e + 0.3·8f = 2.1e + 2.4f.
    Numbers of examples do not count.
    """
    method = METHODS["fedamp"](sharpness=math.log(3))
    task = server_round(method, updates([2, 0, 0, 0, 0], [4, 0, 0, 0, 0], [0, 8, 0, 0, 0]), [1, 50, 7])
    plan = method.plan(task)
    np.testing.assert_allclose(plan.weights, [[0.3, 0.525, 0.175], [0.525, 0.3, 0.175], [0.35, 0.35, 0.3]])
    sent = downloads(method, plan)
    assert vector(sent[0], "update.") == pytest.approx([2.7, 1.4, 0, 0, 0])
    assert vector(sent[2], "update.") == pytest.approx([2.1, 2.4, 0, 0, 0])


def test_fedamp_pulls_the_own_model_to_its_mixture_and_reports_the_update():
    """From its own θ (p = ½), with the mixture at θ₀ + (2, 0, 0, 0, 4), λ = 0.1: besides the usual step,
    −½·λ·(θ − u) = ½·0.1·(2, 0, 0, 0, 4) = (0.1, 0, 0, 0, 0.2). The update since θ₀ is what is sent.
    """
    method = METHODS["fedamp"](proximal=0.1)
    after, task = trained(method, download=tensors_of([2.0, 0.0, 0.0, 0.0, 4.0], "update."))
    assert after == pytest.approx([1.6, 1.25, -1.25, -0.75, 0.95])
    assert vector(task.state, "update.") == pytest.approx([0.6, 0.25, -0.25, 0.25, -0.05], abs=1e-6)
    alone, _ = trained(method)
    assert alone == pytest.approx(STEP_0)


def test_pfedgraph_takes_the_very_similar_for_the_same_and_solves_the_qp():
    """Updates e, 0.95e + 0.312f, f with 1, 1 and 2 examples: p = (¼, ¼, ½). cos(Δ₀, Δ₁) = 0.95 > 0.9 counts as 1.

    Client 0, μ = 0.8: p + s/1.6 = (0.875, 0.875, 0.5), less (2.25 − 1)/3:  w = (0.458333, 0.458333, 0.083333).
    With 0.95 as it is: (0.875, 0.84375, 0.5), less 0.40625:  w = (0.46875, 0.4375, 0.09375).
    A participant that is not known is similar to nobody: p. It starts from the average of all.
    """
    f = math.sqrt(1 - 0.95**2)
    uploads = updates([1, 0, 0, 0, 0], [0.95, f, 0, 0, 0], [0, 1, 0, 0, 0])
    method = METHODS["pfedgraph"]()
    plan = method.plan(server_round(method, uploads, [1, 1, 2], participants=[0, 1, 2, 7]))
    np.testing.assert_allclose(plan.weights[0], [0.458333, 0.458333, 0.083333], atol=1e-6)
    np.testing.assert_allclose(plan.weights[3], [0.25, 0.25, 0.5], atol=1e-6)
    sent = downloads(method, plan)
    expected = [0.458333 + 0.458333 * 0.95, 0.458333 * f + 0.083333, 0, 0, 0]
    assert vector(sent[0], "update.") == pytest.approx(expected, abs=1e-5)
    assert vector(sent[7], "update.") == pytest.approx([0.25 + 0.25 * 0.95, 0.25 * f + 0.5, 0, 0, 0], abs=1e-6)
    as_it_is = METHODS["pfedgraph"](same_above=1.0)
    weights = as_it_is.plan(server_round(as_it_is, uploads, [1, 1, 2])).weights
    np.testing.assert_allclose(weights[0], [0.46875, 0.4375, 0.09375], atol=1e-6)


def test_pfedgraph_starts_from_its_mixture(tmp_path):
    """Round 1 as FedAvg's clients; their updates are ±(½, ¼, −¼, ¼, −¼), cosine −1, p = (¼, ¾). μ = 1:

    client 0: p + s/2 = (0.75, 0.25), a sum of 1: w = (0.75, 0.25), so it starts from θ₀ + ½·(½, ¼, −¼, ¼, −¼)
    client 1: p + s/2 = (−0.25, 1.25), a sum of 1, projected: (0, 1): its own
    """
    method = METHODS["pfedgraph"](mu=1.0, classifier_start="built")
    _, _, grid = federate(tmp_path, method, rounds=2)
    sent = {m.content["config"]["clients"][0]: m for m, _ in grid.of_type("train")[2:]}
    for client, expected in ((0, [0.25, 0.125, -0.125, 0.125, -0.125]), (1, [-0.5, -0.25, 0.25, -0.25, 0.25])):
        download = tensors_of(sent[client].content["arrays"]["flat"].numpy().tolist(), "update.")
        assert vector(download, "update.") == pytest.approx(expected, abs=1e-6)
        received = method.receive(tensors_of([9.0] * 5), download, tensors_of(START))
        assert vector(received) == pytest.approx(np.add(START, expected), abs=1e-6)


def test_pfedgraph_keeps_to_the_direction_of_its_mixture():
    """The model is at d = (1, 0, 0, 0, 0) from θ₀ = (0, 1, −1, −1, 1), its mixture at (0, 0, 0, 3, 0): their cosine is
    0, and its gradient by θ is (0, 0, 0, 1, 0)/|d|. With λ = 0.2 the step is the usual one and ½·λ = 0.1 more for b₀.
    """
    task = local_task(METHODS["pfedgraph"](alignment=0.2), download=tensors_of([0.0, 0.0, 0.0, 3.0, 0.0], "update."))
    task.initial = tensors_of([0.0, 1.0, -1.0, -1.0, 1.0])
    METHODS["pfedgraph"](alignment=0.2).train(task)
    assert vector(task.network.state_dict()) == pytest.approx([1.5, 1.25, -1.25, -0.65, 0.75])
    assert vector(task.state, "update.") == pytest.approx([1.5, 0.25, -0.25, 0.35, -0.25])


# --- FedRoD ----------------------------------------------------------------------------------------------------------


def test_fedrod_balances_the_generic_classifier_and_trains_a_personal_one_beside_it():
    """One example of class 0, none of class 1: π = (1.1, 0.1)/1.2 = (11/12, 1/12), finite logs both.

    Generic: softmax(z + log π) = π, gradient by z (−1/12, 1/12): w = 1 + ½·2/12 = 1.083333, W₀ = 1 + ½/12 = 1.041667,
    b₀ = −1 + ½/12 = −0.958333. Personal: softmax(z + 0) = ½, gradient (−½, ½): P = (¼, −¼), its biases (¼, −¼); had
    that reached the backbone, w would be larger. In use: W + P = (1.291667, −1.291667).
    """
    method = METHODS["fedrod"]()
    after, task = trained(method)
    assert after == pytest.approx([1.083333, 1.041667, -1.041667, -0.958333, 0.958333], abs=1e-6)
    for name in HEAD:
        assert task.state[f"personal.{name}"].flatten().tolist() == pytest.approx([0.25, -0.25])
    deployed = method.deploy({**task.network.state_dict(), **task.state})
    assert vector(deployed) == pytest.approx([1.083333, 1.291667, -1.291667, -0.708333, 0.708333], abs=1e-6)
    assert set(deployed) == set(NAMES)


def test_the_personal_classifier_of_fedrod_does_not_touch_what_is_shared():
    """Wherever it starts, what is shared becomes the same, bit for bit."""
    method = METHODS["fedrod"]()
    other = tensors_of([0.0, 3.0, -2.0, 1.0, -1.0], "personal.")
    del other["personal.stages.0.weight"]
    assert trained(method, steps=3)[0] == trained(method, steps=3, state=other)[0]


# --- FedPAC ----------------------------------------------------------------------------------------------------------


def fedpac_upload(head, means, variance, counts):
    """Means are of (class 0, class 1), times the class's share."""
    w0, w1, b0, b1 = head
    return {
        "exits.0.head.weight": torch.tensor([[w0], [w1]]),
        "exits.0.head.bias": torch.tensor([b0, b1]),
        "class-means": torch.tensor(means).reshape(1, 2, 1),
        "variance": torch.tensor([variance]),
        "class-counts": torch.tensor(counts),
    }


def test_fedpac_reports_class_statistics_of_the_trained_features():
    """x = 1, 3 of class 0 and x = 2 of class 1, w = 1 (rate 0): class means 2 and 2, shares ⅔ and ⅓:
    H = (4/3, 2/3);  v = [(1 + 9 + 4)/3 − (16/9 + 4/9)]/3 = [42/9 − 20/9]/3 = 22/27
    """
    method = METHODS["fedpac"]()
    task = local_task(method, data=Split(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 0, 1])), steps=2)
    task.budget = LocalBudget(batch_size=9, steps=2, learning_rate=1e-12)
    method.train(task)
    assert task.state["class-means"].flatten().tolist() == pytest.approx([4 / 3, 2 / 3])
    assert task.state["variance"].tolist() == pytest.approx([22 / 27])
    assert task.state["class-counts"].tolist() == [2.0, 1.0]


def test_fedpac_combines_classifiers_and_averages_prototypes():
    """Client 0: 4 examples, H = (1, 0); client 1: 12 examples, H = (1, 0) as well, counts (4, 0) and (6, 6).

    H is alike, so D = 0 and α = argmin α₀²v₀ + α₁²v₁ with v = (1, 3):  α = (¾, ¼) for both:
    W = ¾·(1, −1) + ¼·(5, 3) = (2, 0);  b = ¾·(0, 0) + ¼·(4, 8) = (1, 2)
    Prototypes: class 0 (4·1 + 12·1)/(4 + 6) = 1.6, class 1 (4·0 + 12·0)/6 = 0
    """
    method = METHODS["fedpac"]()
    uploads = [
        fedpac_upload([1.0, -1.0, 0.0, 0.0], [1.0, 0.0], 1.0, [4.0, 0.0]),
        fedpac_upload([5.0, 3.0, 4.0, 8.0], [1.0, 0.0], 3.0, [6.0, 6.0]),
    ]
    plan = method.plan(server_round(method, uploads, [4, 12], participants=[0, 1, 5]))
    np.testing.assert_allclose(plan.weights, [[0.75, 0.25]] * 2, atol=1e-6)
    sent = downloads(method, plan)
    assert set(sent) == {0, 1}  # nothing is known of client 5
    for download in sent.values():
        received = method.receive(tensors_of(START), download, tensors_of(START))
        assert vector(received) == pytest.approx([1.0, 2.0, 0.0, 1.0, 2.0], abs=1e-5)
        assert download["prototypes"].flatten().tolist() == pytest.approx([1.6, 0.0])


def test_fedpac_aligns_features_with_prototypes_in_the_second_phase_only():
    """As FedRep, and in the second step λ(φ − c)² with φ = 1, c = 3 for class 0: gradient 2λ(φ − c) = −4λ by w.
    With λ = 0.1:  w = 1.336177 + ½·0.4 = 1.536177. W and b are those of FedRep.
    """
    method = METHODS["fedpac"](alignment=0.1)
    download = {**tensors_of(START), "prototypes": torch.tensor([3.0, -7.0]).reshape(1, 2, 1)}
    after, _ = trained(method, steps=2, download=download)
    assert after == pytest.approx([1.536177, 1.25, -1.25, -0.75, 0.75], abs=1e-6)
    without, _ = trained(method, steps=2)
    assert without == pytest.approx([1.336177, 1.25, -1.25, -0.75, 0.75], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_combinations_solve_their_qps(seed):
    """min αᵀ(diag(v) + D_i)α on the simplex, D_i[a,b] = ⟨H_i − H_a, H_i − H_b⟩: the gradient 2(diag(v) + D_i)α is the
    same for all clients that have a weight, and no smaller for the others (the conditions of Karush, Kuhn, Tucker)."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    h, v = rng.normal(size=(n, 12)), rng.uniform(0.1, 5, size=n)
    for i, alpha in enumerate(combinations(h, v)):
        assert alpha.sum() == pytest.approx(1.0)
        assert (alpha >= 0).all()
        distance = np.array([[(h[i] - h[a]) @ (h[i] - h[b]) for b in range(n)] for a in range(n)])
        gradient = 2 * (np.diag(v) + distance) @ alpha
        used = alpha > 1e-6
        level = gradient[used].mean()
        np.testing.assert_allclose(gradient[used], level, rtol=1e-4)
        assert (gradient >= level * (1 - 1e-4)).all()


def test_combinations_without_any_variance_or_distance_leave_everybody_alone():
    np.testing.assert_allclose(combinations(np.ones((3, 2)), np.zeros(3)), np.eye(3))


# --- methods that distil between exits -------------------------------------------------------------------------------


def with_biases(*biases):
    """A network whose exits give these logits whatever comes in: biases only."""
    network = tiny_network(len(biases))
    tensors = network.state_dict()
    for k, z in enumerate(biases):
        tensors[f"exits.{k}.head.weight"] = torch.zeros(2, 1)
        tensors[f"exits.{k}.head.bias"] = torch.tensor(z)
    network.load_state_dict(tensors)
    return network


def loss_of(method, network, label=0, **options):
    """The loss of one example."""
    task = local_task(method, network=network, **options)
    return method.loss(task, *examples([label])[:2])


def test_depthfl_ramp():
    """T = 10, R = 3: r(1) = exp(−5·(2/3)²) = 0.108368, r(2) = exp(−5/9) = 0.573753, from t = 3 on 1."""
    weights = []
    for t in (1, 2, 3, 10):
        method = METHODS["depthfl"]()
        weights.append(method.weight(local_task(method, exits=2, server_round=t, num_rounds=10)))
    assert weights == pytest.approx([0.108368, 0.573753, 1.0, 1.0], abs=1e-6)


def test_depthfl_loss():
    """Exits (¾, ¼) and (½, ½), label 0: mean cross-entropy (−ln ¾ + ln 2)/2 = 0.490415.
    KL(¾‖½) + KL(½‖¾) = 0.130812 + 0.143841, over (m − 1) = 1, mean over exits: 0.137327. In all 0.627741; in round 1
    of 10 with the ramp's 0.108368 of it: 0.505297.
    """
    method, network = METHODS["depthfl"](), with_biases([math.log(3), 0.0], [0.0, 0.0])
    full = loss_of(method, network, server_round=10, num_rounds=10)
    assert full.item() == pytest.approx(0.627741, abs=1e-6)
    assert loss_of(method, network, server_round=1, num_rounds=10).item() == pytest.approx(0.505297, abs=1e-6)


def test_mutual_divergence_is_the_double_sum_with_teachers_that_do_not_learn():
    """Σ_k Σ_{l≠k} KL(softmax(z_l) ‖ softmax(z_k))/(m − 1), value and gradient, by a double loop."""
    z = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fast, slow = ([row.clone().requires_grad_() for row in z] for _ in range(2))
    total = torch.zeros((), dtype=torch.float64)
    for k in range(4):
        for other in range(4):
            if other != k:
                p = slow[other].detach().softmax(dim=1)
                total = total + (p * (p.log() - slow[k].log_softmax(dim=1))).sum(dim=1).mean() / 3
    value = mutual_divergence(fast)
    assert value.item() == pytest.approx(total.item(), rel=1e-12)
    value.backward()
    total.backward()
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


def test_scalefl_weighs_exits_by_depth_and_begins_to_distil_after_a_quarter():
    """m = 2: weights 2k/(m(m + 1)) = ⅓ and ⅔. Exits (3 ln 3, 0): p = 27/28, and (0, 0), label 0:
    −ln(27/28)/3 + ⅔·ln 2 = 0.012122 + 0.462098 = 0.474221 in rounds 1 and 2 of 8.
    From round 3 on, τ = 3 and γ = 0.05: + ⅓·0.05·9·KL(½‖¾) = 0.15·0.143841 = 0.021576: 0.495797.
    """
    method, network = METHODS["scalefl"](), with_biases([3 * math.log(3), 0.0], [0.0, 0.0])
    for t, expected in ((1, 0.474221), (2, 0.474221), (3, 0.495797), (8, 0.495797)):
        loss = loss_of(method, network, server_round=t, num_rounds=8)
        assert loss.item() == pytest.approx(expected, abs=2e-6)


def test_scalefl_weights_of_three_exits():
    """⅙, ⅓, ½: all exits at (½, ½) and ln 2, but one at (¾, ¼), whose −ln ¾ is then seen with its weight."""
    for k, weight in enumerate((1 / 6, 1 / 3, 1 / 2)):
        network = tiny_network(3)
        with torch.no_grad():
            for j, exit_ in enumerate(network.exits):
                exit_.head.weight.zero_()
                exit_.head.bias.copy_(torch.tensor([math.log(3) if j == k else 0.0, 0.0]))
        loss = loss_of(METHODS["scalefl"](), network, server_round=1, num_rounds=8)
        assert loss.item() == pytest.approx(math.log(2) + weight * (math.log(4 / 3) - math.log(2)), abs=1e-6)


def test_local_kd_loss_and_what_it_trains():
    """Exits (3 ln 3, 0) and (0, 0), label 0: 0.036368 + 0.693147 + λτ²·KL(½‖¾) with λ = 2, τ = 3, which is
    18·0.143841 = 2.589138; in all 3.318653. The teacher's biases feel their cross-entropy only: (−½, ½).
    """
    method, network = METHODS["local-kd"](distill_weight=2.0), with_biases([3 * math.log(3), 0.0], [0.0, 0.0])
    loss = loss_of(method, network)
    assert loss.item() == pytest.approx(3.318653, abs=2e-6)
    loss.backward()
    assert network.exits[1].head.bias.grad.tolist() == pytest.approx([-0.5, 0.5])


def test_local_kd_is_the_text_reading_where_everybody_teaches_himself_from_round_1_on(tmp_path):
    """Bit for bit, averaged and personal."""
    text = METHODS["cafedistill-text"](teachers="own", selection="none")
    a = federate(tmp_path / "a", METHODS["local-kd"](classifier_start="built"), rounds=4, exits=2, steps=3)
    b = federate(tmp_path / "b", text, rounds=4, exits=2, steps=3)
    for name, array in a[0].items():
        assert array.tobytes() == b[0][name].tobytes()
    assert all(same_tensors(a[1][c], b[1][c]) for c in LABELS)


def test_self_distillation_is_added_exit_by_exit_with_the_weights_of_the_cross_entropies():
    """FedAvg with `distill`, exits (3 ln 3, 0) and (0, 0), label 0. q = ½(¾, ¼) + ½(½, ½) = (⅝, ⅜).

    Cross-entropies ½·(0.036368 + 0.693147) = 0.364758. τ²·KL(q‖¾) = 9·(⅝ ln ⅚ + ⅜ ln 1.5) = 9·0.038098,
    τ²·KL(q‖½) = 9·(⅝ ln 1.25 + ⅜ ln ¾) = 9·0.031584, the last with weight 0.3: ½·9·(0.038098 + 0.3·0.031584) = 0.214080
    """
    network = with_biases([3 * math.log(3), 0.0], [0.0, 0.0])
    assert loss_of(METHODS["fedavg"](), network).item() == pytest.approx(0.364758, abs=2e-6)
    loss = loss_of(METHODS["fedavg"](distill=True), network)
    assert loss.item() == pytest.approx(0.364758 + 0.214080, abs=5e-6)


# --- CAFEDistill -----------------------------------------------------------------------------------------------------


def last_head(w0, w1):
    return {"exits.1.head.weight": torch.tensor([[w0], [w1]]), "exits.1.head.bias": torch.zeros(2)}


def first_head(w0, w1):
    return {name.replace("exits.1", "exits.0"): t for name, t in last_head(w0, w1).items()}


def concluded(method, sent, came, *, examples=(1, 3)):
    """What the server makes of classifiers that came back from clients that were sent others; none sent: the start."""
    task = server_round(method, sent, examples[: len(sent)], exits=2, participants=range(len(came)))
    records = {
        c: ClientRecord(examples[c], 2, task.upload.pack(tensors), np.full(1, 0.5)) for c, tensors in enumerate(came)
    }
    done = method.conclude(task, RoundPlan(task.all_exits), records)
    return done, {c: task.upload.unpack(record.upload) for c, record in done.records.items()}


def weights_in(tensors, k=1):
    return tensors[f"exits.{k}.head.weight"].flatten().tolist()


def test_cafedistill_mixes_those_whose_updates_agree_and_keeps_the_mixture():
    """All start from zero, and come back with (3, 4) and (4, 3): cos = 24/25 = 0.96. μ = ½, n = 2: ½ + s = (1.5, 1.46),
    less (2.96 − 1)/2: w = (0.52, 0.48), whoever has how many examples. 0.52·(3, 4) + 0.48·(4, 3) = (3.48, 3.52).
    """
    done, kept = concluded(METHODS["cafedistill"](mu=0.5), [], [last_head(3.0, 4.0), last_head(4.0, 3.0)])
    np.testing.assert_allclose(done.plan.weights, [[0.52, 0.48], [0.48, 0.52]], atol=1e-6)
    assert (list(done.plan.weight_rows), list(done.plan.weight_columns)) == ([0, 1], [0, 1])
    assert weights_in(kept[0]) == pytest.approx([3.48, 3.52], abs=1e-5)
    assert weights_in(kept[1]) == pytest.approx([3.52, 3.48], abs=1e-5)
    np.testing.assert_allclose(done.pairs.among([0, 1]), [[0, 0.96], [0.96, 0]], atol=1e-6)
    assert list(done.unmoved) == []


@pytest.mark.parametrize(
    ("settings", "similarity", "first", "second"),
    [
        ({}, 0.0, [3.25, 3.75], [3.75, 3.25]),
        ({"match_by": "parameters"}, 0.96, [3.49, 3.51], [3.51, 3.49]),
        ({"write_back": False}, 0.0, [3.0, 4.0], [4.0, 3.0]),
    ],
    ids=["released", "by parameters", "not written back"],
)
def test_cafedistill_compares_what_clients_made_of_what_they_were_sent(settings, similarity, first, second):
    """Sent (2, 4) and (4, 0), back came (3, 4) and (4, 3): moves (1, 0) and (0, 3), cos = 0. μ = 1: ½ + s/2 = (1, ½),
    less ¼: w = (¾, ¼): ¾·(3, 4) + ¼·(4, 3) = (3.25, 3.75). The classifiers themselves have cosine 0.96: (1, 0.98) less
    0.49: w = (0.51, 0.49). Not written back, what is kept is what came."""
    method = METHODS["cafedistill"](mu=1.0, **settings)
    sent = [last_head(2.0, 4.0), last_head(4.0, 0.0)]
    done, kept = concluded(method, sent, [last_head(3.0, 4.0), last_head(4.0, 3.0)])
    assert done.pairs.among([0, 1])[0, 1] == pytest.approx(similarity, abs=1e-6)
    assert weights_in(kept[0]) == pytest.approx(first, abs=1e-5)
    assert weights_in(kept[1]) == pytest.approx(second, abs=1e-5)


def test_a_classifier_that_did_not_move_is_like_no_other_and_named():
    """Client 0 sends back what it was sent: cosine 0, μ = ½: all of ½ + 0 to both, w_0 = (½, ½); client 1, which agrees
    with itself: (½, 1.5) less ½: its own."""
    sent = [last_head(2.0, 4.0), last_head(4.0, 0.0)]
    done, _ = concluded(METHODS["cafedistill"](mu=0.5), sent, [last_head(2.0, 4.0), last_head(4.0, 3.0)])
    assert list(done.unmoved) == [0]
    np.testing.assert_allclose(done.plan.weights, [[0.5, 0.5], [0.0, 1.0]], atol=1e-6)
    assert done.pairs.among([0, 1]).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_cafedistill_loss_lets_the_deepest_student_learn_from_the_own_last_exit_alone():
    """Exits (0, 0) and (2 ln 3, 0), label 0: ½·CE = −½ ln 0.9 = 0.052680; at τ = 2 the last exit says (¾, ¼):
    λ·4·KL(¾‖½) = λ·0.523248. Gradients: last (0.9 − 1)/2 = −0.05, which is not that of a teacher that learns;
    student λ·τ·(½ − ¾) = −½ λ, without a cross-entropy's."""
    for weight in (1.0, 0.3):
        network = with_biases([0.0, 0.0], [2 * math.log(3), 0.0])
        loss = loss_of(METHODS["cafedistill"](distill_weight=weight), network)
        assert loss.item() == pytest.approx(0.052680 + weight * 0.523248, abs=2e-6)
        loss.backward()
        assert network.exits[1].head.bias.grad.tolist() == pytest.approx([-0.05, 0.05], abs=1e-6)
        assert network.exits[0].head.bias.grad.tolist() == pytest.approx([-0.5 * weight, 0.5 * weight], abs=1e-6)


def test_without_distillation_the_deepest_student_learns_nothing():
    network = with_biases([0.0, 0.0], [2 * math.log(3), 0.0])
    loss = loss_of(METHODS["cafedistill"](distill_weight=0.0), network)
    assert loss.item() == pytest.approx(0.052680, abs=2e-6)
    loss.backward()
    assert network.exits[0].head.bias.grad is None or not network.exits[0].head.bias.grad.any()


def test_cafedistill_loss_at_every_level():
    """Three exits, (0, 0), (0, 0) and (2 ln 3, 0), label 0. Level 1: ⅓(ln 2 − ln 0.9) + 2·0.523248 = 1.312665.
    Level 0: −⅓ ln 0.9 + 0.523248 = 0.558368, and exit 1 is not computed."""
    method = METHODS["cafedistill"]()
    network = with_biases([0.0, 0.0], [0.0, 0.0], [2 * math.log(3), 0.0])
    loss = loss_of(method, network, active=[True, True])
    assert loss.item() == pytest.approx((math.log(2) - math.log(0.9)) / 3 + 2 * 0.523248, abs=3e-6)
    loss = loss_of(method, network, active=[True, False])
    assert loss.item() == pytest.approx(-math.log(0.9) / 3 + 0.523248, abs=2e-6)
    loss.backward()
    assert network.exits[1].head.bias.grad is None


def test_where_the_mixture_is_not_written_back_it_teaches():
    """φ = 1, mixture W = (2 ln 3, 0), b = 0, own exits (0, 0): ½ ln 2 + 0.523248; written back, the teacher is the
    client's own (0, 0), from which there is nothing to learn."""
    network, download = with_biases([0.0, 0.0], [0.0, 0.0]), last_head(2 * math.log(3), 0.0)
    for write_back, taught in ((False, 0.523248), (True, 0.0)):
        method = METHODS["cafedistill"](write_back=write_back)
        assert loss_of(method, network, download=download).item() == pytest.approx(math.log(2) / 2 + taught, abs=2e-6)
        tensors = {**first_head(1.0, 2.0), **last_head(3.0, 4.0)}
        received = method.receive(tensors, download, {})
        assert weights_in(received, 0) == [1.0, 2.0]
        assert weights_in(received) == pytest.approx([2 * math.log(3), 0.0] if write_back else [3.0, 4.0])


def planned(method, t, *, similarity=None, pairs=None):
    """Which exits of three clients with three exits train in round t of 6."""
    task = server_round(method, [], [], exits=3, participants=[0, 1, 2], t=t, num_rounds=6)
    if similarity is not None:
        known = {c: ClientRecord(1, 1, np.zeros(4, np.float32), np.array(row)) for c, row in enumerate(similarity)}
        task = replace(task, known=known)
    if pairs is not None:
        task = replace(task, pairs=Pairs().updated([0, 1, 2], np.array(pairs)))
    return method.plan(task).active.astype(int).tolist()


def test_cafedistill_lets_students_join_shallow_first_and_least_conflict_first():
    """The formula's t counts from 0. Round 4 of 6: 2·3/6·⅔ = ⅔, without conflict ⌊⅔·3·3⌋ = 6: all.

    S_01 = −0.3, S_12 = −0.15; S_02 = 0.9 does not count. Mean over 9: −0.1; ⌊(⅔ − 0.1)·9⌋ = ⌊5.1⌋ = 5: exit 0 of all,
    exit 1 of two: the sums are −0.3, −0.45, −0.15, so not of client 1. Round 1: exit 0 of all, who begin there.
    """
    method, alike = METHODS["cafedistill"](), np.zeros((3, 3))
    assert planned(method, 1) == [[1, 0]] * 3
    assert planned(method, 4, pairs=alike) == [[1, 1]] * 3
    pairs = [[1.0, -0.3, 0.9], [-0.3, 1.0, -0.15], [0.9, -0.15, 1.0]]
    assert planned(method, 4, pairs=pairs) == [[1, 1], [1, 0], [1, 1]]
    assert planned(METHODS["cafedistill"](selection="none"), 1, pairs=pairs) == [[1, 1]] * 3


def test_conflict_of_exits_orders_students_too():
    """Reported cosines (−0.2, 0.5), (−0.6, −0.3), (0.9, −0.1): conflicts sum to −1.2 over 6: −0.2.
    ⌊(⅔ − 0.2)·9⌋ = ⌊4.2⌋ = 4: exit 0 of all, exit 1 of one: of client 0, which has no conflict there."""
    method = METHODS["cafedistill"](conflict="exits")
    assert planned(method, 4, similarity=[[-0.2, 0.5], [-0.6, -0.3], [0.9, -0.1]]) == [[1, 1], [1, 0], [1, 0]]


# --- CAFEDistill-plus ------------------------------------------------------------------------------------------------


def test_plus_mixes_the_classifiers_of_all_exits_by_the_updates_of_the_last():
    """As above w = (0.52, 0.48) and (0.48, 0.52); the first exit's classifiers (1, 0) and (0, 1) are as unlike as can
    be, and are mixed with the same weights."""
    came = [{**first_head(1.0, 0.0), **last_head(3.0, 4.0)}, {**first_head(0.0, 1.0), **last_head(4.0, 3.0)}]
    done, kept = concluded(METHODS["cafedistill-plus"](mu=0.5), [], came)
    np.testing.assert_allclose(done.plan.weights, [[0.52, 0.48], [0.48, 0.52]], atol=1e-6)
    assert weights_in(kept[0], 0) == pytest.approx([0.52, 0.48], abs=1e-6)
    assert weights_in(kept[1], 0) == pytest.approx([0.48, 0.52], abs=1e-6)
    assert weights_in(kept[0], 1) == pytest.approx([3.48, 3.52], abs=1e-5)


def test_plus_takes_of_the_mixture_what_the_client_has_too_few_examples_of():
    """κ = 10, four examples of class 0, none of class 1: n/C = 2, v = (10/16, 10/12).
    Class 0: 0.625·8 + 0.375·0 = 5, class 1: 10/12·6 + 2/12·12 = 7. Where the client's data are not known, the mixture.
    """
    method = METHODS["cafedistill-plus"](mixture_examples=10.0)
    own = {**first_head(0.0, 12.0), **last_head(0.0, 12.0)}
    mixture = {**first_head(8.0, 6.0), **last_head(8.0, 6.0)}
    received = method.receive(own, mixture, {}, examples([0, 0, 0, 0]))
    for k in (0, 1):
        assert weights_in(received, k) == pytest.approx([5.0, 7.0])
        assert weights_in(method.receive(own, mixture, {}), k) == [8.0, 6.0]
        assert weights_in(method.receive(own, {}, {}, examples([0])), k) == [0.0, 12.0]
    assert weights_in(own) == [0.0, 12.0]
    assert METHODS["cafedistill-plus"]().distill_weight == 0.3


# --- CAFEDistill from the text ---------------------------------------------------------------------------------------


def test_text_mixes_teachers_by_the_qp():
    """Last exits (3, 4) and (4, 3): cos = 24/25 = 0.96. Examples 1 and 3, μ = 0.5: p + s = (1.25, 1.71) for client 0,
    less (2.96 − 1)/2: w = (0.27, 0.73); teacher 0.27·(3, 4) + 0.73·(4, 3) = (3.73, 3.27).
    Client 1: (0.25 + 0.96, 1.75) less 0.98: (0.23, 0.77).
    """
    method = METHODS["cafedistill-text"]()
    plan = method.plan(server_round(method, [last_head(3.0, 4.0), last_head(4.0, 3.0)], [1, 3], exits=2))
    np.testing.assert_allclose(plan.weights, [[0.27, 0.73], [0.23, 0.77]], atol=1e-6)
    sent = downloads(method, plan, exits=2)
    assert sent[0]["exits.1.head.weight"].flatten().tolist() == pytest.approx([3.73, 3.27], abs=1e-5)


def test_text_loss_has_the_teacher_on_the_own_features_and_no_term_for_an_exit_that_sleeps():
    """Exits (0, 0) both, label 0, teacher W = (3 ln 3, 0), b = 0, φ = 1: z̃ = (3 ln 3, 0), at τ = 3 (¾, ¼).

    ln 2 + ln 2 + 9·KL(¾‖½) = 1.386294 + 9·0.130812 = 2.563602. Asleep: ln 2, and exit 1 gets no gradient.
    """
    method, network = METHODS["cafedistill-text"](), with_biases([0.0, 0.0], [0.0, 0.0])
    teacher = {**last_head(3 * math.log(3), 0.0)}
    assert loss_of(method, network, download=teacher).item() == pytest.approx(2.563602, abs=2e-6)
    asleep = loss_of(method, network, download=teacher, active=[False])
    assert asleep.item() == pytest.approx(math.log(2))
    asleep.backward()
    assert network.exits[0].head.bias.grad is None
    assert network.exits[1].head.bias.grad.tolist() == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("name", ["cafedistill", "cafedistill-plus", "cafedistill-prior", "cafedistill-text"])
def test_an_exit_that_sleeps_does_not_change(name):
    """Neither by training nor by weight decay."""
    method = METHODS[name]()
    task = local_task(method, exits=2, active=[False])
    task.budget = LocalBudget(batch_size=9, steps=3, learning_rate=0.5, weight_decay=0.1)
    before = {n: t.clone() for n, t in task.network.state_dict().items()}
    method.train(task)
    moved = {n for n, t in task.network.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == set(before) - {"exits.0.head.weight", "exits.0.head.bias"}


# --- CAFEDistill with a prior ----------------------------------------------------------------------------------------


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


@pytest.mark.parametrize("same_above", [1.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_matching_solves_a_qp_for_every_client_and_class(seed, same_above):
    """w_i^c = argmin over the simplex of those that have class c of −Σ_j S_ij^c w_j + μ‖w − a_c‖², by OSQP and by the
    conditions of Karush, Kuhn and Tucker; those without the class have no weight. S^c is the cosine of what describes
    the class, and counts as 1 above a bound. More values than clients: what was mixed says with which weights. Those
    reported are their mean by the classes' frequency."""
    rng = np.random.default_rng(seed)
    clients, classes, mu = 6, 4, [0.05, 0.2, 0.5, 5.0][seed]
    updates = rng.normal(size=(clients, classes, 12)).astype(np.float32)
    described = rng.normal(size=(clients, classes, 3)).astype(np.float32)
    counts = rng.integers(1, 20, size=(clients, classes)) * (rng.random((clients, classes)) < 0.6).astype(float)
    counts[:, -1] = 0  # a class that nobody has
    counts[0, :-1] += 1
    rows = np.array([0, 3, 5])
    before = updates.copy(), described.copy(), counts.copy()
    mixed, overall = match_classes(updates, described, counts, rows, mu, same_above)
    assert (mixed.dtype, mixed.shape, overall.shape) == (np.float32, (3, classes, 12), (3, clients))
    for now, then in zip((updates, described, counts), before, strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(mixed[:, -1], updates[rows, -1])
    mean = np.zeros((3, clients))
    for r, i in enumerate(rows):
        for c in range(classes - 1):
            w = np.linalg.lstsq(updates[:, c].T.astype(float), mixed[r, c].astype(float))[0]
            has = np.flatnonzero(counts[:, c])
            np.testing.assert_allclose(np.delete(w, has), 0.0, atol=1e-5)
            w, a = w[has], counts[has, c] / counts[has, c].sum()
            s = np.array([cosine(*described[[i, j], c].astype(float)) for j in has])
            s[s > same_above] = 1.0
            slow = simplex_qp(2 * mu * np.eye(len(has)), -(s + 2 * mu * a))
            np.testing.assert_allclose(w, slow, atol=1e-5)
            assert w.sum() == pytest.approx(1.0, abs=1e-5)
            gradient = -s + 2 * mu * (w - a)
            used = w > 1e-4
            level = gradient[used].mean()
            np.testing.assert_allclose(gradient[used], level, atol=1e-4)
            assert (gradient >= level - 1e-4).all()
            mean[r, has] += slow * counts[:, c].sum() / counts.sum()
    np.testing.assert_allclose(overall, mean, atol=1e-6)


def test_matching_compares_and_mixes_every_class_by_itself():
    """What happens to one class of any client leaves all others as they were, bit for bit."""
    rng = np.random.default_rng(0)
    updates, described = rng.normal(size=(2, 4, 3, 5)).astype(np.float32)
    counts = rng.integers(1, 9, size=(4, 3)).astype(float)
    rows = np.arange(4)
    mixed, _ = match_classes(updates, described, counts, rows, 0.5)
    changed, otherwise, fewer = updates.copy(), described.copy(), counts.copy()
    changed[:, 1] *= 2.0
    otherwise[:2, 1] *= -3.0
    fewer[2, 1] = 0
    again, _ = match_classes(changed, otherwise, fewer, rows, 0.5)
    np.testing.assert_array_equal(again[:, [0, 2]], mixed[:, [0, 2]])
    assert not np.isclose(again[:, 1], mixed[:, 1]).all(axis=1).any()


def test_a_client_whose_class_is_not_described_gets_the_average_of_those_that_have_it():
    """No direction, no similarity: its weights are a = (¼, ¾) with examples 1 and 3: ¼·(4, 4) + ¾·(4, 8) = (4, 7)."""
    updates = np.array([[[4.0, 4.0]], [[4.0, 8.0]]], dtype=np.float32)
    described = np.array([[[0.0, 0.0]], [[4.0, 8.0]]], dtype=np.float32)
    mixed, overall = match_classes(updates, described, np.array([[1.0], [3.0]]), np.array([0]), mu=0.5)
    assert mixed[0, 0].tolist() == [4.0, 7.0]
    np.testing.assert_allclose(overall, [[0.25, 0.75]])


def test_matching_without_any_counts_leaves_everybody_alone():
    updates = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    with np.errstate(all="raise"):
        mixed, overall = match_classes(updates, updates, np.zeros((3, 2)), np.array([2, 0]), mu=0.5)
    np.testing.assert_array_equal(mixed, updates[[2, 0]])
    assert not overall.any()


def test_class_means_by_hand():
    """Features φ₁ = w·x and φ₂ = 2w·x with w = 1: x = 1, 3 of class 0, 8 of class 2; their mean is 4.
    Class 0: 2 − 4 = −2, class 1: nobody, 0, class 2: 8 − 4 = 4; at the second exit twice that."""
    network = EarlyExitNetwork(
        [nn.Linear(1, 1, bias=False) for _ in range(2)], [Exit(nn.Identity(), 1, 3) for _ in range(2)]
    )
    with torch.no_grad():
        network.stages[0].weight.fill_(1.0)
        network.stages[1].weight.fill_(2.0)
    network.train()
    means = class_means(network, Split(torch.tensor([[1.0], [8.0], [3.0]]), torch.tensor([0, 2, 0])))
    assert means.shape == (2, 3, 1)
    assert not means.requires_grad
    assert means.flatten().tolist() == pytest.approx([-2.0, 0.0, 4.0, -4.0, 0.0, 8.0])


def test_prior_describes_classes_by_the_trained_features():
    """The state has the means after training, not before; without them nothing of features is sent."""
    data = Split(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]))
    method = METHODS["cafedistill-prior"]()
    task = local_task(method, data=data, exits=2)
    before = class_means(task.network, data)
    method.train(task)
    assert task.state["class-means"].shape == (2, 2, 1)
    assert torch.equal(task.state["class-means"], class_means(task.network, data))
    assert not torch.allclose(task.state["class-means"], before)
    by_classifiers = METHODS["cafedistill-prior"](match_by="classifiers")
    task = local_task(by_classifiers, data=data, exits=2)
    by_classifiers.train(task)
    assert "class-means" not in {*task.state, *by_classifiers.upload_names(task.network)}


@pytest.mark.parametrize("counts", ["noised", "none"])
def test_prior_refuses_to_hide_counts_that_class_means_would_tell(counts):
    with pytest.raises(ValueError, match="set match_by to 'classifiers'"):
        METHODS["cafedistill-prior"](counts=counts)
    METHODS["cafedistill-prior"](counts=counts, match_by="classifiers")


HEAD_UPDATES = [f"update.{name}" for name in HEAD]


def head_update(class_0, class_1, counts):
    """What a client sends: of both classes of its only exit, (weight, bias) since the start; and class counts."""
    tensors = torch.tensor([class_0, class_1])
    upload = dict(zip(HEAD_UPDATES, (tensors[:, :1], tensors[:, 1]), strict=True))
    return {**upload, "class-counts": torch.tensor(counts)}


def test_prior_mixes_updates_class_by_class_by_the_qp():
    """Class 0, as for CAFEDistill: updates (3, 4) and (4, 3), 1 example and 3, μ = ½:

    client 0: p + s = (1.25, 1.71), less 0.98: w = (0.27, 0.73): 0.27·(3, 4) + 0.73·(4, 3) = (3.73, 3.27)
    client 1: p + s = (1.21, 1.75), less 0.98: w = (0.23, 0.77): 0.23·(3, 4) + 0.77·(4, 3) = (3.77, 3.23)
    Class 1: client 1 alone has it, two examples: both get its (0, 2).
    Weights for the records, by 4 and 2 of 6 examples: client 0: (4·0.27 + 2·0)/6 = 0.18; client 1: 4·0.23/6 = 0.153333.
    Client 7 has never reported: it gets nothing.
    """
    method = METHODS["cafedistill-prior"](mu=0.5, match_by="classifiers", same_above=1.0)
    uploads = [head_update([3.0, 4.0], [1.0, 0.0], [1.0, 0.0]), head_update([4.0, 3.0], [0.0, 2.0], [3.0, 2.0])]
    plan = method.plan(server_round(method, uploads, [99, 1], participants=[0, 1, 7]))
    np.testing.assert_allclose(plan.weights, [[0.18, 0.82], [0.153333, 0.846667]], atol=1e-6)
    assert (list(plan.weight_rows), list(plan.weight_columns)) == ([0, 1], [0, 1])
    sent = downloads(method, plan)
    assert set(sent) == {0, 1}
    for client, (weight, bias) in enumerate([([3.73, 0.0], [3.27, 2.0]), ([3.77, 0.0], [3.23, 2.0])]):
        assert sent[client][HEAD_UPDATES[0]].flatten().tolist() == pytest.approx(weight, abs=1e-5)
        assert sent[client][HEAD_UPDATES[1]].tolist() == pytest.approx(bias, abs=1e-5)
    late = method.plan(server_round(method, uploads, [99, 1], participants=[1]))  # learns from the absent, too
    np.testing.assert_array_equal(late.downloads[1], plan.downloads[1])
    np.testing.assert_array_equal(late.weights, plan.weights[1:])


def test_prior_takes_clients_for_alike_whose_class_means_are():
    """Class 0 is described by (3, 4) and (4, 3) over the two exits: a cosine of 0.96, which counts as 1 above 0.6:
    p + s = (1.25, 1.75), less 1: w = (¼, ¾), the average by examples. What the classifiers say does not count. Above
    0.97 it is what it is: w = (0.27, 0.73) and (0.23, 0.77). Class 1: −1 apart, with examples 1 and 1, s = (1, −1):
    p + s = (1.5, −0.5), less ½: each its own.
    """
    uploads = prior_uploads([[1.0, 1.0], [3.0, 1.0]])
    for upload, class_0, class_1 in zip(uploads, ([3.0, 4.0], [4.0, 3.0]), ([1.0, 2.0], [-2.0, -4.0]), strict=True):
        upload["class-means"] = torch.tensor([class_0, class_1]).T[:, :, None]  # (exits, classes, width)
    for same_above, expected in ((0.6, [0.25, 0.25]), (0.97, [0.27, 0.23])):
        method = METHODS["cafedistill-prior"](mu=0.5, same_above=same_above)
        plan = method.plan(server_round(method, uploads, [9, 9], exits=2))
        for client, first in enumerate(expected):
            for name, t in downloads(method, plan, exits=2)[client].items():
                a, b = (upload[name] for upload in uploads)
                torch.testing.assert_close(t[0], first * a[0] + (1 - first) * b[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(t[1], uploads[client][name][1], rtol=1e-5, atol=1e-5)


def prior_uploads(counts, seed=0):
    """Random updates of the classifiers of both exits, class means, and class counts, of several clients."""
    g = torch.Generator().manual_seed(seed)
    uploads = []
    for row in counts:
        upload = {}
        for k in range(2):
            upload[f"update.exits.{k}.head.weight"] = torch.randn(2, 1, generator=g)
            upload[f"update.exits.{k}.head.bias"] = torch.randn(2, generator=g)
        upload["class-means"] = torch.randn(2, 2, 1, generator=g)
        uploads.append({**upload, **({} if row is None else {"class-counts": torch.tensor(row)})})
    return uploads


def matched_slowly(uploads, n, mu, match_by, same_above):
    """Σ_j w_ij^c Δ_j[:, c] with S^c, a_c and the projection written out, one number after the other.

    n[j][c]: examples of class c on client j.
    """
    result = []
    names = [name for name in uploads[0] if name.startswith("update.")]
    for i, own in enumerate(uploads):
        matched = {name: own[name].clone() for name in names}
        for c in range(2):
            has = [j for j in range(len(uploads)) if n[j][c] > 0]
            if not has:
                continue
            total = sum(n[j][c] for j in has)
            if match_by == "features":
                rows = [u["class-means"][:, c].flatten().double() for u in uploads]
            else:
                rows = [torch.cat([u[name][c].flatten() for name in names]).double() for u in uploads]
            s = [cosine(rows[i], rows[j]) for j in has]
            s = [1.0 if value > same_above else value for value in s]
            linear = [-(s[x] + 2 * mu * n[j][c] / total) for x, j in enumerate(has)]
            w = simplex_qp(2 * mu * np.eye(len(has)), linear)
            for name in names:
                matched[name][c] = sum(float(w[x]) * uploads[j][name][c] for x, j in enumerate(has))
        result.append(matched)
    return result


@pytest.mark.parametrize(
    "counts",
    [[[3.0, 1.0], [5.0, 0.0], [1.0, 9.0]], [[3.0, 0.0], [5.0, 0.0], [1.0, 0.0]]],
    ids=["both classes", "a class that nobody has"],
)
@pytest.mark.parametrize("match_by", ["features", "classifiers"])
def test_prior_matches_the_classifiers_of_every_exit_class_by_class(match_by, counts):
    """Against slow loops; a class that nobody has keeps its own column. A client without a class gets that of those
    who have it, and nothing of those who have not."""
    method = METHODS["cafedistill-prior"](mu=0.7, match_by=match_by, same_above=0.4)
    uploads = prior_uploads(counts)
    plan = method.plan(server_round(method, uploads, [4, 5, 10], exits=2))
    sent = downloads(method, plan, exits=2)
    for client, expected in enumerate(matched_slowly(uploads, counts, 0.7, match_by, 0.4)):
        assert set(sent[client]) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(sent[client][name], tensor, rtol=1e-4, atol=1e-5)
        if not sum(row[1] for row in counts):
            assert all(torch.equal(sent[client][name][1], uploads[client][name][1]) for name in expected)


def test_prior_without_counts_takes_the_number_of_examples_for_every_class():
    method = METHODS["cafedistill-prior"](mu=0.5, counts="none", match_by="classifiers")
    uploads = prior_uploads([None] * 3)
    sent = downloads(method, method.plan(server_round(method, uploads, [4, 5, 10], exits=2)), exits=2)
    for client, expected in enumerate(matched_slowly(uploads, [[4] * 2, [5] * 2, [10] * 2], 0.5, "classifiers", 0.6)):
        for name, tensor in expected.items():
            torch.testing.assert_close(sent[client][name], tensor, rtol=1e-4, atol=1e-5)


def test_prior_where_noise_has_left_nobody_with_any_class_plans_with_finite_numbers():
    """Noised counts may all be 0: then every client keeps its classifiers, and the records stay numbers."""
    method = METHODS["cafedistill-prior"](counts="noised", match_by="classifiers")
    uploads = prior_uploads([[0.0, 0.0], [0.0, 0.0]])
    with np.errstate(all="raise"):
        plan = method.plan(server_round(method, uploads, [4, 5], exits=2))
    for client, download in downloads(method, plan, exits=2).items():
        assert all(torch.equal(t, uploads[client][name]) for name, t in download.items())
    assert plan.weights is None or np.isfinite(plan.weights).all()


def test_prior_reports_what_it_made_of_its_classifiers_since_the_common_start_and_keeps_its_backbone():
    """Not since the round's start: the client starts the round at START, all started at b = (2, −3), W = (0, 0).
    After one step with label 0 W = ±1.25, b = ∓0.75; w = 1.5."""
    method = METHODS["cafedistill-prior"](prior=False)
    task = local_task(method)
    task.initial = {**task.initial, HEAD[0]: torch.zeros(2, 1), HEAD[1]: torch.tensor([2.0, -3.0])}
    result = method.train(task)
    assert vector(task.network.state_dict()) == pytest.approx(STEP_0)
    assert task.state[HEAD_UPDATES[0]].flatten().tolist() == pytest.approx([1.25, -1.25])
    assert task.state[HEAD_UPDATES[1]].tolist() == pytest.approx([-2.75, 3.75])
    assert task.state["own.stages.0.weight"].item() == pytest.approx(1.5)
    assert result.loss == pytest.approx(math.log(2))
    task.network.stages[0].weight.data.zero_()  # what is kept is a copy
    assert task.state["own.stages.0.weight"].item() == pytest.approx(1.5)


def test_prior_pulls_classifiers_to_those_matched_and_the_own_backbone_to_the_average():
    """The matched classifiers are the common start (1, −1, −1, 1) and what was sent, (3, −1, 0, 2): (4, −2, −1, 3). The
    client's own, (2, 3, 4, 5), go there by the share ρ; its backbone, w = 5, to the average, w = 1, by a share of its
    own. In its first round, when nothing was sent, a client has the average and its own classifiers."""
    download = dict(zip(HEAD_UPDATES, (torch.tensor([[3.0], [-1.0]]), torch.tensor([0.0, 2.0])), strict=True))
    tensors = {**tensors_of([1.0, 2.0, 3.0, 4.0, 5.0]), "own.stages.0.weight": torch.tensor([[5.0]])}
    start = tensors_of(START)
    for pull, share, expected in (
        (1.0, 0.5, [3.0, 4.0, -2.0, -1.0, 3.0]),
        (0.5, 0.25, [4.0, 3.0, 0.5, 1.5, 4.0]),
        (0.25, 1.0, [1.0, 2.5, 1.75, 2.75, 4.5]),
        (0.0, 0.0, [5.0, 2.0, 3.0, 4.0, 5.0]),
    ):
        method = METHODS["cafedistill-prior"](pull=pull, backbone_pull=share)
        assert vector(method.receive(tensors, download, start)) == pytest.approx(expected)
        assert vector(method.receive(tensors, {}, start)) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert vector(tensors) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert vector(start) == START
    default = METHODS["cafedistill-prior"]()
    assert (default.pull, default.backbone_pull, default.selection) == (1.0, 0.5, "none")
    assert (default.match_by, default.counts) == ("features", "exact")


@pytest.mark.parametrize("active", [[True, True], [True, False], [False, False]])
def test_prior_loss_is_that_of_the_formula(active):
    """CE of the exits awake and the last, with log π in all logits, plus λτ²KL(q‖z_k/τ), times 0.3 for the last; q is
    the mean of the exits awake. What the server sent is no teacher."""
    method = METHODS["cafedistill-prior"](distill_weight=0.7)
    torch.manual_seed(0)
    network = tiny_network(3)
    for p in network.parameters():
        nn.init.normal_(p)
    prior = torch.log(torch.tensor([0.9, 0.1]))
    network.offset = prior
    x, y = torch.randn(5, 1), torch.tensor([0, 1, 0, 0, 1])
    task = local_task(method, network=network, active=active)

    h, z = x, []
    for k in range(3):
        h = network.stages[k](h)
        z.append(h @ network.exits[k].head.weight.T + network.exits[k].head.bias + prior)
    awake = [k for k in range(3) if k == 2 or active[k]]
    q = sum(F.softmax(z[k] / 3, dim=1) for k in awake) / len(awake)
    expected = entropies = 0.0
    for k in awake:
        for row in range(5):
            entropies -= F.log_softmax(z[k], dim=1)[row, y[row]].item() / 5
            kl = (q[row] * (q[row].log() - F.log_softmax(z[k] / 3, dim=1)[row])).sum().item()
            expected += 0.7 * (0.3 if k == 2 else 1.0) * 9 * kl / 5
    expected += entropies
    loss = method.loss(task, x, y)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    task.download = {f"update.{n}": torch.randn(t.shape) for n, t in network.state_dict().items() if "head" in n}
    assert method.loss(task, x, y).item() == loss.item()
    without = METHODS["cafedistill-prior"](distill_weight=0.0)
    assert without.loss(task, x, y).item() == pytest.approx(entropies, rel=1e-5)


def test_prior_teacher_does_not_learn():
    """The last exit's classifier feels its cross-entropy and τ(p − q) of its own divergence at weight 0.3, and nothing
    of being a teacher; nor does the first."""
    method = METHODS["cafedistill-prior"](prior=False)
    network = with_biases([3 * math.log(3), 0.0], [0.0, 0.0])
    loss_of(method, network).backward()
    # q = ½(¾, ¼) + ½(½, ½) = (⅝, ⅜): −½ + 0.3·3·(½ − ⅝) = −0.6125; −1/28 + 3·(¾ − ⅝) = 0.339286
    assert network.exits[1].head.bias.grad.tolist() == pytest.approx([-0.6125, 0.6125], abs=1e-6)
    assert network.exits[0].head.bias.grad.tolist() == pytest.approx([0.339286, -0.339286], abs=1e-6)


@pytest.mark.parametrize(("mode", "sent"), [("exact", [3.0, 1.0]), ("none", None)])
def test_prior_counts_that_leave_the_client(mode, sent):
    method = METHODS["cafedistill-prior"](counts=mode, match_by="classifiers")
    task = local_task(method, labels=[0, 0, 1, 0], exits=2)
    method.train(task)
    assert ("class-counts" in method.upload_names(task.network)) == (sent is not None)
    assert sent is None or task.state["class-counts"].tolist() == sent


def test_noised_counts_are_the_true_ones_with_laplace_noise_of_the_clients_private_generator():
    """Scale 2/ε, ε = 4: ½. Nothing below 0. No other generator is asked."""
    asked = []

    def private_rng(purpose):
        asked.append(purpose)
        return np.random.default_rng(11)

    method = METHODS["cafedistill-prior"](counts="noised", match_by="classifiers", count_epsilon=4.0)
    task = local_task(method, labels=[0, 0, 0, 0, 0], exits=2, private_rng=private_rng)
    method.train(task)
    expected = np.maximum(np.array([5.0, 0.0]) + np.random.default_rng(11).laplace(scale=0.5, size=2), 0)
    assert task.state["class-counts"].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert asked == ["class counts 4.0"]
    exact = METHODS["cafedistill-prior"]()
    exact.train(local_task(exact, exits=2, private_rng=private_rng))
    assert asked == ["class counts 4.0"]  # not asked where it is not needed


MANY = {0: [0, 1] * 20, 1: [0, 1] * 20}  # two clients with the same labels, so many that noise does not reach 0


def counts_sent(grid):
    """Class counts in the training replies of every client, in the order they were sent."""
    sent = {}
    for message, reply in grid.of_type("train"):
        (client,) = message.content["config"]["clients"]
        sent.setdefault(client, []).append(tuple(reply.content["arrays"]["flat"].numpy()[-2:].tolist()))
    return sent


def test_noised_counts_are_drawn_once(tmp_path):
    """Noise drawn anew every round, or every run, could be averaged away: a client sends the same counts in all rounds
    and runs, also where its process is a new one, and they are neither the true ones nor those of another client. They
    are not part of the state that the server names a version of."""
    method = METHODS["cafedistill-prior"](counts="noised", match_by="classifiers")
    _, personal, grid = federate(tmp_path, method, rounds=4, exits=2, labels=MANY)
    _, _, again = federate(tmp_path, method, rounds=2, exits=2, labels=MANY)
    _, _, elsewhere = federate(tmp_path / "elsewhere", method, rounds=1, exits=2, labels=MANY)
    first, second, other = counts_sent(grid), counts_sent(again), counts_sent(elsewhere)
    for client in MANY:
        assert len(first[client]) == 4
        assert len(second[client]) == 2
        assert len({*first[client], *second[client]}) == 1
        assert (np.array(first[client][0]) != 20).all()
        assert first[client][0] != other[client][0]
        assert "class-counts" not in personal[client]
    assert first[0][0] != first[1][0]


def test_noise_is_not_drawn_again_for_a_server_that_says_it_got_no_reply(tmp_path):
    """Client 0's reply of round 1 is lost, or the server says so: it is asked again from the version before it. What
    it sends must be what it has sent, or a server could ask for as many draws as it needs to average them."""

    def first_of_client_0(message):
        config = message.content["config"]
        return message.metadata.message_type == "train" and config["clients"] == [0] and config["server-round"] == 1

    method = METHODS["cafedistill-prior"](counts="noised", match_by="classifiers")
    _, _, grid = federate(tmp_path, method, rounds=2, exits=2, labels=MANY, lose=first_of_client_0)
    exchanges = [m for m, _ in grid.of_type("train") if m.content["config"]["clients"] == [0]]
    assert [m.content["config"]["versions"] for m in exchanges] == [[0], [0]]
    first, again = counts_sent(grid)[0]
    assert first == again


def test_the_secret_is_in_no_message_and_in_no_other_file(tmp_path):
    """Whoever has it can take the noise away. Neither it nor what its generator starts from leaves the client."""
    method = METHODS["cafedistill-prior"](counts="noised", match_by="classifiers")
    _, _, grid = federate(tmp_path, method, rounds=4, exits=2, labels=MANY)
    paths = sorted((tmp_path / "secrets").iterdir())
    assert [path.name for path in paths] == ["client-0", "client-1"]
    messages = [recorddict_to_proto(m.content).SerializeToString() for pair in grid.traffic for m in pair]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path not in paths]
    assert len(messages) > 16
    assert len(files) > 4
    for client, path in enumerate(paths):
        secret = path.read_bytes()
        store = PersonalStore(tmp_path, "0" * 16)
        noise = store.private_rng(client, "class counts 1.0").laplace(scale=2.0, size=2)
        told = [secret[i : i + 8] for i in range(0, 32, 8)]
        told += [part.hex().encode() for part in told]
        told += [noise.tobytes(), noise.astype(np.float32).tobytes()]
        for content in (*messages, *files):
            assert not any(piece in content for piece in told)
        # This is the noise that was sent: the look-out above was for the right numbers.
        assert counts_sent(grid)[client][0] == pytest.approx(tuple(20 + noise), rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_noise_is_laplace_of_scale_2_over_epsilon_and_counts_never_fall_below_0(epsilon):
    """Scale b = 2/ε: P(|noise| > x) = exp(−x/b), median 0, both signs alike; of counts of 0 half stay 0."""
    rng, scale = np.random.default_rng(5), 2 / epsilon
    noise = noised(torch.full((200_000,), 1000.0), epsilon, rng).double() - 1000.0
    assert noise.abs().mean().item() == pytest.approx(scale, rel=0.02)
    assert (noise > 0).double().mean().item() == pytest.approx(0.5, abs=0.005)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert noise.abs().quantile(share).item() == pytest.approx(-scale * math.log(1 - share), rel=0.03)
    at_zero = noised(torch.zeros(200_000), epsilon, rng)
    assert at_zero.min() == 0
    assert (at_zero == 0).double().mean().item() == pytest.approx(0.5, abs=0.005)


def test_noise_hides_the_label_of_one_example():
    """ε of one example's *label*, as the setting has it: a client with counts (5, 5) and one with (6, 4) differ in one
    label, and whatever is sent is at most e^ε times as likely from one as from the other. The event that tells them
    apart best, first count ≥ 6 and second ≤ 4: noise of scale 1/ε makes it e^{2ε} times as likely, since a label that
    changes moves two counts."""
    epsilon, size, rng = 1.0, 200_000, np.random.default_rng(5)

    def share(a, b):
        counts = noised(torch.tensor([a, b]).repeat(size), epsilon, rng).reshape(size, 2)
        return ((counts[:, 0] >= 6) & (counts[:, 1] <= 4)).double().mean().item()

    assert share(6.0, 4.0) <= 1.05 * math.exp(epsilon) * share(5.0, 5.0)
