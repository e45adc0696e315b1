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
from cafe_flwr.training import LocalBudget, batches, learning_rate_at, train


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
    loss = train(
        line,
        points,
        lambda x, y: ((line.w * x - y) ** 2).mean(),
        LocalBudget(batch_size=2, epochs=1, learning_rate=1e-9),
        np.random.default_rng(0),
    )
    errors = {0: 4.0, 1: 9.0, 2: 16.0}  # of every point, squared, at w = 2
    first, second = batches(3, 2, 3, np.random.default_rng(0))
    assert (len(first), len(second)) == (2, 1)
    assert loss == pytest.approx((np.mean([errors[i] for i in first]) + errors[second[0]]) / 2)


@pytest.mark.parametrize("num_rounds", [*range(1, 12), 40, 99, 100])
def test_learning_rate_is_constant_to_half_time_then_falls_and_stays_positive(num_rounds):
    rates = [learning_rate_at(0.3, t, num_rounds) for t in range(1, num_rounds + 1)]
    half = num_rounds // 2  # the last round t ≤ T/2
    assert rates[:half] == [0.3] * half
    assert all(a > b for a, b in zip(rates[max(half - 1, 0) :], rates[max(half, 1) :], strict=False))
    assert all(0 < rate <= 0.3 for rate in rates)


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


def fit(budget, line=None):
    line = line or Line()
    loss = train(line, POINTS, lambda x, y: ((line.w * x - y) ** 2).mean(), budget, np.random.default_rng(0))
    return line, loss


def test_one_step_by_hand():
    """Points (1, 0) and (3, 3), w = 2: errors 2 and 3, loss (4 + 9)/2 = 6.5,
    gradient (2·2·1 + 2·3·3)/2 = 11, step 0.1: w = 2 − 1.1 = 0.9."""
    line, loss = fit(LocalBudget(batch_size=2, steps=1, learning_rate=0.1))
    assert loss == pytest.approx(6.5)
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


def test_momentum_by_hand_and_it_does_not_outlive_the_round():
    """From w = 0.9 the errors are 0.9 and −0.3, the gradient (2·0.9·1 − 2·0.3·3)/2 = 0, loss (0.81 + 0.09)/2 = 0.45.

    In one round of two steps the velocity is 0.9·11 = 9.9: w = 0.9 − 0.99 = −0.09, mean loss (6.5 + 0.45)/2 = 3.475.
    In two rounds of one step the second starts at rest and stays at 0.9.
    """
    line, loss = fit(LocalBudget(batch_size=2, steps=2, learning_rate=0.1, momentum=0.9))
    assert line.w.item() == pytest.approx(-0.09, abs=1e-6)
    assert loss == pytest.approx(3.475)

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
        loss = train(net, images(), lambda x, y: cross_entropy(net(x)[-1], y), BUDGET, np.random.default_rng(seed))
        return loss, torch.cat([p.flatten() for p in net.parameters()])

    (loss_a, a), (loss_b, b), (_, c) = run(0), run(0), run(1)
    assert loss_a == loss_b
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_agrees_with_a_loop_written_out():
    """Momentum v ← μv + g + λθ and θ ← θ − ηv, after scaling g down to the norm, for the parameters with a gradient."""
    net, reference = network(), network()
    cross_entropy = nn.CrossEntropyLoss()
    data = images()
    mean = train(net, data, lambda x, y: cross_entropy(net(x)[-1], y), BUDGET, np.random.default_rng(7))

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

    assert mean == pytest.approx(sum(losses) / 4, rel=1e-5)
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
