"""What is measured, against references written out by hand: accuracy, loss, calibration, dynamic inference."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cafe_flwr.core.numbers import mean, mean_rows
from cafe_flwr.data import Split
from cafe_flwr.metrics import (
    THRESHOLDS,
    ExitMetrics,
    dynamic_counts,
    ensemble_accuracy,
    evaluate,
    exit_logits,
    exit_metrics,
    fit_temperatures,
    worst_share,
)
from cafe_flwr.metrics.curve import area_under_curve
from cafe_flwr.networks import EarlyExitNetwork, Exit


def draw(exits, n, classes, seed, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(exits, n, classes)) * scale
    return torch.from_numpy(logits).float(), torch.from_numpy(rng.integers(0, classes, size=n))


def softmax(z):
    e = np.exp(np.asarray(z, dtype=np.float64) - np.max(z))
    return e / e.sum()


def ece_by_hand(logits, y, bins=15):
    """Σ_b |B_b|/N · |accuracy of B_b − mean confidence of B_b|, bin b holding the confidences in ((b−1)/15, b/15]."""
    rows = [softmax(z) for z in logits]
    total = 0.0
    for b in range(bins):
        inside = [i for i, p in enumerate(rows) if b / bins < p.max() <= (b + 1) / bins]
        if inside:
            accuracy = np.mean([rows[i].argmax() == y[i] for i in inside])
            confidence = np.mean([rows[i].max() for i in inside])
            total += len(inside) / len(rows) * abs(accuracy - confidence)
    return total


@settings(deadline=None, max_examples=40)
@given(exits=st.integers(1, 4), n=st.integers(1, 60), classes=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_metrics_of_every_exit_are_those_of_the_textbook(exits, n, classes, seed):
    logits, y = draw(exits, n, classes, seed)
    result = exit_metrics(logits, y)
    for k in range(exits):
        z, labels = logits[k].numpy(), y.tolist()
        assert result.accuracy[k] == pytest.approx(np.mean([z[i].argmax() == labels[i] for i in range(n)]), abs=1e-6)
        losses = [-math.log(softmax(z[i])[labels[i]]) for i in range(n)]
        assert result.loss[k] == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)
        assert result.ece[k] == pytest.approx(ece_by_hand(z, labels), abs=1e-4)


@pytest.mark.slow
def test_metrics_agree_with_torchmetrics():
    """Calibration errors bit for bit, also at the edges of bins and where probabilities are 0 or 1."""
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    drawn = [draw(3, n, classes, n + classes, scale) for n, classes, scale in product((1, 7, 500), (2, 10), (0, 3, 99))]
    edges = (torch.arange(16) / 15).repeat(2)
    for logits, y in [*drawn, (torch.stack([edges.log(), (1 - edges).log()], 1)[None], torch.arange(32) % 2)]:
        result, classes = exit_metrics(logits, y), logits.shape[2]
        for k, z in enumerate(logits):
            accuracy = multiclass_accuracy(z, y, classes, average="micro").item()
            assert result.accuracy[k] == pytest.approx(accuracy)
            assert result.ece[k] == multiclass_calibration_error(z.softmax(1), y, classes, n_bins=15).item()


def test_metrics_by_hand():
    """Two examples of two classes. Exit 1: (3/4, 1/4) and (1/4, 3/4) with labels 0, 0: one right, loss −½(ln ¾ + ln ¼),
    both at confidence ¾, in one bin with accuracy ½: ECE ¼. Exit 2 is sure and right: accuracy 1, loss 0, ECE 0."""
    ln3 = math.log(3)
    logits = torch.tensor([[[ln3, 0.0], [0.0, ln3]], [[90.0, 0.0], [90.0, 0.0]]])
    result = exit_metrics(logits, torch.tensor([0, 0]))
    assert result.accuracy == [0.5, 1.0]
    assert result.loss == pytest.approx([-(math.log(0.75) + math.log(0.25)) / 2, 0.0], abs=1e-6)
    assert result.ece == pytest.approx([0.25, 0.0], abs=1e-6)


def test_without_examples_nothing_is_known():
    result = exit_metrics(torch.zeros(3, 0, 5), torch.zeros(0, dtype=torch.int64))
    for values in (result.accuracy, result.loss, result.ece):
        assert len(values) == 3
        assert all(math.isnan(v) for v in values)
    assert math.isnan(ensemble_accuracy(torch.zeros(3, 0, 5), torch.zeros(0, dtype=torch.int64)))


def test_unknown_metrics_are_lists_of_their_own():
    unknown = ExitMetrics.unknown(2)
    for values in (unknown.accuracy, unknown.loss, unknown.ece):
        assert len(values) == 2
        assert all(math.isnan(v) for v in values)
    unknown.accuracy[0] = 0.5
    assert math.isnan(unknown.loss[0])
    assert math.isnan(ExitMetrics.unknown(2).accuracy[0])


@settings(deadline=None, max_examples=25)
@given(exits=st.integers(1, 4), n=st.integers(1, 30), classes=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_the_ensemble_is_the_mean_of_the_exits_probabilities(exits, n, classes, seed):
    logits, y = draw(exits, n, classes, seed)
    right = [np.mean([softmax(z) for z in logits[:, i].numpy()], axis=0).argmax() == y[i].item() for i in range(n)]
    assert ensemble_accuracy(logits, y) == pytest.approx(np.mean(right), abs=1e-6)


def test_the_ensemble_by_hand():
    """Not votes: two exits hardly prefer class 0, (0.55, 0.45), the third is for class 1, (0.2, 0.8), and so is their
    mean, (0.433, 0.567). Not logits: 9 for class 0 at one exit is more than the others' ln 9 = 2.2 each for class 1,
    but its probability counts no more than theirs: (0.9999 + 0.1 + 0.1)/3 = 0.4."""
    hardly, clearly = math.log(0.55 / 0.45), math.log(0.2 / 0.8)
    first = torch.tensor([[[hardly, 0.0]], [[hardly, 0.0]], [[clearly, 0.0]]])
    assert ensemble_accuracy(first, torch.tensor([1])) == 1.0
    second = torch.tensor([[[9.0, 0.0]], [[0.0, math.log(9)]], [[0.0, math.log(9)]]])
    assert ensemble_accuracy(second, torch.tensor([1])) == 1.0


class Dropping(EarlyExitNetwork):
    """A network that behaves differently in training."""

    def __init__(self):
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))]
        super().__init__(stages, [Exit(nn.Linear(8, 4), 4, 3) for _ in range(2)])


def test_evaluation_is_in_evaluation_mode_without_gradients_and_in_chunks(monkeypatch):
    """2,500 examples are three chunks of at most 1,024; none of them changes anything, and each row is its own."""
    network = Dropping().train()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    x = torch.randn(2500, 6, generator=torch.Generator().manual_seed(0))
    sizes = []
    original = network.forward

    def watch(part):
        sizes.append(len(part))
        return original(part)

    monkeypatch.setattr(network, "forward", watch)
    logits = exit_logits(network, x)
    assert logits.shape == (2, 2500, 3)
    assert not logits.requires_grad
    assert sum(sizes) == 2500
    assert max(sizes) <= 1024
    network.eval()
    with torch.no_grad():
        for i in (0, 1023, 1024, 2499):
            row = torch.stack(original(x[i : i + 1]))[:, 0]
            torch.testing.assert_close(logits[:, i], row, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert exit_logits(network, x[:0]).shape == (2, 0, 3)


def test_evaluate_is_the_metrics_of_the_logits():
    network = Dropping()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    data = Split(x, torch.arange(30) % 3, torch.zeros(30, 1))
    assert evaluate(network, data) == exit_metrics(exit_logits(network, x), data.y)


# --- dynamic inference ---


def leave_one_by_one(logits, y, threshold):
    """One example at a time, one exit at a time: stop at the first whose max-prob reaches θ, at the last anyway."""
    m, n, _ = logits.shape
    left, correct, changed = [0] * m, 0, 0
    for i in range(n):
        for k in range(m):
            p = logits[k, i].softmax(0)
            if k == m - 1 or p.max().item() >= threshold:
                left[k] += 1
                right = p.argmax().item() == y[i].item()
                at_last = logits[-1, i].argmax().item() == y[i].item()
                correct += right
                changed += right != at_last
                break
    return left, correct, changed


@settings(deadline=None, max_examples=25)
@given(exits=st.integers(1, 4), n=st.integers(0, 12), classes=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_dynamic_counts_are_those_of_a_loop_over_examples(exits, n, classes, seed):
    logits, y = draw(exits, n, classes, seed)
    counts = dynamic_counts(logits, y)
    assert counts.left.shape == (len(THRESHOLDS), exits)
    for t in range(0, len(THRESHOLDS), 7):
        left, correct, changed = leave_one_by_one(logits, y, THRESHOLDS[t])
        assert counts.left[t].tolist() == left
        assert counts.correct[t] == correct
        assert counts.changed[t] == changed


def test_dynamic_counts_from_leaving_at_once_to_never():
    """θ = 0 lets everything leave at exit 1; the last threshold is never reached. In between, less and less leaves at
    exit 1, and every example leaves exactly once."""
    logits, y = draw(3, 200, 5, seed=2)
    counts = dynamic_counts(logits, y)
    assert counts.left[0].tolist() == [200, 0, 0]
    assert counts.left[-1].tolist() == [0, 0, 200]
    assert (counts.left.sum(axis=1) == 200).all()
    assert (np.diff(counts.left[:, 0]) <= 0).all()
    assert counts.correct[0] == (logits[0].argmax(1) == y).sum()
    assert counts.correct[-1] == (logits[-1].argmax(1) == y).sum()
    assert counts.changed[-1] == 0
    assert all(np.issubdtype(part.dtype, np.integer) for part in counts)


def test_dynamic_counts_add_up_over_clients():
    logits, y = draw(3, 50, 4, seed=3)
    whole = dynamic_counts(logits, y)
    parts = [dynamic_counts(logits[:, i], y[i]) for i in (slice(0, 20), slice(20, 20), slice(20, 50))]
    for total, *counts in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(total, sum(counts))


def test_a_confidence_equal_to_the_threshold_leaves():
    """Two equal logits: max-prob exactly ½, at θ = 0.5 the example leaves, at 0.51 it stays."""
    counts = dynamic_counts(torch.zeros(2, 1, 2), torch.tensor([0]))
    half = int(np.flatnonzero(THRESHOLDS == 0.5)[0])
    assert counts.left[half].tolist() == [1, 0]
    assert counts.left[half + 1].tolist() == [0, 1]


# --- temperatures ---


def nll(logits, y, temperature):
    return np.mean(
        [-math.log(max(softmax(z / temperature)[label], 1e-300)) for z, label in zip(logits, y, strict=True)]
    )


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 40), seed=st.integers(0, 10**6), scale=st.floats(0.3, 10))
def test_fitted_temperatures_lower_the_loss_and_no_other_of_the_range_is_better(n, seed, scale):
    logits, y = draw(2, n, 5, seed, scale)
    for z, temperature in zip(logits.numpy(), fit_temperatures(logits, y), strict=True):
        fitted = nll(z, y.tolist(), temperature)
        assert fitted <= nll(z, y.tolist(), 1.0) + 1e-5
        for other in np.geomspace(0.25, 4.0, 9):
            assert fitted <= nll(z, y.tolist(), other) + 1e-5
        assert 0.25 <= temperature <= 4.0


def test_temperatures_undo_a_known_scale_of_each_exit():
    """Labels drawn from softmax(z): logits 2z want T = 2, z/2 wants T = ½."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20_000, 4)) * 1.5
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    y = torch.from_numpy((rng.random((len(p), 1)) > p.cumsum(axis=1)).sum(axis=1).clip(0, 3))
    logits = torch.from_numpy(np.stack([2 * z, z / 2, z])).float()
    assert fit_temperatures(logits, y) == pytest.approx([2.0, 0.5, 1.0], rel=0.1)


