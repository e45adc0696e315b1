"""Local training and early exits on a GPU, in one call of a few minutes; needs torch and numpy only.

    python -m benchmarks.gpu          on a machine with a CUDA GPU
    python -m benchmarks.gpu --cpu    a tiny version of everything, which only shows that it works

The network is a ResNet-18 for CIFAR (group norm, an exit after each stage); the data are random pixels in the shape of
CIFAR-100's, on the CPU as at clients. The bare loop, measured in turn with ours in one process, has its data on the GPU
and nothing but forward, backward and step. Clients that train at the same time are separate processes, like the workers
of a simulation; they start together, and the slowest one counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import inference, memory
from cafe_flwr.core.random import rng_for
from cafe_flwr.data import Split
from cafe_flwr.methods import METHODS, LocalTask
from cafe_flwr.networks import EarlyExitNetwork, Exit
from cafe_flwr.networks.placement import Placement, device_of
from cafe_flwr.training import LocalBudget, batches

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 100
LOCAL_BOUND, SHARED_BOUND = 0.85, 3.0


@dataclass(frozen=True)
class Size:
    """Sizes of network, data and measurements."""

    device: str
    width: int
    image: int
    batch: int
    examples: int
    steps: int
    repeats: int
    together: tuple[int, ...]
    client_steps: int


LARGE = Size("cuda", 64, 32, 64, 2048, 60, 5, (4, 8), 300)
TINY = Size("cpu", 4, 16, 8, 64, 2, 2, (2,), 4)


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut, group norm."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        groups = width // 2 if width < 64 else 32
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.GroupNorm(groups, width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(groups, width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            conv = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.GroupNorm(groups, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, width, H/stride, W/stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18(width: int) -> EarlyExitNetwork:
    """ResNet-18 without torchvision: the layers of ``cafe_flwr.networks.ResNet18``, except for the norm of its stem."""
    torch.manual_seed(0)
    stages, exits = [], []
    for k in range(4):
        stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.ReLU(inplace=True)] if k == 0 else []
        first = Residual(width << max(k - 1, 0), width << k, 1 if k == 0 else 2)
        stages.append(nn.Sequential(*stem, first, Residual(width << k, width << k, 1)))
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width << k, 128), nn.LayerNorm(128)]
        exits.append(Exit(nn.Sequential(*pool), 128, CLASSES))
    return EarlyExitNetwork(stages, exits)


def examples(size: Size) -> Split:
    """Random pixels and labels on the CPU."""
    x = torch.randint(256, (size.examples, 3, size.image, size.image), dtype=torch.uint8)
    return Split(x, torch.randint(CLASSES, (size.examples,)))


def bare(network: EarlyExitNetwork, data: Split, budget: LocalBudget) -> None:
    """Forward, backward, step; the data are where the network is."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), budget.learning_rate, momentum=budget.momentum)
    draws = budget.num_draws(len(data))
    for positions in batches(len(data), budget.batch_size, draws, rng_for(0, 1, 0, "batches")):
        index = torch.from_numpy(positions).to(data.x.device)
        optimizer.zero_grad(set_to_none=True)
        y = data.y[index]
        torch.stack([F.cross_entropy(z, y) for z in network(data.x[index])]).mean().backward()
        optimizer.step()


def ours(name: str, network: EarlyExitNetwork, data: Split, budget: LocalBudget) -> None:
    """One client's local training by a method, all exits; cafedistill-text's teacher is its own last exit."""
    last = network.head_names(network.num_exits - 1) if name == "cafedistill-text" else []
    teacher = {name: network.state_dict()[name].clone() for name in last}
    rng = partial(rng_for, 0, 1, 0)
    METHODS[name]().train(LocalTask(network, data, [True] * (network.num_exits - 1), teacher, budget, rng))


