"""A Transformer text classifier, with an exit after each of its blocks."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cafe_flwr.core.numbers import check_counts
from cafe_flwr.networks.checks import TextNetwork, check_norm, check_tokens
from cafe_flwr.networks.early_exit import Exit

PADDING = 0  # the token that fills up short texts
_GROUPS = 4

Norm = Literal["layer", "group", "batch"]


class TextTransformer(TextNetwork):
    """Token and position embeddings and pre-norm Transformer blocks, with an exit after each.

    The input is tokens, (B, L) int64; short texts are padded with 0 at the end. Stages pass on (B, L, width + 1): the
    last channel is 1 at tokens and 0 at padding, so that a block needs only one tensor, from which rows can be dropped.
    Padding is neither attended to nor averaged over; a text without any token counts as one padding token.

    The projection of an exit is the mean over tokens, a linear layer and a layer norm. The authors' own Transformer for
    AG News is :class:`cafe_flwr.networks.PublishedTransformer` (docs/networks.md).

    Parameters
    ----------
    vocabulary
        Number of tokens, padding included.
    max_length
        Longest text, in tokens.
    num_classes
        C.
    features
        Feature width at every exit.
    width
        Width of embeddings and blocks; a multiple of ``heads``, and of 4 for the group norm.
    heads
        Attention heads.
    blocks
        Number of blocks, and of exits.
    norm
        ``"layer"``; ``"group"``: 4 groups of channels, each normalised within its token; ``"batch"``: over all tokens
        of the batch but padding (see ``statistics`` of the network).
    dropout
        Dropout after the embeddings, the attention and the multilayer perceptron.

    Raises
    ------
    ValueError
        If the sizes do not fit each other, the norm is unknown, or (when called) the input is not tokens or too long.

    Examples
    --------
    >>> network = TextTransformer(vocabulary=100, max_length=8, num_classes=4)
    >>> texts = torch.tensor([[5, 7, 7, 0, 0], [9, 2, 1, 4, 3]])
    >>> [tuple(z.shape) for z in network(texts)]
    [(2, 4), (2, 4), (2, 4), (2, 4)]
    """

    def __init__(  # noqa: PLR0913 (public constructor: sizes)
        self,
        vocabulary: int,
        max_length: int,
        num_classes: int,
        features: int = 64,
        width: int = 128,
        heads: int = 4,
        blocks: int = 4,
        norm: Norm = "layer",
        dropout: float = 0.1,
    ) -> None:
        check_norm(norm, get_args(Norm))
        check_counts(
            vocabulary=vocabulary, max_length=max_length, features=features, width=width, heads=heads, blocks=blocks
        )
        if not isinstance(dropout, Real) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a share from 0 up and below 1, not {dropout!r}")
        parts = math.lcm(heads, _GROUPS if norm == "group" else 1)
        if width % parts:
            raise ValueError(f"width must be a multiple of {parts} for {heads} heads and {norm} norm, got {width}")
        layers: list[nn.Module] = [_Block(width, heads, norm, dropout) for _ in range(blocks)]
        stages = [nn.Sequential(_Embedding(vocabulary, max_length, width, dropout), layers[0]), *layers[1:]]
        projections = [
            nn.Sequential(_Mean(), nn.Linear(width, features), nn.LayerNorm(features)) for _ in range(blocks)
        ]
        exits = [Exit(projection, features, num_classes) for projection in projections]
        super().__init__(stages, exits, vocabulary, max_length)


def _pack(h: Tensor, mask: Tensor) -> Tensor:
    """(B, L, width + 1), from embeddings (B, L, width) and a mask of the tokens (B, L)."""
    return torch.cat([h, mask.unsqueeze(2).to(h.dtype)], dim=2)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    return packed[..., :-1], packed[..., -1] > 0.5


class _Embedding(nn.Module):
    def __init__(self, vocabulary: int, max_length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(max_length, width))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, len(self.position))
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        mask = (tokens != PADDING) | first  # a text without a token must not divide by 0
        return _pack(self.dropout(self.token(tokens) + self.position[: tokens.shape[1]]), mask)


class _Block(nn.Module):
    """Attention and a multilayer perceptron, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([_NORMS[norm](width) for _ in range(2)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, packed: Tensor) -> Tensor:
        h, mask = _unpack(packed)
        h = h + self.dropout(self._attention(self.norms[0](h, mask), mask))
        h = h + self.dropout(self.mlp(self.norms[1](h, mask)))
        return _pack(h, mask)

    def _attention(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=2))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])  # (B, heads, L, width/heads)
        return self.out(seen.transpose(1, 2).flatten(2))


class _Mean(nn.Module):
    """Mean over the tokens of a text."""

    def forward(self, packed: Tensor) -> Tensor:
        h, mask = _unpack(packed)
        weight = mask.unsqueeze(2).to(h.dtype)
        return (h * weight).sum(dim=1) / weight.sum(dim=1)


class _LayerNorm(nn.LayerNorm):
    def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h)


class _GroupNorm(nn.GroupNorm):
    def __init__(self, width: int) -> None:
        super().__init__(_GROUPS, width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h.flatten(0, 1)).unflatten(0, h.shape[:2])


class _BatchNorm(nn.BatchNorm1d):
    """Leaves padding out of the statistics, which would otherwise depend on the length of a client's texts."""

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        if self.training or not self.track_running_stats:
            normed = torch.zeros_like(h)
            normed[mask] = super().forward(h[mask])
            return normed
        return super().forward(h.flatten(0, 1)).unflatten(0, h.shape[:2])


_NORMS = {"layer": _LayerNorm, "group": _GroupNorm, "batch": _BatchNorm}