def test_temperatures_do_not_change_what_is_predicted_and_need_examples():
    logits, y = draw(3, 30, 4, seed=5)
    temperatures = torch.tensor(fit_temperatures(logits, y))[:, None, None]
    assert torch.equal((logits / temperatures).argmax(2), logits.argmax(2))
    assert fit_temperatures(torch.zeros(3, 0, 4), torch.zeros(0, dtype=torch.int64)) == [1.0, 1.0, 1.0]


# --- over clients ---


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([0.9, 0.2, 0.8], 0.1, 0.2),  # at least one
        (list(range(20)), 0.1, 0.5),  # two of twenty: 0 and 1
        (list(range(25)), 0.2, 2.0),  # five: 0..4
        ([0.5, math.nan, 0.1], 0.1, 0.1),
        ([3.0, 1.0, 2.0], 1.0, 2.0),
    ],
)
def test_worst_share(values, share, expected):
    assert worst_share(values, share) == pytest.approx(expected)


def test_worst_share_of_nothing_is_unknown():
    assert math.isnan(worst_share([]))
    assert math.isnan(worst_share([math.nan, math.nan]))


def test_means_leave_out_what_is_unknown():
    assert mean([0.5, math.nan, 1.0]) == 0.75
    assert math.isnan(mean([]))
    assert math.isnan(mean([math.nan]))
    rows = mean_rows([[0.5, math.nan], [1.0, math.nan]])
    assert rows[0] == 0.75
    assert math.isnan(rows[1])


