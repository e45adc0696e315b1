"""Early-exit networks: stepping equals running, and names say what is shared."""

import pytest
import torch
from torch import nn

from cafe_flwr.networks import (
    ConvNet,
    EarlyExitNetwork,
    Exit,
    PublishedConvNet,
    PublishedResNet18,
    PublishedTransformer,
    ResNet18,
    SequenceNet,
    TextTransformer,
)

CONFIGURATIONS = [
    {"input_shape": (1, 16, 16), "num_classes": 10},
    {"input_shape": (3, 9, 17), "num_classes": 4},  # neither square nor a power of two
    {"input_shape": (1, 2, 3), "num_classes": 2, "widths": (4,)},  # one exit, the smallest image
    {"input_shape": (2, 16, 16), "num_classes": 3, "widths": (4, 8, 4, 12), "features": 5},
]


@pytest.fixture(params=CONFIGURATIONS, ids=lambda c: "x".join(map(str, c["input_shape"])))
def case(request):
    torch.manual_seed(0)
    network = ConvNet(**request.param)
    x = torch.randn(5, *request.param["input_shape"])
    return network, x, request.param


def test_stepping_through_the_stages_gives_what_forward_gives(case):
    network, x, configuration = case
    together = network(x)
    assert len(together) == network.num_exits == len(configuration.get("widths", (8, 16, 32)))
    h = x
    for k in range(network.num_exits):
        h = network.stage(k, h)
        features, logits = network.exit(k, h)
        assert torch.equal(logits, together[k])
        assert logits.shape == (5, configuration["num_classes"])
        assert features.shape == (5, configuration.get("features", 24))
        # The head is linear in the features: what makes mixing heads meaningful.
        head = network.exits[k].head
        torch.testing.assert_close(features @ head.weight.T + head.bias, logits)


def test_rows_do_not_depend_on_the_rest_of_the_batch(case):
    """Rows that left early are dropped from the batch; those that stay must come out the same, in either mode."""
    network, x, _ = case
    for mode in (True, False):
        network.train(mode)
        together = network(x)
        alone = network(x[[3, 1]])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[[3, 1]], b, rtol=1e-4, atol=1e-5)


def test_shared_and_personal_names_partition_the_state(case):
    network, _, _ = case
    shared, personal = network.shared_names(), network.personal_names()
    assert len(set(shared)) == len(shared)
    assert len(set(personal)) == len(personal)
    assert not set(shared) & set(personal)
    assert set(shared) | set(personal) == set(network.state_dict())
    # Personal are the linear classifiers and nothing else; projections are shared.
    classifiers = {id(t) for e in network.exits for t in (e.head.weight, e.head.bias)}
    parameters = dict(network.named_parameters())
    assert {id(parameters[name]) for name in personal} == classifiers
    assert any("projection" in name for name in shared)


def test_heads_of_all_exits_have_the_same_shape_and_their_own_names(case):
    network, _, configuration = case
    shapes = set()
    for k in range(network.num_exits):
        weight, bias = (network.state_dict()[name] for name in network.head_names(k))
        assert weight.data_ptr() == network.exits[k].head.weight.data_ptr()
        shapes.add((tuple(weight.shape), tuple(bias.shape)))
    classes = configuration["num_classes"]
    assert shapes == {((classes, configuration.get("features", 24)), (classes,))}
    assert network.num_classes == classes
    assert [name for k in range(network.num_exits) for name in network.head_names(k)] == network.personal_names()


def test_an_exit_depends_on_its_own_stages_only():
    """Exit k has a gradient in stages 0..k and in its own projection and head, and nowhere else."""
    torch.manual_seed(0)
    network = ConvNet((1, 16, 16), num_classes=10)
    for k in range(3):
        network.zero_grad(set_to_none=True)
        network(torch.randn(2, 1, 16, 16))[k].square().sum().backward()
        expected = (f"exits.{k}.", *(f"stages.{j}." for j in range(k + 1)))
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == name.startswith(expected), name


def test_left_and_right_stay_apart():
    """The same bar left or right is not the same to any exit, as "27" is not "72"; global average pooling would
    see hardly any difference."""
    torch.manual_seed(0)
    network = ConvNet((1, 16, 16), num_classes=10)
    x = torch.zeros(1, 1, 16, 16)
    x[..., 4:12, 1:6] = 1.0
    for a, b in zip(network(x), network(torch.roll(x, 9, dims=3)), strict=True):
        assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 7, 16), 10), "at least 8 pixels high and wide for 3 blocks"),
        (((1, 16, 7), 10), "at least 8 pixels"),
        (((1, 16, 16), 10, (4, 4, 4, 4, 4)), "at least 32 pixels high and wide for 5 blocks"),
        (((16, 16), 10), r"shape \(16, 16\)"),
        (((1, 4, 16, 16), 10), r"shape \(1, 4, 16, 16\)"),
    ],
)
def test_images_that_are_too_small_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(*arguments)
    ConvNet((1, 8, 8), 10)  # the smallest that is large enough


