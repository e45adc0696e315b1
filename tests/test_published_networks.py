"""The networks of CAFEDistill's authors: sizes by hand, runs on real messages, and what exits of own widths bar."""

import json
import math

import pytest
import torch
from federations import run_small, small_settings, toy_app, toy_network
from hub_copies import write_copy
from torch import nn

from cafe_flwr.app.parts import build_network
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.inference.export import export
from cafe_flwr.methods import METHODS
from cafe_flwr.methods.exit_agreement import classifier_similarity
from cafe_flwr.networks import EarlyExitNetwork, Exit, PublishedConvNet, PublishedResNet18, PublishedTransformer
from cafe_flwr.networks.capacity import networks_of
from cafe_flwr.networks.preprocessing import SYMMETRIC
from cafe_flwr.personal import FinishedRun
from cafe_flwr.settings import Settings


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def each():
    """The three networks, each with a small batch it takes."""
    torch.manual_seed(0)
    yield PublishedConvNet((3, 22, 24), 5), torch.randn(3, 3, 22, 24)
    yield PublishedResNet18((3, 8, 8), 5), torch.randn(3, 3, 8, 8)
    yield PublishedTransformer(5, vocabulary=50, max_length=9), torch.randint(0, 50, (3, 9))


# --- the networks ---


def test_the_convnet_has_302_622_parameters():
    """Convolutions of 9 weights a pair of channels, with biases: 9·3·128 + 128 = 3,584; twice 9·128·128 + 128 =
    147,584. Three classifiers of 128·10 + 10 = 1,290. 3,584 + 2·147,584 + 3·1,290 = 302,622.

    Maps of 32×32 images: 30 → 15, 13 → 6, 4 → 2. MACs of the first exit: 30·30·27·128 + 1,280 = 3,111,680; the second
    adds 13·13·9·128·128 + 1,280 = 24,921,344, the third 4·4·9·128·128 + 1,280 = 2,360,576.
    """
    network = PublishedConvNet((3, 32, 32), 10)
    assert parameters(network) == 302_622
    assert macs_per_exit(network, torch.zeros(1, 3, 32, 32)) == [3_111_680, 28_033_024, 30_393_600]


def test_the_resnet_has_11_265_232_parameters():
    """Convolutions have no biases, a batch norm has two parameters a channel.

    Stem 27·64 + 128 = 1,856. Stage 1: four times 9·64·64 + 128 = 36,992: 147,968. Stages of w = 128, 256, 512 channels:
    a convolution 9·(w/2)·w, three of 9·w·w, a shortcut (w/2)·w, five norms of 2w, in all 32·w² + 10w: 525,568,
    2,099,712 and 8,393,728. Exits: (64 + 128 + 256 + 512)·100 + 4·100 = 96,400. Together 11,265,232.
    """
    network = PublishedResNet18((3, 32, 32), 100)
    assert parameters(network) == 11_265_232
    assert network.feature_widths == (64, 128, 256, 512)


def test_the_transformer_has_7_926_544_parameters():
    """Embeddings 32,000·192 = 6,144,000; positions none. A layer: query, key, value and output 4·(192·192 + 192) =
    148,224; feed-forward 192·768 + 768 + 768·192 + 192 = 295,872; two norms 768; in all 444,864. Exits 192·4 + 4 = 772.
    6,144,000 + 4·444,864 + 4·772 = 7,926,544. Positions are no part of what is kept or sent, either.

    MACs a layer, of 20 tokens: 20·(4·192² + 2·192·768) + 2·20²·192 = 9,000,960; an exit 768.
    """
    network = PublishedTransformer(4)
    assert parameters(network) == sum(t.numel() for t in network.state_dict().values()) == 7_926_544
    costs = macs_per_exit(network, torch.zeros(1, 20, dtype=torch.int64))
    assert costs == [k * (9_000_960 + 768) for k in (1, 2, 3, 4)]


def test_stepping_is_running_rows_can_be_dropped_and_exits_cut_off():
    for network, x in each():
        together, h = network.eval()(x), x
        short = network.truncated(2)
        for k in range(network.num_exits):
            h = network.stage(k, h)
            features, logits = network.exit(k, h)
            assert torch.equal(logits, together[k])
            assert features.shape == (3, network.feature_widths[k])
        for a, b in zip(together, network(x[[2, 0]]), strict=True):
            torch.testing.assert_close(a[[2, 0]], b, rtol=1e-4, atol=1e-5)
        assert len(short(x)) == 2
        with pytest.raises(ValueError, match="does not say what it is at a share of its width: limit its exits only"):
            network.narrowed(0.5)


def test_exits_are_the_mean_over_positions_or_the_first_token():
    conv, resnet, text = each()
    for network, x in (conv, resnet):
        h = network.stage(0, x)
        torch.testing.assert_close(network.exit(0, h)[0], h.mean(dim=(2, 3)))
    network, x = text
    h = network.stage(0, x)
    assert torch.equal(network.exit(0, h)[0], h[:, 0])


