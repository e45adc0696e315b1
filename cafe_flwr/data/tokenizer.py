"""Turn texts into tokens by hashing lower-cased words, so that clients need not share a vocabulary."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cafe_flwr.networks.transformer import PADDING

_WORD = re.compile(r"[^\W_]+")


class Tokenizer(NamedTuple):
    """Texts → tokens, (N, L) int64, of the first L words; short texts are filled up with 0.

    A word's token is its CRC-32 mod (vocabulary − 1), plus 1: the same on every machine. Words that share a token
    cannot be told apart: of 5,000 different words in a vocabulary of 8,192, nearly half share theirs with another. The
    vocabulary is the number of tokens, including 0 (no word). Longer texts are cut if ``cut``, else a ValueError.

    Examples
    --------
    >>> Tokenizer(max_tokens=4, vocabulary=1000)(["a cat", "A cat, a CAT!"]).tolist()
    [[172, 470, 0, 0], [172, 470, 172, 470]]
    """

    max_tokens: int = 64
    vocabulary: int = 8192
    cut: bool = True

    def __call__(self, texts: Iterable[str]) -> Tensor:
        """Tokens of texts, (N, max_tokens) int64."""
        rows = []
        for text in texts:
            found = words(text)
            if len(found) > self.max_tokens and not self.cut:
                raise ValueError(
                    f"a text has {len(found)} words, more than the {self.max_tokens} that are taken "
                    f"({text[:40]!r}…): raise data.max-tokens, or cut long texts (data.long-texts = 'cut')"
                )
            tokens = [_token(word, self.vocabulary) for word in found[: self.max_tokens]]
            rows.append(tokens + [PADDING] * (self.max_tokens - len(tokens)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_tokens)


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, in any script.

    Examples
    --------
    >>> words("Tokyo stocks fell 2.3%, the *biggest* drop")
    ['tokyo', 'stocks', 'fell', '2', '3', 'the', 'biggest', 'drop']
    """
    return _WORD.findall(text.lower())


@lru_cache(maxsize=2**16)
def _token(word: str, vocabulary: int) -> int:
    return zlib.crc32(word.encode()) % (vocabulary - 1) + 1
