"""ResNet-18 with exits, and what becomes of the running statistics of batch norms."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from cafe_flwr.core.schema import Schema
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.networks import ConvNet, EarlyExitNetwork, Exit, ResNet18, batch_norm_names


def small(norm="batch", size=16, **more):
    torch.manual_seed(0)
    return ResNet18((3, size, size), num_classes=5, features=6, norm=norm, width=8, **more)


def maps(network, x):
    """Shapes of what the stages give."""
    shapes = []
    for k in range(network.num_exits):
        x = network.stage(k, x)
        shapes.append(tuple(x.shape[1:]))
    return shapes


# --- the network ---


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_stepping_is_running_and_all_exits_are_comparable(norm):
    network, x = small(norm), torch.randn(3, 3, 16, 16)
    together, h = network.eval()(x), x
    for k in range(4):
        h = network.stage(k, h)
        features, logits = network.exit(k, h)
        assert torch.equal(logits, together[k])
        assert features.shape == (3, 6)
        head = network.exits[k].head
        torch.testing.assert_close(features @ head.weight.T + head.bias, logits)
    # Rows that left are dropped from the batch; the others come out the same.
    for a, b in zip(together, network(x[[2, 0]]), strict=True):
        torch.testing.assert_close(a[[2, 0]], b, rtol=1e-4, atol=1e-5)


def test_it_is_torchvisions_resnet18_but_for_the_stem_and_the_exits():
    """With the same weights, the stages give what torchvision's layers give behind the same stem."""
    network = ResNet18((3, 32, 32), num_classes=10, norm="batch")
    theirs = resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    stem = {f"stages.0.{i}.": f"{name}." for i, name in enumerate(("conv1", "bn1"))}
    blocks = {f"stages.{k}.{b + 3 * (k == 0)}.": f"layer{k + 1}.{b}." for k in range(4) for b in range(2)}
    ours = {k: v for k, v in network.state_dict().items() if k.startswith("stages")}
    renamed = {}
    for name, tensor in ours.items():
        (prefix,) = [p for p in {**stem, **blocks} if name.startswith(p)]
        renamed[{**stem, **blocks}[prefix] + name.removeprefix(prefix)] = tensor
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    x = h = torch.randn(2, 3, 32, 32)
    network.eval(), theirs.eval()
    theirs.fc = nn.Identity()
    for k in range(4):
        h = network.stage(k, h)
    torch.testing.assert_close(h.mean((2, 3)), theirs(x))