# --- the accuracy–MACs curve ---


@pytest.mark.parametrize(
    ("accuracy", "macs", "expected"),
    [
        ([0.6, 0.8], [10, 30], 0.7),  # a straight line
        ([0.6, 0.8, 0.8], [10, 20, 30], 0.75),  # (0.7·10 + 0.8·10)/20
        ([0.8, 0.6, 0.7], [10, 20, 30], 0.8),  # the cheapest is the best: nothing dearer need be used
        ([0.5, 0.9, 0.7, 0.9], [10, 20, 30, 50], 0.85),  # (0.7·10 + 0.9·30)/40
        ([0.5, 0.9, 0.9], [10, 10, 30], 0.9),  # two points of one cost: the better one
        ([0.5, 0.7], [10, 10], 0.7),  # a single cost
        ([0.4], [10], 0.4),
    ],
)
def test_the_area_under_the_curve_by_hand(accuracy, macs, expected):
    assert area_under_curve(accuracy, macs) == pytest.approx(expected)
    assert area_under_curve(accuracy[::-1], macs[::-1]) == pytest.approx(expected)


@settings(deadline=None)
@given(n=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_the_area_is_the_mean_of_the_best_accuracy_within_each_cost(n, seed):
    """On a fine grid: between two points the best accuracy so far grows along a line."""
    rng = np.random.default_rng(seed)
    accuracy, macs = rng.random(n), rng.choice(50, size=n, replace=False).astype(float)
    area = area_under_curve(accuracy, macs)
    order = np.argsort(macs)
    best = [accuracy[order][: i + 1].max() for i in range(n)]
    middles = macs.min() + (np.arange(20_000) + 0.5) / 20_000 * np.ptp(macs)
    assert area == pytest.approx(np.interp(middles, macs[order], best).mean(), abs=1e-3)
    assert accuracy[order[0]] - 1e-12 <= area <= accuracy.max() + 1e-12


def test_the_area_of_no_curve_is_unknown():
    assert math.isnan(area_under_curve([], []))
