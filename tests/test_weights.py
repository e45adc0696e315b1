"""Only weights are weights: other buffers stay the network's own, and tied tensors stay tied, in every method."""

import copy
from functools import cache

import pytest
import torch
from federations import WatchedGrid
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from cafe_flwr import EarlyExitNetwork, attach_exits, make_client_app
from cafe_flwr.core.random import seeded
from cafe_flwr.data import ClientData, Split
from cafe_flwr.inference.export import export
from cafe_flwr.methods import METHODS
from cafe_flwr.networks import Exit, batch_norm_names
from cafe_flwr.networks.fingerprint import fingerprint
from cafe_flwr.networks.placement import Placement
from cafe_flwr.networks.weights import tied_names, weight_names
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.training import LocalBudget
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.keys import Keys
from cafe_flwr.wire.options import Privacy

FORMS = {"float32": {}, "float16": {"wire": "float16"}, "noise": {"privacy": Privacy(0.1, noise_multiplier=0.1)}}
VOCABULARY, LENGTH, WIDTH = 5, 4, 6


class Attention(nn.Module):
    """Causal attention with a relative bias, and buffers of every kind that is no weight."""

    def __init__(self):
        super().__init__()
        self.look = nn.Linear(WIDTH, WIDTH)
        self.back = nn.Linear(WIDTH, WIDTH, bias=False)
        self.back.weight = self.look.weight
        self.bias = nn.Parameter(torch.zeros(2 * LENGTH - 1))
        self.norm = nn.BatchNorm1d(LENGTH)
        place = torch.arange(LENGTH)
        self.register_buffer("table", place[:, None] - place + LENGTH - 1)
        self.register_buffer("causal", torch.full((LENGTH, LENGTH), -torch.inf).triu(1))
        self.register_buffer("whole", torch.tensor([True, False, True, True]))
        self.register_buffer("positions", torch.randn(LENGTH, WIDTH))
        self.register_buffer("hidden", torch.full((LENGTH, LENGTH), -torch.inf).triu(1), persistent=False)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, h):
        self.seen += self.training
        h = (h + self.positions) * self.whole[:, None]
        scores = h @ self.look(h).mT + self.bias[self.table] + self.causal + self.hidden
        return self.norm(h + self.back(torch.softmax(scores, 2) @ h))


class First(nn.Module):
    """The mean over tokens."""

    def forward(self, h):
        return h.mean(1)


def gpt():
    """Two blocks of attention on embeddings; the second looks with the weights of the first."""
    stages = [nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), Attention()), Attention()]
    stages[1].look.weight = stages[1].back.weight = stages[0][1].look.weight
    return EarlyExitNetwork(stages, [Exit(First(), WIDTH, VOCABULARY) for _ in stages])


def one_head():
    """Both exits have one classifier."""
    network = gpt()
    network.exits[1].head = network.exits[0].head
    return network


def tied_embedding():
    """The embedding is the last exit's classifier."""
    network = gpt()
    network.exits[1].head.weight = network.stages[0][0].weight
    return network


def shared_memory():
    """Two parameters in the same memory, as assigning ``.data`` makes them."""
    network = gpt()
    network.stages[1].look.weight = nn.Parameter(network.stages[0][1].look.weight.data)
    return network


def vit():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(8, 4, num_layers=2, num_heads=1, hidden_dim=8, mlp_dim=8, num_classes=3)
    second = model.encoder.layers.encoder_layer_1.mlp
    second[0].weight = model.encoder.layers.encoder_layer_0.mlp[0].weight
    return attach_exits(model, ["encoder.layers.encoder_layer_0"], input_shape=(3, 8, 8))


def swin():
    from torchvision.models import SwinTransformer

    model = SwinTransformer([2, 2], 4, [1, 1], [1, 2], [2, 2], num_classes=3)
    return attach_exits(model, ["features.1"], input_shape=(3, 8, 8))


def fresh(build):
    """A network, always with the same weights."""
    if build in (swin, vit):  # which take a while to cut
        return copy.deepcopy(template(build))
    with seeded(0):
        return build()


@cache
def template(build):
    with seeded(0):
        return build()


