"""What the named networks refuse in the same words."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

IMAGE_NORMS = ("group", "batch")


def check_norm(norm: str, known: Iterable[str]) -> None:
    """Raise ValueError if the norm is not one of those known."""
    if norm not in (known := list(known)):
        raise ValueError(f"norm must be one of {', '.join(known)}; got {norm!r}")


def check_images(x: Tensor, channels: int) -> None:
    """Raise ValueError if these are not images, (N, channels, H, W) float32 or uint8.

    Examples
    --------
    >>> check_images(torch.zeros(2, 7, dtype=torch.int64), 3)
    Traceback (most recent call last):
        ...
    ValueError: images must be (N, 3, height, width), float32 or uint8; got torch.int64 of shape (2, 7)
    """
    if x.dim() != 4 or x.shape[1] != channels or x.dtype not in (torch.float32, torch.uint8):
        raise ValueError(
            f"images must be (N, {channels}, height, width), float32 or uint8; got {x.dtype} of shape {tuple(x.shape)}"
        )


def check_tokens(x: Tensor, max_length: int) -> None:
    """Raise ValueError if these are not texts, (N, L) int64 with L up to ``max_length``.

    Examples
    --------
    >>> check_tokens(torch.zeros(2, 7), 200)
    Traceback (most recent call last):
        ...
    ValueError: texts must be tokens, (B, L) int64; got torch.float32 of shape (2, 7)
    """
    if x.dtype != torch.int64 or x.dim() != 2:
        raise ValueError(f"texts must be tokens, (B, L) int64; got {x.dtype} of shape {tuple(x.shape)}")
    if x.shape[1] > max_length:
        raise ValueError(
            f"texts have {x.shape[1]} tokens, the network takes {max_length}: shorten them, or build "
            "the network with a larger max_length"
        )


def check_vocabulary(x: Tensor, vocabulary: int) -> None:
    """Raise ValueError if a token is not one of 0..vocabulary − 1."""
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < vocabulary:
        raise ValueError(
            f"tokens are {int(x.min())}..{int(x.max())}, the network knows 0..{vocabulary - 1}: build it with "
            f"a larger vocabulary, or make tokens with its own"
        )


def narrow(width: int, share: float, multiple: int) -> int:
    """About this share of a width, a multiple of a number.

    Examples
    --------
    >>> narrow(16, 0.5, 4), narrow(8, 0.3, 4)
    (8, 4)
    """
    return max(1, round(width * share / multiple)) * multiple
