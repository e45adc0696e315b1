"""The local loop, one step at a time and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cafe_flwr.data import Split
from cafe_flwr.networks import ConvNet
from cafe_flwr.training import LocalBudget, LoopOptions, Outcome, batches, learning_rate_at, pull, snapshot, train


@settings(deadline=None)
@given(n=st.integers(1, 60), batch_size=st.integers(1, 70), draws=st.integers(1, 400), seed=st.integers(0, 1000))
def test_batches_cover_all_examples_evenly(n, batch_size, draws, seed):
    chosen = list(batches(n, batch_size, draws, np.random.default_rng(seed)))
    size = min(batch_size, n)
    full, rest = divmod(draws, size)
    assert [len(batch) for batch in chosen] == [size] * full + [rest] * (rest > 0)
    stream = np.concatenate(chosen)
    counts = np.bincount(stream, minlength=n)
    assert len(counts) == n
    assert counts.max() - counts.min() <= 1
    # Passes follow one another: each stretch of n examples holds every example once.
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n].tolist()) == list(range(n))


def test_batches_are_shuffled_anew_in_every_pass_and_repeat_with_the_generator():
    def order(seed):
        return np.concatenate(list(batches(50, 10, 100, np.random.default_rng(seed)))).tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0)[:50] != order(0)[50:]
    assert order(0)[:50] != list(range(50))


def test_a_client_without_examples_is_an_error():
    with pytest.raises(ValueError, match="no training examples"):
        list(batches(0, 4, 1, np.random.default_rng(0)))


def steps_of(budget, n):
    """Sizes of the batches of one round of a client with n examples."""
    return [len(b) for b in batches(n, budget.batch_size, budget.num_draws(n), np.random.default_rng(0))]


def test_steps_count_unless_epochs_are_set():
    """Six steps are six steps whatever the client has; three epochs of 20 examples are 60 draws, 16·3 + 12."""
    assert steps_of(LocalBudget(batch_size=16, steps=6), 20) == [16] * 6
    assert steps_of(LocalBudget(batch_size=16, steps=6), 2000) == [16] * 6
    assert steps_of(LocalBudget(batch_size=16, steps=6), 5) == [5] * 6
    assert steps_of(LocalBudget(batch_size=16, steps=6, epochs=3), 20) == [16, 16, 16, 12]
    assert steps_of(LocalBudget(batch_size=16, steps=6, epochs=3), 32) == [16] * 6
    assert steps_of(LocalBudget(batch_size=16, steps=6, epochs=1), 5) == [5]


@settings(deadline=None)
@given(n=st.integers(1, 90), batch_size=st.integers(1, 40), epochs=st.integers(1, 5))
def test_an_epoch_draws_every_example_exactly_once(n, batch_size, epochs):
    budget = LocalBudget(batch_size=batch_size, epochs=epochs)
    drawn = np.concatenate(list(batches(n, batch_size, budget.num_draws(n), np.random.default_rng(0))))
    assert np.bincount(drawn, minlength=n).tolist() == [epochs] * n


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": -2}, "steps must be at least 1, got -2"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0, got 0.0"),
        ({"learning_rate": -0.1}, "learning_rate must be greater than 0, got -0.1"),
        ({"learning_rate": math.nan}, "learning_rate must be greater than 0, got nan"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        LocalBudget(**values)


def test_the_loss_reported_is_the_mean_over_the_steps_of_an_epoch():
    """Three points in batches of two: (4 + 9)/2 or the like, then a batch of one; w = 2 stays, the rate is tiny."""
    points = Split(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 3, 0]), torch.zeros(3, 1))
    line = Line()
    outcome = train(
        line,
        points,
        lambda x, y: ((line.w * x - y) ** 2).mean(),
        LocalBudget(batch_size=2, epochs=1, learning_rate=1e-9),
        np.random.default_rng(0),
    )
    errors = {0: 4.0, 1: 9.0, 2: 16.0}  # of every point, squared, at w = 2
    first, second = batches(3, 2, 3, np.random.default_rng(0))
    assert (len(first), len(second)) == (2, 1)
    assert outcome.loss == pytest.approx((np.mean([errors[i] for i in first]) + errors[second[0]]) / 2)
    assert outcome.steps == 2


@pytest.mark.parametrize("num_rounds", [*range(1, 12), 40, 99, 100])
def test_learning_rate_is_constant_to_half_time_then_falls_and_stays_positive(num_rounds):
    rates = [learning_rate_at(0.3, t, num_rounds) for t in range(1, num_rounds + 1)]
    half = num_rounds // 2  # the last round t ≤ T/2
    assert rates[:half] == [0.3] * half
    assert all(a > b for a, b in zip(rates[max(half - 1, 0) :], rates[max(half, 1) :], strict=False))
    assert all(0 < rate <= 0.3 for rate in rates)


@pytest.mark.parametrize("num_rounds", [1, 7, 300])
def test_the_exponential_schedule_by_hand(num_rounds):
    """lr · f^t with rounds counted from 0; it does not ask how many there are, and with f = 1 it is constant."""
    rates = [learning_rate_at(0.1, t, num_rounds, "exponential", 0.99) for t in range(1, 301)]
    assert rates[:3] == pytest.approx([0.1, 0.099, 0.09801])
    assert rates[-1] == pytest.approx(0.1 * math.exp(299 * math.log(0.99)))
    assert {learning_rate_at(0.1, t, num_rounds, "exponential", 1.0) for t in range(1, 301)} == {0.1}


def test_learning_rate_by_hand():
    """T = 8, t = 6: two of the five steps from round 4 to the (imagined) round 9, ½(1 + cos(2π/5)) = ½·1.309017."""
    assert learning_rate_at(1.0, 6, 8) == pytest.approx(0.6545085)
    assert learning_rate_at(0.2, 6, 8) == pytest.approx(0.1309017)
    assert learning_rate_at(1.0, 100, 100) < 0.001


class Line(nn.Module):
    """y = w·x, and a parameter that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.tensor(5.0))
        self.frozen = nn.Parameter(torch.tensor(7.0), requires_grad=False)


