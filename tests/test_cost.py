"""Multiply-adds by hand, latency of stages that sleep, and the accuracy–MACs curve against a slow reference."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cafe_flwr.cost import expected_macs, macs_per_exit, macs_without_early_exits
from cafe_flwr.inference import EarlyExitRunner, MaxProb
from cafe_flwr.inference.latency import latency_per_exit, policy_latency
from cafe_flwr.metrics.curve import accuracy_macs_curve, area_under_curve
from cafe_flwr.networks import EarlyExitNetwork, Exit


class Attention(nn.Module):
    """Multi-head self-attention over 6 tokens of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, h):
        return self.attention(h, h, h, need_weights=False)[0]


class Mean(nn.Module):
    def forward(self, h):
        return h.mean(dim=1)


def dense() -> EarlyExitNetwork:
    """Stages 5→4, 4→4 and 4→4 (20, 16, 16 MACs), exits with projection 4→3 and head 3→2 (12 + 6)."""
    stages = [nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)]
    return EarlyExitNetwork(stages, [Exit(nn.Linear(4, 3), 3, 2) for _ in stages])


# --- multiply-adds ---


@pytest.mark.parametrize("batch", [1, 3])
def test_stages_and_all_exits_on_the_way_by_hand(batch):
    """20 + 18 = 38; 38 + 16 + 18 = 72; 72 + 16 + 18 = 106. Without exits 1 and 2: 106 − 36 = 70."""
    assert macs_per_exit(dense(), torch.zeros(batch, 5)) == [38, 72, 106]
    assert macs_without_early_exits(dense(), torch.zeros(batch, 5)) == 70


