"""Latency of inference: seconds up to every exit, and under a policy."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cafe_flwr.inference.runner import EarlyExitRunner
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.statistics import evaluating

_T = TypeVar("_T")


def latency_per_exit(network: EarlyExitNetwork, example: Tensor, repeats: int = 20) -> list[float]:
    """Seconds until exit k has answered, for k = 1..m, of a batch (B, …), B ≥ 1, on the network's device.

    The sum over the stages (each with its exit) of their median over repeats, after one more repeat to warm up. The
    device is synchronised after every stage, and the network is left unchanged.

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
    """Median seconds per example, of (N, …), N ≥ 1, under the runner's policy, ``batch_size`` of them at a time.

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


def _check_measurable(examples: int, repeats: int) -> None:
    if examples < 1 or repeats < 1:
        raise ValueError(f"one example and one repeat at least are needed, got {examples} and {repeats}")


def _step(network: EarlyExitNetwork, k: int, h: Any) -> Any:
    h = network.stage(k, h)
    network.exit(k, h)
    return h


def _timed(compute: Callable[[], _T], device: torch.device) -> tuple[_T, float]:
    """The result, and the seconds until the device had finished."""
    start = time.perf_counter()
    result = compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
