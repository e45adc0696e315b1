"""Differential privacy of what a client sends: it is clipped and gets noise on the client.

A client releases two vectors a round: its shared part and what it sends of its own (CAFEDistill: its last classifier).
The difference of each to a point that the server knows already is clipped to norm C and gets Gaussian noise of standard
deviation σC in every value (the Gaussian mechanism: Dwork and Roth, The Algorithmic Foundations of Differential
Privacy, 2014, appendix A). docs/security.md says what this protects and what it costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def clipped(update: NDArray[Any], clip_norm: float) -> NDArray[np.float64]:
    """The update in float64, scaled down to norm ``clip_norm`` if it is longer.

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
        (d,), known to the server already; for a personalised download, what this client received.
    clip_norm, noise_multiplier
        C > 0 and σ ≥ 0; ValueError if C is not.
    rng
        Generator for a purpose, from a secret of the client (``PersonalStore.private_rng``). The purpose identifies
        what is released: repeating a release repeats its noise and reveals nothing new, while two different releases
        never share noise, which would cancel in their difference.

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