def test_maps_and_costs_at_both_sizes():
    """CIFAR stem: nothing is halved before the second stage; on 64×64 four times the MACs, unless the stem strides."""
    assert maps(small(size=32), torch.zeros(1, 3, 32, 32)) == [(8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert maps(small(size=64), torch.zeros(1, 3, 64, 64)) == [(8, 64, 64), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    strided = small(size=64, stem_stride=2)
    assert maps(strided, torch.zeros(1, 3, 64, 64)) == [(8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
    costs = macs_per_exit(small(size=32), torch.zeros(1, 3, 32, 32))
    # By hand, first exit at 32×32: stem 27·8, four 3×3 convolutions 8→8 at each of 1024 places; 8·6 + 6·5 at the exit.
    assert costs[0] == 1024 * (27 * 8 + 4 * 72 * 8) + 8 * 6 + 6 * 5
    assert costs == sorted(set(costs))
    larger = macs_per_exit(small(size=64), torch.zeros(1, 3, 64, 64))
    assert larger[0] == 4096 * (27 * 8 + 4 * 72 * 8) + 8 * 6 + 6 * 5


def test_group_norm_has_no_statistics_and_groups_divide_any_even_width():
    assert batch_norm_names(small("group")) == []
    for width in (2, 6, 24, 64, 96):
        network = ResNet18((1, 8, 8), num_classes=2, width=width, features=2)
        norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
        assert len(norms) == 20  # the stem's, two in each of eight blocks, three shortcuts
        assert all(m.num_channels >= 2 * m.num_groups for m in norms)
        assert max(m.num_groups for m in norms) <= 32
    assert {m.num_groups for m in ResNet18((3, 32, 32), 2).modules() if isinstance(m, nn.GroupNorm)} == {32}


@pytest.mark.slow
def test_it_learns():
    """Every exit tells four patterns apart after a few steps, with either norm."""
    for norm in ("group", "batch"):
        network = small(norm)
        x = torch.randn(4, 3, 16, 16).repeat(8, 1, 1, 1) + 0.1 * torch.randn(32, 3, 16, 16)
        y = torch.arange(4).repeat(8)
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            sum(nn.functional.cross_entropy(z, y) for z in network(x)).backward()
            optimizer.step()
        for z in network.eval()(x):
            assert (z.argmax(1) == y).float().mean() > 0.95, norm


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (3, 7, 32)}, "at least 8 pixels high and wide"),
        ({"input_shape": (3, 8, 8), "stem_stride": 2}, "at least 16 pixels"),
        ({"input_shape": (32, 32)}, r"shape \(32, 32\)"),
        ({"input_shape": (3, 32, 32), "norm": "layer"}, "norm must be one of group, batch; got 'layer'"),
        ({"input_shape": (3, 32, 32), "width": 7}, "even number of channels, got 7"),
    ],
)
def test_what_cannot_be_built_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNet18(num_classes=3, **arguments)


# --- running statistics ---


def counters(network):
    return {name for name in network.state_dict() if name.endswith("num_batches_tracked")}


def test_names_of_statistics_are_all_of_them():
    network = small()
    names = batch_norm_names(network)
    assert len(names) == 3 * 20 == len(set(names))
    assert set(names) == set(network.state_dict()) - dict(network.named_parameters()).keys()
    assert batch_norm_names(nn.BatchNorm1d(2)) == ["running_mean", "running_var", "num_batches_tracked"]


def test_policies_say_where_statistics_go():
    """average: with the backbone; personal: with the classifiers; counters nowhere. Affine parameters stay shared."""
    network = small()
    assert network.statistics == "average"
    running = set(batch_norm_names(network)) - counters(network)
    state = set(network.state_dict())
    shared, personal = set(network.shared_names()), set(network.personal_names())
    assert running <= shared
    assert shared | personal == state - counters(network)
    network.statistics = "personal"
    assert set(network.shared_names()) == shared - running
    assert set(network.personal_names()) == personal | running
    assert set(network.classifier_names()) == personal
    assert {"stages.0.1.weight", "stages.0.1.bias"} <= set(network.shared_names())
    network.statistics = "average"
    assert (set(network.shared_names()), set(network.personal_names())) == (shared, personal)


def test_dropped_statistics_are_neither_kept_nor_used():
    network, x = small(), torch.randn(4, 3, 16, 16)
    shared = set(network.shared_names())
    network.train()
    while_training = network(x)
    network.statistics = "drop"
    assert batch_norm_names(network) == []
    assert set(network.state_dict()) == dict(network.named_parameters()).keys()
    assert set(network.shared_names()) == shared & set(network.state_dict())
    for a, b in zip(while_training, network.eval()(x), strict=True):  # evaluation normalises by the batch, too
        torch.testing.assert_close(a, b)
    fresh = small()
    fresh.statistics = "drop"
    fresh.load_state_dict(dict(network.state_dict()))
    with pytest.raises(ValueError, match="dropped: build it anew for 'average'"):
        network.statistics = "average"
    network.statistics = "drop"  # once more is no error
    assert copy.deepcopy(network).statistics == "drop"


def test_an_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match="one of average, personal, drop; got 'keep'"):
        small().statistics = "keep"


@pytest.mark.parametrize("policy", ["average", "personal"])
def test_statistics_travel_as_float32_and_arrive(policy):
    """A round trip as a client makes it: the shared part flat, the rest from its disk, counters from the start."""
    network = small()
    network.statistics = policy
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()(torch.randn(8, 3, 16, 16))
    after = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    schema = Schema.of(after, network.shared_names())
    kept = {name: after[name] for name in network.personal_names()}
    flat = schema.pack(after)
    assert flat.dtype == "float32"
    network.load_state_dict({**start, **schema.unpack(flat), **kept})
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == start[name].dtype, name
        assert torch.equal(tensor, start[name] if name in counters(network) else after[name]), name
    assert not torch.equal(after["stages.0.1.running_mean"], start["stages.0.1.running_mean"])


def test_counters_of_a_whole_model_survive_the_wire_as_integers():
    """Methods that send everything send counters, too: float32 on the way, whole numbers again in the network."""
    network = small()
    for _ in range(3):
        network.train()(torch.randn(2, 3, 16, 16))
    schema = Schema.of(network.state_dict(), list(network.state_dict()))
    other = small()
    other.load_state_dict(schema.unpack(schema.pack(network.state_dict())))
    for name in counters(other):
        assert other.state_dict()[name].dtype == torch.int64
        assert other.state_dict()[name] == 3


def test_networks_without_batch_norm_do_not_care():
    for policy in ("average", "personal", "drop"):
        network = ConvNet((1, 8, 8), num_classes=3)
        names = network.shared_names(), network.personal_names(), list(network.state_dict())
        network.statistics = policy
        assert (network.shared_names(), network.personal_names(), list(network.state_dict())) == names


def test_statistics_in_an_exit_are_statistics_as_well():
    projection = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    network = EarlyExitNetwork([nn.Tanh()], [Exit(projection, 4, 2)])
    network.statistics = "personal"
    running = ["exits.0.projection.1.running_mean", "exits.0.projection.1.running_var"]
    assert network.personal_names() == ["exits.0.head.weight", "exits.0.head.bias", *running]
