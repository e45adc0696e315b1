"""CAFEDistill as released: equal to a slow reference, to the bit through any crash, and no dearer than FedAvg."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from federations import (
    DyingGrid,
    FaultyApp,
    Killed,
    WatchedGrid,
    asked,
    run_small,
    same_tensors,
    small_settings,
    strict_json,
    toy_app,
    toy_data,
    toy_network,
)
from flwr.app import Array, ArrayRecord
from reference_released import Reference
from safetensors.torch import load_file
from torch import nn

from cafe_flwr.client.model import ClientModel
from cafe_flwr.methods import METHODS
from cafe_flwr.methods.pairs import Pairs
from cafe_flwr.metrics import evaluate
from cafe_flwr.networks import (
    ConvNet,
    EarlyExitNetwork,
    PublishedConvNet,
    PublishedResNet18,
    PublishedTransformer,
    ResNet18,
    SequenceNet,
    TextTransformer,
    attach_exits,
)
from cafe_flwr.networks.safe_kd import safe_kd_exit
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.training import LocalBudget
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.keys import Keys

N, EXITS, T, SEED = 4, 3, 3, 2
RATE, DECAY = 0.2, 0.9
BUDGET = LocalBudget(8, steps=3, learning_rate=RATE, momentum=0.9, weight_decay=1e-3, keep_momentum=True)


@dataclass
class Noted:
    """A callback that checkpoints, and keeps records and states."""

    folder: Any
    records: list[Any] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)

    def on_start(self, run):
        pass

    def on_round(self, record, state):
        checkpoints = Checkpoints(self.folder / "checkpoint")
        checkpoints.save(state)
        self.records.append(record)
        self.states.append(checkpoints.load())

    def on_finish(self, reports):
        self.reports = reports


def federate(folder, method, *, app=None, grid=None, nodes=2, rounds=T, **options):
    """A federation of toys with three exits; what was noted of it, and its grid."""
    noted = Noted(folder)
    app = app or toy_app(build=lambda: toy_network(EXITS))
    grid = grid or WatchedGrid(app, nodes, node_config={"state-dir": str(folder / "personal")})
    options = {
        "num_clients": N,
        "num_rounds": T,
        "local": BUDGET,
        "learning_rate_schedule": "exponential",
        "learning_rate_decay": DECAY,
        "seed": SEED,
        "wait_seconds": 0.0,
    } | options
    FederatedStrategy(method=method, callbacks=[noted], **options).start(grid, num_rounds=rounds)
    return noted, grid


def published(folder):
    """The personal networks, by client."""
    return [load_file(folder / "personal" / f"client-{c}.safetensors") for c in range(N)]


def participating(monkeypatch, rounds):
    """Who takes part in rounds 1, 2, …; where any are evaluated between rounds, all are."""

    def sample(self, server_round, available, purpose="participants"):
        return rounds[server_round - 1] if purpose == "participants" else sorted(available)

    monkeypatch.setattr(FederatedStrategy, "sample", sample)


def is_train(message, server_round):
    return message.metadata.message_type == "train" and message.content["config"]["server-round"] == server_round


# --- the reference ---

# name and settings of the method, the same of the reference, T
FORMS = {
    "released": ("cafedistill", {}, {}, 3),
    "all alike": ("cafedistill", {"mu": 2.0}, {"alpha": 2.0}, 3),
    "exits": (
        "cafedistill",
        {"conflict": "exits", "classifier_start": "own"},
        {"conflict": "exits", "start": "own"},
        4,
    ),
    "plus": ("cafedistill-plus", {"mu": 1.0}, {"alpha": 1.0, "lam": 0.3, "kappa": 10.0}, 3),
}
ABSENCES = {"nobody": ((), ()), "client 0": ((0,), ()), "client 2": ((2,), ()), "the reply of client 1": ((), (1,))}


def reference(**changes):
    options = {
        "build": lambda: toy_network(EXITS),
        "load": toy_data,
        "num_clients": N,
        "T": T,
        "batch_size": BUDGET.batch_size,
        "steps": BUDGET.steps,
        "learning_rate": lambda t: RATE * DECAY**t,
        "momentum": BUDGET.momentum,
        "weight_decay": BUDGET.weight_decay,
        "seed": SEED,
    }
    return Reference(**{**options, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "missing"),
    [*(("released", missing) for missing in ABSENCES), *((form, "client 2") for form in FORMS if form != "released")],
)
def test_a_federation_is_what_the_formulas_say(tmp_path, monkeypatch, form, missing):
    """Three or four rounds of four clients, of whom one may be missing in round 2: levels and weights are equal,
    parameters to 1e-6; levels and weights are of several values, so that an error would show.

    The guard against classifiers that are far too long is not in the formulas, and has nothing to say here.
    """
    name, settings, changes, planned = FORMS[form]
    away, lost = ABSENCES[missing]
    rounds = [[0, 1, 2, 3], [c for c in range(N) if c not in away], [0, 1, 2, 3]]
    rounds += [[0, 1, 2, 3]] * (planned - len(rounds))
    participating(monkeypatch, rounds)
    grid = WatchedGrid(
        toy_app(build=lambda: toy_network(EXITS)), N, node_config={"state-dir": str(tmp_path / "personal")}
    )
    grid.lose = lambda message: is_train(message, 2) and asked(message)[0] in lost
    noted, _ = federate(tmp_path, METHODS[name](**settings), grid=grid, num_rounds=planned, rounds=planned)
    expected = reference(T=planned, **changes)
    for t in range(planned):
        expected.round(rounds[t], lost if t == 1 else ())
        known, record, state = expected.rounds[t], noted.records[t], noted.states[t]
        assert [r.client for r in record.reports] == known.participants
        assert [state.known[c].level for c in known.participants] == known.levels
        np.testing.assert_allclose(record.plan.weights, known.weights, rtol=0, atol=1e-6)
        np.testing.assert_allclose(state.pairs.among(range(N)), off_diagonal(expected.S), rtol=0, atol=1e-6)
    for client, tensors in enumerate(published(tmp_path)):
        wanted = expected.personal(client)
        assert sorted(tensors) == sorted(wanted)
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=1e-6)
    assert {*expected.rounds[2].levels} == {0, 1}
    assert len(np.unique(np.round(expected.rounds[2].weights, 3))) >= (8 if "mu" in settings else 3)


def off_diagonal(matrix):
    matrix = np.array(matrix)
    np.fill_diagonal(matrix, 0.0)
    return matrix


# --- killed and resumed ---

COMING_AND_GOING = [[0, 1, 2], [1, 3], [0, 1, 2, 3], [0, 3]]
METHOD_FORMS = {
    "clients": lambda: METHODS["cafedistill"](mu=1.0),
    "exits": lambda: METHODS["cafedistill"](mu=1.0, conflict="exits", classifier_start="own"),
    "plus": lambda: METHODS["cafedistill-plus"](mu=1.0),
}
every_form = pytest.mark.parametrize("make", METHOD_FORMS.values(), ids=METHOD_FORMS)


def assert_same_end(folder, other):
    """The server's state, personal networks and personal state, momentum included, are equal bit for bit."""
    a, b = (Checkpoints(path / "checkpoint").load() for path in (folder, other))
    assert a.round == b.round
    assert a.shared.tobytes() == b.shared.tobytes()
    assert (a.pairs.keys.tobytes(), a.pairs.values.tobytes()) == (b.pairs.keys.tobytes(), b.pairs.values.tobytes())
    assert a.known.keys() == b.known.keys()
    for client, record in a.known.items():
        same = b.known[client]
        assert record.upload.tobytes() == same.upload.tobytes()  # the mixture that waits
        assert (record.level, record.seen) == (same.level, same.seen)
        assert record.similarity.tobytes() == same.similarity.tobytes()
    for mine, theirs in zip(published(folder), published(other), strict=True):
        assert same_tensors(mine, theirs)
    versions = [
        sorted((path / "personal" / "versions" / state.run).glob("*/*.safetensors"))
        for path, state in ((folder, a), (other, b))
    ]
    assert versions[0]
    assert [path.parts[-2:] for path in versions[0]] == [path.parts[-2:] for path in versions[1]]
    for mine, theirs in zip(*versions, strict=True):
        tensors = load_file(mine)
        assert any(name.endswith("momentum_buffer") for name in tensors)
        assert same_tensors(tensors, load_file(theirs))


