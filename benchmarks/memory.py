"""Peak memory of a client that trains, compared with the least that training needs.

The bound: network + gradients + momentum + activations of one batch, and 15 %. Activations are the storages that
autograd keeps for the backward pass of the exits' cross-entropies, without the weights. On the CPU the peak is the
largest running sum of allocations in a profile (``profile_memory``); on a GPU, ``torch.cuda.max_memory_allocated``.
NumPy's arrays, such as those of a message, and Python are not counted; what the process holds before, such as initial
weights, is. The client is a ClientApp in a federation: it evaluates, trains, evaluates and keeps its personal state.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

BATCH = 64
ON_CPU = {"compute.device": "cpu"}
BOUND = 1.15


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Peak bytes allocated on the device while this runs, above those allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def activations_of(network: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of the exits' cross-entropies."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(F.cross_entropy(z, y) for z in network(x))
    del loss
    return sum(kept.values())


def needed(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, int]:
    """Bytes that training by SGD with momentum needs at least."""
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    return {"network": weights, "gradients": weights, "momentum": weights, "activations": activations_of(network, x, y)}


def report(what: str, peak: int, parts: dict[str, int]) -> bool:
    """Print a peak and its bound; return whether it is kept."""
    total = sum(parts.values())
    words = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
    print(f"{what}: peak memory {peak / 1e6:.0f} MB, {peak / total:.2f} × ({words}) MB (bound {BOUND})")
    return peak <= BOUND * total


def main() -> None:
    """ResNet-18 on data of CIFAR-100's shape, batch 64: one client's rounds in the federation of three methods."""
    from cafe_flwr import make_client_app
    from cafe_flwr.data import ClientData, Split
    from cafe_flwr.engine import InProcessGrid
    from cafe_flwr.methods import METHODS
    from cafe_flwr.networks import ResNet18
    from cafe_flwr.server.strategy import FederatedStrategy
    from cafe_flwr.training import LocalBudget

    torch.manual_seed(0)

    def split(size: int) -> Split:
        return Split(torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8), torch.randint(100, (size,)))

    def build() -> ResNet18:
        return ResNet18((3, 32, 32), num_classes=100)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    data = ClientData(split(BATCH), split(8), split(2 * BATCH))
    parts = needed(build(), data.train.x[:BATCH], data.train.y[:BATCH])
    good = True
    for name in ("fedavg", "cafedistill", "cafedistill-text"):
        with tempfile.TemporaryDirectory() as folder:
            app = make_client_app(
                lambda context: build(),
                lambda client, context: data,
                state_dir=lambda context, folder=folder: str(Path(folder)),
            )
            strategy = FederatedStrategy(
                method=METHODS[name](),
                num_clients=1,
                num_rounds=1,
                local=LocalBudget(batch_size=BATCH, steps=2, learning_rate=0.01, momentum=0.9),
            )
            peak = peak_of(lambda: strategy.start(InProcessGrid(app, 1, ON_CPU)), torch.device("cpu"))  # noqa: B023
        good &= report(
            f"a simulated client of {name}, ResNet-18, 32×32, 100 classes, batch {BATCH}, on cpu", peak, parts
        )
    if not good:
        sys.exit("a bound is missed")


if __name__ == "__main__":
    main()
