"""Running statistics of batch norms: their names, and how to drop them or leave them untouched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

Statistics = Literal["average", "personal", "drop"]


def batch_norm_names(network: nn.Module) -> list[str]:
    """State-dict names of the running statistics of batch (and instance) norms: means, variances and counters.

    Examples
    --------
    >>> batch_norm_names(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(module, _NormBase)
        for name in ("running_mean", "running_var", "num_batches_tracked")
        if getattr(module, name) is not None
    ]


def drop_statistics(network: nn.Module) -> None:
    """Make batch norms always normalise by the statistics of the batch, and keep none."""
    for module in network.modules():
        if isinstance(module, _NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode in a ``with`` block; afterwards every module is in its earlier mode.

    Examples
    --------
    >>> layer = nn.Dropout()
    >>> with evaluating(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    training = [module for module in _modules(network) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _modules(network: nn.Module) -> list[nn.Module]:
    """All modules, faster than ``network.modules()``, which takes as long as a small stage."""
    found = [network]
    for module in found:
        found.extend(child for child in module._modules.values() if child is not None)
    return found