def whole_run(folder, make, **options):
    with pytest.MonkeyPatch.context() as patch:
        participating(patch, COMING_AND_GOING)
        federate(folder, make(), num_rounds=4, rounds=4, evaluate_every=4, **options)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Four rounds of cafedistill at a stretch, with clients coming and going."""
    return whole_run(tmp_path_factory.mktemp("undisturbed"), METHOD_FORMS["clients"])


@pytest.mark.slow
@every_form
def test_two_and_two_rounds_are_four(tmp_path_factory, tmp_path, monkeypatch, make):
    """Levels, S, momentum and the mixtures that wait come from the checkpoint and the clients' disks."""
    whole = whole_run(tmp_path_factory.mktemp("whole"), make)
    participating(monkeypatch, COMING_AND_GOING)
    federate(tmp_path, make(), num_rounds=4, rounds=2, evaluate_every=4)
    whole_run(tmp_path, make, resume_from=Checkpoints(tmp_path / "checkpoint").load())
    assert_same_end(tmp_path, whole)


# 2 questions, the initial weights, then 2, 1, 2 and 2 messages of the rounds, as two nodes host {0, 2} and {1, 3}, and
# 2 of the end.
@pytest.mark.slow
@pytest.mark.parametrize("handled", [False, True])
@pytest.mark.parametrize("number", range(5, 13))
def test_a_run_killed_at_any_message_ends_with_the_same_bits(tmp_path, undisturbed, number, handled):
    make, whole = METHOD_FORMS["clients"], undisturbed
    config = {"state-dir": str(tmp_path / "personal")}
    app = toy_app(build=lambda: toy_network(EXITS))
    grid = DyingGrid(app, 2, node_config=config, dies_at=number, handled=handled)
    with pytest.raises(Killed):
        whole_run(tmp_path, make, grid=grid)
    whole_run(tmp_path, make, resume_from=Checkpoints(tmp_path / "checkpoint").load())
    assert_same_end(tmp_path, whole)


