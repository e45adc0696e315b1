"""The text Transformer: padding does not matter, stepping is running, bad texts are refused."""

import pytest
import torch
from torch import nn

from cafe_flwr.cost import macs_per_exit
from cafe_flwr.metrics import exit_features, exit_logits
from cafe_flwr.networks import TextTransformer, batch_norm_names

NORMS = ["layer", "group", "batch"]


def build(norm="layer", **more):
    torch.manual_seed(0)
    sizes = {"vocabulary": 50, "max_length": 12, "num_classes": 3, "features": 6, "width": 16, "heads": 2, "norm": norm}
    return TextTransformer(**{**sizes, **more})


def texts():
    """Of lengths 5, 3, 1 and 0, padded to 7."""
    tokens = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((5, 3, 1, 0)):
        tokens[row, length:] = 0
    return tokens


@pytest.mark.parametrize("norm", NORMS)
def test_stepping_is_running_and_rows_can_be_dropped(norm):
    network, x = build(norm).eval(), texts()
    together, h = network(x), x
    assert len(together) == 4
    for k in range(4):
        h = network.stage(k, h)
        features, logits = network.exit(k, h)
        assert torch.equal(logits, together[k])
        assert features.shape == (4, 6)
        fewer = network.exit(k, h[[2, 0]])[1]
        torch.testing.assert_close(fewer, logits[[2, 0]], rtol=1e-4, atol=1e-5)
    h = network.stage(0, x)[[3, 1]]  # two leave after the first stage
    torch.testing.assert_close(network.exit(1, network.stage(1, h))[1], together[1][[3, 1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("norm", NORMS)
def test_padding_does_not_matter(norm, mode):
    """More of it changes nothing, in training (statistics of batch norms included) as in evaluation; without the mask
    in attention, in the mean or in the norm this fails."""
    network, other = build(norm, dropout=0.0), build(norm, dropout=0.0)
    for n in (network, other):
        n.train(mode == "training")
    x = texts()[:3]
    short, long = network(x[:, :5]), other(torch.cat([x, torch.zeros(3, 5, dtype=torch.int64)], dim=1))
    for a, b in zip(short, long, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name in batch_norm_names(network):
        torch.testing.assert_close(network.state_dict()[name], other.state_dict()[name])
    assert bool(batch_norm_names(network)) == (norm == "batch")


def test_what_is_at_padding_is_never_seen():
    """Even after the embedding of padding is changed, and after a stage: only tokens count."""
    network, x = build().eval(), texts()[:3]
    before = network(x)
    with torch.no_grad():
        network.stages[0][0].token.weight[0] += 5.0
    for a, b in zip(before, network(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_an_empty_text_is_one_padding_token(norm):
    network = build(norm, dropout=0.0)
    for training in (True, False):
        logits = network.train(training)(texts())
        assert all(z.isfinite().all() for z in logits)
    sum(z.square().sum() for z in network.train()(texts())).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_order_and_words_matter():
    network = build().eval()
    x = torch.tensor([[5, 9, 3], [3, 9, 5], [5, 9, 4]])
    for z in network(x):
        assert (z[0] - z[1]).abs().max() > 1e-4
        assert (z[0] - z[2]).abs().max() > 1e-4


def test_an_exit_depends_on_its_own_blocks_only():
    network = build(dropout=0.0)
    for k in range(4):
        network.zero_grad(set_to_none=True)
        network(texts())[k].square().sum().backward()
        expected = (f"exits.{k}.", *(f"stages.{j}." for j in range(k + 1)))
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == name.startswith(expected), name


def test_costs_count_attention():
    """By hand, a block of width d on L tokens: 4d² + 8d² for the linear layers, 2Ld for the attention, per token."""
    length, d = 7, 16
    costs = macs_per_exit(build(), texts())
    block, leave = length * (12 * d * d + 2 * length * d), d * 6 + 6 * 3
    assert costs == [(k + 1) * (block + leave) for k in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_it_learns_what_a_text_is_about(norm):
    """The class is which of three words is in the text, anywhere; every exit finds out."""
    network = build(norm, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(10, 50, (96, 8), generator=generator)
    y = torch.arange(96) % 3
    x[torch.arange(96), torch.randint(0, 6, (96,), generator=generator)] = 1 + y
    x[::2, 6:] = 0
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(z, y) for z in network(x)).backward()
        optimizer.step()
    for z in network.eval()(x):
        assert (z.argmax(1) == y).float().mean() > 0.95


@pytest.mark.parametrize("policy", ["average", "personal", "drop"])
def test_batch_norm_follows_the_policy_for_statistics(policy):
    network = build("batch")
    network.statistics = policy
    assert network.train()(texts())[0].isfinite().all()
    assert network.eval()(texts())[0].isfinite().all()
    running = {n for n in batch_norm_names(network) if "num_batches" not in n}
    assert len(running) == (0 if policy == "drop" else 16)
    assert running <= set(network.personal_names() if policy == "personal" else network.shared_names())


def test_measuring_takes_texts_as_it_takes_images():
    network, x = build(), texts()
    assert exit_logits(network, x).shape == (4, 4, 3)
    assert exit_features(network, x).shape == (4, 4, 6)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
def test_every_stage_and_exit_can_be_exported(norm):
    network, h = build(norm).eval(), texts()
    batch = torch.export.Dim("batch", min=2)
    for k in range(4):
        for module, call in ((network.stages[k], network.stage), (network.exits[k], network.exit)):
            if call == network.exit:
                h = network.stage(k, h)
            program = torch.export.export(module, (h,), dynamic_shapes=({0: batch},)).module()
            torch.testing.assert_close(program(h[:3]), call(k, h[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("instance"), "norm must be one of layer, group, batch; got 'instance'"),
        (lambda: build(width=15), "width must be a multiple of 2 for 2 heads and layer norm, got 15"),
        (lambda: build("group", width=6), "width must be a multiple of 4 for 2 heads and group norm, got 6"),
        (lambda: build()(torch.ones(2, 13, dtype=torch.int64)), "13 tokens, the network takes 12: shorten them"),
        (lambda: build()(torch.ones(2, 5)), r"\(B, L\) int64; got torch.float32"),
        (lambda: build()(torch.ones(5, dtype=torch.int64)), r"of shape \(5,\)"),
    ],
)
def test_what_does_not_fit_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
