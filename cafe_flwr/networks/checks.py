"""Checks of inputs and sizes that the package's own networks share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from cafe_flwr.networks.early_exit import EarlyExitNetwork, Exit

IMAGE_NORMS = ("group", "batch")


class ImageNetwork(EarlyExitNetwork):
    """An early-exit network for images with a given number of channels."""

    def __init__(self, stages: Sequence[nn.Module], exits: Sequence[Exit], in_channels: int) -> None:
        super().__init__(stages, exits)
        self.in_channels = in_channels

    def check_inputs(self, x: Tensor) -> None:
        """Raise ValueError if these are not images with its number of channels."""
        check_images(x, self.in_channels)


class TextNetwork(EarlyExitNetwork):
    """An early-exit network for tokens 0..vocabulary − 1, in texts of at most ``max_length``."""

    def __init__(self, stages: Sequence[nn.Module], exits: Sequence[Exit], vocabulary: int, max_length: int) -> None:
        super().__init__(stages, exits)
        self.vocabulary, self.max_length = vocabulary, max_length

    def check_inputs(self, x: Tensor) -> None:
        """Raise ValueError if these are not tokens (N, L) int64 of its vocabulary, or too long."""
        check_tokens(x, self.max_length)
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < self.vocabulary:
            raise ValueError(
                f"tokens are {int(x.min())}..{int(x.max())}, the network knows 0..{self.vocabulary - 1}: build it with "
                f"a larger vocabulary, or make tokens with its own"
            )


def check_norm(norm: str, known: Iterable[str]) -> None:
    """Raise ValueError if the norm is not among the known ones."""
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


def narrow(width: int, share: float, multiple: int) -> int:
    """About this share of a width, rounded to a multiple of a number.

    Examples
    --------
    >>> narrow(16, 0.5, 4), narrow(8, 0.3, 4)
    (8, 4)
    """
    return max(1, round(width * share / multiple)) * multiple