# --- mixtures that wait ---


def sent_to(grid, client, kind, server_round):
    """What a client alone on its node was sent of its own, flat, in a message of a round."""
    shared = NodeInfo.from_message(grid.of_type("query")[0][1], Keys()).shared.size
    (message,) = (
        m for m, _ in grid.of_type(kind) if m.content["config"]["server-round"] == server_round and asked(m) == [client]
    )
    return message.content["arrays"]["flat"].numpy()[shared:]


def last_of(tensors):
    """The last classifier, flat."""
    return np.concatenate([tensors[f"exits.{EXITS - 1}.head.{part}"].numpy().ravel() for part in ("weight", "bias")])


def test_a_mixture_waits_until_its_client_is_asked_again(tmp_path, monkeypatch):
    """Client 3 is mixed in round 1 and asked again in round 4: it gets the mixture of round 1, bit for bit, and trains
    from it. Client 2 is never asked again: it gets its mixture at the end. What is published is what was measured."""
    participating(monkeypatch, [[0, 1, 2, 3], [0, 1], [0, 1], [1, 3]])
    found, train = {}, METHODS["cafedistill"].train

    def watched(method, task):
        found[task.server_round, len(task.data)] = last_of({n: t.clone() for n, t in task.network.state_dict().items()})
        return train(method, task)

    monkeypatch.setattr(METHODS["cafedistill"], "train", watched)
    noted, grid = federate(
        tmp_path, METHODS["cafedistill"](mu=1.0), nodes=N, num_rounds=4, rounds=4, fraction_evaluate=1.0
    )
    first = noted.states[0].known
    sent_up = {r.client: r.upload for r in noted.records[0].reports}
    for client, weights in zip(range(N), noted.records[0].plan.weights, strict=True):
        mixture = sum(w * sent_up[j].astype(np.float64) for j, w in enumerate(weights))
        np.testing.assert_allclose(first[client].upload, mixture, rtol=0, atol=1e-6)
        assert not np.array_equal(first[client].upload, sent_up[client])
    for client in (2, 3):  # evaluated in between with the same
        for server_round in (1, 2, 3):
            assert sent_to(grid, client, "evaluate", server_round).tobytes() == first[client].upload.tobytes()
    assert sent_to(grid, 3, "train", 4).tobytes() == first[3].upload.tobytes()
    assert found[4, len(toy_data(3).train)].tobytes() == first[3].upload.tobytes()

    last = noted.states[-1].known
    assert last[2].upload.tobytes() == first[2].upload.tobytes()
    for client, tensors in enumerate(published(tmp_path)):
        assert last_of(tensors).tobytes() == last[client].upload.tobytes()
        assert_measured(noted, client, tensors)


@every_form
def test_what_is_published_is_what_was_measured(tmp_path, monkeypatch, make):
    """Whoever was asked last when: the accuracies of the final report are those of the published network."""
    participating(monkeypatch, COMING_AND_GOING)
    noted, _ = federate(tmp_path, make(), num_rounds=4, rounds=4, evaluate_every=4)
    for client, tensors in enumerate(published(tmp_path)):
        assert_measured(noted, client, tensors)


