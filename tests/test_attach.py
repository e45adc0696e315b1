"""attach_exits: what a backbone gives stays what it gives, stages stop, and what cannot be cut is said."""

import copy
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from cafe_flwr.cost import macs_per_exit
from cafe_flwr.networks import EarlyExitNetwork, attach_exits, batch_norm_names
from cafe_flwr.networks.attach import ClassToken, Pool
from cafe_flwr.networks.cutting import candidates, cut

SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "num_heads": (1, 2, 2), "depths": (2, 2, 2), "patch_size": 2}
EFFICIENTNET = [models.efficientnet.MBConvConfig(4, 3, 2, 8 * k, 8 * k + 8, 1) for k in (4, 5, 6)]
CONVNEXT = [models.convnext.CNBlockConfig(*c) for c in ((8, 16, 1), (16, 24, 2), (24, None, 1))]

# name: (make, exits, where the last one is, image size, pooling of the early exits)
BACKBONES = {
    "torchvision resnet18": (
        lambda: models.resnet18(num_classes=7),
        ["layer1", "layer2", "layer3"],
        "beyond",
        32,
        Pool,
    ),
    "torchvision mobilenet_v3_small": (
        lambda: models.mobilenet_v3_small(num_classes=7),
        ["features.1", "features.6", "features.9"],
        "beyond",
        32,
        Pool,
    ),
    "torchvision efficientnet": (
        lambda: models.EfficientNet(EFFICIENTNET, dropout=0.2, num_classes=7),
        ["features.1", "features.2", "features.3"],
        "beyond",
        32,
        Pool,
    ),
    "torchvision convnext": (
        lambda: models.ConvNeXt(CONVNEXT, num_classes=7),
        ["features.1", "features.3.0", "features.5"],
        "named",
        32,
        Pool,
    ),
    "torchvision vit": (
        lambda: models.VisionTransformer(16, 4, 3, 2, 16, 32, num_classes=7),
        [f"encoder.layers.encoder_layer_{k}" for k in range(3)],
        "named",
        16,
        ClassToken,
    ),
    "torchvision swin": (
        lambda: models.SwinTransformer([2, 2], 8, [2, 2, 2], [1, 2, 2], [4, 4], num_classes=7),
        ["features.1", "features.3.0", "features.5"],
        "named",
        32,
        Pool,
    ),
    "timm resnet": (
        lambda: timm.create_model("resnet10t", num_classes=7),
        ["layer2", "layer3", "layer4"],
        "named",
        32,
        Pool,
    ),
    "timm mobilenetv3": (
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=7, drop_rate=0.2),
        ["blocks.0", "blocks.2", "blocks.4.0"],
        "beyond",
        32,
        Pool,
    ),
    "timm efficientnet": (
        lambda: timm.create_model("efficientnet_lite0", num_classes=7),
        ["blocks.1", "blocks.3", "blocks.5"],
        "beyond",
        32,
        Pool,
    ),
    "timm convnext": (
        lambda: timm.create_model("convnext_atto", num_classes=7, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
        ["stages.1", "stages.2.blocks.0", "stages.3"],
        "named",
        64,
        Pool,
    ),
    "timm vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, patch_size=8, depth=3),
        ["blocks.0", "blocks.1", "blocks.2"],
        "named",
        32,
        ClassToken,
    ),
    "timm swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, **SWIN),
        ["layers.0", "layers.1", "layers.2.blocks.0"],
        "beyond",
        32,
        Pool,
    ),
}

CLASSIFIERS = {
    "torchvision resnet18": "fc",
    "torchvision mobilenet_v3_small": "classifier.3",
    "torchvision efficientnet": "classifier.1",
    "torchvision convnext": "classifier.2",
    "torchvision vit": "heads.head",
    "torchvision swin": "head",
    "timm resnet": "fc",
    "timm mobilenetv3": "classifier",
    "timm efficientnet": "classifier",
    "timm convnext": "head.fc",
    "timm vit": "head",
    "timm swin": "head.fc",
}


class Case:
    """A backbone with statistics and weights that are not those of the start, its network, and a batch."""

    def __init__(self, name):
        self.name = name
        self.make, self.at, self.last, size, self.pool = BACKBONES[name]
        torch.manual_seed(0)
        self.backbone = self.make().train()
        self.shape = (3, size, size)
        self.x = torch.randn(4, *self.shape)
        with torch.no_grad():
            self.backbone(self.x)  # batch norms have seen something
        self.network = attach_exits(self.backbone, self.at, num_classes=7, input_shape=self.shape)


@pytest.fixture(scope="module", params=BACKBONES)
def built(request):
    return Case(request.param)


