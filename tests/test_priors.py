"""The client's log-prior, and how it is re-estimated from unlabelled examples when class shares shift."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_flwr.training.class_prior import adapt_to_label_shift, class_counts, em_log_prior, log_prior

OLD, NEW = [0.6, 0.3, 0.1], [0.1, 0.3, 0.6]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def shifted(size, seed=0, spread=1.0):
    """Calibrated posteriors of a known problem: x of class c is normal around the c-th corner of a triangle; logits
    are log p(x|c) + log OLD, exactly; the examples come in shares NEW. Logits and labels."""
    rng = np.random.default_rng(seed)
    corners = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 1.7]])
    y = rng.choice(3, size=size, p=NEW)
    x = corners[y] + spread * rng.normal(size=(size, 2))
    log_likelihood = -((x[:, None] - corners) ** 2).sum(axis=2) / (2 * spread**2)
    return torch.from_numpy(log_likelihood) + tensor(OLD).log(), torch.from_numpy(y)


# --- the prior -------------------------------------------------------------------------------------------------------


def test_counts_have_a_place_for_every_class():
    counts = class_counts(torch.tensor([2, 0, 2]), 5)
    assert counts.tolist() == [1.0, 0.0, 2.0, 0.0, 0.0]
    assert counts.dtype == torch.float32


def test_log_prior_by_hand():
    """3, 1 and 0 examples: (3.1, 1.1, 0.1)/4.3."""
    assert log_prior(torch.tensor([3.0, 1.0, 0.0])).exp().tolist() == pytest.approx([3.1 / 4.3, 1.1 / 4.3, 0.1 / 4.3])


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_log_prior_is_a_distribution_without_zeros(counts):
    """Finite for classes that are not there, even if there are none at all; more examples, larger share."""
    prior = log_prior(torch.tensor(counts, dtype=torch.float32))
    assert torch.isfinite(prior).all()
    assert prior.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    order = np.argsort(counts, kind="stable")
    assert (np.diff(prior.numpy()[order]) >= -1e-6).all()


# --- its re-estimation -----------------------------------------------------------------------------------------------


def test_em_recovers_a_shifted_prior():
    """20 000 examples of overlapping classes in shares (0.1, 0.3, 0.6), posteriors with (0.6, 0.3, 0.1) in them.

    EM comes within 0.02 of the truth. What is easily done instead does not: the mean of the posteriors as they are (one
    step of EM), the shares of the labels predicted, EM that adds the new prior without taking out the old one.
    """
    logits, y = shifted(20_000)
    truth = class_counts(y, 3).double() / len(y)
    old = tensor(OLD).log()

    def error(shares):
        return (shares - truth).abs().max().item()

    assert error(em_log_prior(logits, old).exp()) < 0.02
    assert error(logits.softmax(dim=1).mean(dim=0)) > 0.1
    assert error(class_counts(logits.argmax(dim=1), 3).double() / len(y)) > 0.1
    doubled = old
    for _ in range(50):
        doubled = (logits + doubled).softmax(dim=1).mean(dim=0).log()
    assert error(doubled.exp()) > 0.1


def test_em_finds_no_shift_where_there_is_none():
    logits, y = shifted(20_000)
    keep = torch.cat([(y == c).nonzero()[:n, 0] for c, n in enumerate((1200, 600, 200))])
    new = em_log_prior(logits[keep], tensor(OLD).log())
    torch.testing.assert_close(new.exp(), tensor(OLD), rtol=0, atol=0.03)


def objective(logits, old, new):
    """Log-likelihood of the examples under class shares ``new``, plus that of 10 imagined ones in the old shares."""
    mixture = torch.logsumexp(logits - old + new, dim=1).sum()
    return (mixture + 10 * (old.exp() * new).sum()).item()


@pytest.mark.parametrize("seed", range(5))
def test_every_step_of_em_raises_the_likelihood(seed):
    logits, _ = shifted(60, seed)
    old = tensor(OLD).log()
    values = [objective(logits, old, em_log_prior(logits, old, steps=steps)) for steps in range(12)]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))
    assert values[-1] > values[0] + 0.1
    assert values[0] == pytest.approx(objective(logits, old, old))


def test_em_has_come_to_the_best_shares_there_are():
    """No shares of a fine grid have a higher likelihood."""
    logits, _ = shifted(300, seed=1)
    old = tensor(OLD).log()
    best = objective(logits, old, em_log_prior(logits, old))
    grid = np.linspace(0.01, 0.98, 60)
    others = [objective(logits, old, tensor([a, b, 1 - a - b]).log()) for a in grid for b in grid if a + b < 0.995]
    assert best >= max(others) - 1e-3


def test_one_step_by_hand():
    """Two examples with logits that say class 0 for sure and class 1 for sure, old shares (¾, ¼), of which 10 examples
    are imagined: (1 + 7.5)/12 = 0.708333 and (1 + 2.5)/12 = 0.291667."""
    new = em_log_prior(tensor([[50.0, 0.0], [0.0, 50.0]]), tensor([0.75, 0.25]).log(), steps=1)
    assert new.exp().tolist() == pytest.approx([8.5 / 12, 3.5 / 12])


def test_without_examples_the_old_prior_stays():
    old = tensor(OLD).log()
    assert torch.equal(em_log_prior(torch.zeros(0, 3, dtype=torch.float64), old), old)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 30), scale=st.floats(0.1, 100))
def test_the_new_prior_is_a_distribution_whatever_the_logits(seed, size, scale):
    """Also in float32, also where the prior given is one up to a constant; few examples rule no class out."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(scale * rng.normal(size=(size, 4))).float()
    prior = torch.from_numpy(rng.normal(size=4)).float()
    new = em_log_prior(logits, prior)
    assert torch.isfinite(new).all()
    assert new.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    assert (new.exp() >= 0.99 * 10 * prior.softmax(0) / (size + 10)).all()
    torch.testing.assert_close(em_log_prior(logits + 3.0, prior - 5.0), new, rtol=1e-3, atol=1e-3)