def assert_measured(noted, client, tensors):
    (report,) = (r for r in noted.reports if r.client == client)
    network = toy_network(EXITS)
    network.load_state_dict(tensors)
    again = evaluate(network, toy_data(client).test)
    assert report.exits.accuracy == again.accuracy
    assert report.exits.loss == pytest.approx(again.loss)


# --- bad input ---

D = 15  # of the last classifier: 3 classes of 4 features, and their biases


def changed(change):
    """An app in which the array of client 2's reply in round 2 is changed."""

    def fault(answer, message, context):
        reply = answer(message, context)
        if is_train(message, 2) and asked(message) == [2]:
            flat = change(reply.content["arrays"]["flat"].numpy().copy(), message.content["arrays"]["flat"].numpy())
            reply.content["arrays"] = ArrayRecord({"flat": Array(np.ascontiguousarray(flat, dtype=np.float32))})
        return reply

    return FaultyApp(toy_app(build=lambda: toy_network(EXITS)), fault)


def poked(value):
    def change(flat, sent):
        flat[-3] = value
        return flat

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda flat, sent: flat[:-5], "values, expected "),
        (lambda flat, sent: np.append(flat, flat[-5:]), "values, expected "),
        (poked(np.nan), "1 of the values in its array are NaN or infinite"),
        (poked(np.inf), "1 of the values in its array are NaN or infinite"),
    ],
    ids=["of fewer features", "of more features", "NaN", "infinite"],
)
def test_a_classifier_that_cannot_be_used_changes_no_pair(tmp_path, flower_log, change, reason):
    """Client 2 is left out of round 2 by name: its pairs, level and mixture stay; all others' pairs are new."""
    noted, _ = federate(tmp_path, METHODS["cafedistill"](), app=changed(change), nodes=N, rounds=2, evaluate_every=T)
    before, after = noted.states
    assert reason in noted.records[1].left_out[2]
    assert f"Round 2: client 2 is left out: {noted.records[1].left_out[2]}" in flower_log.text()
    old, new = before.pairs.among(range(N)), after.pairs.among(range(N))
    others = [0, 1, 3]
    assert (new[2] == old[2]).all()
    assert (new[:, 2] == old[:, 2]).all()
    assert (new[np.ix_(others, others)] != old[np.ix_(others, others)])[~np.eye(3, dtype=bool)].all()
    assert after.known[2].upload.tobytes() == before.known[2].upload.tobytes()
    assert (after.known[2].level, after.known[2].seen) == (before.known[2].level, 1)
    assert noted.records[1].plan.weights.shape == (3, 3)


def test_an_update_of_norm_0_is_like_nobody_and_is_said_once(tmp_path, flower_log):
    """Client 2 sends its classifier back as it got it in rounds 2 and 3: cosine 0 with all, itself included, so that
    its mixture is the plain mean of all; the log says so once."""

    def fault(answer, message, context):
        reply = answer(message, context)
        if asked(message) == [2] and (is_train(message, 2) or is_train(message, 3)):
            flat = reply.content["arrays"]["flat"].numpy().copy()
            flat[-D:] = message.content["arrays"]["flat"].numpy()[-D:]
            reply.content["arrays"] = ArrayRecord({"flat": Array(flat)})
        return reply

    app = FaultyApp(toy_app(build=lambda: toy_network(EXITS)), fault)
    noted, _ = federate(tmp_path, METHODS["cafedistill"](), app=app, nodes=N, evaluate_every=T)
    for t in (1, 2):
        assert noted.records[t].left_out == {}
        assert (noted.states[t].pairs.among(range(N))[2] == 0).all()
        np.testing.assert_allclose(noted.records[t].plan.weights[2], [0.25] * N, rtol=0, atol=1e-12)
        sent = np.mean([r.upload for r in noted.records[t].reports], axis=0, dtype=np.float64)
        np.testing.assert_allclose(noted.states[t].known[2].upload, sent, rtol=0, atol=1e-6)
    assert noted.states[0].pairs.among(range(N))[2].any()
    assert flower_log.text().count("client 2 returned its classifier unchanged") == 1
    assert flower_log.text().count("returned its classifier unchanged") == 1


