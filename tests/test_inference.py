"""The runner that stops gives what computing everything and choosing afterwards gives, and computes no more."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cafe_flwr.inference import EarlyExitRunner, Entropy, Margin, MaxProb, Patience, PerExit, Prediction
from cafe_flwr.metrics import exit_logits
from cafe_flwr.networks import ConvNet, EarlyExitNetwork, Exit, TextTransformer
from cafe_flwr.personal import fingerprint
from cafe_flwr.risk.thresholds import ExitThresholds

CLASSES = 5


class Pair(nn.Module):
    """Passes a tuple on: rows, and a nested one with what the rows were before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, h):
        x = h if isinstance(h, torch.Tensor) else h[0]
        return torch.tanh(self.layer(x)), (x, torch.stack([x, x], dim=1))


class First(nn.Module):
    def forward(self, h):
        return h[0] + h[1][0] + h[1][1].mean(dim=1)


def spread(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """Confidences all over 0..1."""
    with torch.no_grad():
        for e in network.exits:
            e.head.weight.mul_(6)
    return network.eval()


def conv() -> tuple[EarlyExitNetwork, torch.Tensor]:
    torch.manual_seed(0)
    return spread(ConvNet((1, 8, 8), CLASSES)), 3 * torch.randn(60, 1, 8, 8)


def text() -> tuple[EarlyExitNetwork, torch.Tensor]:
    torch.manual_seed(1)
    network = TextTransformer(vocabulary=30, max_length=6, num_classes=CLASSES, features=12, width=16, blocks=4)
    return spread(network), torch.randint(0, 30, (60, 6))


def batch_norm() -> tuple[EarlyExitNetwork, torch.Tensor]:
    torch.manual_seed(2)
    stages = [nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Tanh()) for _ in range(5)]
    network = EarlyExitNetwork(stages, [Exit(nn.Identity(), 7, CLASSES) for _ in stages])
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.randn(32, 7))
    return spread(network), torch.randn(60, 7)


def tuples() -> tuple[EarlyExitNetwork, torch.Tensor]:
    torch.manual_seed(3)
    stages = [Pair(7) for _ in range(3)]
    return spread(EarlyExitNetwork(stages, [Exit(First(), 7, CLASSES) for _ in stages])), torch.randn(60, 7)


CASES = {make.__name__: make() for make in (conv, text, batch_norm, tuples)}
LOGITS = {name: exit_logits(network, x).double().numpy() for name, (network, x) in CASES.items() if name != "tuples"}
with torch.no_grad():
    LOGITS["tuples"] = torch.stack(CASES["tuples"][0](CASES["tuples"][1])).double().numpy()


def score(policy, p):
    """How much a policy makes of the probabilities of one exit for one row; it leaves from 0 up."""
    ranked = sorted(p)
    if isinstance(policy, MaxProb):
        return ranked[-1] - policy.threshold
    if isinstance(policy, Margin):
        return ranked[-1] - ranked[-2] - policy.threshold
    return policy.threshold + sum(q * math.log(q) for q in p if q > 0) / math.log(len(p))


def reference(policy, logits, temperatures=()):
    """Every exit of every row is known; the first at which the policy lets the row go is taken. And the closest."""
    if isinstance(policy, (PerExit, ExitThresholds)):
        temperatures = policy.temperatures
    scale = np.array(temperatures or [1.0] * len(logits))
    probabilities = softmax(logits / scale[:, None, None], axis=2)
    m, n, _ = probabilities.shape
    exits, closest = [], math.inf
    for row in range(n):
        for k in range(m):
            p = probabilities[:, row]
            if k == m - 1:
                leaves = True
            elif isinstance(policy, Patience):
                said = [int(np.argmax(p[j])) for j in range(k + 1)]
                leaves = len(said) >= policy.count and len(set(said[-policy.count :])) == 1
            else:
                per_exit = isinstance(policy, (PerExit, ExitThresholds))
                value = score(MaxProb(policy.thresholds[k]) if per_exit else policy, p[k])
                closest, leaves = min(closest, abs(value)), value >= 0
            if leaves:
                exits.append(k)
                break
    chosen = probabilities[exits, np.arange(n)]
    return chosen.argmax(1), np.array(exits), chosen.max(1), closest


