"""Initial values of personal classifiers, which depend only on seed, client and shape.

So the server can compute them, too: it compares clients by the updates of their classifiers, also in a client's first
round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cafe_flwr.core.random import rng_for

STARTS = ("zero", "common", "own", "built")


def classifier_start(
    entries: Sequence[tuple[str, tuple[int, ...]]], start: str, seed: int, client: int
) -> dict[str, Tensor]:
    """Initial values of a client's classifiers, by name; ValueError for another ``start``.

    Parameters
    ----------
    entries
        Names and shapes of weights (C, features) and biases (C,); a bias follows the weight of the same module.
    start
        ``"zero"``; ``"common"``, one draw for all clients; or ``"own"``, a draw for each. Draws are uniform in
        ±1/√features, as in :class:`torch.nn.Linear`.

    Examples
    --------
    >>> entries = [("head.weight", (10, 4)), ("head.bias", (10,))]
    >>> a, b = (classifier_start(entries, "own", 0, client)["head.weight"] for client in (1, 2))
    >>> bool((a == b).any()), bool(a.abs().max() <= 0.5)
    (False, True)
    """
    if start == "zero":
        return {name: torch.zeros(shape) for name, shape in entries}
    if start not in ("common", "own"):
        raise ValueError(f"start must be zero, common or own, got {start!r}")
    tensors, bound = {}, 1.0
    for name, shape in entries:
        bound = 1.0 / math.sqrt(shape[1]) if len(shape) == 2 else bound
        draw = rng_for(seed, 0, client if start == "own" else -1, f"start of {name}").uniform(-bound, bound, shape)
        tensors[name] = torch.from_numpy(draw).float()
    return tensors
