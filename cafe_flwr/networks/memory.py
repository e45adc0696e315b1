"""Recognise errors of memory that has run out, explain them, and free memory."""

from __future__ import annotations

import re

import torch
from torch import nn

from cafe_flwr.networks.placement import device_of

_NO_MEMORY = "out of memory|not enough memory|can't allocate memory"
_ONE_VALUE = "more than 1 value per channel"  # of a batch norm


def reason_of(error: BaseException, device: torch.device) -> str:
    """An error as a sentence: type and message, or what to do about it where PyTorch's message does not say.

    Examples
    --------
    >>> reason_of(ValueError("no"), torch.device("cpu"))
    'ValueError: no'
    """
    if _ONE_VALUE in str(error):
        return (
            "a batch norm cannot normalise one example by its own statistics: give the client more examples, raise "
            "train.batch-size, or set model.norm = 'group'"
        )
    if not is_out_of_memory(error):
        return f"{type(error).__name__}: {error}"
    first = str(error).strip().split(". ")[0].splitlines()
    sharing = ", compute.clients-per-gpu" if device.type == "cuda" else ""
    return (
        f"out of memory on {device} ({first[0] if first else type(error).__name__}): lower train.batch-size or "
        f"model.width{sharing}, or set compute.precision = 'bfloat16'"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(_NO_MEMORY, str(error)))


def free_memory(network: nn.Module) -> None:
    """Free gradients, and the memory that PyTorch caches on a GPU."""
    network.zero_grad(set_to_none=True)
    if device_of(network).type == "cuda":
        torch.cuda.empty_cache()