def wait(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, all in turn, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def local_training(size: Size) -> bool:
    """Images per second, and their share of the bare loop's."""
    good = True
    for precision in ("float32", "bfloat16"):
        network, data = resnet18(size.width), examples(size)
        Placement(size.device, precision, channels_last=precision != "float32").place(network)
        device = device_of(network)
        there = Split(data.x.to(device), data.y.to(device))
        budget = LocalBudget(size.batch, size.steps, learning_rate=0.01, momentum=0.9)
        images = size.batch * size.steps
        runs: dict[str, Callable[[], object]] = {
            "bare": partial(bare, network, there, budget),
            "fedavg": partial(ours, "fedavg", network, data, budget),
            "cafedistill-text": partial(ours, "cafedistill-text", network, data, budget),
        }
        seconds = seconds_of(runs, size.repeats, device)
        print(f"local training, {precision}, batch {size.batch}: bare loop {images / seconds['bare']:.0f} images/s")
        for name in ("fedavg", "cafedistill-text"):
            share = seconds["bare"] / seconds[name]
            print(f"  {name}: {images / seconds[name]:.0f} images/s, {share:.0%} of the bare loop's (bound 85 %)")
            good &= share >= LOCAL_BOUND
    return good


def worker(size: Size) -> None:
    """One client in its own process: report that it is ready, wait for a line, train, report the end."""
    torch.set_num_threads(1)
    network, data = resnet18(size.width), examples(size)
    Placement(size.device).place(network)
    device = device_of(network)
    warm_up = LocalBudget(size.batch, 2, learning_rate=0.01, momentum=0.9)
    ours("cafedistill-text", network, data, warm_up)
    wait(device)
    print("ready", flush=True)
    sys.stdin.readline()
    ours(
        "cafedistill-text", network, data, LocalBudget(size.batch, size.client_steps, learning_rate=0.01, momentum=0.9)
    )
    wait(device)
    print("done", flush=True)


def images_per_second(size: Size, processes: int) -> float:
    """Measure this many clients that train at the same time."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "--batch", str(size.batch)]
    command += ["--cpu"] if size is TINY else []
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    try:
        for process in started:
            _expect(process, "ready")
        start = time.perf_counter()
        for process in started:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in started:
            _expect(process, "done")
        return processes * size.batch * size.client_steps / (time.perf_counter() - start)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout
    if (line := process.stdout.readline().strip()) != word:
        raise SystemExit(f"a client's process said {line!r} instead of {word!r}: see its error above")


def clients_together(size: Size) -> bool:
    """Several clients on one GPU, compared with one at a time."""
    best = 0.0
    for batch in dict.fromkeys((size.batch, max(1, size.batch // 4))):
        of_batch = Size(**{**vars(size), "batch": batch}) if size is not TINY else size
        alone = images_per_second(of_batch, 1)
        for processes in size.together:
            together = images_per_second(of_batch, processes)
            best = max(best, together / alone)
            print(
                f"{processes} clients at a time, batch {of_batch.batch}: {together:.0f} images/s, "
                f"{together / alone:.2f} × one client at a time ({alone:.0f}; bound 3)"
            )
        if size is TINY:
            break
    return best >= SHARED_BOUND


def early_exits(size: Size) -> bool:
    """The speed-up of early exits, compared with that in multiply-adds, at batch 256 and 1."""
    if size is not TINY:
        return inference.measure(size.device)
    torch.manual_seed(0)
    network = inference.network(8, 1)
    x = torch.randn(8, 3, inference.SIZE, inference.SIZE)
    runner = inference.EarlyExitRunner(network, inference.MaxProb(0.02))
    runs = {"all": partial(inference.everything, network, [x]), "early": partial(runner.predict, x)}
    speed = inference.speeds(runs, 2, "cpu")["early"]
    macs = inference.macs_per_exit(network, x[:1])
    promised = macs[-1] / runner.predict(x).mean_macs(macs)
    print(f"EarlyExitRunner, batch 8: speed-up {speed:.2f}, {promised:.2f} by MACs")
    return True


def peak_memory(size: Size) -> bool:
    """Peak memory of a client that trains."""
    network, data = resnet18(size.width), examples(size)
    Placement(size.device).place(network)
    device = device_of(network)
    x, y = data.x[: size.batch].to(device), data.y[: size.batch].to(device)
    parts = memory.needed(network, x, y)
    del x, y
    budget = LocalBudget(size.batch, 3, learning_rate=0.01, momentum=0.9)
    ours("cafedistill-text", network, data, budget)  # libraries take their own share at first use
    peak = memory.peak_of(partial(ours, "cafedistill-text", network, data, budget), device)
    return memory.report(f"a client of cafedistill-text on {device}", parts["network"] + peak, parts)


def main() -> None:
    """Print everything, and whether the bounds are kept."""
    parser = argparse.ArgumentParser(description="Local training and early exits on a GPU.")
    parser.add_argument("--cpu", action="store_true", help="a tiny version of everything, on the CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    size = TINY if given.cpu else LARGE
    if given.worker:
        return worker(Size(**{**vars(size), "batch": given.batch}))
    if not given.cpu and not torch.cuda.is_available():
        print("There is no CUDA GPU here, so nothing was measured: --cpu runs a tiny version of everything.")
        return None
    name = torch.cuda.get_device_name() if size.device == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    print(f"{name}; PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    parts = {
        "local training": local_training,
        "clients at a time": clients_together,
        "EarlyExitRunner": early_exits,
        "peak memory": peak_memory,
    }
    missed = []
    for title, part in parts.items():
        print(f"-- {title}", flush=True)
        start = time.perf_counter()
        if not part(size):
            missed.append(title)
        print(f"   ({time.perf_counter() - start:.0f} s)", flush=True)
    if missed and size is not TINY:  # what is tiny says nothing about bounds
        sys.exit(f"a bound is missed: {', '.join(missed)}")
    return None


if __name__ == "__main__":
    main()
