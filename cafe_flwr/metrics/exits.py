"""Logits, features and metrics of all exits on one client's examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.data.split import Split
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.placement import device_of, moved

ECE_BINS = 15
_BATCH = 1024  # examples evaluated at once, at most
_VALUES = 1 << 18  # input values of a batch, at most, so that evaluation takes no more memory than training


@dataclass(frozen=True)
class ExitMetrics:
    """Accuracy, loss (cross-entropy) and expected calibration error of every exit, (m,) each; NaN without examples."""

    accuracy: list[float]
    loss: list[float]
    ece: list[float]

    @classmethod
    def unknown(cls, num_exits: int) -> ExitMetrics:
        """NaN for every exit."""
        return cls(*([math.nan] * num_exits for _ in range(3)))

    def padded(self, num_exits: int) -> ExitMetrics:
        """The same metrics, with NaN for the exits up to ``num_exits`` that are missing."""
        missing = [math.nan] * (num_exits - len(self.accuracy))
        return ExitMetrics([*self.accuracy, *missing], [*self.loss, *missing], [*self.ece, *missing])


def _batches(network: EarlyExitNetwork, x: Tensor) -> Iterator[Tensor]:
    """Mini-batches of the inputs, on the network's device."""
    device = device_of(network)
    rows = max(1, min(_BATCH, _VALUES // max(1, x[:1].numel())))
    return (moved(part, device) for part in x.split(rows))


@torch.no_grad()
def exit_logits(network: EarlyExitNetwork, x: Tensor) -> Tensor:
    """Logits of all exits in evaluation mode, (m, N, C), on the CPU; computed where the network is."""
    network.eval()
    chunks = [torch.stack(network(part)).cpu() for part in _batches(network, x) if len(part)]
    return torch.cat(chunks, dim=1) if chunks else torch.zeros(network.num_exits, 0, network.num_classes)


@torch.no_grad()
def exit_features(network: EarlyExitNetwork, x: Tensor) -> Tensor:
    """Features of all exits in evaluation mode, (m, N, d), on the CPU; computed where the network is."""
    network.eval()
    chunks = []
    for h in _batches(network, x):
        features = []
        for k in range(network.num_exits):
            h = network.stage(k, h)
            features.append(network.exit(k, h)[0])
        chunks.append(torch.stack(features).cpu())
    return torch.cat(chunks, dim=1)


def exit_metrics(logits: Tensor, y: Tensor) -> ExitMetrics:
    """Accuracy, cross-entropy and ECE (15 bins, L1) of every exit, from logits (m, N, C) and labels (N,)."""
    m, n, _ = logits.shape
    if n == 0:
        return ExitMetrics.unknown(m)
    accuracy = (logits.argmax(dim=2) == y).float().mean(dim=1).tolist()
    loss = [F.cross_entropy(z, y).item() for z in logits]
    return ExitMetrics(accuracy, loss, [_calibration_error(p, y) for p in logits.softmax(dim=2)])


def _calibration_error(probabilities: Tensor, y: Tensor) -> float:
    """ECE from probabilities (N, C), bit for bit as of torchmetrics, whose import takes a client's process seconds."""
    confidence, predicted = probabilities.max(dim=1)
    confidence, edges = confidence.float(), torch.linspace(0, 1, ECE_BINS + 1)
    bins = torch.bucketize(confidence, edges, right=True) - 1
    count, correct, confident = (
        torch.zeros(len(edges)).scatter_add_(0, bins, values)
        for values in (torch.ones_like(confidence), (predicted == y).float(), confidence)
    )
    gaps = (correct / count).nan_to_num() - (confident / count).nan_to_num()
    return (gaps.abs() * (count / count.sum())).sum().item()


def ensemble_accuracy(logits: Tensor, y: Tensor) -> float:
    """Accuracy of the mean of all exits' probabilities, from logits (m, N, C); NaN without examples."""
    if not len(y):
        return math.nan
    return (logits.softmax(dim=2).mean(dim=0).argmax(dim=1) == y).float().mean().item()


def evaluate(network: EarlyExitNetwork, data: Split) -> ExitMetrics:
    """:func:`exit_metrics` of a network on a split."""
    return exit_metrics(exit_logits(network, data.x), data.y)
