"""Temperature scaling of the exits' logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_TEMPERATURES = [float(t) for t in np.geomspace(0.25, 4.0, 33)]


def fit_temperatures(logits: Tensor, y: Tensor) -> list[float]:
    """Temperature T of each exit with the lowest cross-entropy of logits/T, from a grid; 1 without examples.

    Logits (m, N, C) and labels (N,) are those of calibration examples (Guo et al., arXiv 1706.04599). Distillation
    makes early exits less confident than the last: one threshold means the same at all exits only after this scaling.
    """
    if not len(y):
        return [1.0] * len(logits)
    losses = torch.stack([torch.stack([F.cross_entropy(z / t, y) for z in logits]) for t in _TEMPERATURES])
    return [_TEMPERATURES[i] for i in losses.argmin(dim=0).tolist()]
