"""Cost of inference in multiply-adds: up to every exit, and on average over examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.statistics import evaluating


def macs_per_exit(network: EarlyExitNetwork, example: Tensor) -> list[int]:
    """Multiply-adds (MACs) of inference that stops at exit k, for k = 1..m.

    Counted by ``torch.utils.flop_counter`` (2 of its FLOPs are 1 MAC): the stages up to k and every exit evaluated on
    the way, its own included (C_k of docs/method.md).

    Parameters
    ----------
    network
        Left unchanged, its mode included.
    example
        One batch, (B, …), B ≥ 1; the result is per example.

    Raises
    ------
    ValueError
        If the batch is empty, or the network has layers whose operations are not counted.

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

    Raises ValueError unless there is one share per exit, all are 0 or more and they sum to 1.

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
    """ValueError if a stage has layers that are not counted: recurrent ones, or weight matrices with no MACs at all."""
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
    """Compute attention in parts that are counted; in evaluation mode torch else fuses it into one that is not."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
