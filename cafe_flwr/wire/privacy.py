"""Differential privacy of what a client sends: clipped, and noised on the client.

A client's round releases two vectors: its shared part and what it sends of its own (CAFEDistill: its last classifier).
Of each only the difference to a point that the server knows already is the client's own; that difference is clipped to
norm C and gets Gaussian noise of standard deviation σC in every value (the Gaussian mechanism: Dwork and Roth, The
Algorithmic Foundations of Differential Privacy, 2014, appendix A). docs/security.md says what this protects and what
it costs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Privacy:
    """What clients do to what they send.

    Attributes
    ----------
    clip_norm
        C: the update of the shared part is scaled down to this norm; 0: neither clipping nor noise.
    upload_clip_norm
        C of what a client sends of its own; 0: as ``clip_norm``.
    noise_multiplier
        σ: noise has the standard deviation σC; 0: none.
    delta
        δ for which ε is reported.
    report_metrics
        Whether clients report accuracies, losses and similarities, which get no noise.
    """

    clip_norm: float = 0.0
    upload_clip_norm: float = 0.0
    noise_multiplier: float = 0.0
    delta: float = 1e-5
    report_metrics: bool = True

    def __post_init__(self) -> None:
        for name in ("clip_norm", "upload_clip_norm", "noise_multiplier"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of 0 (off) or more, got {value}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, far below 1 / number of clients, got {self.delta}")
        if not self.clip_norm and (self.noise_multiplier or self.upload_clip_norm):
            raise ValueError("noise_multiplier and upload_clip_norm need a clip_norm greater than 0: noise is σ·C")

    @property
    def on(self) -> bool:
        """Whether anything is clipped."""
        return self.clip_norm > 0

    def clip_of(self, kind: str) -> float:
        """C of the ``"shared"`` part or of the ``"upload"``."""
        return self.upload_clip_norm or self.clip_norm if kind == "upload" else self.clip_norm


def clipped(update: NDArray[Any], clip_norm: float) -> NDArray[np.float64]:
    """The update, scaled down to the norm if it is longer; in float64.

    Examples
    --------
    >>> clipped(np.array([3.0, 4.0]), 2.5).tolist(), clipped(np.array([0.3, 0.4]), 2.5).tolist()
    ([1.5, 2.0], [0.3, 0.4])
    """
    wide = update.astype(np.float64)
    length = float(np.linalg.norm(wide))
    return wide if length <= clip_norm else wide * (clip_norm / length)


def release(
    values: NDArray[np.float32],
    reference: NDArray[np.float32],
    clip_norm: float,
    noise_multiplier: float,
    rng: Callable[[str], np.random.Generator],
) -> NDArray[np.float32]:
    """reference + clip(values − reference, C) + N(0, (σC)²).

    Parameters
    ----------
    values
        What the client would send, (d,).
    reference
        (d,), known to the server already. For a personalised download: what this client got, not what others did.
    clip_norm, noise_multiplier
        C > 0 and σ ≥ 0.
    rng
        Generator for a purpose, from a secret of the client (``PersonalStore.private_rng``). The purpose names all
        that is released, so the same release repeats the same noise and tells nothing more, while anything else gets
        noise of its own: noise that two different releases shared would cancel in their difference.

    Examples
    --------
    >>> start, end = np.zeros(2, dtype=np.float32), np.array([30.0, 40.0], dtype=np.float32)
    >>> release(end, start, 5.0, 0.0, lambda purpose: np.random.default_rng(0))
    array([3., 4.], dtype=float32)
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be greater than 0, got {clip_norm}")
    update = clipped(values.astype(np.float64) - reference, clip_norm)
    if noise_multiplier:
        scale = noise_multiplier * clip_norm
        content = hashlib.sha256(reference.tobytes() + update.tobytes()).hexdigest()
        update += rng(f"{scale!r} {content}").normal(scale=scale, size=update.shape)
    return (reference + update).astype(np.float32)
