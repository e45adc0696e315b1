"""Training in one place: what it trains, what it leaves, and who can read that."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cafe_flwr.app.central import SAFE_KD, central_settings, run_central, train_central
from cafe_flwr.core.random import rng_for
from cafe_flwr.data import ClientData, Split
from cafe_flwr.metrics import evaluate
from cafe_flwr.networks import ConvNet, EarlyExitNetwork, Exit
from cafe_flwr.personal import FinishedRun
from cafe_flwr.training import LocalBudget, batches
from cafe_flwr.training.losses import cross_entropies
from cafe_flwr.training.objectives import OBJECTIVES, SafeKD

CONFIG = {
    "dataset": "digits",
    "num-clients": 2,
    "data.examples-per-client": 60,
    "local-epochs": 2,
    "train.batch-size": 16,
    "learning-rate": 0.003,
}


def images(n=20, seed=0):
    """Four patterns in noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    y = torch.randint(4, (n,), generator=generator)
    return Split(patterns[y] + 0.5 * torch.randn(n, 1, 8, 8, generator=generator), y)


def held(train, watch=None):
    """These examples to train on, and others to watch."""
    return ClientData(train, watch or images(0), images(0))


def network():
    torch.manual_seed(0)
    return ConvNet((1, 8, 8), num_classes=4)


def test_plain_training_is_a_loop_of_adamw_written_out():
    """Its state lives through all epochs; mean of the exits' cross-entropies; batches in the seeded order."""
    data, net = images(20), network()
    other = copy.deepcopy(net)
    budget = replace(SAFE_KD, epochs=3, batch_size=8, learning_rate=0.01, weight_decay=0.1)
    trained = train_central(net, held(data), budget, objective="cross-entropy", seed=5)
    optimizer = torch.optim.AdamW(other.parameters(), 0.01, weight_decay=0.1)
    losses = []
    for index in batches(20, 8, 60, rng_for(5, 0, 0, "batches")):
        optimizer.zero_grad()
        value = cross_entropies(other(data.x[index]), data.y[index]).mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert trained.steps == len(losses) == 8
    for name, t in net.state_dict().items():
        torch.testing.assert_close(t, other.state_dict()[name], rtol=1e-4, atol=1e-5)
    # Epochs of 20 examples end within steps 3, 5 and 8.
    means = [sum(part) / len(part) for part in (losses[:3], losses[3:5], losses[5:])]
    assert [epoch.loss for epoch in trained.history] == pytest.approx(means, rel=1e-3)
    assert trained.teacher is None


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_training_learns_repeats_and_depends_on_its_seed(objective):
    data, outcomes = images(32), []
    for seed in (1, 1, 2):
        trained = train_central(
            network(),
            held(data),
            replace(SAFE_KD, epochs=8, learning_rate=0.01, batch_size=8),
            objective=objective,
            seed=seed,
        )
        assert trained.history[-1].loss < trained.history[0].loss
        assert not trained.network.training
        outcomes.append(trained)
    a, b, c = (t.network.state_dict() for t in outcomes)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)
    assert [e.loss for e in outcomes[0].history] == [e.loss for e in outcomes[1].history]
    assert evaluate(outcomes[0].network, data).accuracy[-1] > 0.5  # by chance: 0.25


def test_the_teacher_averages_over_all_epochs():
    """One step an epoch; d = ½: θ^T = ½θ_3 + ¼θ_2 + ⅛θ_1 + ⅛θ_0, each from a training of that length."""
    data = images(8)

    def after(epochs):
        net = network()
        objective = SafeKD(ema_decay=0.5)
        budget = replace(SAFE_KD, epochs=epochs, batch_size=8, learning_rate=0.01)
        return train_central(net, held(data), budget, objective=objective)

    end = after(3)
    parts = [network().state_dict(), *(after(e).network.state_dict() for e in (1, 2)), end.network.state_dict()]
    for name, t in end.teacher.state_dict().items():
        mean = parts[0][name] / 8 + parts[1][name] / 8 + parts[2][name] / 4 + parts[3][name] / 2
        torch.testing.assert_close(t, mean, rtol=1e-4, atol=1e-5)
        assert not torch.equal(t, parts[3][name])


def drawing_network():
    """One that draws, and has running statistics."""
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
    return EarlyExitNetwork([stage], [Exit(nn.Identity(), 16, 4)])