POINTS = Split(torch.tensor([1.0, 3.0]), torch.tensor([0, 3]), torch.tensor([[0], [1]]))


def fit(budget, line=None, **how):
    line = line or Line()
    outcome = train(
        line, POINTS, lambda x, y: ((line.w * x - y) ** 2).mean(), budget, np.random.default_rng(0), LoopOptions(**how)
    )
    return line, outcome


def test_one_step_by_hand():
    """Points (1, 0) and (3, 3), w = 2: errors 2 and 3, loss (4 + 9)/2 = 6.5,
    gradient (2·2·1 + 2·3·3)/2 = 11, step 0.1: w = 2 − 1.1 = 0.9."""
    line, outcome = fit(LocalBudget(batch_size=2, steps=1, learning_rate=0.1))
    assert outcome == Outcome(pytest.approx(6.5), 1)
    assert line.w.item() == pytest.approx(0.9)


def test_weight_decay_and_clipping_by_hand():
    """Weight decay 0.5 adds 0.5·2 = 1 to the gradient: w = 2 − 0.1·12 = 0.8.
    Clipped to norm 1 the gradient is 1: w = 1.9; with both, decay comes after: w = 2 − 0.1·(1 + 1) = 1.8.
    A norm of 20 is above 11 and changes nothing."""

    def step(**settings):
        return fit(LocalBudget(batch_size=2, steps=1, learning_rate=0.1, **settings))[0].w.item()

    assert step(weight_decay=0.5) == pytest.approx(0.8)
    assert step(max_grad_norm=1.0) == pytest.approx(1.9)
    assert step(weight_decay=0.5, max_grad_norm=1.0) == pytest.approx(1.8)
    assert step(max_grad_norm=20.0) == pytest.approx(0.9)


def test_weight_decay_is_torchs_of_every_parameter():
    """Two steps of a network with convolutions, norms, biases and exits, against torch's SGD over all parameters."""
    budget = LocalBudget(batch_size=8, steps=2, learning_rate=0.1, momentum=0.9, weight_decay=0.2)
    torch.manual_seed(0)
    data = Split(torch.rand(8, 1, 8, 8), torch.arange(8) % 3, torch.zeros(8, 1))
    networks = []
    for _ in range(2):
        torch.manual_seed(1)
        networks.append(ConvNet((1, 8, 8), 3, (4, 4), 4))

    def loss(network, x, y):
        return sum(nn.functional.cross_entropy(z, y) for z in network(x))

    train(networks[0], data, lambda x, y: loss(networks[0], x, y), budget, np.random.default_rng(0))
    optimizer = torch.optim.SGD(networks[1].parameters(), 0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(networks[1].train(), data.x, data.y).backward()
        optimizer.step()
    for (name, ours), torchs in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-5, msg=name)


