"""What is measured on one client's examples, and how clients are summed up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.data.federation import Split
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.placement import device_of, moved

ECE_BINS = 15
_TEMPERATURES = [float(t) for t in np.geomspace(0.25, 4.0, 33)]
_BATCH = 1024  # examples evaluated at once, at most
_VALUES = 1 << 18  # inputs of a batch, at most: so that evaluation takes no more memory than training

# Max-prob thresholds at which dynamic inference is counted; the last one is never reached: all exits run.
THRESHOLDS = np.append(np.linspace(0.0, 1.0, 101), np.inf)


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
        """With NaN for exits that are not there."""
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
    """Accuracy, cross-entropy and ECE (15 bins, L1) of every exit.

    Parameters
    ----------
    logits
        (m, N, C).
    y
        Labels, (N,).
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    m, n, num_classes = logits.shape
    if n == 0:
        return ExitMetrics.unknown(m)
    accuracy = (logits.argmax(dim=2) == y).float().mean(dim=1).tolist()
    loss = [F.cross_entropy(z, y).item() for z in logits]
    ece = [
        multiclass_calibration_error(p, y, num_classes, n_bins=ECE_BINS, validate_args=False).item()
        for p in logits.softmax(dim=2)
    ]
    return ExitMetrics(accuracy, loss, ece)


def ensemble_accuracy(logits: Tensor, y: Tensor) -> float:
    """Accuracy of the mean of all exits' probabilities, from logits (m, N, C); NaN without examples."""
    if not len(y):
        return math.nan
    return (logits.softmax(dim=2).mean(dim=0).argmax(dim=1) == y).float().mean().item()


def evaluate(network: EarlyExitNetwork, data: Split) -> ExitMetrics:
    """:func:`exit_metrics` of a network on a split."""
    return exit_metrics(exit_logits(network, data.x), data.y)


def fit_temperatures(logits: Tensor, y: Tensor) -> list[float]:
    """Temperature per exit that makes its confidences fit the labels best (lowest cross-entropy of logits/T).

    Training with distillation makes students less sure than the last exit; one confidence threshold for all exits means
    the same at each only after this scaling (Guo et al., arXiv 1706.04599). Chosen from a grid, 1 without examples.

    Parameters
    ----------
    logits
        Of calibration examples, (m, N, C).
    y
        Labels, (N,).
    """
    if not len(y):
        return [1.0] * len(logits)
    losses = torch.stack([torch.stack([F.cross_entropy(z / t, y) for z in logits]) for t in _TEMPERATURES])
    return [_TEMPERATURES[i] for i in losses.argmin(dim=0).tolist()]


class DynamicCounts(NamedTuple):
    """Counts of examples at every threshold of ``THRESHOLDS``; they add up over clients.

    Attributes
    ----------
    left
        (thresholds, m): leave at each exit.
    correct
        (thresholds,): classified correctly at the exit they leave by.
    changed
        (thresholds,): right there and wrong at the last exit, or the other way round.
    """

    left: NDArray[np.int64]
    correct: NDArray[np.int64]
    changed: NDArray[np.int64]


def dynamic_counts(logits: Tensor, y: Tensor) -> DynamicCounts:
    """How dynamic inference would go at every threshold: leave at the first exit with max-prob ≥ θ.

    Parameters
    ----------
    logits
        (m, N, C).
    y
        Labels, (N,).
    """
    confidence, label = (t.numpy() for t in logits.softmax(dim=2).max(dim=2))
    right = label == y.numpy()
    m = len(confidence)
    passes = confidence[None] >= THRESHOLDS[:, None, None]
    passes[:, -1] = True
    exits = passes.argmax(axis=1)  # (thresholds, N): the first exit that passes
    left = (exits[:, :, None] == np.arange(m)).sum(axis=1)
    outcome = np.take_along_axis(right, exits, axis=0)
    changed = (outcome != right[-1]).sum(axis=1)
    return DynamicCounts(left.astype(np.int64), outcome.sum(axis=1, dtype=np.int64), changed.astype(np.int64))


def worst_share(values: ArrayLike, share: float = 0.1) -> float:
    """Mean over the worst ``share`` of the clients (at least one), NaN left out.

    Examples
    --------
    >>> worst_share([0.9, 0.2, 0.8, float("nan")])
    0.2
    """
    known = np.sort(np.asarray(values, dtype=np.float64))
    known = known[~np.isnan(known)]
    if not len(known):
        return float("nan")
    return float(known[: max(1, round(len(known) * share))].mean())
