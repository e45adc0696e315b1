"""The three networks that CAFEDistill's authors run (arXiv 2601.10015; code: github.com/boyi-liu/CIKM26-X-FED).

Layers and sizes are taken from that code, the code here is this project's own. In all three an exit is a linear
classifier on its stage's pooled output, without a projection, so that ResNet-18's exits have four widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cafe_flwr.core.numbers import check_counts
from cafe_flwr.networks.attach import ClassToken, Pool
from cafe_flwr.networks.checks import ImageNetwork, TextNetwork, check_tokens
from cafe_flwr.networks.early_exit import Exit
from cafe_flwr.networks.resnet import residual_stages

_CHANNELS = 128  # of every convolution of the ConvNet
_SMALLEST = 22  # pixels: 22 → 10 → 4 → 1 through three times 3×3 convolution without padding and 2×2 pooling
_WIDTH, _HEADS, _HIDDEN, _LAYERS, _DROPOUT = 192, 2, 768, 4, 0.1  # of the Transformer
MAX_LENGTH = 200
"""Longest text of the Transformer, in tokens."""


class PublishedConvNet(ImageNetwork):
    """Three blocks of 3×3 convolution without padding (128 channels, stride 1), ReLU and 2×2 max pooling; no norm.

    An exit is the mean over all positions and a linear layer. ``input_shape`` is (channels, height, width) of the
    images, of 22×22 pixels at least.

    Examples
    --------
    >>> network = PublishedConvNet(input_shape=(3, 32, 32), num_classes=10)
    >>> sum(p.numel() for p in network.parameters())
    302622
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        check_counts(input_shape=input_shape)
        _check_size(input_shape)
        channels = [input_shape[0], _CHANNELS, _CHANNELS]
        stages = [nn.Sequential(nn.Conv2d(c, _CHANNELS, 3), nn.ReLU(), nn.MaxPool2d(2)) for c in channels]
        super().__init__(stages, [Exit(Pool((2, 3)), _CHANNELS, num_classes) for _ in stages], input_shape[0])

    def check_inputs(self, x: Tensor) -> None:
        """Raise ValueError if these are not images with its number of channels, or are too small."""
        super().check_inputs(x)
        _check_size(x.shape[1:])


class PublishedResNet18(ImageNetwork):
    """ResNet-18 with batch norm and the CIFAR stem; the exits have the width of their stage: 64, 128, 256 and 512.

    An exit is the mean over all positions and a linear layer. ``input_shape`` is (channels, height, width) of the
    images, of 8×8 pixels at least.

    Examples
    --------
    >>> network = PublishedResNet18(input_shape=(3, 32, 32), num_classes=100)
    >>> sum(p.numel() for p in network.parameters())
    11265232
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        stages = residual_stages(input_shape)
        exits = [Exit(Pool((2, 3)), 64 << k, num_classes) for k in range(len(stages))]
        super().__init__(stages, exits, input_shape[0])


class PublishedTransformer(TextNetwork):
    """Four of torch's encoder layers (width 192, 2 heads, feed-forward 768, dropout 0.1); exits on the first token.

    Layers are post-norm with ReLU, torch's defaults. Embeddings are scaled by √192, and sinusoidal positions added.
    Padding is attended to like any other token: the authors mask nothing.

    ``vocabulary`` is the number of tokens, padding included; ``max_length`` is that of the longest text, up to the
    published 200. ValueError if it is more, or (when called) if the input is not tokens or is too long.

    Examples
    --------
    >>> network = PublishedTransformer(num_classes=4)
    >>> sum(p.numel() for p in network.parameters())
    7926544
    """

    def __init__(self, num_classes: int, vocabulary: int = 32_000, max_length: int = MAX_LENGTH) -> None:
        check_counts(vocabulary=vocabulary, max_length=max_length)
        if not 1 <= max_length <= MAX_LENGTH:
            raise ValueError(
                f"the published Transformer takes texts of 1 to {MAX_LENGTH} tokens, got {max_length}: set "
                f"data.max-tokens to {MAX_LENGTH} or less"
            )
        layers: list[nn.Module] = [
            nn.TransformerEncoderLayer(_WIDTH, _HEADS, _HIDDEN, _DROPOUT, batch_first=True) for _ in range(_LAYERS)
        ]
        stages = [nn.Sequential(_Embedding(vocabulary, max_length), layers[0]), *layers[1:]]
        super().__init__(stages, [Exit(ClassToken(), _WIDTH, num_classes) for _ in stages], vocabulary, max_length)


class _Embedding(nn.Module):
    """Embeddings times the root of their width, plus positions, then dropout: (B, L) → (B, L, 192)."""

    position: Tensor

    def __init__(self, vocabulary: int, max_length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, _WIDTH)
        self.dropout = nn.Dropout(_DROPOUT)
        self.register_buffer("position", sinusoids(max_length, _WIDTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, len(self.position))
        return self.dropout(self.token(tokens) * math.sqrt(_WIDTH) + self.position[: tokens.shape[1]])


def sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal positions (Vaswani et al., arXiv 1706.03762, section 3.5), (length, width).

    Position p has sin(p / 10000^(i/width)) in every even channel i, and the cosine of the same in channel i + 1.

    Examples
    --------
    >>> sinusoids(2, 4).round(decimals=2)
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8400, 0.5400, 0.0100, 1.0000]])
    """
    even = torch.arange(0, width, 2)
    angles = torch.arange(length)[:, None] / 10_000 ** (even / width)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _check_size(input_shape: Sequence[int]) -> None:
    _, *size = input_shape
    if len(size) != 2 or min(size) < _SMALLEST:
        raise ValueError(
            f"the published ConvNet takes images of at least {_SMALLEST} pixels high and wide, of which three "
            f"convolutions without padding and poolings leave one, got an input of shape {tuple(input_shape)}: choose "
            "larger images, or network = 'conv'"
        )