def agree(found: Prediction, expected) -> None:
    labels, exits, confidence, _ = expected
    np.testing.assert_array_equal(found.exits, exits)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.confidence, confidence, atol=1e-5)
    assert (found.labels.dtype, found.exits.dtype, found.confidence.dtype) == (np.int64, np.int64, np.float32)


shares = st.floats(0, 1)
POLICIES = st.one_of(
    shares.map(MaxProb), shares.map(Entropy), shares.map(Margin), st.integers(1, 6).map(Patience), st.just("per exit")
)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    case=st.sampled_from(sorted(CASES)),
    policy=POLICIES,
    batch_size=st.sampled_from([1, 7, 60, 256]),
    scaled=st.booleans(),
    data=st.data(),
)
def test_same_labels_and_exits_as_computing_everything_and_choosing_afterwards(case, policy, batch_size, scaled, data):
    network, x = CASES[case]
    m = network.num_exits
    temperatures = tuple(data.draw(st.lists(st.floats(0.3, 3), min_size=m, max_size=m))) if scaled else ()
    if policy == "per exit":
        thresholds = data.draw(st.lists(st.one_of(shares, st.just(math.inf)), min_size=m - 1, max_size=m - 1))
        policy, temperatures = PerExit(tuple(thresholds), temperatures), ()
    expected = reference(policy, LOGITS[case], temperatures)
    assume(expected[3] > 1e-5)
    agree(EarlyExitRunner(network, policy, batch_size=batch_size, temperatures=temperatures).predict(x), expected)


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize(
    ("first", "none"),
    [
        (MaxProb(0.0), MaxProb(math.inf)),
        (Entropy(1.0), Entropy(-math.inf)),
        (Margin(0.0), Margin(math.inf)),
        (Patience(1), Patience(9)),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 60])
def test_all_leave_at_once_and_none_leave(case, first, none, batch_size):
    network, x = CASES[case]
    for policy, k in ((first, 0), (none, network.num_exits - 1)):
        found = EarlyExitRunner(network, policy, batch_size=batch_size).predict(x)
        assert set(found.exits) == {k}
        agree(found, reference(policy, LOGITS[case]))


@pytest.mark.parametrize("case", ["text", "batch_norm"])
def test_patience_forgets_the_exits_before_the_last_few(case):
    network, x = CASES[case]
    found = EarlyExitRunner(network, Patience(2)).predict(x)
    agree(found, reference(Patience(2), LOGITS[case]))
    first, late = LOGITS[case][0].argmax(axis=1), (found.exits > 1) & (found.exits < network.num_exits - 1)
    assert (first != found.labels)[late].any()


def test_calibrated_thresholds_leave_where_they_say_themselves():
    network, x = CASES["conv"]
    temperatures = (0.8, 1.2, 1.0)
    thresholds = ExitThresholds(
        (0.71, 0.55), True, 0.5, "selective", 0.05, temperatures=temperatures, fingerprint=fingerprint(network)
    )
    found = EarlyExitRunner(network, thresholds).predict(x)
    confidence = softmax(LOGITS["conv"] / np.array(temperatures)[:, None, None], axis=2).max(axis=2).T
    np.testing.assert_array_equal(found.exits, thresholds.leave(confidence))
    assert set(found.exits) == {0, 1, 2}
    agree(found, reference(thresholds, LOGITS["conv"]))


def test_a_policy_of_ones_own_sees_the_rows_that_are_still_there():
    network, x = CASES["batch_norm"]
    full = LOGITS["batch_norm"].argmax(axis=2)
    seen = []

    class ByClass:
        def leaves(self, k, logits, labels):
            assert logits.shape == (len(labels), CLASSES)
            assert torch.equal(labels[:, -1], logits.argmax(1))
            seen.append(labels.numpy())
            return labels[:, -1] == k

    found = EarlyExitRunner(network, ByClass()).predict(x)
    there = np.arange(60)
    for k, labels in enumerate(seen):
        np.testing.assert_array_equal(labels, full[: k + 1, there].T)
        there = there[full[k, there] != k]
    np.testing.assert_array_equal(found.exits[there], 4)


# --- no more is computed than needed ---


