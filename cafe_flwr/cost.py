"""What inference costs: multiply-adds and seconds up to every exit, and under a policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from cafe_flwr.inference.runner import EarlyExitRunner
from cafe_flwr.metrics.curve import CostCurve, accuracy_macs_curve, area_under_curve
from cafe_flwr.networks.early_exit import EarlyExitNetwork, evaluating

__all__ = [
    "CostCurve",
    "accuracy_macs_curve",
    "area_under_curve",
    "expected_macs",
    "latency_per_exit",
    "macs_per_exit",
    "macs_without_early_exits",
    "policy_latency",
]

_T = TypeVar("_T")


def macs_per_exit(network: EarlyExitNetwork, example: Tensor) -> list[int]:
    """Multiply-adds (MACs) of inference that stops at exit k, for k = 1..m.

    Counted by ``torch.utils.flop_counter`` (2 of its FLOPs are 1 MAC): the stages up to k and every exit evaluated on
    the way, its own included (C_k of docs/method.md).

    Parameters
    ----------
    network
        In evaluation mode or not, it is left as it is.
    example
        One batch, (B, …), B ≥ 1; the result is per example.

    Raises
    ------
    ValueError
        If the batch is empty, or the network computes with operations that are not counted.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> macs_per_exit(ConvNet((1, 16, 16), num_classes=100), torch.zeros(1, 1, 16, 16))
    [23904, 106176, 185376]
    """
    stages, exits = _macs_of_parts(network, example)
    return [int(c) for c in np.cumsum(np.add(stages, exits))]


def macs_without_early_exits(network: EarlyExitNetwork, example: Tensor) -> int:
    """Multiply-adds of the plain static network: all stages and the last exit, none of the exits on the way.

    Parameters and errors are those of :func:`macs_per_exit`.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> macs_without_early_exits(ConvNet((1, 16, 16), num_classes=100), torch.zeros(1, 1, 16, 16))
    171360
    """
    stages, exits = _macs_of_parts(network, example)
    return sum(stages) + exits[-1]


def expected_macs(exit_shares: ArrayLike, macs: Sequence[int]) -> float:
    """Σ_k r_k C_k: mean MACs, from the share of the examples that leaves at each exit (docs/method.md).

    Raises
    ------
    ValueError
        If the shares are not one per exit, from 0 up, of sum 1.

    Examples
    --------
    >>> expected_macs([0.5, 0.25, 0.25], [10, 20, 40])
    20.0
    """
    shares = np.asarray(exit_shares, dtype=np.float64)
    if shares.shape != (len(macs),) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(
            f"exit_shares must be {len(macs)} numbers from 0 up, one per exit, of sum 1; not {shares.tolist()}"
        )
    return float(shares @ np.asarray(macs, dtype=np.float64))


def latency_per_exit(network: EarlyExitNetwork, example: Tensor, repeats: int = 20) -> list[float]:
    """Seconds until exit k has answered, for k = 1..m, of a batch as it is given.

    Sum over the stages (each with its exit) of the median over repeats, where the device has finished after each; one
    more repeat before warms up.

    Parameters
    ----------
    network
        In evaluation mode or not, it is left as it is.
    example
        One batch, (B, …), B ≥ 1, on the network's device.
    repeats
        How often each stage is timed.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> seconds = latency_per_exit(ConvNet((1, 16, 16), num_classes=10), torch.zeros(1, 1, 16, 16), repeats=3)
    >>> 0 < seconds[0] < seconds[1] < seconds[2]
    True
    """
    _check_measurable(len(example), repeats)
    times = []
    with torch.inference_mode(), evaluating(network):
        for _ in range(repeats + 1):
            h, row = example, []
            for k in range(network.num_exits):
                h, seconds = _timed(partial(_step, network, k, h), example.device)
                row.append(seconds)
            times.append(row)
    return [float(t) for t in np.median(times[1:], axis=0).cumsum()]


def policy_latency(runner: EarlyExitRunner, x: Tensor, repeats: int = 5) -> float:
    """Seconds per example under the runner's policy: the median over repeats, after one that warms up.

    Parameters
    ----------
    runner
        Its ``batch_size`` is how many examples are computed at a time.
    x
        Examples, (N, …), N ≥ 1.
    repeats
        How often all of them are predicted.

    Examples
    --------
    >>> from cafe_flwr.inference import MaxProb
    >>> from cafe_flwr.networks import ConvNet
    >>> runner = EarlyExitRunner(ConvNet((1, 16, 16), num_classes=10), MaxProb(0.6))
    >>> policy_latency(runner, torch.zeros(4, 1, 16, 16), repeats=1) > 0
    True
    """
    _check_measurable(len(x), repeats)
    times = [_timed(partial(runner.predict, x), runner.device)[1] for _ in range(repeats + 1)]
    return median(times[1:]) / len(x)


def _macs_of_parts(network: EarlyExitNetwork, example: Tensor) -> tuple[list[int], list[int]]:
    """MACs of each stage and of each exit, per example."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, a tenth of a second of every process

    if not len(example):
        raise ValueError("the example is an empty batch: one row at least is needed to count by")
    if len(example) == 1 and network.statistics == "drop":  # a single row has no statistics of its batch
        example = torch.cat([example, example])
    totals, h = [], example
    with torch.no_grad(), evaluating(network), _all_counted(), FlopCounterMode(display=False) as counter:
        for k in range(network.num_exits):
            h = network.stage(k, h)
            totals.append(counter.get_total_flops())
            network.exit(k, h)
            totals.append(counter.get_total_flops())
    parts = np.diff(np.array(totals) // (2 * len(example)), prepend=0).tolist()
    stages, exits = parts[0::2], parts[1::2]
    for k, stage in enumerate(network.stages):
        _check_counted(k, stage, stages[k])
    return stages, exits


def _check_counted(k: int, stage: nn.Module, macs: int) -> None:
    """ValueError if a stage computes what is not counted: recurrent layers, or with matrices and still nothing."""
    kinds = {
        type(module).__name__
        for module in stage.modules()
        if isinstance(module, nn.RNNBase)
        or (
            not macs
            and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and any(p.dim() > 1 for p in module.parameters(recurse=False))
        )
    }
    if kinds:
        raise ValueError(
            f"stage {k + 1} computes with {', '.join(sorted(kinds))}, which torch.utils.flop_counter does not count: "
            "the MACs of this network are not known; build it from convolutions, linear layers and attention"
        )


@contextmanager
def _all_counted() -> Iterator[None]:
    """Multi-head attention in the parts that are counted: in evaluation it is else one operation that is not."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _check_measurable(examples: int, repeats: int) -> None:
    if examples < 1 or repeats < 1:
        raise ValueError(f"one example and one repeat at least are needed, got {examples} and {repeats}")


def _step(network: EarlyExitNetwork, k: int, h: Any) -> Any:
    h = network.stage(k, h)
    network.exit(k, h)
    return h


def _timed(compute: Callable[[], _T], device: torch.device) -> tuple[_T, float]:
    """What is computed, and the seconds it took until the device had finished."""
    start = time.perf_counter()
    result = compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
