"""The rule "leave at the first exit that passes" is one rule, wherever it is written: array, runner, device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cafe_flwr.device import ExitedModel, _confidence
from cafe_flwr.inference import EarlyExitRunner, MaxProb, PerExit
from cafe_flwr.metrics.early_exit import THRESHOLDS, counts_at, dynamic_counts, first_exit
from cafe_flwr.networks import EarlyExitNetwork, Exit
from cafe_flwr.risk.thresholds import ExitThresholds

CLASSES = 3


class Column(nn.Module):
    """Logits of one exit out of an input that holds those of all, (B, m, C)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, h):
        return h[:, self.k]


def network_of(num_exits: int) -> EarlyExitNetwork:
    """Takes the logits of all its exits, and gives them."""
    exits = [Exit(Column(k), CLASSES, CLASSES) for k in range(num_exits)]
    for e in exits:
        with torch.no_grad():
            e.head.weight.copy_(torch.eye(CLASSES))
            e.head.bias.zero_()
    return EarlyExitNetwork([nn.Identity() for _ in exits], exits)


class Session:
    """In place of an ONNX graph."""

    def __init__(self, k: int) -> None:
        self.k = k

    def run(self, outputs, inputs):
        return inputs["h"], inputs["h"][:, self.k]


def device_of(num_exits: int, thresholds) -> ExitedModel:
    model = ExitedModel.__new__(ExitedModel)
    model.__dict__ |= {
        "num_exits": num_exits,
        "thresholds": np.array(thresholds),
        "input_shape": (num_exits, CLASSES),
        "_temperatures": np.ones(num_exits, np.float32),
        "_dtype": np.dtype(np.float32),
        "_sessions": [Session(k) for k in range(num_exits)],
    }
    return model


def by_the_book(confidence, thresholds):
    """Row by row, exit by exit."""
    wanted = [*thresholds, -math.inf]
    return [next(k for k, t in enumerate(wanted) if not t > float(row[k])) for row in confidence]


@st.composite
def cases(draw):
    """Logits (m, N, C), and thresholds of which many are exactly some example's confidence."""
    m, n = draw(st.integers(2, 5)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = (rng.standard_normal((m, n, CLASSES)) * draw(st.sampled_from([0.1, 1.0, 8.0]))).astype(np.float32)
    seen = torch.from_numpy(logits).softmax(dim=2).amax(dim=2).double().numpy()
    kinds = st.sampled_from(["seen", "share", "never", "always"])
    thresholds = []
    for k in range(m - 1):
        values = {"seen": rng.choice(seen[k]), "share": rng.random(), "never": math.inf, "always": 0.0}
        thresholds.append(float(values[draw(kinds)]))
    return logits, thresholds


@settings(deadline=None, max_examples=60)
@given(cases())
def test_all_forms_of_the_rule_agree(case):
    logits, thresholds = case
    m, n, _ = logits.shape
    x = np.ascontiguousarray(logits.transpose(1, 0, 2))
    confidence = torch.from_numpy(x).softmax(dim=2).amax(dim=2).numpy()  # (N, m) float32
    expected = by_the_book(confidence, thresholds)
    assert first_exit(confidence, thresholds).tolist() == expected
    assert first_exit(confidence.astype(np.float64), thresholds).tolist() == expected
    own = ExitThresholds(tuple(thresholds), certified=True, coverage=0.0, guarantee="selective", risk=0.1)
    assert own.leave(confidence).tolist() == expected
    network = network_of(m)
    for policy in (PerExit(tuple(thresholds)), own):
        assert EarlyExitRunner(network, policy).predict(x).exits.tolist() == expected
    on_device = np.stack([_confidence(z, np.float32(1), np.arange(n)) for z in logits], axis=1)
    assert device_of(m, thresholds).predict(x).exits.tolist() == by_the_book(on_device, thresholds)
    correct = np.random.default_rng(0).random((n, m)) < 0.5
    counts = counts_at(confidence, correct, np.array([thresholds]))
    right = correct[np.arange(n), expected]
    assert counts.left.tolist() == [np.bincount(expected, minlength=m).tolist()]
    assert (counts.correct.tolist(), counts.changed.tolist()) == ([right.sum()], [(right != correct[:, -1]).sum()])


@settings(deadline=None, max_examples=20)
@given(cases(), st.sampled_from(THRESHOLDS.tolist()))
def test_one_threshold_for_all_exits_is_the_same_at_each(case, threshold):
    logits, _ = case
    m, n, _ = logits.shape
    x = np.ascontiguousarray(logits.transpose(1, 0, 2))
    confidence = torch.from_numpy(logits).softmax(dim=2).amax(dim=2).T.numpy()
    expected = by_the_book(confidence, [threshold] * (m - 1))
    assert first_exit(confidence, threshold).tolist() == expected
    assert EarlyExitRunner(network_of(m), MaxProb(threshold)).predict(x).exits.tolist() == expected
    y = torch.zeros(n, dtype=torch.int64)
    counts = dynamic_counts(torch.from_numpy(logits), y)
    assert counts.left[THRESHOLDS.tolist().index(threshold)].tolist() == np.bincount(expected, minlength=m).tolist()


def test_a_single_exit_keeps_everybody_and_nan_reaches_nothing():
    assert first_exit(np.array([[0.9], [0.1]]), ()).tolist() == [0, 0]
    assert first_exit(np.array([[0.9], [0.1]]), 0.5).tolist() == [0, 0]
    assert first_exit(np.array([[math.nan, 0.3]]), 0.0).tolist() == [1]


@pytest.mark.parametrize("policy", [0.5, [0.5, 0.5], (0.9,), None, "MaxProb", lambda k, logits, labels: logits])
def test_what_is_no_policy_is_refused_with_what_to_pass(policy):
    network = EarlyExitNetwork([nn.Identity()] * 2, [Exit(nn.Identity(), 3, 2) for _ in range(2)])
    with pytest.raises(ValueError, match=r"policy must say which rows leave: MaxProb\(0\.9\) for one threshold"):
        EarlyExitRunner(network, policy)
