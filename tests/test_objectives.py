"""Objectives: their teacher, their adversary, and their place in every method."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from federations import WatchedGrid, toy_app, toy_data, toy_network
from torch import nn

from cafe_flwr import CafeDistill
from cafe_flwr.core.options import options_of
from cafe_flwr.core.random import rng_for
from cafe_flwr.methods import METHODS, LocalTask, settings_of
from cafe_flwr.methods.registry import method_from
from cafe_flwr.networks import EarlyExitNetwork, Exit
from cafe_flwr.networks.safe_kd import safe_kd_exit
from cafe_flwr.networks.statistics import evaluating
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.settings import Settings
from cafe_flwr.training import LocalBudget, LoopOptions, train
from cafe_flwr.training.losses import (
    consistency,
    cross_entropies,
    decoupled_distillation,
    distillation,
    erde,
    neighbour_distillation,
    orthogonal_distillation,
    self_distillation,
)
from cafe_flwr.training.objectives import ERDE, OBJECTIVES, CrossEntropy, NeoKD, SafeKD
from cafe_flwr.training.objectives.adversarial import adversarial_examples, deal_classes
from cafe_flwr.training.objectives.base import logits_at

OTHERS = sorted(set(OBJECTIVES) - {"cross-entropy"})
TAUGHT = ["erde", "safe-kd"]


def normed(exits=3, seed=0):
    """A network with batch norm, whose running statistics are buffers, one of them an integer."""
    torch.manual_seed(seed)
    stages = [nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU()) for _ in range(exits)]
    return EarlyExitNetwork(stages, [Exit(nn.Linear(5, 4), 4, 3) for _ in range(exits)])


def batch(n=6, seed=1):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, 5))).float(), torch.from_numpy(rng.integers(3, size=n))


def rng():
    return np.random.default_rng(7)


def step(objective, state, optimizer, x, y):
    optimizer.zero_grad()
    objective.losses(state, (x, y), state.network(x)).mean().backward()
    optimizer.step()
    state.update()


# --- the EMA teacher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", TAUGHT)
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_the_teacher_begins_as_the_network_and_follows_it_after_every_step_buffers_too(objective, decay):
    """θ^T ← d·θ^T + (1−d)·θ from the first step on, written out; running statistics are averaged alike."""
    network = normed().train()
    objective = OBJECTIVES[objective](ema_decay=decay)
    state = objective.init(network, rng())
    expected = {name: t.clone() for name, t in network.state_dict().items()}
    for name, t in state.teacher.state_dict().items():
        assert torch.equal(t, expected[name])
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    for i in range(3):
        step(objective, state, optimizer, *batch(seed=i))
        now = network.state_dict()
        expected = {n: decay * t + (1 - decay) * now[n] for n, t in expected.items()}
    assert "stages.0.1.running_mean" in expected
    for name, t in state.teacher.state_dict().items():
        if t.is_floating_point():
            torch.testing.assert_close(t, expected[name], rtol=1e-5, atol=1e-6)
    moved = [not torch.equal(t, network.state_dict()[n]) for n, t in state.teacher.state_dict().items()]
    assert any(moved) == (decay > 0)
    assert not state.teacher.training
    assert not any(p.requires_grad for p in state.teacher.parameters())


@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - set(TAUGHT)))
def test_an_objective_without_a_teacher_has_none(objective):
    state = OBJECTIVES[objective]().init(normed(), rng())
    assert state.teacher is None
    state.update()


def taught_by_another(objective):
    """An objective at work whose teacher has gone another way than the network; the network; a batch."""
    network = normed().train()
    state = objective.init(network, rng())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return state, network, *batch()


def test_safe_kd_is_its_formula():
    """CE + 0.5·DKD from the teacher's LAST exit at every exit, the last included, + 2·(last exit to the others)."""
    objective = SafeKD(alpha=0.5, beta=2.0, temperature=3.0)
    state, network, x, y = taught_by_another(objective)
    logits = network(x)
    teacher = state.teacher(x)[-1]
    expected = [
        cross_entropies([z], y)[0]
        + 0.5 * decoupled_distillation(z, teacher, y, temperature=3.0)
        + (2.0 * distillation(z, logits[-1], 3.0) if k < 2 else 0.0)
        for k, z in enumerate(logits)
    ]
    torch.testing.assert_close(objective.losses(state, (x, y), logits), torch.stack(expected))
    assert decoupled_distillation(logits[2], teacher, y, temperature=3.0) > 0.01