def test_a_transformer_layer_is_normed_after_its_parts_and_positions_are_sinusoidal():
    """By hand, of two tokens: softmax(qkᵀ/√96) of two heads, h = LN(h + attention), LN(h + mlp(h)), ReLU."""
    network, _ = list(each())[2]
    network.eval()
    x = torch.tensor([[7, 3]])
    embedding, layer = network.stages[0]
    angles = torch.tensor([[p / 10_000 ** (2 * (i // 2) / 192) for i in range(192)] for p in range(2)])
    even = torch.arange(192) % 2 == 0
    h = embedding.token.weight[x[0]] * 192**0.5 + torch.where(even, angles.sin(), angles.cos())
    torch.testing.assert_close(embedding(x)[0], h, rtol=1e-4, atol=1e-4)
    attention = layer.self_attn
    q, k, v = (h @ attention.in_proj_weight.T + attention.in_proj_bias).reshape(2, 3, 2, 96).permute(1, 2, 0, 3)
    seen = (q @ k.transpose(1, 2) / 96**0.5).softmax(dim=2) @ v
    h = layer.norm1(h + attention.out_proj(seen.transpose(0, 1).flatten(1)))
    h = layer.norm2(h + layer.linear2(layer.linear1(h).relu()))
    torch.testing.assert_close(network.stage(0, x)[0], h, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_they_are_exported_with_what_they_compute(tmp_path):
    network, x = next(each())
    made = export(network, tmp_path / "net", x, class_names="abcde", thresholds=0.9)
    assert made.verified


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PublishedConvNet((3, 21, 32), 10), r"at least 22 pixels high and wide, .* got .*\(3, 21, 32\)"),
        (lambda: PublishedConvNet((200,), 10), r"takes images .* got an input of shape \(200,\)"),
        (lambda: PublishedConvNet((9, 200), 10), r"takes images .* got an input of shape \(9, 200\)"),
        (lambda: PublishedResNet18((3, 7, 32), 10), "at least 8 pixels high and wide"),
        (lambda: PublishedResNet18((200,), 10), r"shape \(200,\)"),
        (
            lambda: PublishedTransformer(4, max_length=201),
            "texts of 1 to 200 tokens, got 201: set data.max-tokens to 200",
        ),
        (lambda: PublishedConvNet((3, 32, 32), 9).check_inputs(torch.zeros(2, 3, 20, 20)), "at least 22 pixels"),
        (lambda: PublishedConvNet((3, 32, 32), 9).check_inputs(torch.zeros(2, 9).long()), "images must be"),
        (lambda: PublishedResNet18((3, 32, 32), 9).check_inputs(torch.zeros(2, 1, 32, 32)), "images must be"),
        (lambda: PublishedTransformer(4, 50, 9).check_inputs(torch.zeros(2, 3, 32, 32)), "texts must be tokens"),
        (lambda: PublishedTransformer(4, 50, 9).check_inputs(torch.full((2, 5), 50)), "the network knows 0..49"),
        (
            lambda: PublishedTransformer(4, 50, 9)(torch.zeros(2, 10).long()),
            "texts have 10 tokens, the network takes 9",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- by name ---

RUNS = {
    "published-conv": {"dataset": "cifar10"},
    "published-resnet18": {
        "dataset": "digits",  # of 16×16
        "examples_per_client": 16,
        "dirichlet_alpha": 100.0,
        "statistics": "personal",
    },
    "published-transformer": {"dataset": "ag-news", "vocabulary": 200, "max_tokens": 8},
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    home = tmp_path_factory.mktemp("copies")
    for name, rows in (("cifar10", 40), ("ag-news", 40)):
        write_copy(home, name, rows)
    return home


def settings_for(folder, copies, network, **changes):
    more = {"num_server_rounds": 2, "num_clients": 2, "batch_size": 4, "local_steps": 1, "evaluate_every": 2}
    if RUNS[network]["dataset"] != "digits":
        more["data_dir"] = str(copies)
    return small_settings(folder, network=network, **{**RUNS[network], **more, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedper", "cafedistill"])
@pytest.mark.parametrize("network", RUNS)
def test_they_run_by_name_on_real_messages(tmp_path, no_report, copies, network, method):
    """Pixels are taken as −1..1, not as CIFAR's usual normalisation has them."""
    settings = settings_for(tmp_path, copies, network, method=method)
    run_small(settings)
    personal = FinishedRun(settings.results).personal(0)
    assert personal.network.pixels == SYMMETRIC
    assert len(personal.metadata["accuracy_per_exit"]) == personal.network.num_exits
    lines = [json.loads(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    measured = [value for line in lines for value in line["similarity_per_exit"]]
    assert len(lines) == 2
    if network == "published-resnet18":  # there is nothing to measure, which is not 0
        assert measured == [None] * 6
    else:
        assert all(abs(value) <= 1 for value in measured)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "published-conv", "dataset": "ag-news"}, "'published-conv' takes images, and 'ag-news' holds"),
        ({"network": "published-transformer", "dataset": "cifar10"}, "'published-transformer' takes texts"),
        (
            {"network": "published-conv", "model.width": 64},
            "model.width = 64 does not change 'published-conv', .* leave it at 0, or choose network = 'conv'",
        ),
        (
            {"network": "published-resnet18", "model.norm": "layer"},
            "model.norm = 'layer' does not change 'published-resnet18'",
        ),
        ({"network": "published-resnet18", "model.stem-stride": 2}, "model.stem-stride = 2 does not change"),
        ({"network": "published-conv", "model.statistics": "drop"}, "'published-conv' has none: set it to 'average'"),
        (
            {"network": "published-transformer", "dataset": "ag-news", "objective": "neo-kd"},
            "tokens cannot be: choose another",
        ),
        ({"network": "published-resnet"}, "'published-conv', 'published-resnet18' or 'published-transformer'"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_run_config(settings)


def test_settings_that_say_what_a_published_network_is_are_taken():
    same = {"network": "published-resnet18", "model.width": 64, "model.depth": 4, "model.norm": "batch"}
    assert Settings.from_run_config({**same, "model.statistics": "personal"}).network == "published-resnet18"


def test_what_does_not_fit_the_data_is_refused_before_the_first_round(tmp_path):
    with pytest.raises(ValueError, match=r"at least 22 pixels high and wide, .* \(1, 16, 16\): .* network = 'conv'"):
        build_network(small_settings(tmp_path, network="published-conv"))


# --- exits of own widths ---


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "cafedistill-text",
            {"similarity_proxy": "parameters", "selection": "shallow-first"},
            "selection = 'shallow-first' .* 64, 128, 256, 512: set cafedistill-text.similarity-proxy to 'grad",
        ),
        (
            "cafedistill-text",
            {"selection": "none", "peers": "deeper"},
            "cafedistill-text.peers = 'deeper' needs exits of one width",
        ),
        (
            "cafedistill-prior",
            {},
            "cafedistill-prior.match-by = 'features' needs .* set cafedistill-prior.match-by to 'classifiers'",
        ),
        (
            "cafedistill-prior",
            {"selection": "deep-first", "match_by": "classifiers"},
            "set cafedistill-prior.selection to 'none'",
        ),
        ("cafedistill", {"conflict": "exits"}, "conflict = 'exits' needs .* set conflict to 'clients'"),
        ("cafedistill-plus", {"conflict": "exits"}, "conflict = 'exits' needs .* set conflict to 'clients'"),
        ("fedpac", {}, "method = 'fedpac' needs exits of one width"),
    ],
)
def test_methods_that_compare_exits_refuse_exits_of_own_widths(method, settings, message):
    networks = dict(zip(RUNS, each(), strict=True))
    with pytest.raises(ValueError, match=message):
        METHODS[method](**settings).check(networks["published-resnet18"][0])
    for name in ("published-conv", "published-transformer"):
        METHODS[method](**settings).check(networks[name][0])


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "cafedistill"},
        {"method": "cafedistill", "depth_shares": "2:0.5"},
        {"method": "cafedistill-plus"},
        {"method": "cafedistill-text", "text_similarity_proxy": "gradients"},
        {"method": "cafedistill-prior", "prior_match_by": "classifiers"},
        {"method": "fedrod"},
        {"method": "pfedgraph"},
    ],
    ids=lambda settings: "-".join([settings["method"], *settings.get("depth_shares", "")[:1]]),
)
def test_methods_that_compare_no_exits_take_exits_of_own_widths(tmp_path, no_report, settings):
    """Those too of which some clients hold the first exits only."""
    settings = small_settings(tmp_path, num_server_rounds=2, num_clients=2, **settings)
    run_small(settings, app=toy_app(build=lambda: toy_network(widths=(2, 3, 4))))
    kept = [json.loads((settings.results / f"personal/client-{client}.json").read_text()) for client in range(2)]
    assert sorted(one["num_exits"] for one in kept) == ([2, 3] if settings.heterogeneity.depth_shares else [3, 3])


def test_a_similarity_that_cannot_be_measured_is_none():
    conv, resnet, _ = each()
    assert all(math.isnan(value) for value in classifier_similarity(resnet[0]))
    assert all(abs(value) <= 1 for value in classifier_similarity(conv[0]))


def test_heads_need_the_same_classes_and_modalities_the_same_widths():
    layers = [nn.Linear(4, 4) for _ in range(2)]
    with pytest.raises(ValueError, match="all heads must have the same classes, got 2, 3"):
        EarlyExitNetwork(layers, [Exit(nn.Identity(), 4, classes) for classes in (3, 2)])
    exits = [Exit(nn.Linear(4, width), width, 3) for width in (5, 6)]
    unequal = EarlyExitNetwork(layers, exits)
    equal = EarlyExitNetwork(layers, [Exit(nn.Identity(), 4, 3) for _ in range(2)])
    assert networks_of({"a": unequal})[""].feature_widths == (5, 6)
    with pytest.raises(ValueError, match=r"the same \(classes, width\), got a: \(3, 5\) \(3, 6\), b: \(3, 4\)"):
        networks_of({"a": unequal, "b": equal})