def test_momentum_by_hand_and_it_does_not_outlive_the_round():
    """From w = 0.9 the errors are 0.9 and −0.3, the gradient (2·0.9·1 − 2·0.3·3)/2 = 0, loss (0.81 + 0.09)/2 = 0.45.

    In one round of two steps the velocity is 0.9·11 = 9.9: w = 0.9 − 0.99 = −0.09, mean loss (6.5 + 0.45)/2 = 3.475.
    In two rounds of one step the second starts at rest and stays at 0.9.
    """
    line, outcome = fit(LocalBudget(batch_size=2, steps=2, learning_rate=0.1, momentum=0.9))
    assert line.w.item() == pytest.approx(-0.09, abs=1e-6)
    assert outcome == Outcome(pytest.approx(3.475), 2)

    one_step = LocalBudget(batch_size=2, steps=1, learning_rate=0.1, momentum=0.9)
    line, _ = fit(one_step)
    fit(one_step, line)
    assert line.w.item() == pytest.approx(0.9, abs=1e-6)


def test_epochs_take_as_many_steps_as_they_need():
    """One epoch in batches of one is two steps. In either order of the points, with step 0.01, gradients 2(w − 0) and
    6(3w − 3): first point first w = 2 − 0.04 = 1.96, then 1.96 − 0.01·6·2.88 = 1.7872; the other way round
    w = 2 − 0.18 = 1.82, then 1.82 − 0.0364 = 1.7836."""
    line, _ = fit(LocalBudget(batch_size=1, steps=50, epochs=1, learning_rate=0.01))
    assert line.w.item() == pytest.approx(1.7872) or line.w.item() == pytest.approx(1.7836)


def sizes_seen(network, n, batch_size, **options):
    """Sizes of the mini-batches of two epochs."""
    sizes, data = [], Split(torch.rand(n, 2), torch.zeros(n, dtype=torch.int64), torch.zeros(n, 1))

    def loss(x, y):
        sizes.append(len(x))
        return network(x).square().mean()

    budget = LocalBudget(batch_size=batch_size, epochs=2)
    train(network, data, loss, budget, np.random.default_rng(0), LoopOptions(**options))
    return sizes


@given(n=st.integers(2, 20), batch_size=st.integers(2, 9))
@settings(deadline=None, max_examples=60)
def test_a_batch_norm_never_gets_a_last_batch_of_one(n, batch_size):
    """It joins the batch before it: every example is drawn as often; other networks train as they did."""
    plain = sizes_seen(nn.Linear(2, 2), n, batch_size)
    sizes = sizes_seen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), n, batch_size)
    assert sum(sizes) == sum(plain) == 2 * n
    assert min(sizes) > 1
    assert sizes == ([*plain[:-2], plain[-2] + 1] if plain[-1] == 1 else plain)


def test_parameters_without_gradient_do_not_change_even_with_weight_decay():
    line, _ = fit(LocalBudget(batch_size=2, steps=5, learning_rate=0.1, momentum=0.9, weight_decay=0.5))
    assert line.unused.item() == 5.0
    assert line.frozen.item() == 7.0
    assert line.w.item() != 2.0