# --- adaptation of all exits -----------------------------------------------------------------------------------------


def test_adaptation_adds_the_same_difference_of_priors_at_every_exit():
    """Logits over their temperatures, plus log of new over old shares: one estimate, from the mean of the exits'
    calibrated log-probabilities."""
    logits, _ = shifted(400)
    temperatures = tensor([2.0, 0.5])[:, None, None]
    stacked = torch.stack([2.0 * logits, 0.5 * logits])  # both calibrated by their temperature
    adapted = adapt_to_label_shift(stacked, temperatures, tensor(OLD).log())
    difference = em_log_prior(logits, tensor(OLD).log()) - tensor(OLD).log()
    for exit_ in adapted:
        torch.testing.assert_close(exit_, logits + difference)


def test_adaptation_raises_accuracy_under_shift():
    """And comes near to what the true shares would give."""
    logits, y = shifted(5000, seed=2)

    def accuracy(z):
        return (z.argmax(dim=1) == y).double().mean().item()

    adapted = adapt_to_label_shift(logits[None], torch.ones(1, 1, 1), tensor(OLD).log())[0]
    best = accuracy(logits + (tensor(NEW) / tensor(OLD)).log())
    assert accuracy(adapted) > accuracy(logits) + 0.05
    assert accuracy(adapted) > best - 0.01


def test_adaptation_without_examples_is_nothing():
    adapted = adapt_to_label_shift(torch.zeros(2, 0, 3), torch.ones(2, 1, 1), torch.zeros(3))
    assert adapted.shape == (2, 0, 3)


def test_adaptation_does_not_mind_how_the_prior_is_normalised():
    logits, _ = shifted(100)
    a, b = (adapt_to_label_shift(logits[None], torch.ones(1, 1, 1), tensor(OLD).log() + c) for c in (0.0, math.log(7)))
    torch.testing.assert_close(a.softmax(dim=2), b.softmax(dim=2))
