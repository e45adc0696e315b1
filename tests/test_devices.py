"""Where and how precisely a network computes. There may be no GPU here: what CUDA would do is tried on fake tensors."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from federations import INPUTS, Recorded, run_small, small_settings, toy_app, toy_network
from torch import nn

from cafe_flwr.app.launch import simulation_resources, with_resources
from cafe_flwr.client.model import ClientModel
from cafe_flwr.core.random import rng_for
from cafe_flwr.data import Split
from cafe_flwr.methods import METHODS, LocalTask
from cafe_flwr.metrics import exit_features, exit_logits
from cafe_flwr.networks import ConvNet
from cafe_flwr.networks.memory import reason_of
from cafe_flwr.networks.placement import OnDevice, Placement, find_device, moved
from cafe_flwr.settings import Settings
from cafe_flwr.training import LocalBudget, snapshot, train

ROOT = Path(__file__).resolve().parent.parent
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def cross_entropy(network):
    return lambda x, y: sum(nn.functional.cross_entropy(z, y) for z in network(x))


def trained(placement, steps=4, **budget):
    """A small convolutional network after a few steps, and what it was placed as."""
    torch.manual_seed(0)
    network = ConvNet((1, 8, 8), num_classes=3)
    placement.place(network)
    generator = torch.Generator().manual_seed(1)
    data = Split(torch.randn(40, 1, 8, 8, generator=generator), torch.arange(40) % 3)
    outcome = train(
        network,
        data,
        cross_entropy(network),
        LocalBudget(8, steps, learning_rate=0.1, **budget),
        np.random.default_rng(0),
    )
    return network, outcome


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_nearly_as_float32_and_leaves_float32_weights(precision):
    network, outcome = trained(Placement("cpu", precision), max_grad_norm=5.0)
    reference, exact = trained(Placement("cpu"), max_grad_norm=5.0)
    assert all(t.dtype == torch.float32 for t in network.state_dict().values())
    assert outcome.loss == pytest.approx(exact.loss, rel=0.03)
    assert outcome.loss != exact.loss  # something was computed otherwise
    start, _ = trained(Placement("cpu"), steps=1, max_grad_norm=5.0)
    for name, tensor in network.state_dict().items():
        moved_by = (reference.state_dict()[name] - start.state_dict()[name]).norm()
        assert (tensor - reference.state_dict()[name]).norm() <= 0.2 * moved_by + 1e-3, name
    logits = network(torch.zeros(2, 1, 8, 8))
    assert {z.dtype for z in logits} == {torch.float32}
    assert exit_features(network, torch.zeros(2, 1, 8, 8)).dtype == torch.float32


def test_gradients_that_vanish_in_float16_are_kept_by_the_scaler():
    """A loss of 1e-6 · logit: its gradient passes a float16 product, where anything below 6e-8 is 0."""
    torch.manual_seed(0)
    network = toy_network(exits=1)
    Placement("cpu", "float16").place(network)
    before = snapshot(network)
    data = Split(torch.ones(8, INPUTS), torch.zeros(8, dtype=torch.int64))
    budget = LocalBudget(8, 1, learning_rate=1e4)
    train(network, data, lambda x, y: 1e-7 * network(x)[0][:, 0].mean(), budget, np.random.default_rng(0))
    change = network.state_dict()["exits.0.head.weight"][0] - before["exits.0.head.weight"][0]
    with torch.no_grad():
        Placement("cpu").place(network)
        network.load_state_dict(before)
        features = network.exit(0, network.stage(0, data.x))[0].mean(dim=0)
    torch.testing.assert_close(change, -1e4 * 1e-7 * features, rtol=0.02, atol=1e-6)


def test_channels_last_changes_the_layout_and_not_the_network():
    plain, _ = trained(Placement("cpu"))
    network, _ = trained(Placement("cpu", channels_last=True))
    kernel = next(p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_after_training_no_gradients_take_memory():
    network, _ = trained(Placement())
    assert all(p.grad is None for p in network.parameters())


def test_evaluation_takes_large_inputs_in_smaller_batches_with_the_same_result():
    network = ConvNet((3, 64, 64), num_classes=3)
    sizes = []
    network.stages[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    x = torch.randn(50, 3, 64, 64)
    logits = exit_logits(network, x)
    assert max(sizes) * x[0].numel() <= 1 << 18
    assert sum(sizes) == 50
    with torch.no_grad():
        torch.testing.assert_close(logits, torch.stack(network(x)))


def test_the_node_decides_where_its_clients_compute():
    assert (
        Placement.of({"compute.device": "cuda:1", "compute.precision": "bfloat16"}, {"device": "cpu"}).device == "cpu"
    )
    assert Placement.of({"compute.device": "cuda:1"}, {}).device == "cuda:1"
    assert Placement.of({}, {}) == Placement("auto", "float32", False, False)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_a_device_that_is_no_name_is_an_error(device):
    with pytest.raises(ValueError, match="device should match pattern"):
        Settings.from_run_config({"compute.device": device})
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
        Placement(device)


@needs_no_gpu
def test_a_gpu_that_is_not_there_is_an_error_that_names_what_is():
    with pytest.raises(ValueError, match=r"device = 'cuda:7' is not there: this process can compute on cpu"):
        find_device("cuda:7")
    assert find_device("auto") == torch.device("cpu")


@needs_no_gpu
def test_a_gpu_that_is_not_there_stops_the_run_before_its_first_round(tmp_path, caplog):
    settings = small_settings(tmp_path, device="cuda", dataset="digits")
    with pytest.raises(RuntimeError):
        run_small(settings)
    assert "client 0 is left out: device = 'cuda' is not there: this process can compute on cpu" in caplog.text
    assert not (settings.results / "rounds.jsonl").exists() or not (settings.results / "rounds.jsonl").read_text()


@pytest.mark.slow
@needs_no_gpu
def test_the_rest_goes_on_where_one_node_has_no_such_gpu(tmp_path, caplog):
    """The node-config of every node here says cpu: the run's setting asks in vain."""
    from cafe_flwr.engine import InProcessGrid

    settings = small_settings(tmp_path, device="cuda")
    grid = InProcessGrid(
        toy_app(), 2, settings.to_run_config(), {"device": "cpu", "state-dir": str(tmp_path / "state")}
    )
    run_small(settings, grid=grid)
    assert (settings.results / "summary.json").exists()