def tokens(client):
    torch.manual_seed(client)
    x = torch.randint(VOCABULARY, (16, LENGTH))
    split = Split(x, x.amax(1), torch.arange(16)[:, None])
    return ClientData(split, split, split)


def images(client):
    torch.manual_seed(client)
    split = Split(torch.randn(12, 3, 8, 8), torch.arange(12) % 3, torch.arange(12)[:, None])
    return ClientData(split, split, split)


def federate(folder, build, method, load=tokens, **options):
    """Two rounds of two clients; gives the messages, and the published tensors of each client."""
    app = make_client_app(lambda context: fresh(build), lambda client, context: load(client))
    grid = WatchedGrid(app, 1, node_config={"state-dir": str(folder), "clients": "0,1"})
    budget = LocalBudget(batch_size=8, steps=1, learning_rate=0.01)
    strategy = FederatedStrategy(
        method=METHODS[method](), num_clients=2, num_rounds=2, local=budget, wait_seconds=0.0, **options
    )
    strategy.start(grid)
    return grid, [load_file(folder / f"client-{client}.safetensors") for client in range(2)]


def constants_of(network):
    """Persistent buffers that are neither statistics nor counters of norms."""
    named = {name for name, _ in network.named_buffers()} & network.state_dict().keys()
    return {name for name in named if not name.rpartition(".")[2].startswith(("running_", "num_batches"))}


def plain(name):
    """The network's name of a tensor that a method keeps beside it."""
    return name.partition(".")[2] if name.startswith(("update.", "personal.", "own.")) else name


def check(folder, build, method, load=tokens, **options):
    """All that is promised, after two rounds."""
    grid, published = federate(folder, build, method, load, **options)
    own, network = template(build), fresh(build)
    built, tied, constants = own.state_dict(), tied_names(own), constants_of(own)
    fixed = {name for name in constants if not name.endswith("seen")}  # the forward of fine-tuning counts on
    for tensors in published:
        assert tensors.keys() == built.keys()
        assert all(torch.equal(tensors[name], built[name]) for name in fixed)
        assert all(torch.isfinite(tensors[name]).all() for name in tensors.keys() - constants)
        assert all(torch.equal(tensors[name], tensors[first]) for name, first in tied.items())
        assert not all(torch.equal(tensors[name], built[name]) for name in own.shared_names())
        network.load_state_dict(tensors)
        assert tied_names(network).keys() == tied.keys()
        assert all(torch.equal(t, tensors[name]) for name, t in network.state_dict().items())
    info = NodeInfo.from_message(grid.of_type("query")[0][1], Keys())
    kept = [[name for name in load_file(path) if "/" not in name] for path in folder.rglob("round-*.safetensors")]
    for names in (info.shared.names, info.upload.names, info.download.names, *kept):
        of_network = [(name.removesuffix(plain(name)), tied.get(plain(name), plain(name))) for name in names]
        assert not constants.intersection(name for _, name in of_network)
        assert len(set(of_network)) == len(names)


every_method = pytest.mark.parametrize("method", sorted(METHODS))


@every_method
def test_in_every_method_buffers_stay_the_networks_own_and_tied_tensors_tied(tmp_path, method):
    check(tmp_path, gpt, method, wire="float16" if method != "local" else "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "form"), [(gpt, "noise"), (tied_embedding, "float32"), (swin, "float16"), (vit, "noise")]
)
@every_method
def test_in_every_method_with_tied_embeddings_torchvisions_networks_and_noise(tmp_path, build, form, method):
    if (build, method) == (tied_embedding, "fedrod"):
        with pytest.raises(ValueError, match="also a tensor of the backbone: choose another method"):
            METHODS[method]().check(template(build))
        return
    check(tmp_path, build, method, images if build in (swin, vit) else tokens, **FORMS[form])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "method"),
    [(one_head, name) for name in ("cafedistill", "cafedistill-prior", "fedrod", "fedpac", "fedamp", "ditto", "fedrep")]
    + [(shared_memory, "local"), (shared_memory, "fedavg")],
)
def test_exits_with_one_classifier_and_parameters_in_one_memory(tmp_path, build, method):
    check(tmp_path, build, method)