@pytest.mark.parametrize(("case", "batch_size"), [("conv", 60), ("conv", 1), ("text", 60), ("tuples", 20)])
def test_rows_that_left_are_not_computed_further(case, batch_size):
    network, x = CASES[case]
    rows = [0] * network.num_exits
    calls = [0] * network.num_exits

    def note(k):
        def hook(module, args, output):
            h = args[0][0] if isinstance(args[0], tuple) else args[0]
            rows[k] += len(h)
            calls[k] += 1

        return hook

    handles = [stage.register_forward_hook(note(k)) for k, stage in enumerate(network.stages)]
    try:
        found = EarlyExitRunner(network, MaxProb(0.6), batch_size=batch_size).predict(x)
    finally:
        for handle in handles:
            handle.remove()
    there = [int((found.exits >= k).sum()) for k in range(network.num_exits)]
    assert there[0] > there[1] > 0
    assert rows == there
    if batch_size == 1:
        assert calls == there


def test_later_stages_do_not_run_when_nobody_is_left():
    network = EarlyExitNetwork([nn.Linear(3, 4), nn.Linear(99, 1)], [Exit(nn.Identity(), 4, 2) for _ in range(2)])
    assert EarlyExitRunner(network, MaxProb(0.0)).predict(torch.randn(5, 3)).exits.tolist() == [0] * 5
    with pytest.raises(RuntimeError):  # the second stage cannot run
        EarlyExitRunner(network, MaxProb(math.inf)).predict(torch.randn(5, 3))


def test_exits_by_which_nobody_may_leave_are_not_computed():
    network, x = CASES["text"]
    seen = []
    handles = [e.register_forward_hook(lambda *_, k=k: seen.append(k)) for k, e in enumerate(network.exits)]
    policy = PerExit((math.inf, 0.6, math.inf))
    try:
        found = EarlyExitRunner(network, policy).predict(x)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [1, 3]
    assert set(found.exits) == {1, 3}
    agree(found, reference(policy, LOGITS["text"]))


def test_nothing_is_copied_while_all_rows_stay():
    network, x = CASES["conv"]
    given, taken = [], []
    handles = [
        network.stages[0].register_forward_hook(lambda module, args, output: given.append(output)),
        network.stages[1].register_forward_pre_hook(lambda module, args: taken.append(args[0])),
    ]
    try:
        EarlyExitRunner(network, MaxProb(math.inf)).predict(x)
        EarlyExitRunner(network, MaxProb(0.6)).predict(x)
    finally:
        for handle in handles:
            handle.remove()
    assert taken[0] is given[0]
    assert len(taken[1]) < len(given[1])


# --- what goes in ---


def test_the_same_from_a_tensor_an_array_a_loader_and_a_stream():
    network, x = CASES["conv"]
    runner = EarlyExitRunner(network, MaxProb(0.6), batch_size=16)
    expected = runner.predict(x)
    assert set(expected.exits) == {0, 1, 2}
    y = torch.zeros(60)
    inputs = {
        "array": x.double().numpy(),
        "loader of pairs": DataLoader(TensorDataset(x, y), batch_size=13),
        "list of arrays": [part.numpy() for part in x.split(31)],
        "stream of pairs": ((part, None) for part in x.split(9)),
    }
    for name, rows in inputs.items():
        found = runner.predict(rows)
        np.testing.assert_array_equal(found.exits, expected.exits, err_msg=name)
        np.testing.assert_array_equal(found.labels, expected.labels, err_msg=name)
        np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-5, err_msg=name)


def test_a_stream_is_read_as_it_comes():
    network, x = CASES["conv"]
    runner, done = EarlyExitRunner(network, MaxProb(0.6)), []
    handle = network.stages[0].register_forward_hook(lambda *_: done.append(len(read)))
    read = []

    def stream():
        for part in x.split(20):
            read.append(len(part))
            yield part

    try:
        runner.predict(stream())
    finally:
        handle.remove()
    assert done == [1, 2, 3]