def images(n=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return Split(x, torch.arange(n) % 3, torch.arange(n)[:, None])


def network():
    torch.manual_seed(0)
    return ConvNet((1, 8, 8), num_classes=3, widths=(4, 4), features=6)


BUDGET = LocalBudget(batch_size=5, steps=4, learning_rate=0.1, momentum=0.5, weight_decay=0.1, max_grad_norm=1.0)


def test_an_exit_that_does_not_train_and_all_behind_it_stay_as_they_are_bit_for_bit():
    net, loss = network(), nn.CrossEntropyLoss()
    sum(z.square().sum() for z in net(images().x)).backward()  # a gradient left over from before does not count
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train(net, images(), lambda x, y: loss(net.exit(0, net.stage(0, x))[1], y), BUDGET, np.random.default_rng(0))
    for name, value in net.state_dict().items():
        untouched = name.startswith(("stages.1.", "exits.1."))
        assert torch.equal(value, before[name]) == untouched, name


def test_the_same_generator_gives_the_same_network_bit_for_bit():
    def run(seed):
        net = network()
        cross_entropy = nn.CrossEntropyLoss()
        outcome = train(net, images(), lambda x, y: cross_entropy(net(x)[-1], y), BUDGET, np.random.default_rng(seed))
        return outcome, torch.cat([p.flatten() for p in net.parameters()])

    (outcome_a, a), (outcome_b, b), (_, c) = run(0), run(0), run(1)
    assert outcome_a == outcome_b
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_agrees_with_a_loop_written_out():
    """Momentum v ← μv + g + λθ and θ ← θ − ηv, after scaling g down to the norm, for the parameters with a gradient."""
    net, reference = network(), network()
    cross_entropy = nn.CrossEntropyLoss()
    data = images()
    mean, steps = train(net, data, lambda x, y: cross_entropy(net(x)[-1], y), BUDGET, np.random.default_rng(7))

    velocity, losses = {}, []
    for positions in batches(len(data), 5, 4 * 5, np.random.default_rng(7)):
        value = cross_entropy(reference(data.x[positions])[-1], data.y[positions])
        losses.append(value.item())
        names = [name for name, _ in reference.named_parameters()]
        gradients = torch.autograd.grad(value, list(reference.parameters()), allow_unused=True)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))
        for name, p, g in zip(names, reference.parameters(), gradients, strict=True):
            if g is None:
                continue
            with torch.no_grad():
                g = g * min(1.0, 1.0 / norm) + 0.1 * p
                velocity[name] = g if name not in velocity else 0.5 * velocity[name] + g
                p -= 0.1 * velocity[name]

    assert (mean, steps) == (pytest.approx(sum(losses) / 4, rel=1e-5), 4)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_training_leaves_the_network_in_training_mode_whatever_it_was():
    net = network().eval()
    cross_entropy = nn.CrossEntropyLoss()
    modes = []

    def loss(x, y):
        modes.append(net.training)
        return cross_entropy(net(x)[-1], y)

    train(net, images(), loss, BUDGET, np.random.default_rng(0))
    assert modes == [True] * 4


# --- some of the parameters ---


def all_exits(net):
    """Mean cross-entropy over all exits, of which every parameter is a part."""
    cross_entropy = nn.CrossEntropyLoss()
    return lambda x, y: sum(cross_entropy(z, y) for z in net(x)) / net.num_exits


@pytest.mark.parametrize("part", ["personal", "shared", "one", "all"])
def test_only_the_named_parameters_train_and_the_others_stay_bit_for_bit(part):
    """With momentum, weight decay and clipping, and whatever gradients are left over from before; afterwards all can be
    trained as before."""
    net = network()
    names = {"personal": net.personal_names(), "shared": net.shared_names(), "one": ["exits.0.head.weight"], "all": []}
    all_exits(net)(images().x, images().y).backward()
    before = snapshot(net)
    train(net, images(), all_exits(net), BUDGET, np.random.default_rng(0), LoopOptions(only=names[part]))
    trained = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert trained == set(names[part] or before)
    assert all(p.requires_grad for p in net.parameters())


def test_what_does_not_train_counts_nothing_in_the_norm():
    """y = w·x + b from w = 2, b = 0: gradients 11 and 5. Clipped to norm 1, w moves by 0.1 alone or 0.1·11/√146 with b,
    and b, alone, by 0.1."""

    class Affine(Line):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.tensor(0.0))

    def step(*only):
        line = Affine()
        budget = LocalBudget(batch_size=2, steps=1, learning_rate=0.1, max_grad_norm=1.0)
        train(
            line,
            POINTS,
            lambda x, y: ((line.w * x + line.b - y) ** 2).mean(),
            budget,
            np.random.default_rng(0),
            LoopOptions(only=only),
        )
        return line.w.item(), line.b.item()

    assert step("w") == pytest.approx((1.9, 0.0))
    assert step("b") == pytest.approx((2.0, -0.1))
    assert step("w", "b") == step() == pytest.approx((2 - 1.1 / math.sqrt(146), -0.5 / math.sqrt(146)), abs=1e-6)


