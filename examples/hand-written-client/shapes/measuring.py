"""What a client says about its network: accuracy, loss, calibration, and what leaving early would bring."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from shapes.model import ExitNet

THRESHOLDS = [*np.linspace(0, 1, 101), np.inf]


@torch.no_grad()
def logits_of(network: ExitNet, x: Tensor) -> Tensor:
    """Logits of all exits, (m, N, C)."""
    network.eval()
    return torch.stack(network(x))


def exit_metrics(logits: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Accuracy, cross-entropy and expected calibration error (15 bins) of every exit."""
    return {
        "accuracy": (logits.argmax(dim=2) == y).float().mean(dim=1).tolist(),
        "loss": [F.cross_entropy(z, y).item() for z in logits],
        "ece": [calibration_error(z, y) for z in logits],
    }


def calibration_error(logits: Tensor, y: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy, over bins of confidence, weighted by their examples."""
    confidence, label = logits.softmax(dim=1).max(dim=1)
    gap = (label == y).float() - confidence
    bin_of = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1)[1:-1])
    return sum(abs(gap[bin_of == b].sum().item()) for b in range(bins)) / len(y)


def leaving_early(logits: Tensor, y: Tensor) -> dict[str, list[int]]:
    """How many leave at each exit, are right, and are right or wrong where the last exit is not, at every threshold."""
    confidence, label = logits.softmax(dim=2).max(dim=2)
    right = label == y
    left, correct, changed = [], [], []
    for threshold in THRESHOLDS:
        leaves = confidence >= threshold
        leaves[-1] = True
        exits = leaves.int().argmax(dim=0)  # the first
        outcome = right.gather(0, exits[None])[0]
        left += torch.bincount(exits, minlength=len(logits)).tolist()
        correct.append(int(outcome.sum()))
        changed.append(int((outcome != right[-1]).sum()))
    return {"left": left, "correct": correct, "changed": changed}


def temperature(logits: Tensor, y: Tensor) -> float:
    """By which one exit's logits must be divided for its confidences to fit the labels best."""
    grid = [float(t) for t in np.geomspace(0.25, 4, 33)]
    return min(grid, key=lambda t: F.cross_entropy(logits / t, y).item())


@torch.no_grad()
def macs(network: ExitNet, x: Tensor) -> list[int]:
    """Multiply-adds of an example up to each exit, with the exits on the way."""
    h, result = x[:1], []
    with FlopCounterMode(display=False) as counter:
        for stage, each in zip(network.stages, network.exits, strict=True):
            h = stage(h)
            each["head"](network.pool(h))
            result.append(counter.get_total_flops() // 2)
    return result