@pytest.mark.slow
def test_a_run_in_bfloat16_keeps_and_sends_float32(tmp_path):
    exact = small_settings(tmp_path / "a", name="exact", num_server_rounds=2)
    low = small_settings(tmp_path / "b", name="low", num_server_rounds=2, precision="bfloat16", channels_last=True)
    for settings in (exact, low):
        run_small(settings)
    kept = [Recorded.read(settings.results) for settings in (exact, low)]
    for run in kept:
        stored = [*run.networks.values(), *(tensors for _, tensors in run.versions.values())]
        assert {t.dtype for tensors in stored for t in tensors.values()} == {torch.float32}
    assert kept[0].networks[0].keys() == kept[1].networks[0].keys()
    assert not torch.equal(kept[0].networks[0]["exits.0.head.weight"], kept[1].networks[0]["exits.0.head.weight"])


class _Starved(nn.Module):
    """Has no memory left in training."""

    def forward(self, x):
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")
        return x


def test_a_client_without_memory_says_which_settings_to_lower(tmp_path, caplog):
    def build():
        network = toy_network()
        network.stages[1].append(_Starved())
        return network

    settings = small_settings(tmp_path, round_retries=0)
    with pytest.raises(RuntimeError):
        run_small(settings, app=toy_app(build=build))
    assert (
        "out of memory on cpu (CUDA out of memory): lower train.batch-size or model.width, or set compute.precision"
        in caplog.text
    )


def test_memory_that_has_run_out_is_known_by_its_many_names():
    gpu = torch.device("cuda:0")
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: 9"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ):
        assert "lower train.batch-size or model.width, compute.clients-per-gpu, or set compute.precision" in reason_of(
            error, gpu
        )
    assert reason_of(RuntimeError("shapes differ"), gpu) == "RuntimeError: shapes differ"