def test_a_parameter_that_is_frozen_stays_so_even_where_it_is_named():
    line, _ = fit(LocalBudget(batch_size=2, steps=3, learning_rate=0.1), only=["w", "frozen"])
    assert (line.frozen.item(), line.frozen.requires_grad) == (7.0, False)
    assert line.unused.requires_grad
    assert line.w.item() != 2.0


def test_after_an_error_all_parameters_can_be_trained_again():
    net = network()

    def loss(x, y):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        train(net, images(), loss, BUDGET, np.random.default_rng(0), LoopOptions(only=net.personal_names()))
    assert all(p.requires_grad for p in net.parameters())


def test_tensors_beside_the_network_train_with_it():
    """y = w·x + b with b beside the network: gradients 11 and 5, step 0.1: w = 0.9, b = −0.5. Clipping to norm 1 is of
    both together; with weight decay 0.5 b has none of it, as it is 0; with `only`, b trains all the same."""

    def step(also=True, **how):
        line, b = Line(), torch.zeros((), requires_grad=True)
        only = how.pop("only", ())
        train(
            line,
            POINTS,
            lambda x, y: ((line.w * x + b - y) ** 2).mean(),
            LocalBudget(batch_size=2, steps=1, learning_rate=0.1, **how),
            np.random.default_rng(0),
            LoopOptions(also=[b] if also else [], only=only),
        )
        return line.w.item(), b.item()

    assert step() == pytest.approx((0.9, -0.5))
    assert step(also=False) == pytest.approx((0.9, 0.0))
    assert step(only=["unused"]) == pytest.approx((2.0, -0.5))
    assert step(weight_decay=0.5) == pytest.approx((0.8, -0.5))
    norm = math.sqrt(11**2 + 5**2)
    assert step(max_grad_norm=1.0) == pytest.approx((2 - 1.1 / norm, -0.5 / norm))


def test_gradients_are_adjusted_after_every_backward_pass_and_before_clipping():
    """Twice the gradient of 11: w = 2 − 2.2. Clipped to 1 it is 1 again, twice or not. Weight decay 0.5 comes after."""
    calls = []

    def step(steps=1, **settings):
        line = Line()

        def double():
            calls.append(line.w.grad.item())
            line.w.grad.mul_(2)

        fit(LocalBudget(batch_size=2, steps=steps, learning_rate=0.1, **settings), line, adjust=double)
        return line.w.item()

    assert step() == pytest.approx(-0.2)
    assert calls == [pytest.approx(11.0)]
    assert step(max_grad_norm=1.0) == pytest.approx(1.9)
    assert step(weight_decay=0.5) == pytest.approx(-0.3)
    calls.clear()
    step(steps=3)
    assert len(calls) == 3


# --- part of a round ---


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 8),
    steps=st.integers(1, 9),
    epochs=st.integers(0, 2),
    parts=st.integers(1, 4),
)
def test_parts_of_a_round_follow_one_another_and_are_the_whole_together(n, batch_size, steps, epochs, parts):
    """No mini-batch twice, none left out, in the same order; the numbers of steps differ by one at most. Where there
    are fewer mini-batches than parts, as in one pass over few examples, every part takes them all."""
    data = Split(torch.arange(n).float(), torch.zeros(n, dtype=torch.int64), None)
    budget = LocalBudget(batch_size=batch_size, steps=steps, epochs=epochs, learning_rate=1e-6)

    def seen(part):
        line, batches_seen = Line(), []

        def loss(x, y):
            batches_seen.append(x.tolist())
            return (line.w * x).square().mean()

        outcome = train(line, data, loss, budget, np.random.default_rng(3), LoopOptions(part=part))
        assert outcome.steps == len(batches_seen)
        return batches_seen

    whole = seen((0, 1))
    split = [seen((i, parts)) for i in range(parts)]
    if len(whole) < parts:
        assert split == [whole] * parts
        return
    assert [batch for part in split for batch in part] == whole
    sizes = [len(part) for part in split]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 20), steps=st.integers(1, 5), epochs=st.integers(0, 2), times=st.integers(1, 4))
