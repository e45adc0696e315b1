"""Running statistics of norms and of one's own layers: their names, and how to drop them or leave them untouched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

_NAMES = ("running_mean", "running_var", "num_batches_tracked")
Statistics = Literal["average", "personal", "drop"]


def batch_norm_names(network: nn.Module) -> list[str]:
    """State-dict names of running statistics: means, variances and counters of batch (and instance) norms.

    Buffers called ``running_mean``, ``running_var`` and ``num_batches_tracked`` are among them in other layers, too,
    unless ``weight`` is a buffer as well, as in frozen norms; so are buffers that a layer names in its attribute
    ``running_statistics``.

    Examples
    --------
    >>> batch_norm_names(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        for name in _statistics_of(module)
    ]


def _statistics_of(module: nn.Module) -> list[str]:
    """Names of a layer's buffers that are running statistics and in its state dict."""
    usual = () if "weight" in module._buffers else _NAMES
    estimates = ("_u", "_v") if isinstance(module, _SpectralNorm) else ()
    names = dict.fromkeys([*usual, *estimates, *getattr(module, "running_statistics", ())])
    there = module._buffers.keys() - module._non_persistent_buffers_set
    return [name for name in names if name in there and module._buffers[name] is not None]


def drop_statistics(network: nn.Module) -> None:
    """Make batch norms always normalise by the statistics of the batch, and keep none.

    ValueError, before anything is changed, if other layers have running statistics, too.
    """
    others = {type(m).__name__ for m in network.modules() if not isinstance(m, _NormBase) and _statistics_of(m)}
    if others:
        raise ValueError(
            f"only torch's batch norms can do without running statistics, not {', '.join(sorted(others))}: set "
            "statistics to 'average' or 'personal'"
        )
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