def test_watching_changes_nothing_and_sees_the_network_as_it_is():
    data = images(20)
    budget = replace(SAFE_KD, epochs=3, batch_size=8)
    seen = train_central(drawing_network(), held(data, images(40, seed=1)), budget, seed=2)
    blind = train_central(drawing_network(), held(data), budget, seed=2)
    same = blind.network.state_dict()
    assert all(torch.equal(t, same[n]) for n, t in seen.network.state_dict().items())
    assert seen.history[-1].accuracy_per_exit == evaluate(seen.network, images(40, seed=1)).accuracy
    assert [epoch.epoch for epoch in seen.history] == [1, 2, 3]
    assert blind.history[-1].accuracy_per_exit == []


def test_a_bar_can_be_shown(capsys):
    train_central(network(), held(images(8), images(8)), replace(SAFE_KD, epochs=2, batch_size=8), progress=True)
    assert "epoch 2/2" in capsys.readouterr().out


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        train_central(network(), held(images()), replace(SAFE_KD, epochs=0))
    with pytest.raises(ValueError, match="no training examples"):
        train_central(network(), held(images(0)), replace(SAFE_KD, epochs=1))
    diverging = LocalBudget(epochs=3, weight_decay=1e9)
    with pytest.raises(ValueError, match=r"NaN or infinite values in .*: lower learning-rate"):
        train_central(network(), held(images()), diverging, objective="cross-entropy")


# --- a results folder ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    settings = central_settings(CONFIG)
    folder = tmp_path_factory.mktemp("results") / settings.run_name
    return settings, folder, run_central(settings, folder)


def test_settings_are_safe_kds_where_nothing_else_is_said():
    settings = central_settings({})
    assert (settings.objective, settings.train.optimizer, settings.learning_rate) == ("safe-kd", "adamw", 3e-4)
    assert (settings.train.weight_decay, settings.run_name) == (0.05, "digit-pairs-central-seed0")
    assert (settings.num_clients, settings.data.examples_per_client) == (1, 4000)
    said = central_settings(
        {"objective": "erde", "train.optimizer": "sgd", "learning-rate": 0.1, "name": "mine", "seed": 3}
    )
    assert (said.objective, said.train.optimizer, said.learning_rate, said.run_name) == ("erde", "sgd", 0.1, "mine")
    with pytest.raises(ValueError, match="did you mean 'objective'"):
        central_settings({"objectiv": "erde"})


def test_the_folder_is_a_finished_run_of_one_client_with_all_the_data(done):
    settings, folder, summary = done
    run = FinishedRun(folder)
    assert run.clients == [0]
    personal, data = run.personal(0), run.data(0)
    assert sum(map(len, (data.train, data.calibration, data.test))) == 120
    assert len(data.train.y.unique()) == len(run.class_names) == 10
    accuracy = evaluate(personal.network, data.test).accuracy
    assert accuracy == pytest.approx(summary["accuracy_per_exit"])
    assert accuracy == pytest.approx(personal.metadata["accuracy_per_exit"])
    assert len(personal.temperatures) == 3
    assert set(personal.metadata) >= {"run", "round", "digest", "num_exits", "num_classes", "personal", "state-version"}
    assert (personal.metadata["method"], personal.metadata["client"]) == ("central", 0)
    assert json.loads((folder / "settings.json").read_text()) == settings.to_run_config()


def test_the_summary_has_what_a_federations_has(done):
    _, folder, summary = done
    assert summary["method"] == "central"
    assert summary["objective"] == "safe-kd"
    assert summary["num_clients"] == 1
    assert summary["accuracy"] == pytest.approx(sum(summary["accuracy_per_exit"]) / 3)
    assert summary["accuracy_last_exit"] == summary["accuracy_per_exit"][-1]
    assert summary["macs_per_exit"] == sorted(summary["macs_per_exit"])
    assert summary["seconds"] > 0
    assert [epoch["epoch"] for epoch in summary["history"]] == [1, 2]
    assert summary["local_steps_per_client"] == math.ceil(2 * summary["clients"][0]["train"] / 16)
    written = json.loads((folder / "summary.json").read_text())
    assert written["accuracy_per_exit"] == pytest.approx(summary["accuracy_per_exit"])


def test_the_same_settings_give_the_same_network(done, tmp_path):
    settings, folder, _ = done
    run_central(settings, tmp_path / "again")
    first, again = (load_file(f / "personal" / "client-0.safetensors") for f in (folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_is_not_overwritten_and_settings_of_a_federation_are_refused(done, tmp_path):
    settings, folder, _ = done
    with pytest.raises(ValueError, match="is not empty: choose another name"):
        run_central(settings, folder)
    with pytest.raises(ValueError, match="make its settings by central_settings"):
        run_central(settings.model_copy(update={"num_clients": 2}), tmp_path / "x")
    with pytest.raises(ValueError, match="prior is of a client in a federation"):
        run_central(central_settings({**CONFIG, "train.prior": True}), tmp_path / "x")
    assert not (tmp_path / "x").exists()
