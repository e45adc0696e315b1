"""Networks by their settings: built as named, run on real messages, and refused where they do not fit."""

import pytest
from federations import run_small, small_settings

from cafe_flwr.app.parts import build_network
from cafe_flwr.networks import ConvNet, ResNet18, TextTransformer, batch_norm_names
from cafe_flwr.personal import FinishedRun
from cafe_flwr.settings import Settings

TINY_TEXT = {
    "dataset": "docstrings",
    "network": "transformer",
    "network_width": 8,
    "network_depth": 2,
    "attention_heads": 2,
    "max_tokens": 8,
    "vocabulary": 100,
}


def weights(settings):
    return {name: tuple(tensor.shape) for name, tensor in build_network(settings).state_dict().items()}


def same(network, other):
    """The same architecture, by names and shapes of its weights."""
    return {n: t.shape for n, t in network.state_dict().items()} == {n: t.shape for n, t in other.state_dict().items()}


@pytest.mark.slow
def test_networks_are_built_as_named(tmp_path):
    def built(**settings):
        return build_network(small_settings(tmp_path, **settings))

    assert same(built(), ConvNet((1, 16, 16), 10))
    wide = built(network_width=4, network_depth=2, feature_width=7, norm="batch")
    assert same(wide, ConvNet((1, 16, 16), 10, (4, 8), 7, "batch"))
    resnet = built(network="resnet18", network_width=4, stem_stride=2, norm="batch", feature_width=9)
    assert same(resnet, ResNet18((1, 16, 16), 10, 9, "batch", 4, 2))
    assert resnet.stages[0][0].stride == (2, 2)
    assert same(built(network="resnet18"), ResNet18((1, 16, 16), 10, 24))
    text = built(**TINY_TEXT, norm="layer", dropout=0.3)
    assert same(text, TextTransformer(100, 8, 12, 24, 8, 2, 2, "layer"))
    assert text.stages[0][0].dropout.p == 0.3
    assert text.stages[1].heads == 2
    assert same(built(**{**TINY_TEXT, "network_width": 0, "network_depth": 0}), TextTransformer(100, 8, 12, 24))


@pytest.mark.parametrize("policy", ["average", "personal", "drop"])
def test_the_policy_for_statistics_is_that_of_the_settings(tmp_path, policy):
    network = build_network(small_settings(tmp_path, norm="batch", statistics=policy))
    assert network.statistics == policy
    assert bool(batch_norm_names(network)) == (policy != "drop")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"network": "resnet18", "network_width": 2, "norm": "batch", "statistics": "personal"},
        {"network": "resnet18", "network_width": 2, "stem_stride": 2},
        {"network": "conv", "norm": "batch", "statistics": "drop"},
        {**TINY_TEXT, "norm": "group"},
        {**TINY_TEXT, "norm": "batch", "statistics": "personal", "method": "cafedistill-plus"},
    ],
    ids=["resnet18 batch", "resnet18 group", "conv batch", "transformer group", "transformer batch"],
)
def test_networks_by_name_run_on_real_messages(tmp_path, no_report, settings):
    settings = small_settings(tmp_path, num_server_rounds=2, num_clients=2, **settings)
    run_small(settings)
    run = FinishedRun(settings.results)
    for client in range(2):
        personal = run.personal(client)
        assert personal.network.num_exits == len(personal.metadata["accuracy_per_exit"])
        assert same(personal.network, build_network(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"network": "transformer"},
            "'transformer' takes texts, and 'digit-pairs' holds images: set network to 'conv' or",
        ),
        ({"network": "transformer", "dataset": "cifar100"}, "'cifar100' holds images"),
        ({"network": "transformer", "dataset": "local:/a"}, "'local:/a' holds images"),
        ({"network": "conv", "dataset": "ag-news"}, "'conv' takes images, and 'ag-news' holds texts: .* 'transformer'"),
        ({"network": "resnet18", "dataset": "docstrings"}, "'resnet18' takes images, and 'docstrings' holds texts"),
        ({"model.norm": "layer"}, "model.norm = 'layer' is of the transformer: 'conv' takes 'group' or 'batch'"),
        (
            {"model.statistics": "personal"},
            "model.norm = 'group' keeps none: set model.norm to 'batch', or model.statistics to 'average'",
        ),
        ({"network": "resnet18", "model.depth": 3}, "resnet18 has 4 stages, got model.depth = 3"),
        ({"model.stem-stride": 2}, "model.stem-stride = 2 is of resnet18: set it to 1 for 'conv'"),
        ({"network": "transformer", "dataset": "ag-news", "objective": "neo-kd"}, "tokens cannot be: choose another"),
        ({"dataset": "cifar10", "data.dir": "here"}, "data.dir must be an absolute path"),
        ({"network": "resnet"}, "network should be 'conv', 'resnet18', .* or 'published-transformer', got 'resnet'"),
        ({"model.norm": "none"}, "model.norm should be"),
        ({"model.statistics": "keep"}, "model.statistics should be"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_run_config(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network_depth": 5}, "images must be at least 32 pixels high and wide for 5 blocks"),
        ({"network": "resnet18", "network_width": 3}, "width must be an even number of channels, got 3"),
        ({"network_width": 6}, "widths must be multiples of 4 for the group norm, got 6, 12, 24"),
        ({**TINY_TEXT, "attention_heads": 3}, "width must be a multiple of 12 for 3 heads and group norm, got 8"),
    ],
)
def test_networks_that_cannot_be_built_are_refused_in_words(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build_network(small_settings(tmp_path, **settings))
