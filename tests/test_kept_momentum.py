"""Momentum that stays with the client between rounds: as one optimiser that never stopped, as durable as weights."""

import pytest
import torch
import torch.nn.functional as F
from federations import (
    DyingGrid,
    FaultyApp,
    Killed,
    Recorded,
    WatchedGrid,
    asked,
    digits_app,
    run_small,
    same_tensors,
    small_settings,
)
from torch import nn

from cafe_flwr.app.parts import build_network, federation
from cafe_flwr.core.random import rng_for, seeded
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.training import LocalBudget, batches
from cafe_flwr.training.optimizer_state import given_back, new_optimizer, taken

pytestmark = pytest.mark.usefixtures("no_report")

SGD = {"momentum": 0.9, "keep_momentum": True, "learning_rate": 0.05, "weight_decay": 0.01}
ADAMW = {"optimizer": "adamw", "keep_momentum": True, "learning_rate": 0.003, "weight_decay": 0.01}
ROUNDS, STEPS = 3, 2
# Those that train one thing, several, or what is not in the network.
METHODS_TRIED = ["cafedistill", "cafedistill-plus", "cafedistill-prior", "cafedistill-text"]
METHODS_TRIED += ["ditto", "fedrep", "fedrod", "fedbabu", "fedpac", "pfedgraph"]


def without_interruption(settings, client):
    """The client's network after ROUNDS · STEPS steps of torch's own optimiser, made once; classifiers start at 0."""
    with seeded(settings.seed):
        network = build_network(settings)
    for name in network.classifier_names():
        nn.init.zeros_(network.get_parameter(name))
    data = federation(settings).load(client).train
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.train.optimizer]
    further = {} if settings.train.optimizer == "adamw" else {"momentum": settings.train.momentum}
    optimizer = kind(network.parameters(), settings.learning_rate, weight_decay=settings.train.weight_decay, **further)
    network.train()
    for t in range(ROUNDS):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * settings.train.learning_rate_decay**t
        size = min(settings.train.batch_size, len(data))
        for index in batches(len(data), size, STEPS * size, rng_for(settings.seed, t + 1, client, "batches")):
            optimizer.zero_grad()
            logits = network(data.x[index])
            weight = 1 / len(logits)
            sum(weight * F.cross_entropy(z, data.y[index]) for z in logits).backward()
            optimizer.step()
    return network.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_rounds_of_local_training_are_one_uninterrupted_run_of_torchs_optimiser(tmp_path, optimizer, nodes):
    """Three rounds of two steps against six steps, learning rates lr · 0.9^t; weight decay is of every parameter.

    With one node all clients share a process, and must not share a buffer.
    """
    settings = small_settings(
        tmp_path,
        **{"method": "local", "num_server_rounds": ROUNDS, "local_steps": STEPS, **optimizer},
        learning_rate_schedule="exponential",
        learning_rate_decay=0.9,
    )
    run_small(settings, nodes)
    networks = Recorded.read(settings.results).networks
    for client in range(settings.num_clients):
        expected = without_interruption(settings, client)
        for name, tensor in networks[client].items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_without_it_every_round_starts_at_rest(tmp_path):
    """The same run with the buffers dropped ends elsewhere, and its files hold no state of an optimiser."""
    kept = small_settings(tmp_path / "kept", method="local", **SGD)
    dropped = small_settings(tmp_path / "dropped", method="local", **{**SGD, "keep_momentum": False})
    run_small(kept)
    run_small(dropped)
    a, b = Recorded.read(kept.results), Recorded.read(dropped.results)
    assert not same_tensors(a.networks[0], b.networks[0])
    remembered = {name for _, tensors in a.versions.values() for name in tensors if name.startswith("optimizer/")}
    assert {name.rpartition("/")[2] for name in remembered} == {"momentum_buffer"}
    assert not any(name.startswith("optimizer/") for _, tensors in b.versions.values() for name in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS_TRIED)
def test_the_state_never_travels(tmp_path, method):
    """With every method as many bytes are sent as without, but for the word that says so; the networks differ."""
    traffic, networks = {}, {}
    for keep in (False, True):
        settings = small_settings(
            tmp_path / str(keep), method=method, num_clients=3, num_server_rounds=2, **{**SGD, "keep_momentum": keep}
        )
        grid = WatchedGrid(digits_app(), 2, settings.to_run_config())
        run_small(settings, grid=grid)
        traffic[keep] = [
            {name: array.shape for name, array in part.content["arrays"].items()}
            for pair in grid.of_type("train")
            for part in pair
        ]
        words = {key for message, _ in grid.of_type("train") for key in message.content["config"]}
        assert ("local.keep-momentum" in words) is keep
        networks[keep] = Recorded.read(settings.results).networks
    assert traffic[True] == traffic[False]
    assert not same_tensors(networks[True][0], networks[False][0])