def test_attention_is_counted_in_evaluation_too():
    """There torch computes it by one operation that its counter does not know.

    Per example: in-projection 6·8·24 = 1152, scores and mixing 2·6·6·8 = 576, out-projection 6·8·8 = 384:
    2112; head 8·2.
    """
    network = EarlyExitNetwork([Attention()], [Exit(Mean(), 8, 2)]).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    assert macs_per_exit(network, torch.randn(2, 6, 8)) == [2112 + 16]
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_transformer_layer_is_counted():
    """Attention as above, then 2·6·8·16 = 1536 of the multilayer perceptron."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = EarlyExitNetwork([layer], [Exit(Mean(), 8, 2)]).eval()
    assert macs_per_exit(network, torch.randn(2, 6, 8)) == [2112 + 1536 + 16]


def test_what_cannot_be_counted_is_refused():
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, h):
            return (h[:, :, None] * self.weight).sum(dim=1)

    class Last(nn.Module):
        def forward(self, h):
            return h[0][:, -1]

    exits = [Exit(nn.Identity(), 4, 2) for _ in range(2)]
    with pytest.raises(ValueError, match=r"stage 2 computes with Unknown, which .* does not count"):
        macs_per_exit(EarlyExitNetwork([nn.Linear(4, 4), Unknown()], exits), torch.zeros(1, 4))
    recurrent = EarlyExitNetwork([nn.LSTM(4, 4, batch_first=True)], [Exit(Last(), 4, 2)])
    with pytest.raises(ValueError, match="stage 1 computes with LSTM"):
        macs_per_exit(recurrent, torch.zeros(1, 3, 4))
    assert macs_per_exit(EarlyExitNetwork([nn.Identity(), nn.ReLU()], exits), torch.zeros(1, 4)) == [8, 16]


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="empty batch"):
        macs_per_exit(dense(), torch.zeros(0, 5))


def test_counting_leaves_the_network_as_it_is():
    network = dense().train()
    network.stages[1].eval()
    macs_per_exit(network, torch.zeros(1, 5))
    assert network.stages[0].training
    assert not network.stages[1].training


def test_expected_macs_by_hand():
    assert expected_macs([0.5, 0.25, 0.25], [38, 72, 106]) == 63.5
    for shares in ([0.5, 0.5], [0.5, 0.5, 0.5], [1.5, -0.5, 0.0], [math.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match="of sum 1"):
            expected_macs(shares, [38, 72, 106])


# --- seconds ---


class Sleeps(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, h):
        time.sleep(self.seconds * len(h))
        return h


def sleeping() -> EarlyExitNetwork:
    return EarlyExitNetwork([Sleeps(0.02), Sleeps(0.06)], [Exit(nn.Identity(), 2, 2) for _ in range(2)])


def test_latency_is_cumulative_over_stages():
    first, second = latency_per_exit(sleeping(), torch.zeros(1, 2), repeats=5)
    assert 0.02 <= first < second
    assert second - first >= 0.06


@pytest.mark.slow
def test_latency_of_a_policy_is_per_example():
    """Nobody leaves: 80 ms an example. All leave at the first exit: 20 ms."""
    x = torch.zeros(4, 2)
    full = policy_latency(EarlyExitRunner(sleeping(), MaxProb(math.inf)), x, repeats=3)
    early = policy_latency(EarlyExitRunner(sleeping(), MaxProb(0.0)), x, repeats=3)
    assert 0.08 <= full < 0.3
    assert 0.02 <= early < full


def test_latency_of_nothing_is_refused():
    with pytest.raises(ValueError, match="one example and one repeat"):
        latency_per_exit(dense(), torch.zeros(0, 5))
    with pytest.raises(ValueError, match="one example and one repeat"):
        policy_latency(EarlyExitRunner(dense(), MaxProb(0.5)), torch.zeros(1, 5), repeats=0)


# --- accuracy for MACs ---


def some_logits(seed: int, m: int = 3, n: int = 200, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Later exits are better and surer."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    signal = nn.functional.one_hot(y, classes).float()
    z = [1.5 * (k + 1) * signal + 1.5 * torch.randn(n, classes, generator=generator) for k in range(m)]
    return torch.stack(z), y


def points(logits, y, macs, temperatures):
    """(accuracy, MACs) of every threshold, row by row."""
    p = (logits / torch.tensor(temperatures)[:, None, None]).softmax(dim=2).numpy()
    found = []
    for threshold in [*np.linspace(0, 1, 101), math.inf]:
        right = cost = 0.0
        for row in range(len(y)):
            k = next((k for k in range(len(p) - 1) if p[k, row].max() >= threshold), len(p) - 1)
            right += p[k, row].argmax() == y[row].item()
            cost += macs[k]
        found.append((right / len(y), cost / len(y)))
    return found


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_the_curve_is_that_of_every_threshold_row_by_row(seed):
    logits, y = some_logits(seed, n=60)
    macs, temperatures = [10, 25, 60], [0.8, 1.3, 0.9]
    curve = accuracy_macs_curve(logits, y, macs, temperatures)
    expected = points(logits, y, macs, temperatures)
    np.testing.assert_allclose(np.c_[curve.accuracy, curve.macs], expected, atol=1e-12)
    assert curve.area == pytest.approx(area_under_curve(*zip(*expected, strict=True)))
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        within = [a for a, c in expected if c <= share * 60 + 1e-9]
        assert curve.accuracy_within(share) == pytest.approx(max(within, default=math.nan), nan_ok=True)
    full = expected[-1][0]
    summary = curve.summary()
    assert summary["macs_one_point_less"] == pytest.approx(min(c for a, c in expected if a >= full - 0.01 - 1e-9))
    assert [summary[f"accuracy_at_{p}"] for p in (25, 50, 75)] == [curve.accuracy_within(p / 100) for p in (25, 50, 75)]
    assert (summary["accuracy_full"], summary["macs_full"]) == (pytest.approx(full), 60)
    for i, (a, c) in enumerate(expected):  # a point is on the Pareto front iff none beats it, or repeats it there
        beaten = any((b > a + 1e-12 and d <= c + 1e-9) or (b >= a - 1e-12 and d < c - 1e-9) for b, d in expected)
        alike = [j for j, (b, d) in enumerate(expected) if abs(a - b) < 1e-12 and abs(c - d) < 1e-9]
        assert curve.pareto[i] <= (not beaten)
        assert curve.pareto[alike].sum() == (not beaten)


def test_what_is_not_reached_is_unknown():
    logits, y = some_logits(0)
    curve = accuracy_macs_curve(logits, y, [30, 40, 60])
    assert math.isnan(curve.accuracy_within(0.25))  # exit 1 alone costs half
    assert math.isnan(curve.macs_to_reach(1.01))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, y: (z[:2], y, [1, 2, 3]), "for 3 exits"),
        (lambda z, y: (z, y[:-1], [1, 2, 3]), "199 labels"),
        (lambda z, y: (z[:, :0], y[:0], [1, 2, 3]), "one example at least"),
        (lambda z, y: (z, y + 1, [1, 2, 3]), r"labels must be in 0\.\.3, got 1\.\.4"),
        (lambda z, y: (z, y - 1, [1, 2, 3]), r"labels must be in 0\.\.3, got -1\.\.2"),
        (
            lambda z, y: (z.clone().index_fill_(1, torch.tensor([7]), math.nan), y, [1, 2, 3]),
            "12 logits are not finite",
        ),
        (lambda z, y: (z, y, [1, 3, 2]), "macs must rise"),
        (lambda z, y: (z, y, [0, 1, 2]), "macs must rise"),
    ],
)
def test_examples_that_do_not_fit_are_refused(change, message):
    logits, y, macs = change(*some_logits(0))
    with pytest.raises(ValueError, match=message):
        accuracy_macs_curve(logits, y, macs)