@pytest.mark.parametrize("empty", [torch.zeros(0, 1, 8, 8), np.zeros((0, 1, 8, 8)), [], [torch.zeros(0, 1, 8, 8)]])
def test_no_rows_give_no_rows(empty):
    found = EarlyExitRunner(CASES["conv"][0], MaxProb(0.6)).predict(empty)
    assert len(found.labels) == len(found.exits) == len(found.confidence) == 0
    assert (found.labels.dtype, found.exits.dtype, found.confidence.dtype) == (np.int64, np.int64, np.float32)
    assert math.isnan(found.mean_macs([1, 2, 3]))


def test_empty_batches_in_a_stream_are_passed_over():
    network, x = CASES["conv"]
    runner = EarlyExitRunner(network, MaxProb(0.6))
    np.testing.assert_array_equal(runner.predict([x[:3], x[:0], x[3:9]]).exits, runner.predict(x[:9]).exits)


def test_every_module_is_left_in_the_mode_it_was_in():
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.5), nn.BatchNorm1d(7)) for _ in range(2)]
    network = EarlyExitNetwork(stages, [Exit(nn.Identity(), 7, 3) for _ in stages])
    network.train()
    network.stages[0][2].eval()  # frozen, on purpose
    before = {name: module.training for name, module in network.named_modules()}
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    runner, x = EarlyExitRunner(network, MaxProb(0.5)), torch.randn(40, 7)
    first, again = runner.predict(x), runner.predict(x)
    np.testing.assert_array_equal(first.confidence, again.confidence)  # no dropout
    with pytest.raises(ValueError, match="a batch must be"):
        runner.predict([x, "text"])
    assert {name: module.training for name, module in network.named_modules()} == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_macs_of_rows():
    rows = Prediction(np.array([0, 0, 0]), np.array([0, 2, 1]), np.array([1, 1, 1], dtype=np.float32))
    assert rows.macs([10, 20, 60]).tolist() == [10, 60, 20]
    assert rows.mean_macs([10, 20, 60]) == 30


def test_a_progress_bar_counts_batches(capsys):
    network, x = CASES["conv"]
    EarlyExitRunner(network, MaxProb(0.6), batch_size=20, progress=True).predict(x)
    assert "3/3" in capsys.readouterr().out
    EarlyExitRunner(network, MaxProb(0.6), progress=True).predict(part for part in x.split(30))
    assert "2/?" in capsys.readouterr().out
    EarlyExitRunner(network, MaxProb(0.6)).predict(x)
    assert capsys.readouterr().out == ""


# --- what is refused ---


def test_thresholds_of_another_network_are_refused():
    network, _ = conv()
    known, strict = fingerprint(network), {"certified": True, "coverage": 0.5, "guarantee": "gap", "risk": 0.1}
    for thresholds in (
        PerExit((0.5, 0.5), fingerprint=known),
        ExitThresholds((0.5, 0.5), **strict, fingerprint=known),
    ):
        EarlyExitRunner(network, thresholds)
        other, _ = conv()
        with torch.no_grad():
            other.exits[1].head.bias[0] += 1e-3
        with pytest.raises(ValueError, match=f"{known}.*{fingerprint(other)}"):
            EarlyExitRunner(other, thresholds)


def test_thresholds_of_another_number_of_exits_are_refused():
    network = CASES["conv"][0]
    for thresholds in (PerExit((0.5,)), PerExit((0.5,) * 3), ExitThresholds((0.5,), True, 0.5, "gap", 0.1)):
        with pytest.raises(ValueError, match="do not fit a network of 3 exits: it needs 2"):
            EarlyExitRunner(network, thresholds)
    with pytest.raises(ValueError, match="leave the temperatures out"):
        EarlyExitRunner(network, PerExit((0.5, 0.5), (1.0, 2.0, 1.0)), temperatures=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("make", [MaxProb, Entropy, Margin])
@pytest.mark.parametrize("threshold", [-0.1, 1.1, 60.0, math.nan])
def test_thresholds_that_are_no_shares_are_refused(make, threshold):
    with pytest.raises(ValueError, match=f"threshold of {make.__name__} must be in 0..1"):
        make(threshold)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_patience_that_counts_nothing_is_refused(count):
    with pytest.raises(ValueError, match="whole number from 1 up"):
        Patience(count)


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (1.0, 1.0, 0.0), (1.0, 1.0, math.inf), (1.0, 1.0, math.nan)])
def test_temperatures_that_do_not_fit_are_refused(temperatures):
    with pytest.raises(ValueError, match="3 positive numbers"):
        EarlyExitRunner(CASES["conv"][0], MaxProb(0.5), temperatures=temperatures)
    with pytest.raises(ValueError, match="3 positive numbers"):
        PerExit((0.5, 0.5), temperatures)