# --- killed and resumed ---


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of three rounds with two of five clients away in each: who is away keeps its momentum."""
    settings = small_settings(tmp_path_factory.mktemp("undisturbed"), num_server_rounds=3, fraction_train=0.6, **SGD)
    run_small(settings)
    return Recorded.read(settings.results)


# 2 questions and the initial weights are messages 1 to 3; two nodes are then asked in every round, and at the end.
@pytest.mark.slow
@pytest.mark.parametrize("handled", [False, True])
@pytest.mark.parametrize("number", range(6, 12))
def test_a_run_killed_at_any_message_is_resumed_with_the_same_bits(tmp_path, undisturbed, number, handled):
    settings = small_settings(tmp_path, num_server_rounds=3, fraction_train=0.6, **SGD)
    with pytest.raises(Killed):
        run_small(settings, grid=DyingGrid(digits_app(), 2, settings.to_run_config(), dies_at=number, handled=handled))
    again = small_settings(tmp_path, num_server_rounds=3, fraction_train=0.6, resume=True, **SGD)
    run_small(again)
    Recorded.read(settings.results).assert_same(undisturbed, but={"name"})


@pytest.mark.slow
def test_a_lost_reply_counts_as_not_given(tmp_path):
    """Round 2 is done twice by a client whose first reply got lost: the second starts from round 1's momentum."""
    lost = []

    def fault(answer, message, context):
        reply = answer(message, context)
        config = message.content["config"]
        if not lost and message.metadata.message_type == "train" and config["server-round"] == 2:
            lost.append(asked(message))
            raise OSError("power cut")
        return reply

    runs = []
    for app in (digits_app(), FaultyApp(digits_app(), fault)):
        settings = small_settings(tmp_path / str(len(runs)), num_server_rounds=3, min_train_nodes=5, **SGD)
        run_small(settings, app=app)
        runs.append(Recorded.read(settings.results))
    assert lost
    runs[1].assert_same(
        runs[0],
        but={"failed_tries", "bytes_up", "bytes_down", "bytes_up_per_client_round", "bytes_down_per_client_round"},
    )


def test_a_flipped_bit_in_a_buffer_is_noticed(tmp_path):
    """Buffers are under the same checksum as weights: the version before is used."""
    store = PersonalStore(tmp_path, "0" * 8)
    for server_round in (1, 2):
        tensors = {"optimizer/batches/0/w/momentum_buffer": torch.full((4,), float(server_round))}
        store.save(0, server_round, tensors, base=server_round - 1, resumable_from=0)
    (path,) = tmp_path.rglob("round-000002.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert store.load(0, 2)["optimizer/batches/0/w/momentum_buffer"].tolist() == [1.0] * 4
    assert "damaged" in store.notes[0]


# --- the parts ---


def test_a_parameter_of_another_shape_or_name_starts_at_rest():
    kept, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = new_optimizer(LocalBudget(momentum=0.5), [kept, other])
    state = {f"{name}/momentum_buffer": torch.full((2,), 4.0) for name in ("kept", "other", "gone")}
    given_back(optimizer, ["kept", "other"], state)
    assert taken(optimizer, ["kept", "other"]).keys() == {"kept/momentum_buffer"}
    kept.grad, other.grad = torch.ones(2), torch.ones(3)
    optimizer.step()  # 1 − 0.3·(0.5·4 + 1) and 1 − 0.3·1
    assert kept.tolist() == pytest.approx([0.1, 0.1])
    assert other.tolist() == pytest.approx([0.7] * 3)
    assert state["kept/momentum_buffer"].tolist() == [4.0, 4.0]  # what was given is not written to


def test_there_must_be_something_to_keep():
    with pytest.raises(ValueError, match=r"keep_momentum has nothing to keep, as sgd with momentum 0 has none"):
        LocalBudget(keep_momentum=True)
    assert LocalBudget(keep_momentum=True, optimizer="adamw").keep_momentum