def test_a_network_that_computes_on_tied_classifiers_reads_them_under_every_name(tmp_path):
    for build in (one_head, tied_embedding):
        check(tmp_path / build.__name__, build, "cafedistill-plus", **FORMS["noise"])


class Average(nn.Module):
    """A layer with statistics of its own, and a constant mean."""

    running_statistics = ("level", "times")

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.zeros(3))
        self.register_buffer("times", torch.tensor(0))
        self.register_buffer("mean", torch.ones(3))


class Frozen(nn.Module):
    """As torchvision's frozen batch norm: all buffers."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(3))


class Written(nn.Module):
    """A norm written by hand, as timm's EvoNorm."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))
        self.register_buffer("memory", torch.ones(3), persistent=False)


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (nn.BatchNorm1d(3), ["weight", "bias", "running_mean", "running_var"]),
        (nn.InstanceNorm1d(3), []),
        (Average(), ["level"]),
        (Frozen(), []),
        (Written(), ["running_var"]),
        (nn.ParameterList([nn.Parameter(torch.arange(3), requires_grad=False)]), []),
        (
            spectral_norm(nn.Linear(2, 3)),
            ["bias", *(f"parametrizations.weight.{name}" for name in ("original", "0._u", "0._v"))],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_running_statistics_are_weights_and_other_buffers_are_not(layer, weights):
    assert weight_names(layer) == weights


def with_layer(layer):
    stage = nn.Sequential(nn.Linear(4, 3), layer)
    return EarlyExitNetwork([stage], [Exit(nn.Identity(), 3, 2)])


def test_statistics_that_a_layer_declares_follow_the_policy():
    network = with_layer(Average())
    assert "stages.0.1.level" in network.shared_names()
    assert "stages.0.1.times" not in network.shared_names()
    assert batch_norm_names(network) == ["stages.0.1.level", "stages.0.1.times"]
    network.statistics = "personal"
    assert network.statistics_names() == ["stages.0.1.level"]
    assert "stages.0.1.level" not in network.shared_names() + network.whole_names()
    with pytest.raises(ValueError, match="only torch's batch norms can do without running statistics, not Average"):
        network.statistics = "drop"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_a_network_of_another_precision_is_refused_with_what_to_do(dtype):
    network = with_layer(nn.Identity())
    network.stages[0][0].weight = nn.Parameter(network.stages[0][0].weight.to(dtype))
    with pytest.raises(ValueError, match=f"stages.0.0.weight is {str(dtype)[6:]}, and weights .* in float32"):
        Placement().place(network)


def test_parameters_in_one_memory_are_one_parameter_once_a_network_is_placed():
    network = shared_memory()
    Placement(device="cpu").place(network)
    copied = copy.deepcopy(network)
    assert copied.stages[1].look.weight is copied.stages[0][1].look.weight


def test_a_backbone_without_parameters_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="does not end in a linear classifier"):
        attach_exits(nn.Sequential(nn.Flatten(), nn.ReLU()), ["0"], input_shape=(3, 8, 8))


def test_the_teacher_that_is_an_average_has_the_networks_own_buffers(tmp_path):
    network = fresh(gpt)
    state = METHODS["fedper"](objective="safe-kd").objective.init(network, None)
    for _ in range(3):
        network.stages[0][1].look.weight.data += 1.0
        state.update()
    teacher = dict(state.teacher.named_buffers())
    assert all(torch.equal(teacher[name], buffer) for name, buffer in network.named_buffers())
    assert tied_names(state.teacher) == tied_names(network)
    assert state.teacher.eval()(tokens(0).train.x)[0].isfinite().all()


@pytest.mark.slow
def test_an_exported_network_of_tied_tensors_and_masks_computes_the_same(tmp_path):
    network = fresh(tied_embedding).eval()
    before = fingerprint(network)
    names = [str(c) for c in range(VOCABULARY)]
    made = export(network, tmp_path / "net", tokens(0).test.x, class_names=names, format="both")
    assert made.verified
    assert fingerprint(network) == before