def test_erde_is_its_formula():
    """The teacher's exit k teaches exit k."""
    objective = ERDE(right=0.5, wrong=2.0)
    state, network, x, y = taught_by_another(objective)
    logits, teachers = network(x), state.teacher(x)
    expected = cross_entropies(logits, y) + torch.stack(
        [erde(z, t, y, temperature=4.0, right=0.5, wrong=2.0) for z, t in zip(logits, teachers, strict=True)]
    )
    torch.testing.assert_close(objective.losses(state, (x, y), logits), expected)
    some = objective.losses(state, (x, y), [logits[1], logits[2]], exits=[1, 2])
    torch.testing.assert_close(some, expected[1:])


def test_neo_kd_is_its_formula():
    """The adversarial input and the classes dealt out come from the state's generator, in that order."""
    objective = NeoKD(alpha=2.0, beta=0.5, epsilon=0.1, steps=2)
    state, network, x, y = taught_by_another(objective)
    logits, same, twin = network(x), rng(), copy.deepcopy(network)
    found = adversarial_examples(twin.eval(), x, y, epsilon=0.1, steps=2, rng=same)
    bad = twin.train()(found)
    owner = deal_classes(6, 3, 3, same)
    expected = (
        0.5 * (cross_entropies(logits, y) + cross_entropies(bad, y))
        + 2.0 * neighbour_distillation(bad, logits)
        + 0.5 * orthogonal_distillation(bad, logits, y, owner)
    )
    torch.testing.assert_close(objective.losses(state, (x, y), logits), expected)


