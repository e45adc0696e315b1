"""Every method with a network that has batch norms, under each policy for their running statistics."""

import json
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from federations import CLASSES, INPUTS, WatchedGrid, same_arrays, same_tensors, toy_app, toy_data
from safetensors.torch import load_file
from torch import nn

from cafe_flwr import EarlyExitNetwork
from cafe_flwr.methods import METHODS
from cafe_flwr.networks import Exit, batch_norm_names
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.training import LocalBudget
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.keys import Keys

N, T = 3, 4
POLICIES = ("average", "personal", "drop")
every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_policy = pytest.mark.parametrize("policy", POLICIES)


def network_with(policy):
    """An MLP of two exits with a batch norm in every stage, and one in the first exit."""

    def build():
        stages = [nn.Sequential(nn.Linear(8 if k else INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh()) for k in range(2)]
        projections = [nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), nn.Linear(8, 4)]
        network = EarlyExitNetwork(stages, [Exit(projection, 4, CLASSES) for projection in projections])
        network.statistics = policy
        return network

    return build


class Names(NamedTuple):
    """Names of the network's tensors, by what they are."""

    heads: set[str]
    backbone: set[str]  # weights: affine parameters of norms are among them
    running: set[str]
    counters: set[str]


def names_of(policy):
    network = network_with(policy)()
    statistics = set(batch_norm_names(network))
    counters = {name for name in statistics if name.endswith("num_batches_tracked")}
    heads = {name for name in network.state_dict() if ".head." in name}
    return Names(heads, set(network.state_dict()) - heads - statistics, statistics - counters, counters)


def with_prefix(prefix, names):
    return {prefix + name for name in names}


def expected(method, policy):
    """What is averaged, what stays on the client, what each client sends and receives of its own."""
    n = names_of(policy)
    averaged = n.running if policy == "average" else set()
    kept = n.running if policy == "personal" else set()
    backbone, every = n.backbone | averaged, n.backbone | n.running | n.counters | n.heads
    last = {name for name in n.heads if name.startswith("exits.1.")}
    described = {"class-means", "class-counts"}
    if method in ("fedavg", "fedprox", "depthfl", "scalefl"):
        return backbone | n.heads, kept, set(), set()
    if method in ("fedper", "fedrep", "fedbabu", "local-kd"):
        return backbone, n.heads | kept, set(), set()
    if method == "local":
        return set(), every, set(), set()
    if method in ("fedamp", "pfedgraph"):
        updates = with_prefix("update.", backbone | n.heads)
        return set(), every, updates, updates
    if method == "fedrod":
        return backbone | n.heads, with_prefix("personal.", n.heads) | kept, set(), set()
    if method == "ditto":
        return backbone | n.heads, with_prefix("personal.", every) | kept, set(), set()
    if method == "fedpac":
        return backbone, n.heads | kept, n.heads | described | {"variance"}, n.heads | {"prototypes"}
    if method in ("cafedistill", "cafedistill-text"):
        return backbone, n.heads | kept, last, last
    if method == "cafedistill-plus":
        return backbone, n.heads | kept, n.heads, n.heads
    assert method == "cafedistill-prior"
    updates = with_prefix("update.", n.heads)
    return backbone, n.heads | kept | with_prefix("own.", backbone), updates | described, updates


class Save:
    """Checkpoints every round."""

    def __init__(self, folder):
        self.checkpoints = Checkpoints(folder / "checkpoint")

    def on_start(self, run):
        pass

    def on_round(self, record, state):
        self.checkpoints.save(state)

    def on_finish(self, reports):
        pass


def federate(folder, method, policy, rounds=T, resume_from=None):
    """Run a federation of toys, or go on with one."""
    grid = WatchedGrid(toy_app(build=network_with(policy)), 2, node_config={"state-dir": str(folder / "personal")})
    strategy = FederatedStrategy(
        method=METHODS[method](),
        num_clients=N,
        num_rounds=T,
        local=LocalBudget(batch_size=6, steps=2, learning_rate=0.1),
        wait_seconds=0.0,
        evaluate_every=T,
        callbacks=[Save(folder)],
        resume_from=resume_from,
    )
    return strategy.start(grid, num_rounds=rounds), grid


def published(folder):
    return {path.name: load_file(path) for path in sorted((folder / "personal").glob("client-*.safetensors"))}


def last_version(folder, client):
    (path,) = (folder / "personal" / "versions").glob(f"*/client-{client}/round-{T:06d}.safetensors")
    return load_file(path)


@pytest.mark.slow
@every_policy
@every_method
def test_statistics_travel_or_stay_as_the_policy_says_and_a_stopped_run_goes_on(tmp_path, method, policy):
    whole, grid = federate(tmp_path / "whole", method, policy)
    info = NodeInfo.from_message(grid.of_type("query")[0][1], Keys())
    averaged, kept, up, down = expected(method, policy)
    assert set(info.shared.names) == set(whole.arrays) == averaged
    assert (set(info.upload.names), set(info.download.names)) == (up, down)
    for client in range(N):
        assert set(last_version(tmp_path / "whole", client)) == kept
    if policy != "personal" and method not in ("fedavg", "fedper", "ditto", "fedamp", "cafedistill"):
        return  # where the statistics are kept does not depend on the method, but for these families

    federate(tmp_path / "parts", method, policy, rounds=T // 2)
    state = Checkpoints(tmp_path / "parts" / "checkpoint").load()
    resumed, _ = federate(tmp_path / "parts", method, policy, resume_from=state)
    assert same_arrays(resumed.arrays, whole.arrays)
    one, other = published(tmp_path / "whole"), published(tmp_path / "parts")
    assert list(one) == list(other)
    assert len(one) == N
    assert all(same_tensors(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedper", "ditto", "fedamp", "fedrod", "fedpac", "cafedistill-prior"])
def test_personal_statistics_are_the_clients_own_and_averaged_ones_the_same_for_all(tmp_path, method):
    """With methods that make a model of its own for every client, they differ in any case."""
    name = "stages.1.1.running_mean"
    for policy, differ in (("average", method in ("ditto", "fedamp", "cafedistill-prior")), ("personal", True)):
        federate(tmp_path / policy, method, policy)
        means = [tensors[name] for tensors in published(tmp_path / policy).values()]
        assert all(torch.isfinite(mean).all() for mean in means)
        assert all(mean.abs().max() > 0 for mean in means)
        assert [not torch.equal(mean, means[0]) for mean in means[1:]] == [differ] * (N - 1)


def test_personal_statistics_are_facts_of_the_published_network(tmp_path):
    federate(tmp_path, "cafedistill", "personal")
    metadata = json.loads((tmp_path / "personal" / "client-0.json").read_text())
    n = names_of("personal")
    assert set(metadata["personal"]) == n.heads | n.running


def test_a_client_with_one_example_is_left_out_with_what_to_do(tmp_path):
    """PyTorch's own words name neither batch norm nor a setting."""

    def load(client):
        data = toy_data(client)
        return replace(data, train=data.train.take(np.arange(1))) if client == 1 else data

    grid = WatchedGrid(toy_app(load, network_with("drop")), 2, node_config={"state-dir": str(tmp_path)})
    seen = []
    strategy = FederatedStrategy(method=METHODS["fedavg"](), num_rounds=1, num_clients=2, local=LocalBudget(steps=1))
    strategy.start(grid)
    for _, reply in grid.of_type("train"):
        seen += reply.content["config"].get("failures", [])
    (reason,) = seen
    assert reason.startswith("a batch norm cannot normalise one example by its own statistics")
    assert "set model.norm = 'group'" in reason
