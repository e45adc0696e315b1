"""What inference costs: multiply-adds up to every exit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cafe_flwr.networks import EarlyExitNetwork


@torch.no_grad()
def macs_per_exit(network: EarlyExitNetwork, example: Tensor) -> list[int]:
    """Multiply-adds (MACs) of inference that stops at exit k, for k = 1..m.

    Counted by ``torch.utils.flop_counter`` (2 of its FLOPs are 1 MAC): the stages up to k and every exit evaluated on
    the way, its own included (C_k of docs/method.md).

    Parameters
    ----------
    network
        In evaluation mode or not, it is left as it is.
    example
        One batch, (B, …); the result is per example.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> macs_per_exit(ConvNet((1, 16, 16), num_classes=100), torch.zeros(1, 1, 16, 16))
    [23904, 106176, 185376]
    """
    macs, h, training = [], example, network.training
    network.eval()
    with FlopCounterMode(display=False) as counter:
        for k in range(network.num_exits):
            h = network.stage(k, h)
            network.exit(k, h)
            macs.append(counter.get_total_flops() // (2 * len(example)))
    network.train(training)
    return macs