@pytest.mark.parametrize("objective", TAUGHT)
def test_another_teacher_can_take_the_place_of_the_average(objective):
    name, objective = objective, OBJECTIVES[objective]()
    state, network, x, y = taught_by_another(objective)
    logits, other = network(x), torch.from_numpy(rng().normal(size=(6, 3))).float()
    there = objective.losses(state, (x, y), logits, teacher=other)
    same = objective.losses(state, (x, y), logits, teacher=state.teacher(x)[-1])
    own = objective.losses(state, (x, y), logits)
    assert not torch.allclose(there, own)
    assert torch.allclose(same, own) == (name == "safe-kd")  # in erde the average teaches exit by exit


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_what_is_added_to_the_students_logits_is_added_to_the_teachers(objective):
    """A shift gives what a network with the shift in its biases gives."""
    shift = torch.tensor([1.0, -2.0, 0.5])
    network, (x, y) = normed().eval(), batch()
    shifted = copy.deepcopy(network)
    for k in range(3):
        shifted.exits[k].head.bias.data += shift
    objective = OBJECTIVES[objective]()
    one, two = (objective.init(n, rng()) for n in (network, shifted))
    a = objective.losses(one, (x, y), [z + shift for z in network(x)], shift=shift)
    torch.testing.assert_close(a, objective.losses(two, (x, y), shifted(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", OTHERS)
def test_the_last_exit_alone_is_enough(objective):
    """Of a network with one exit, or of one whose students sleep."""
    for network, exits in ((normed(1), [0]), (normed(3), [2])):
        state = OBJECTIVES[objective]().init(network.train(), rng())
        (term,) = OBJECTIVES[objective]().losses(state, batch(), logits_at(network, batch()[0], exits), exits=exits)
        assert term.isfinite()


def test_weights_of_safe_kd_are_published_for_three_exits_and_sum_to_one_for_any():
    objective = SafeKD()
    assert objective.exit_weights(3) == pytest.approx([0.3, 0.3, 0.4])
    for m in (1, 2, 5, 12):
        weights = objective.exit_weights(m)
        assert sum(weights) == pytest.approx(1.0)
        assert weights[-1] == pytest.approx(4 / 3 * weights[0]) or m == 1
        assert CrossEntropy().exit_weights(m) == [1 / m] * m


def test_settings_that_cannot_be_are_refused_by_name():
    with pytest.raises(ValueError, match="objective must be one of cross-entropy, safe-kd, erde, neo-kd; got 'kd'"):
        METHODS["fedper"](objective="kd")
    with pytest.raises(ValueError, match=r"ema_decay must be at most 1, got 1\.1"):
        SafeKD(ema_decay=1.1)


# --- the adversary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_an_attack_stays_in_its_box_and_in_the_range_and_raises_the_loss(steps):
    network, (x, y) = normed().eval(), batch(32)
    size = 0.1 * (x.max() - x.min())
    found = adversarial_examples(network, x, y, epsilon=0.1, steps=steps, rng=rng())
    assert (found - x).abs().max() <= size + 1e-6
    assert x.min() <= found.min()
    assert found.max() <= x.max()
    at_random = x + size * torch.from_numpy(rng().uniform(-1, 1, size=x.shape)).float()
    losses = [cross_entropies(network(inputs), y).mean().item() for inputs in (x, at_random, found)]
    assert losses[2] > max(losses[:2]) + 0.01


def test_an_attack_repeats_with_its_generator_and_leaves_gradients_and_statistics_alone():
    network, (x, y) = normed().train(), batch()
    network.stages[1].eval()  # as someone may have frozen it
    before = copy.deepcopy(network.state_dict())
    with evaluating(network):
        a, b = (adversarial_examples(network, x, y, epsilon=0.1, steps=2, rng=rng()) for _ in range(2))
        other = adversarial_examples(network, x, y, epsilon=0.1, steps=2, rng=np.random.default_rng(8))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not a.requires_grad
    assert [m.training for m in network.stages] == [True, False, True]


def test_no_room_is_no_attack():
    x, y = batch()
    assert torch.equal(adversarial_examples(normed().eval(), x, y, epsilon=0.0, steps=2, rng=rng()), x)


def test_classes_are_dealt_out_evenly_and_anew_for_every_example():
    owner = deal_classes(200, 10, 3, rng())
    counts = torch.stack([(owner == k).sum(dim=1) for k in range(3)], dim=1)
    assert sorted(set(map(tuple, counts.tolist()))) == [(4, 3, 3)]
    shares = torch.stack([(owner == k).float().mean(dim=0) for k in range(3)])
    assert (shares - torch.tensor([0.4, 0.3, 0.3])[:, None]).abs().max() < 0.12
    assert len({tuple(row) for row in owner.tolist()}) > 150


# --- in methods ------------------------------------------------------------------------------------------------------


def client(method, steps=3, network=None, exits=2, **options):
    """A client's work; the network starts from seed 0."""
    torch.manual_seed(0)
    network = network or toy_network(exits=exits)
    options = {"download": {}, "state": method.extra_tensors(network), "active": [True]} | options
    return LocalTask(
        network=network,
        data=toy_data(1).train,
        budget=LocalBudget(batch_size=8, steps=steps, learning_rate=0.1),
        rng=lambda purpose: rng_for(0, 1, 1, purpose),
        private_rng=lambda purpose: rng_for(0, 0, 1, purpose),
        initial={name: t.clone() for name, t in network.state_dict().items()},
        **options,
    )


def trained(method, **options):
    task = client(method, **options)
    result = method.train(task)
    return result, {**task.network.state_dict(), **task.state}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OTHERS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_every_objective_and_learns_something_else_by_it(name, objective):
    """Finite, repeatable bit for bit, no teacher left behind, and not what cross-entropy gives."""
    method = METHODS[name](objective=objective)
    outcomes = [trained(method) for _ in range(2)]
    assert np.isfinite(outcomes[0][0].loss)
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(t, outcomes[1][1][n]) for n, t in outcomes[0][1].items())
    _, plain = trained(METHODS[name]())
    assert outcomes[0][1].keys() == plain.keys()
    assert not all(torch.equal(t, plain[n]) for n, t in outcomes[0][1].items())
    task = client(method)
    method.train(task)
    assert task.objective_state is None


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_objective_can_be_given_as_an_object_and_travels_under_flat_names(name):
    """By name it has its defaults; a client makes the same method of the settings sent, and learns otherwise by it."""
    method = METHODS[name](objective=SafeKD(alpha=0.5, beta=0.0))
    plain = METHODS[name](objective="safe-kd")
    assert plain == METHODS[name](objective=SafeKD()) != method
    sent = settings_of(method)
    assert list(sent) == list(settings_of(METHODS[name]()))
    assert {key: sent[key] for key in ("objective", "safe_kd_alpha", "safe_kd_beta", "objective_temperature")} == {
        "objective": "safe-kd",
        "safe_kd_alpha": 0.5,
        "safe_kd_beta": 0.0,
        "objective_temperature": 4.0,
    }
    built = method_from(name, sent)
    assert built == method
    assert trained(built)[0].loss == trained(method)[0].loss != trained(plain)[0].loss


def test_the_example_of_the_documentation_runs():
    text = (Path(__file__).parent.parent / "docs" / "objectives.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "SafeKD(" in block)
    exec(code, {})


@pytest.mark.parametrize("objective", ["safe-kd", SafeKD(alpha=0.5)])
def test_the_strategies_take_an_objective_and_tell_the_clients(tmp_path, objective):
    alpha, made = 0.5 if isinstance(objective, SafeKD) else 1.0, METHODS["fedper"](objective=objective)
    options = {"num_rounds": 1, "num_clients": 2, "local": LocalBudget(steps=1), "wait_seconds": 0.0}
    for strategy in (CafeDistill(objective=objective, **options), FederatedStrategy(method=made, **options)):
        folder = tmp_path / strategy.method.name
        grid = WatchedGrid(toy_app(), 2, node_config={"state-dir": str(folder)})
        strategy.start(grid)
        for message, reply in grid.of_type("train"):
            config = message.content["config"]
            assert (config["method.objective"], config["method.safe-kd-alpha"]) == ("safe-kd", alpha)
            assert not reply.has_error()


def test_a_method_that_cannot_take_an_objective_says_why():
    @dataclass(frozen=True, kw_only=True)
    class Fixed(METHODS["fedper"]):
        name: ClassVar[str] = "fixed"
        refuses: ClassVar[dict[str, str]] = {"objective": "its loss has no cross-entropies"}

    assert Fixed().objective == Fixed(objective="cross-entropy").objective == CrossEntropy()
    with pytest.raises(ValueError, match="objective is not for fixed: its loss has no cross-entropies"):
        Fixed(objective=ERDE())


@pytest.mark.parametrize("objective", OTHERS)
def test_settings_of_an_objective_are_a_table_of_a_run(objective):
    """A value set arrives; one out of bounds is refused in code and in a run."""
    kind = OBJECTIVES[objective]
    for o in options_of(kind):
        run = {"method": "fedper", "objective": objective, o.key: type(o.default)(1)}
        given = Settings.from_run_config(run)
        assert given.build_method().objective == kind(**{o.field: 1})
        assert given.unread() == {}
        bad = type(o.default)(-1)
        with pytest.raises(ValueError, match=f"{o.field} must be"):
            kind(**{o.field: bad})
        with pytest.raises(ValueError, match=f"{o.key} should be"):
            Settings.from_run_config({**run, o.key: bad})


@pytest.mark.parametrize("distill", [False, True])
def test_the_terms_stand_where_the_cross_entropies_stood(distill):
    """FedAvg: the objective's weights; ScaleFL: its own, 2k/(m(m+1)); `distill` is added with the same weights."""
    x, y = toy_data(1).train.x[:8], toy_data(1).train.y[:8]
    for name, weights in (("fedavg", [3 / 7, 4 / 7]), ("scalefl", [1 / 3, 2 / 3])):
        method = METHODS[name](objective="safe-kd", distill=distill)
        task = client(method, server_round=1, num_rounds=10)  # before ScaleFL's own distillation begins
        logits = task.network(x)
        terms = cross_entropies(logits, y) + consistency(logits, temperature=4.0)
        terms = terms + torch.stack([decoupled_distillation(z, logits[-1], y) for z in logits])
        terms = terms + (self_distillation(logits) if distill else 0.0)
        value = method.loss(task, x, y)
        torch.testing.assert_close(value, terms @ torch.tensor(weights))


def test_the_teacher_begins_anew_with_every_training_of_a_round():
    """FedRep trains twice: the second teacher starts where the first training ended, and neither lives on."""
    seen = []

    class Watching(LocalTask):
        def _after_step(self):
            state = self.objective_state
            if not any(one is state for one, _ in seen):
                seen.append((state, {n: t.clone() for n, t in state.teacher.state_dict().items()}))
            super()._after_step()

    method = METHODS["fedrep"](objective=SafeKD(ema_decay=1.0), equal_steps=False)
    plain = client(method)
    task = Watching(**{f: getattr(plain, f) for f in plain.__dataclass_fields__})
    method.train(task)
    (_, first), (_, second) = seen
    heads, rest = set(task.network.personal_names()), set(task.network.shared_names())
    assert all(torch.equal(first[n], plain.initial[n]) for n in first)
    assert all(torch.equal(second[n], task.network.state_dict()[n]) for n in heads)  # as phase 1 left them
    assert all(torch.equal(second[n], plain.initial[n]) for n in rest)
    assert not any(torch.equal(second[n], plain.initial[n]) for n in heads)


def test_a_look_at_the_loss_before_training_leaves_no_teacher_for_it():
    """The loss asked for by itself makes a teacher of the network as it was; training must not go on with it."""
    method, ends = METHODS["fedavg"](objective=SafeKD(ema_decay=1.0)), []
    for looked in (False, True):
        task = client(method)
        if looked:
            other = toy_network(exits=2).state_dict()
            task.network.load_state_dict({n: torch.ones_like(t) for n, t in other.items()})
            method.loss(task, toy_data(1).train.x, toy_data(1).train.y)
            task.network.load_state_dict(task.initial)
        method.train(task)
        ends.append(task.network.state_dict())
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


@pytest.mark.parametrize("objective", [ERDE(wrong=0.0), SafeKD()], ids=TAUGHT)
def test_fedrods_balance_is_in_the_teacher_too(objective):
    """One exit, first step: the teacher is the network itself, so there is nothing to learn from it, balance or not."""
    values = []
    for one in (CrossEntropy(), objective):
        result, _ = trained(METHODS["fedrod"](objective=one), steps=1, exits=1, active=[])
        values.append(result.loss)
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def matched(**settings):
    """Loss of the reading from the text with a teacher received, exit 1 and the last; and what it is made of."""
    method = METHODS["cafedistill-text"](**settings)
    network = toy_network(exits=2)
    generator = torch.Generator().manual_seed(3)
    names = network.head_names(1)
    download = {n: torch.randn(network.state_dict()[n].shape, generator=generator) for n in names}
    task = client(method, network=network, download=download)
    x, y = toy_data(1).train.x[:8], toy_data(1).train.y[:8]
    logits, h = network(x), x
    for k in range(2):
        h = network.stage(k, h)
    features = network.exit(1, h)[0]
    taught = nn.functional.linear(features, *(download[n] for n in names))
    return method.loss(task, x, y), logits, taught, y


def test_the_text_reading_keeps_its_distillation_beside_the_objective():
    loss, logits, taught, y = matched(objective="safe-kd")
    terms = cross_entropies(logits, y) + consistency(logits, temperature=4.0)
    own = torch.stack([decoupled_distillation(z, logits[-1], y) for z in logits])  # the average is the network still
    torch.testing.assert_close(loss, (terms + own).sum() + distillation(logits[0], taught, 3.0))


def test_the_matched_classifier_can_take_the_place_of_the_average_and_then_teaches_by_dkd_alone():
    loss, logits, taught, y = matched(objective="safe-kd", objective_teacher="matched")
    terms = cross_entropies(logits, y) + consistency(logits, temperature=4.0)
    taught_by_it = torch.stack([decoupled_distillation(z, taught, y) for z in logits])
    torch.testing.assert_close(loss, (terms + taught_by_it).sum())
    plain, logits, taught, y = matched(objective_teacher="matched")  # cross-entropy has no teacher to replace
    torch.testing.assert_close(plain, cross_entropies(logits, y).sum() + distillation(logits[0], taught, 3.0))


@pytest.mark.parametrize("name", ["cafedistill", "cafedistill-plus", "cafedistill-prior", "cafedistill-text"])
@pytest.mark.parametrize("objective", OTHERS)
def test_an_exit_that_sleeps_does_not_change(name, objective):
    task = client(METHODS[name](objective=objective), active=[False])
    METHODS[name](objective=objective).train(task)
    for n, t in task.network.state_dict().items():
        assert torch.equal(t, task.initial[n]) == n.startswith("exits.0")


@pytest.mark.parametrize("objective", OTHERS)
def test_the_prior_reaches_teacher_and_adversary(objective):
    """With a log-prior as offset, the loss is that of a network with it in its biases."""
    offset = torch.tensor([0.3, -1.0, 0.2])
    x, y = toy_data(1).train.x[:8], toy_data(1).train.y[:8]
    values = []
    for inside in (True, False):
        torch.manual_seed(0)
        network = toy_network(exits=2)
        if inside:
            for k in range(2):
                network.exits[k].head.bias.data += offset
        else:
            network.offset = offset
        method = METHODS["fedper"](objective=objective)
        values.append(method.loss(client(method, network=network), x, y).item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


# --- the optimiser ---------------------------------------------------------------------------------------------------


def test_adamw_is_torchs():
    """Two steps on all the data, written out; nothing of it outlives a round."""
    network = toy_network(exits=2)
    other = copy.deepcopy(network)
    data = toy_data(1).train
    budget = LocalBudget(batch_size=len(data), steps=2, learning_rate=0.01, weight_decay=0.1, optimizer="adamw")

    def loss_of(n):
        return lambda x, y: cross_entropies(n(x), y).mean()

    optimizer = torch.optim.AdamW(other.parameters(), 0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(other)(data.x, data.y).backward()
        optimizer.step()
    calls = []
    train(network, data, loss_of(network), budget, rng(), LoopOptions(after_step=lambda: calls.append(None)))
    for name, t in network.state_dict().items():
        torch.testing.assert_close(t, other.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_optimisers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw; got 'adam'"):
        LocalBudget(optimizer="adam")
    with pytest.raises(ValueError, match="momentum is of sgd"):
        LocalBudget(optimizer="adamw", momentum=0.9)


# --- SAFE-KD's heads -------------------------------------------------------------------------------------------------


def test_the_exit_of_safe_kd_is_pool_norm_linear():
    h = torch.from_numpy(rng().normal(size=(2, 6, 5, 4))).float()
    head = safe_kd_exit(6, 3)
    pooled = h.mean(dim=(2, 3))
    z = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    features, logits = head(h)
    torch.testing.assert_close(features, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, z @ head.head.weight.T + head.head.bias, rtol=1e-4, atol=1e-5)


def test_exits_of_stages_of_different_width_have_their_own_or_a_common_width():
    stages = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)]
    with pytest.raises(ValueError, match="same classes, got 3, 4"):
        EarlyExitNetwork(stages, [safe_kd_exit(4, 3), safe_kd_exit(8, 4)])
    assert EarlyExitNetwork(stages, [safe_kd_exit(4, 3), safe_kd_exit(8, 3)]).feature_widths == (4, 8)
    network = EarlyExitNetwork(stages, [safe_kd_exit(4, 3, width=5), safe_kd_exit(8, 3, width=5)])
    assert [tuple(z.shape) for z in network(torch.zeros(2, 1, 9, 9))] == [(2, 3), (2, 3)]
    assert network.exits[0].head.weight.shape == network.exits[1].head.weight.shape == (3, 5)