@pytest.mark.parametrize("thresholds", [(-0.1, 0.5), (math.nan, 0.5)])
def test_thresholds_per_exit_are_numbers_from_0_up(thresholds):
    with pytest.raises(ValueError, match="numbers from 0 up"):
        PerExit(thresholds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused():
    for device in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"'{device}' cannot be used here .*choose another"):
            EarlyExitRunner(CASES["conv"][0], MaxProb(0.5), device=device)


def test_a_device_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'gpu' cannot be used here"):
        EarlyExitRunner(CASES["conv"][0], MaxProb(0.5), device="gpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("case", sorted(CASES))
def test_the_same_on_cuda(case):
    network, x = {make.__name__: make for make in (conv, text, batch_norm, tuples)}[case]()
    expected = EarlyExitRunner(network, MaxProb(0.6)).predict(x)
    found = EarlyExitRunner(network, MaxProb(0.6), device="cuda").predict(x)
    np.testing.assert_array_equal(found.exits, expected.exits)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-3)


def test_the_offset_goes_where_the_network_goes():
    network, x = conv()
    network.offset = torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0], dtype=torch.float32)
    found = EarlyExitRunner(network, MaxProb(0.9), device="cpu").predict(x)
    agree(found, reference(MaxProb(0.9), exit_logits(network, x).double().numpy()))
    assert (found.labels == 1).mean() > 0.5


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_a_batch_size_that_is_none_is_refused(batch_size):
    with pytest.raises(ValueError, match="batch_size must be a whole number from 1 up"):
        EarlyExitRunner(CASES["conv"][0], MaxProb(0.5), batch_size=batch_size)


@pytest.mark.parametrize("given", [(torch.zeros(1), torch.zeros(1)), "x.npy", {"x": 1}, 3, torch.tensor(1.0)])
def test_an_input_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="the input"):
        EarlyExitRunner(CASES["conv"][0], MaxProb(0.5)).predict(given)


def test_rows_that_are_not_numbers_are_refused():
    network, x = CASES["conv"]
    x = x.clone()
    x[41, 0, 0, 0] = math.nan
    for policy in (MaxProb(0.5), Entropy(0.5), Margin(0.5), Patience(2)):
        with pytest.raises(ValueError, match="of 1 rows are not numbers, the first is row 41"):
            EarlyExitRunner(network, policy, batch_size=16).predict(x)


def test_norms_by_the_batch_at_hand_are_refused():
    """There a row's answer depends on who else is still in the batch."""
    stages = [nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7)) for _ in range(2)]
    network = EarlyExitNetwork(stages, [Exit(nn.Identity(), 7, 3) for _ in stages])
    EarlyExitRunner(network, MaxProb(0.5))
    network.statistics = "drop"
    with pytest.raises(ValueError, match=r"stages\.0\.1 normalises by the statistics of the batch"):
        EarlyExitRunner(network, MaxProb(0.5))


def test_a_network_of_one_class_is_refused():
    network = EarlyExitNetwork([nn.Linear(2, 2)], [Exit(nn.Identity(), 2, 1)])
    with pytest.raises(ValueError, match="two classes or more"):
        EarlyExitRunner(network, MaxProb(0.5))


def test_a_stage_output_whose_rows_cannot_be_dropped_is_refused():
    class Wrapped(nn.Module):
        def forward(self, x):
            return {"h": x}

    class Unwrap(nn.Module):
        def forward(self, h):
            return h["h"]

    network = EarlyExitNetwork([Wrapped(), nn.Identity()], [Exit(Unwrap(), 3, 2) for _ in range(2)])
    with torch.no_grad():
        network.exits[0].head.weight.mul_(10)
    with pytest.raises(ValueError, match="stage 1 gives a dict"):
        EarlyExitRunner(network, MaxProb(0.8)).predict(torch.randn(50, 3))