@pytest.fixture
def case(built):
    """Nothing that a test does to it reaches the next."""
    again = copy.copy(built)
    again.network = copy.deepcopy(built.network)
    return again


@pytest.mark.slow
@torch.no_grad()
def test_the_last_exit_gives_what_the_backbone_gives(case):
    """Bit for bit, in evaluation; and the network trains if the backbone did."""
    assert isinstance(case.network, EarlyExitNetwork)
    assert case.network.num_exits == len(case.at) + (case.last == "beyond")
    assert case.network.training
    expected = copy.deepcopy(case.backbone).eval()(case.x)
    assert torch.equal(case.network.eval()(case.x)[-1], expected)


@pytest.mark.slow
@torch.no_grad()
def test_stepping_is_running_and_rows_can_be_dropped(case):
    network, h = case.network.eval(), case.x
    together = network(case.x)
    kept = case.x
    for k in range(network.num_exits):
        h = network.stage(k, h)
        features, logits = network.exit(k, h)
        assert torch.equal(logits, together[k])
        head = network.exits[k].head
        torch.testing.assert_close(features @ head.weight.T + head.bias, logits)
        if k == 1:
            kept = kept[[2, 0, 1]]  # one has left
        kept = network.stage(k, kept)
        rows = [2, 0, 1] if k else [0, 1, 2, 3]
        torch.testing.assert_close(network.exit(k, kept)[1], logits[rows], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_stage_runs_its_own_modules_and_no_others(case):
    """Every module with parameters of its own runs in one stage or exit, once; what is stopped before is not run."""
    network, ran = case.network.eval(), []
    for name, module in network.named_modules():
        if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    h = case.x
    for k in range(network.num_exits):
        ran.clear()
        h = network.stage(k, h)
        assert {name.split(".")[:2] == ["stages", str(k)] for name in ran} == {True}
        assert len(set(ran)) == len(ran)
        ran.clear()
        network.exit(k, h)
        assert {name.split(".")[:2] == ["exits", str(k)] for name in ran} == {True}
    # All that the backbone has is in the network, under its own names, once.
    ours = [re.sub(r"^(stages\.\d+|exits\.\d+\.projection)\.", "", name) for name in network.state_dict()]
    for name in case.backbone.state_dict():
        last = name.endswith((".weight", ".bias")) and name.rsplit(".", 1)[0] == CLASSIFIERS[case.name]
        assert ours.count(name) == (0 if last else 1), name


def test_macs_grow_from_exit_to_exit_and_end_with_the_backbones(case):
    """The last exit costs what the backbone costs and the early exits on the way."""
    macs = macs_per_exit(case.network, case.x)
    assert macs == sorted(set(macs))
    assert macs[0] > 0
    whole = macs_per_exit(EarlyExitNetwork([nn.Identity()], [_as_exit(case.backbone)]), case.x)[0]
    h, early = case.x, 0
    for k in range(case.network.num_exits - 1):
        h = case.network.eval().stage(k, h).detach()
        early += macs_per_exit(EarlyExitNetwork([nn.Identity()], [case.network.exits[k]]), h)[0]
    assert macs[-1] == whole + early


def _as_exit(backbone):
    class AsExit(nn.Module):
        head = nn.Linear(1, 1)

        def __init__(self):
            super().__init__()
            self.backbone = copy.deepcopy(backbone)

        def forward(self, x):
            return x, self.backbone(x)

    return AsExit()


def test_gradients_reach_all_that_an_exit_uses(case):
    """Of exit k: every parameter of stages 0..k and of the exit, none of any other."""
    network = case.network
    network.train()
    h = case.x
    for k in range(network.num_exits):
        network.zero_grad(set_to_none=True)
        network(h)[k].square().sum().backward()
        expected = (f"exits.{k}.", *(f"stages.{j}." for j in range(k + 1)))
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == name.startswith(expected), name


@pytest.mark.slow
@torch.no_grad()
def test_state_round_trip_and_copy(case):
    """The weights loaded into another such network make it the same; a copy is independent."""
    other = attach_exits(case.make(), case.at, num_classes=7, input_shape=case.shape)
    other.load_state_dict({name: tensor.clone() for name, tensor in case.network.state_dict().items()})
    expected = case.network.eval()(case.x)
    for a, b in zip(other.eval()(case.x), expected, strict=True):
        assert torch.equal(a, b)
    twin = copy.deepcopy(case.network)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(case.network(case.x)[0], expected[0])
    names = [*case.network.shared_names(), *case.network.personal_names()]
    counters = {n for n in batch_norm_names(case.network) if n.endswith("num_batches_tracked")}
    assert len(names) == len(set(names))
    tables = {name for name, tensor in case.network.state_dict().items() if not tensor.is_floating_point()}
    assert set(names) == set(case.network.state_dict()) - counters - tables


@torch.no_grad()
def test_early_exits_pool_as_their_family_does(case):
    """Class token of ViT, token mean of Swin (height and width of maps with channels last), pooled maps of the rest."""
    network, h = case.network.eval(), case.x
    for k, leave in enumerate(list(network.exits)[:-1]):
        h = network.stage(k, h)
        pool, norm, linear = leave.projection
        assert isinstance(pool, case.pool)
        pooled = pool(h)
        swin = "swin" in type(case.backbone).__name__.lower()
        expected = h[:, 0] if case.pool is ClassToken else h.mean((1, 2) if swin else (2, 3))
        torch.testing.assert_close(pooled, expected)
        assert norm.normalized_shape == (linear.in_features,) == pooled.shape[1:]
        assert linear.out_features == network.exits[-1].head.in_features


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["torchvision resnet18", "timm convnext", "timm vit", "torchvision swin"])
def test_stages_and_exits_can_be_exported_for_any_batch_size(name):
    case = Case(name)
    network, h = case.network.eval(), case.x
    batch = torch.export.Dim("batch", min=2)
    for k in range(network.num_exits):
        stage = torch.export.export(network.stages[k], (h,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(stage(h[:3]), network.stage(k, h[:3]), rtol=1e-3, atol=1e-4)
        h = network.stage(k, h)
        leave = torch.export.export(network.exits[k], (h,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(leave(h[:3])[1], network.exit(k, h[:3])[1], rtol=1e-3, atol=1e-4)


# --- options ---


class Small(nn.Module):
    """A classifier of one's own, with a connection around a block, dropout in its forward, and what else is asked."""

    def __init__(self, bias=True, norm=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Sequential(nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Conv2d(4, 6, 3, padding=1))
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(6, 5, bias=bias)

    def forward(self, x, scale=None):
        h = self.stem(x)
        h = h + self.inner(h)
        h = F.dropout(self.last(h).mean((2, 3)), 0.5, self.training)
        return self.fc(h if scale is None else h * scale)


SHAPE = (1, 8, 10)
X = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_the_last_named_module_has_the_last_exit_unless_work_remains():
    """Pooling is no work; the convolution is, and makes one exit more."""
    assert attach_exits(Small(), ["stem", "last"], input_shape=SHAPE).num_exits == 2
    network = attach_exits(Small(), ["stem"], input_shape=SHAPE)
    assert network.num_exits == 2
    assert isinstance(network.exits[1].projection, nn.Identity)
    assert attach_exits(Small(), "last", input_shape=SHAPE).num_exits == 1


def test_the_backbone_is_left_as_it_is():
    backbone = Small(norm=True).train()
    before = copy.deepcopy(backbone.state_dict())
    network = attach_exits(backbone, ["stem", "last"], num_classes=9, input_shape=SHAPE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert backbone.training
    assert not attach_exits(backbone.eval(), ["stem"], input_shape=SHAPE).training
    assert list(backbone.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert dict(backbone.named_modules()).keys() == dict(Small(norm=True).named_modules()).keys()


@torch.no_grad()
def test_dropout_in_the_forward_follows_the_mode():
    network = attach_exits(Small(), ["stem", "last"], input_shape=SHAPE)
    assert torch.equal(network.eval()(X)[-1], network(X)[-1])
    h = network.stage(1, network.stage(0, X))
    dropped = torch.stack([network.train().exit(1, h)[0] for _ in range(200)])
    assert 0.4 < (dropped == 0).float().mean() < 0.6


@torch.no_grad()
def test_another_number_of_classes_or_width_gives_all_exits_new_heads():
    for options, shape in (({"num_classes": 3}, (3, 6)), ({"features": 4}, (5, 4)), ({}, (5, 6))):
        backbone = Small().eval()
        network = attach_exits(backbone, ["stem", "last"], input_shape=SHAPE, **options)
        assert [tuple(e.head.weight.shape) for e in network.exits] == [shape, shape]
        kept = torch.equal(network.exits[-1].head.weight, backbone.fc.weight) if not options else False
        assert kept == (not options)
        assert network.num_classes == shape[0]


@torch.no_grad()
def test_a_classifier_without_bias_gets_one_of_zeros():
    backbone = Small(bias=False).eval()
    network = attach_exits(backbone, ["stem"], input_shape=SHAPE)
    torch.testing.assert_close(network(X)[-1], backbone(X))
    assert [len(network.head_names(k)) for k in (0, 1)] == [2, 2]


def test_linear_heads_have_no_norm():
    network = attach_exits(Small(), ["stem"], head="linear", input_shape=SHAPE)
    assert [type(m).__name__ for m in network.exits[0].projection] == ["Pool", "Linear"]
    assert network.head_names(0) == ["exits.0.head.weight", "exits.0.head.bias"]


def test_an_example_will_do_for_the_shape_and_torchvision_and_timm_say_theirs():
    attach_exits(Small(), ["stem"], example=X)
    at = ["encoder.layers.encoder_layer_0"]
    assert attach_exits(models.VisionTransformer(16, 4, 2, 2, 16, 32), at).num_exits == 2
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, in_chans=1, global_pool="avg")
    network = attach_exits(vit, ["blocks.0"])
    assert (network.exits[0].projection[0].over, network.exits[0].projection[0].skip) == ((1,), 1)


@torch.no_grad()
def test_statistics_of_an_attached_backbone_follow_the_policy():
    network = attach_exits(timm.create_model("mobilenetv3_small_050"), ["blocks.1"], input_shape=(3, 32, 32))
    network.statistics = "personal"
    running = [n for n in batch_norm_names(network) if "num_batches" not in n]
    assert running
    assert set(running) <= set(network.personal_names())
    network.statistics = "drop"
    assert not any("running" in name for name in network.state_dict())
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(network.eval()(x)[0], network.train()(x)[0])


def test_pieces_lead_from_the_input_to_the_classifier():
    network = Small().eval()
    pieces = cut(network, ["stem"], "fc")
    assert torch.equal(network.fc(pieces[1](pieces[0](X))), network(X))
    assert sorted(dict(pieces[1].named_parameters())) == ["inner.bias", "inner.weight", "last.1.bias", "last.1.weight"]


# --- what cannot be ---


class Branches(nn.Module):
    """Does not run the same way in training and evaluation, or for all data."""

    def __init__(self, on="training"):
        super().__init__()
        self.on = on
        self.a, self.b, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        h = self.a(x)
        if self.on == "twice":
            h = self.b(self.b(h))
        elif self.training if self.on == "training" else h.sum() > 0:
            h = self.b(h)
        return self.fc(h.mean((2, 3)))


class Scaled(Small):
    def forward(self, x):
        return 2 * super().forward(x)


REFUSED = {
    "unknown": (Small, ["stem", "lost"], {}, "no module 'lost' in Small: did you mean last"),
    "unknown, listed": (Small, ["zzz"], {}, "no module 'zzz' in Small: choose from stem, inner, last, unused, fc"),
    "none": (Small, [], {}, "at must name the modules after which there is an exit: choose from stem"),
    "empty": (Small, [""], {}, "no module ''"),
    "order": (Small, ["last", "stem"], {}, r"exits out of order: give them as they run, at=\['stem', 'last'\]"),
    "twice": (Small, ["stem", "stem"], {}, "at the same place"),
    "same place": (Small, ["stem.1", "stem"], {}, "at the same place"),
    "classifier": (Small, ["stem", "fc"], {}, "'fc' is not before the classifier 'fc'"),
    "unused": (Small, ["unused"], {}, "'unused' of Small is not called once"),
    "called twice": (lambda: Branches("twice"), ["b"], {}, "'b' of Branches is not called once"),
    "around": (Small, ["stem", "inner"], {}, "needs more after 'inner' than what comes out of it"),
    "modes": (Branches, ["a"], {}, "does different things in training and in evaluation"),
    "data": (lambda: Branches("data"), ["a"], {}, "torch.fx cannot trace Branches"),
    "no classifier": (Scaled, ["stem"], {}, "Scaled does not end in a linear classifier"),
    "shape": (Small, ["stem"], {"input_shape": (3, 8, 8)}, r"does not take an input of shape \(2, 3, 8, 8\)"),
    "head": (Small, ["stem"], {"head": "mlp"}, "head must be one of safe-kd, linear; got 'mlp'"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_cut_is_said(reason):
    make, at, options, message = REFUSED[reason]
    with pytest.raises(ValueError, match=message):
        attach_exits(make(), at, **{"input_shape": SHAPE, **options})


def test_candidates_are_blocks_not_their_insides():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3)
    listed = candidates(vit).removeprefix("choose from ").split(", ")
    assert {"blocks", "blocks.0", "blocks.1", "blocks.2", "norm"} <= set(listed)
    assert not any("attn" in name for name in listed)
    with pytest.raises(ValueError, match=r"did you mean blocks\.1 or"):
        attach_exits(vit, ["block.1"])
    with pytest.raises(ValueError, match="in timm, num_classes above 0"):
        attach_exits(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0), ["blocks.0"])