def test_workers_share_a_gpu_as_the_settings_say(monkeypatch):
    assert simulation_resources("cuda", 4) == [] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert simulation_resources("auto", 1) == ["client-resources-num-cpus=1", "client-resources-num-gpus=1.0"]
    assert simulation_resources("cpu", 4) == []
    for clients in range(1, 101):
        share = float(simulation_resources("cuda", clients)[1].partition("=")[2])
        assert 0 < share * clients <= 1  # all fit
        assert share * (clients + 1) > 1 or clients > 98  # and no more
    settings = Settings(compute={"clients_per_gpu": 4})
    assert with_resources(settings, []) == ["client-resources-num-cpus=1", "client-resources-num-gpus=0.25"]
    assert with_resources(settings, ["num-supernodes=3 client-resources-num-gpus=0.5"]) == [
        "client-resources-num-cpus=1",
        "num-supernodes=3 client-resources-num-gpus=0.5",
    ]
    assert with_resources(settings, ["here.toml"]) == ["here.toml"]


def test_tensors_that_are_on_the_device_already_are_not_copied():
    tensors = {"a": torch.ones(3)}
    view = OnDevice(tensors, torch.device("cpu"))
    assert view["a"] is tensors["a"]
    assert dict(view) == tensors
    assert moved(tensors["a"], torch.device("cpu")) is tensors["a"]
    assert OnDevice(tensors, torch.device("meta"))["a"].device.type == "meta"


@pytest.fixture
def fake_gpu(monkeypatch):
    """CUDA tensors without values: operations on two devices at once are errors, as on a real GPU.

    What needs values or a real device is replaced: counting, the backward pass.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def backward(loss):
        assert loss.device.type == "cuda"

    def counts(y, minlength):
        return torch.zeros(minlength, dtype=torch.int64, device=y.device)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.5)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch, "bincount", counts)
    monkeypatch.setattr(
        torch.autograd, "grad", lambda loss, inputs, **_: [torch.zeros_like(t) for t in _listed(inputs)]
    )
    with FakeTensorMode():
        yield torch.device("cuda:0")


def _listed(inputs):
    return [inputs] if isinstance(inputs, torch.Tensor) else inputs


@pytest.mark.slow
@pytest.mark.parametrize("method", [kind() for kind in METHODS.values()], ids=lambda method: method.name)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_all_methods_compute_on_the_device_of_the_network_alone(method, fake_gpu):
    """The node's own code around them: the client's tensors begin and end on the CPU, downloads arrive there."""
    with fake_gpu:
        network = ConvNet((1, 16, 16), num_classes=10)
    work = ClientModel(network, method, {name: t.cpu() for name, t in snapshot(network).items()})
    data = Split(torch.randn(32, 1, 16, 16), torch.randint(10, (32,)))
    download = {name: torch.randn(work.tensors[name].shape) for name in method.download_names(network)}
    task = LocalTask(
        network,
        data,
        [True, True],
        {name: t.to(fake_gpu) for name, t in download.items()},
        LocalBudget(steps=2),
        partial(rng_for, 0, 1, 0),
        initial=OnDevice(work.weights, fake_gpu),
    )
    work.put(task, method.receive(work.tensors, download, work.weights))
    method.train(task)
    method.finish(task)
    tensors = work.take(task)
    assert {tensors[name].device.type for name in work.weights} == {"cuda"}
    assert {t.device for t in method.deploy(tensors).values()} >= {fake_gpu}


_BLOCKER = """
import sys
for name in "flwr ray pydantic torchvision flwr_datasets datasets scipy pandas torchmetrics sklearn rich typer".split():
    sys.modules[name] = None  # as if it were not installed
"""


@pytest.mark.slow
def test_the_gpu_benchmark_runs_with_torch_and_numpy_alone(tmp_path):
    """Also in the processes that it starts."""
    (tmp_path / "sitecustomize.py").write_text(_BLOCKER)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--cpu"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for words in ("local training", "at a time", "EarlyExitRunner", "peak memory"):
        assert words in done.stdout
