"""Budgets are kept on the calibration examples exactly, on others up to chance, and spent well."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cafe_flwr.cost import macs_per_exit
from cafe_flwr.inference import EarlyExitRunner, PerExit
from cafe_flwr.inference.budgets import exit_shares, for_accuracy, for_macs, thresholds_for_shares
from cafe_flwr.metrics import exit_logits, fit_temperatures
from cafe_flwr.networks import ConvNet, EarlyExitNetwork, Exit
from cafe_flwr.personal import fingerprint

MACS = [10, 25, 60]


def examples(n: int, seed: int, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, N, C) of examples of unequal difficulty, exits of unequal sureness; and labels."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    easy = 4 * torch.rand(n, 1, generator=g)
    signal = nn.functional.one_hot(y, classes).float() * easy
    scales, strength = (0.4, 2.0, 1.0), (1.0, 1.6, 2.4)
    z = [c * (s * signal + torch.randn(n, classes, generator=g)) for c, s in zip(scales, strength, strict=True)]
    return torch.stack(z), y


def spend(policy: PerExit, logits: torch.Tensor, y: torch.Tensor, macs=MACS) -> tuple[float, float]:
    """Share of the full MACs, and accuracy, row by row."""
    p = (logits / torch.tensor(policy.temperatures)[:, None, None]).softmax(dim=2).double().numpy()
    cost = right = 0.0
    for row in range(len(y)):
        k = next((k for k, t in enumerate(policy.thresholds) if p[k, row].max() >= t), len(macs) - 1)
        cost += macs[k]
        right += p[k, row].argmax() == y[row].item()
    return cost / len(y) / macs[-1], right / len(y)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), budget=st.floats(MACS[0] / MACS[-1], 1.0), n=st.integers(1, 120))
def test_the_macs_budget_is_kept_on_calibration(seed, budget, n):
    logits, y = examples(n, seed)
    policy = for_macs(logits, y, MACS, budget)
    assert spend(policy, logits, y)[0] <= budget + 1e-9
    assert policy.temperatures == tuple(fit_temperatures(logits, y))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_the_macs_budget_holds_on_other_examples_and_is_spent_well(budget):
    """Ten times: mean MACs near the budget; more accuracy than letting examples leave by lot for the same MACs."""
    spent, gained = [], []
    for seed in range(10):
        policy = for_macs(*examples(1500, seed), MACS, budget)
        test = examples(1500, 1000 + seed)
        share, accuracy = spend(policy, *test)
        exit_accuracy = (test[0].argmax(dim=2) == test[1]).float().mean(dim=1).numpy()
        lot = np.interp(share * MACS[-1], MACS, exit_accuracy)
        spent.append(share)
        gained.append(accuracy - lot)
    assert np.mean(spent) <= budget + 0.01
    assert np.mean(spent) >= budget - 0.1
    assert np.mean(gained) > 0.03


def test_the_whole_budget_may_leave_a_better_exit_than_the_last():
    """An exit in the middle that is always right: no use in going on."""
    logits, y = examples(400, 3)
    logits[1] = 5 * nn.functional.one_hot(y, 6)
    logits[0] = 0.01 * logits[0]
    share, accuracy = spend(for_macs(logits, y, MACS, 1.0), logits, y)
    assert accuracy == 1.0
    assert share <= MACS[1] / MACS[2]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [0.0, 0.01, 0.05])
def test_the_accuracy_budget_is_kept(loss):
    """On calibration always, and on others on average; a larger loss never costs more."""
    losses = []
    for seed in range(10):
        logits, y = examples(1500, seed)
        policy = for_accuracy(logits, y, MACS, loss)
        share, accuracy = spend(policy, logits, y)
        assert accuracy >= (logits[-1].argmax(dim=1) == y).float().mean().item() - loss - 1e-9
        assert spend(for_accuracy(logits, y, MACS, loss + 0.03), logits, y)[0] <= share
        test = examples(1500, 1000 + seed)
        losses.append((test[0][-1].argmax(dim=1) == test[1]).float().mean().item() - spend(policy, *test)[1])
    assert np.mean(losses) <= loss + 0.005
    assert loss == 0 or np.mean(losses) > loss - 0.035  # and it is made use of


def test_nothing_leaves_when_early_exits_know_nothing():
    logits, y = examples(300, 0)
    logits[:2] = torch.randn(2, 300, 6, generator=torch.Generator().manual_seed(1))
    assert spend(for_accuracy(logits, y, MACS, 0.0), logits, y)[0] == pytest.approx(1.0, abs=0.02)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 50),
    m=st.integers(2, 5),
    decay=st.floats(0.01, 100),
    seed=st.integers(0, 10**6),
    grid=st.booleans(),
)
def test_as_many_leave_as_the_shares_say(n, m, decay, seed, grid):
    """Counted one by one; with equal confidences (on a grid) more may leave, never fewer."""
    confidence = np.random.default_rng(seed).random((n, m))
    if grid:
        confidence = confidence.round(1)
    shares = exit_shares(decay, m)
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares[1:] / shares[:-1], decay)
    thresholds = thresholds_for_shares(confidence, shares)
    there = list(range(n))
    for k in range(m - 1):
        leaving = [i for i in there if confidence[i, k] >= thresholds[k]]
        there = [i for i in there if i not in leaving]
        due = math.ceil(shares[: k + 1].sum() * n - 1e-9)
        assert n - len(there) >= due
        if not grid:
            assert n - len(there) == due
        if leaving and there:  # the most confident go, and no threshold touches a confidence
            assert min(confidence[i, k] for i in leaving) > thresholds[k] > max(confidence[i, k] for i in there)


def test_the_runner_takes_the_thresholds_for_their_network_only():
    torch.manual_seed(0)
    network, x = ConvNet((1, 8, 8), 4), 3 * torch.randn(200, 1, 8, 8)
    with torch.no_grad():
        for e in network.exits:
            e.head.weight.mul_(5)
    logits, macs = exit_logits(network, x), macs_per_exit(network, x[:1])
    y = logits[-1].argmax(dim=1)
    policy = for_macs(logits, y, macs, 0.7, fingerprint=fingerprint(network))
    found = EarlyExitRunner(network, policy, batch_size=33).predict(x)
    assert len(set(found.exits)) > 1
    share, accuracy = spend(policy, logits, y, macs)
    assert found.mean_macs(macs) / macs[-1] == pytest.approx(share)
    assert (found.labels == y.numpy()).mean() == pytest.approx(accuracy)
    with pytest.raises(ValueError, match="made for the network"):
        EarlyExitRunner(ConvNet((1, 8, 8), 4), policy)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.01, 50, math.nan])
def test_a_budget_that_is_no_share_is_refused(budget):
    with pytest.raises(ValueError, match="the budget is a share"):
        for_macs(*examples(20, 0), MACS, budget)


def test_a_budget_below_the_first_exit_is_refused():
    with pytest.raises(ValueError, match=r"at least 0\.1667"):
        for_macs(*examples(20, 0), MACS, 0.16)


@pytest.mark.parametrize("loss", [-0.01, 1.0, math.nan])
def test_a_loss_that_is_none_is_refused(loss):
    with pytest.raises(ValueError, match="loss_allowed"):
        for_accuracy(*examples(20, 0), MACS, loss)


def test_examples_that_do_not_fit_are_refused():
    logits, y = examples(20, 0)
    with pytest.raises(ValueError, match="one example at least"):
        for_macs(logits[:, :0], y[:0], MACS, 0.5)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.5"):
        for_accuracy(logits, y + 9, MACS, 0.0)
    with pytest.raises(ValueError, match="one exit has no thresholds"):
        for_macs(logits[:1], y, MACS[:1], 1.0)


def test_thresholds_can_be_exported():
    network = EarlyExitNetwork([nn.Linear(2, 2)] * 2, [Exit(nn.Identity(), 2, 2) for _ in range(2)])
    known = PerExit((math.inf,), (1.0, 2.0), fingerprint(network)).to_dict()
    assert known == {
        "thresholds": [None],
        "temperatures": [1.0, 2.0],
        "fingerprint": fingerprint(network),
        "guarantee": None,
    }