def test_where_nobody_moves_all_are_mixed_alike(tmp_path):
    """A rate so small that classifiers of ones stay as they are: no division by 0 anywhere, and S is 0."""
    frozen = LocalBudget(8, steps=1, learning_rate=1e-30)
    noted, _ = federate(tmp_path, METHODS["cafedistill"](classifier_start="own"), local=frozen, rounds=2)
    assert not noted.states[-1].pairs.values.any()
    np.testing.assert_allclose(noted.records[-1].plan.weights, np.full((N, N), 0.25), rtol=0, atol=1e-12)


# --- S ---


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_a_table_of_who_has_met(seed):
    """Against a dict, clients in any order: the newest similarity of every pair, and no pair that never met."""
    rng = np.random.default_rng(seed)
    pairs, table = Pairs(), {}
    for _ in range(40):
        clients = rng.permutation(20)[: rng.integers(1, 7)].tolist()
        similarity = rng.normal(size=(len(clients), len(clients)))
        similarity += similarity.T
        pairs = pairs.updated(clients, similarity)
        table |= {(i, j): similarity[a, b] for a, i in enumerate(clients) for b, j in enumerate(clients) if i < j}
    assert [(key >> 32, key & 0xFFFFFFFF) for key in pairs.keys.tolist()] == sorted(table)
    np.testing.assert_allclose(pairs.values, [table[pair] for pair in sorted(table)], rtol=1e-6)
    everyone = rng.permutation(20).tolist()
    expected = [[table.get((min(i, j), max(i, j)), 0.0) for j in everyone] for i in everyone]
    np.testing.assert_allclose(pairs.among(everyone), expected, rtol=1e-6)


# --- what travels ---


def resnet_with_exits():
    torchvision = pytest.importorskip("torchvision")
    return attach_exits(torchvision.models.resnet18(num_classes=10), ["layer2", "layer3"], input_shape=(3, 32, 32))


def safe_kd_network():
    stages = [nn.Sequential(nn.Conv2d(c, 2 * c, 3, 2, 1), nn.ReLU()) for c in (4, 8, 16)]
    stages[0].insert(0, nn.Conv2d(3, 4, 3, padding=1))
    return EarlyExitNetwork(stages, [safe_kd_exit(8 << k, 10, 24) for k in range(3)])


SHIPPED = {
    "conv": lambda: ConvNet((1, 16, 16), 100),
    "conv, wide": lambda: ConvNet((3, 32, 32), 10, (32, 64, 128), 64, "batch"),
    "sequence": lambda: SequenceNet((6, 32), 5),
    "resnet18": lambda: ResNet18((3, 32, 32), 100),
    "transformer": lambda: TextTransformer(5000, 64, 4),
    "conv, published": lambda: PublishedConvNet((3, 32, 32), 10),
    "resnet18, published": lambda: PublishedResNet18((3, 32, 32), 100),
    "transformer, published": lambda: PublishedTransformer(4, vocabulary=1000),
    "safe-kd": safe_kd_network,
    "attached": resnet_with_exits,
}


def values_of(method, network):
    """Values that a client alone on its node receives and sends in a round."""
    schemas = ClientModel(network, method, network.state_dict()).schemas
    return 2 * schemas["shared"].size + schemas["upload"].size + schemas["download"].size


@pytest.mark.parametrize("build", SHIPPED.values(), ids=SHIPPED)
def test_no_more_travels_than_with_fedavg(build):
    """Of cafedistill the classifiers of all exits but the last stay at home; of cafedistill-plus nothing more travels
    than the network, but for 1 %."""
    network = build()
    everything = values_of(METHODS["fedavg"](), network)
    home = sum(
        network.state_dict()[name].numel() for k in range(network.num_exits - 1) for name in network.head_names(k)
    )
    assert values_of(METHODS["cafedistill"](), network) == everything - 2 * home
    assert values_of(METHODS["cafedistill-plus"](), network) <= 1.01 * everything


@pytest.mark.slow
def test_messages_are_no_longer_than_those_of_fedavg(tmp_path, no_report):
    """With all that is in them: lists of clients, levels, settings, metrics. The smallest network we ship, ten classes
    and one client a node, where such words weigh most."""
    counted = {}
    for method in ("fedavg", "cafedistill", "cafedistill-plus"):
        settings = small_settings(tmp_path, name=method, method=method, num_clients=2, num_server_rounds=2)
        run_small(settings, 2)
        summary = strict_json((settings.results / "summary.json").read_text())
        counted[method] = summary["bytes_up_per_client_round"] + summary["bytes_down_per_client_round"]
    assert counted["cafedistill"] <= counted["fedavg"]
    assert counted["cafedistill-plus"] <= 1.01 * counted["fedavg"]
