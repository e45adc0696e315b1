"""The input of inference: batches from a tensor, an array or a loader, and the device to compute them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def batches_of(x: Any, size: int) -> tuple[Iterable[Any], int | None]:
    """Batches of ``size`` rows of a tensor or array, or those of an iterable; and their number, None if unknown.

    Examples
    --------
    >>> batches, number = batches_of(np.zeros((5, 2)), 2)
    >>> [tuple(batch.shape) for batch in batches], number
    ([(2, 2), (2, 2), (1, 2)], 3)
    """
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    if isinstance(x, Tensor):
        if not x.dim():
            raise ValueError("the input is a single number: give rows, (N, …)")
        return x.split(size), -(-len(x) // size)
    if isinstance(x, tuple | str | dict) or not isinstance(x, Iterable):
        raise ValueError(f"the input must be a tensor, an array or an iterable of batches, not a {type(x).__name__}")
    try:
        return x, len(x)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of one
        return x, None


def rows_of(batch: Any) -> Tensor:
    """The inputs of a batch, (B, …): itself, or what its tuple or list begins with."""
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    if not isinstance(x, Tensor) or not x.dim():
        raise ValueError(f"a batch must be a tensor or array of rows, or (x, y), not a {type(x).__name__}")
    return x


def available(device: str | torch.device) -> torch.device:
    """The device; ValueError if it cannot be used here."""
    try:
        wanted = torch.device(device)
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the device {str(device)!r} cannot be used here ({reason}): choose another, as 'cpu'"
        ) from None
    return wanted


@contextmanager
def progress_bar(total: int | None, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar over batches; call it after each."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("batch"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