def test_several_rounds_worth_of_steps_go_on_through_the_examples(n, steps, epochs, times):
    """As many steps as so many rounds take, and every example about as often: nothing is seen again before all is."""
    data = Split(torch.arange(n).float(), torch.zeros(n, dtype=torch.int64), None)
    budget = LocalBudget(batch_size=4, steps=steps, epochs=epochs, learning_rate=1e-6)
    line, seen = Line(), []

    def loss(x, y):
        seen.append(x.int().tolist())
        return (line.w * x).square().mean()

    outcome = train(line, data, loss, budget, np.random.default_rng(0), LoopOptions(times=times))
    draws = times * (epochs * n if epochs else steps * min(4, n))
    assert sum(map(len, seen)) == draws
    assert outcome.steps == len(seen) == -(-draws // min(4, n))
    counts = np.bincount([i for batch in seen for i in batch], minlength=n)
    assert counts.max() - counts.min() <= 1


def test_no_round_is_no_step():
    """Nothing changes, and the loss is unknown."""
    line, outcome = fit(LocalBudget(batch_size=2, steps=1, learning_rate=0.1), times=0)
    assert math.isnan(outcome.loss)
    assert outcome.steps == 0
    assert line.w.item() == 2.0


# --- the pull ---


def test_the_pull_by_hand():
    """0.4/2·(w − 0.5)² has gradient 0.4·1.5 = 0.6 at w = 2: w = 2 − 0.1·11.6 = 0.84. The parameters that the loss never
    sees, or that are frozen, are not pulled though their anchors are far away."""
    line = Line()
    anchor = {"w": torch.tensor(0.5), "unused": torch.tensor(-50.0), "frozen": torch.tensor(-70.0)}
    fit(LocalBudget(batch_size=2, steps=1, learning_rate=0.1), line, adjust=pull(line, anchor, 0.4))
    assert line.w.item() == pytest.approx(0.84)
    assert (line.unused.item(), line.frozen.item()) == (5.0, 7.0)
    assert [t.item() for t in anchor.values()] == [0.5, -50.0, -70.0]


def test_the_pull_is_the_gradient_of_half_the_squared_distance():
    """Against autograd, with anchors for some of the parameters only, over several steps with momentum and clipping;
    the second exit does not train and does not move."""
    anchor = {name: t + 1.0 for name, t in snapshot(network()).items() if not name.startswith("stages.0.")}
    cross_entropy = nn.CrossEntropyLoss()

    def first_exit(net, x, y):
        return cross_entropy(net.exit(0, net.stage(0, x))[1], y)

    def with_penalty(net, x, y):
        moving = [p for name, p in net.named_parameters() if name in anchor and name.startswith("exits.0.")]
        there = [a for name, a in anchor.items() if name.startswith("exits.0.")]
        distance = sum((p - a).square().sum() for p, a in zip(moving, there, strict=True))
        return first_exit(net, x, y) + 0.3 / 2 * distance

    pulled, reference = network(), network()
    train(
        pulled,
        images(),
        lambda x, y: first_exit(pulled, x, y),
        BUDGET,
        np.random.default_rng(0),
        LoopOptions(adjust=pull(pulled, anchor, 0.3)),
    )
    train(reference, images(), lambda x, y: with_penalty(reference, x, y), BUDGET, np.random.default_rng(0))
    start = snapshot(network())
    for name, value in pulled.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(value, start[name]) == name.startswith(("stages.1.", "exits.1.")), name


def test_no_pull_is_no_change_bit_for_bit():
    free, held = network(), network()
    train(free, images(), all_exits(free), BUDGET, np.random.default_rng(0))
    anchor = {name: t + 1.0 for name, t in snapshot(held).items()}
    train(
        held, images(), all_exits(held), BUDGET, np.random.default_rng(0), LoopOptions(adjust=pull(held, anchor, 0.0))
    )
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), held.parameters(), strict=True))


def test_a_snapshot_is_a_copy_of_all_tensors():
    """Running statistics too; it neither follows the network nor leads it, and holds no graph."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    copy = snapshot(net)
    assert list(copy) == list(net.state_dict())
    before = {name: t.clone() for name, t in net.state_dict().items()}
    net(torch.randn(4, 3)).sum().backward()
    with torch.no_grad():
        net[0].weight += 1.0
    assert all(torch.equal(copy[name], before[name]) for name in before)
    copy["0.bias"] += 5.0
    assert torch.equal(net[0].bias, before["0.bias"])
    assert not any(t.requires_grad for t in copy.values())
