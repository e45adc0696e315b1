"""Speed-up of early exit over running the whole network, compared with the reduction of multiply-adds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from cafe_flwr.cost import macs_per_exit
from cafe_flwr.inference import EarlyExitRunner, MaxProb, PerExit
from cafe_flwr.inference.budgets import thresholds_for_shares
from cafe_flwr.inference.latency import latency_per_exit
from cafe_flwr.metrics import exit_logits
from cafe_flwr.networks import EarlyExitNetwork, Exit

EXITS, SIZE, CLASSES, FEATURES, ROWS = 3, 32, 100, 64, 256
WIDTH = {"cpu": 128, "cuda": 256}  # of every stage; on a GPU a narrow one would measure how fast kernels are launched
BLOCKS = {"cpu": 2, "cuda": 8}  # convolutions per stage


def network(width: int, blocks: int) -> EarlyExitNetwork:
    """Stages that are all alike, so that a multiply-add costs the same in each: 3×3 convolutions, group norm, ReLU.

    The stem before them has 3 input channels, and pools to half the size.
    """
    stages = []
    for k in range(EXITS):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, padding=1)] if k == 0 else []
        for _ in range(blocks):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
        stages.append(nn.Sequential(*layers))
    exits = []
    for _ in stages:
        pool = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, FEATURES), nn.LayerNorm(FEATURES)]
        exits.append(Exit(nn.Sequential(*pool), FEATURES, CLASSES))
    return EarlyExitNetwork(stages, exits).eval()


def everything(model: EarlyExitNetwork, parts: Iterable[Tensor]) -> None:
    """All exits of all rows, without even choosing one."""
    with torch.inference_mode():
        for part in parts:
            model(part)


def speeds(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Speed-ups over the first: medians of the ratios within a repeat, which measures all in turn.

    On the CPU, seconds of work of this thread, the only one there is: what else the machine does does not count.
    """
    clock = time.perf_counter if device == "cuda" else time.thread_time
    rounds: list[list[float]] = []
    for _ in range(repeats + 1):
        row = []
        for run in runs.values():
            start = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            row.append(clock() - start)
        rounds.append(row)
    first, *rest = zip(*rounds[1:], strict=True)  # the first round warms up
    return {
        name: median(a / b for a, b in zip(first, times, strict=True))
        for name, times in zip(list(runs)[1:], rest, strict=True)
    }


def measure(device: str) -> bool:
    """Print the figures of one device; return whether they keep the bounds."""
    torch.manual_seed(0)
    model = network(WIDTH[device], BLOCKS[device]).to(device)
    x = torch.randn(ROWS, 3, SIZE, SIZE, device=device) * torch.rand(ROWS, 1, 1, 1, device=device)
    confidence = exit_logits(model, x).softmax(dim=2).amax(dim=2).double().T.cpu().numpy()
    early = PerExit(tuple(thresholds_for_shares(confidence, torch.full((EXITS,), 1 / EXITS).double().numpy())))
    macs = macs_per_exit(model, x[:1])
    print(
        f"{device}: {EXITS} stages of {BLOCKS[device]} convolutions 3×3, {WIDTH[device]} channels on {SIZE // 2}×"
        f"{SIZE // 2} ({SIZE}×{SIZE} images), {CLASSES} classes, {torch.get_num_threads()} thread(s); "
        f"MACs up to each exit {', '.join(f'{c / 1e6:.1f}M' for c in macs)}"
    )
    batches = (x.split(ROWS), 3, 0.85), (x[:64].split(1), 7, 0.75)
    good = [measure_batches(model, early, macs, *some) for some in batches]
    return all(good)


def measure_batches(
    model: EarlyExitNetwork, early: PerExit, macs: list[int], parts: Sequence[Tensor], repeats: int, bound: float
) -> bool:
    """Print the figures of batches of one size; return whether they keep the bounds."""
    batch, rows = len(parts[0]), torch.cat(list(parts))
    latency = latency_per_exit(model, parts[0], 1 if batch > 1 else 20)
    stages = [b - a for a, b in zip([0.0, *latency], latency, strict=False)]
    stops = EarlyExitRunner(model, early, batch_size=batch)
    never = EarlyExitRunner(model, MaxProb(math.inf), batch_size=batch)
    closed = EarlyExitRunner(model, PerExit((math.inf,) * (EXITS - 1)), batch_size=batch)
    runs: dict[str, Callable[[], object]] = {
        "all": partial(everything, model, parts),
        "early": partial(stops.predict, rows),
        "never": partial(never.predict, rows),
        "closed": partial(closed.predict, rows),
    }
    speed = speeds(runs, repeats, rows.device.type)
    found = stops.predict(rows)
    promised = macs[-1] / found.mean_macs(macs)
    shares = ", ".join(f"{(found.exits == k).mean():.2f}" for k in range(EXITS))
    realised = speed["early"]
    print(
        f"  batch {batch}: stages take {', '.join(f'{1e3 * s:.2f}' for s in stages)} ms; leave at each exit "
        f"{shares}; speed-up {realised:.2f} of {promised:.2f} by MACs: {realised / promised:.2f} (bound {bound}); "
        f"nobody leaves: {speed['never']:.3f} × the speed of running everything, nobody may "
        f"leave: {speed['closed']:.3f} ×"
    )
    return realised / promised >= bound and realised >= 1


def main() -> None:
    """Measure the CPU, on one thread, and the GPU if there is one."""
    torch.set_num_threads(1)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    good = [measure(device) for device in devices]
    if not all(good):
        raise SystemExit("a bound is missed")


if __name__ == "__main__":
    main()