def linear_exit(width, classes, inputs=4):
    return Exit(nn.Linear(inputs, width), width, classes)


def test_any_modules_make_an_early_exit_network():
    network = EarlyExitNetwork([nn.Linear(3, 4), nn.Tanh()], [linear_exit(2, 5), linear_exit(2, 5)])
    assert [tuple(z.shape) for z in network(torch.zeros(7, 3))] == [(7, 5), (7, 5)]
    assert (network.num_exits, network.num_classes) == (2, 5)


@pytest.mark.parametrize(
    ("stages", "exits", "message"),
    [
        ([], [], "got 0 stages and 0 exits"),
        ([nn.Tanh()], [linear_exit(2, 5), linear_exit(2, 5)], "got 1 stages and 2 exits"),
        ([nn.Tanh(), nn.Tanh()], [linear_exit(2, 5), linear_exit(3, 6)], "the same classes, got 5, 6"),
    ],
)
def test_exits_that_do_not_fit_are_an_error(stages, exits, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitNetwork(stages, exits)


# --- the offset ---


def test_an_offset_is_added_to_the_logits_of_every_exit(case):
    """In forward as well as step by step; features are as they were, and None is no offset."""
    network, x, configuration = case
    plain = network(x)
    network.offset = torch.linspace(-3, 2, configuration["num_classes"])
    h = x
    for k, (z, together) in enumerate(zip(plain, network(x), strict=True)):
        h = network.stage(k, h)
        features, logits = network.exit(k, h)
        assert torch.equal(together, z + network.offset)
        assert torch.equal(logits, together)
        head = network.exits[k].head
        torch.testing.assert_close(features @ head.weight.T + head.bias, z)
    network.offset = None
    for a, b in zip(plain, network(x), strict=True):
        assert torch.equal(a, b)


def test_an_offset_is_no_parameter():
    """It neither travels nor trains, and loading a state leaves it alone."""
    network = ConvNet((1, 8, 8), num_classes=3)
    assert network.offset is None
    names = list(network.state_dict())
    network.offset = offset = torch.tensor([1.0, 2.0, 3.0])
    assert list(network.state_dict()) == names
    assert {id(p) for p in network.parameters()} & {id(offset)} == set()
    network.load_state_dict(ConvNet((1, 8, 8), num_classes=3).state_dict())
    assert network.offset is offset
    sum(z.square().sum() for z in network(torch.randn(2, 1, 8, 8))).backward()
    assert offset.grad is None


NUMBERS = {
    ConvNet: {"input_shape": (1, 8, 8), "num_classes": 3, "widths": (4, 4), "features": 5},
    SequenceNet: {"input_shape": (2, 8), "num_classes": 3, "widths": (4, 4), "features": 5},
    ResNet18: {"input_shape": (1, 8, 8), "num_classes": 3, "features": 5, "width": 2, "stem_stride": 1},
    PublishedConvNet: {"input_shape": (1, 32, 32), "num_classes": 3},
    PublishedResNet18: {"input_shape": (1, 8, 8), "num_classes": 3},
    PublishedTransformer: {"num_classes": 3, "vocabulary": 9, "max_length": 4},
    TextTransformer: {
        "vocabulary": 9,
        "max_length": 4,
        "num_classes": 3,
        "features": 5,
        "width": 8,
        "heads": 2,
        "blocks": 1,
        "dropout": 0.1,
    },
    Exit: {"projection": nn.Identity(), "width": 3, "num_classes": 2},
}


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, float("nan"), "3", None])
@pytest.mark.parametrize(
    ("network", "name"), [(n, k) for n, numbers in NUMBERS.items() for k in numbers if k != "projection"]
)
def test_numbers_that_cannot_be_are_refused_by_name(network, name, wrong):
    if name == "dropout":
        wrong = {0: 1.0, True: -0.1}.get(wrong, wrong)
    if name in ("input_shape", "widths"):
        wrong = (*NUMBERS[network][name][:-1], wrong)
    with pytest.raises(ValueError, match=f"{name} must be "):
        network(**{**NUMBERS[network], name: wrong})
