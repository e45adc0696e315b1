"""FedAMP-EE (Huang et al., arXiv 2007.03797): every client is pulled to a mixture of models like its own.

    server, round t                                            client i, round t
      Δ_j: client j's model since the common initial one         minimise Σ_k CE(z_k, y)/m + λ/2 · ‖θ_i − u_i‖²
      w_ij ∝ exp(σ cos(Δ_i, Δ_j)), j ≠ i;  w_ii = 0.3             from its own θ_i
      u_i ← Σ_j w_ij θ_j                                          send Δ_i, keep θ_i

Similarity is a cosine, as in HeurFedAMP: the published distance form gives zero weights on deep networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.core.options import setting
from cafe_flwr.methods.client import LocalResult, LocalTask
from cafe_flwr.methods.server import RoundPlan, ServerRound
from cafe_flwr.methods.whole_model import WholeModel
from cafe_flwr.teaching import cosine_similarity
from cafe_flwr.training.loop import pull


@dataclass(frozen=True, kw_only=True)
class FedAMP(WholeModel):
    """Personal models with a proximal term towards a mixture."""

    name: ClassVar[str] = "fedamp"

    sharpness: float = setting(10.0, "σ of the weights exp(σ·cos).", ge=0)
    self_weight: float = setting(0.3, "Weight of a client's own model in its mixture.", ge=0, le=1)
    proximal: float = setting(0.1, "Weight λ of the pull towards the mixture.", ge=0)

    def plan(self, task: ServerRound) -> RoundPlan:
        """Mix the models of all clients for every participant that has one."""
        clients, pupils = task.teachers, task.pupils
        if not pupils:
            return RoundPlan(task.all_exits)
        updates = task.uploads(clients)
        rows = np.searchsorted(clients, pupils)
        weights = attention(cosine_similarity(updates)[rows], rows, self.sharpness, self.self_weight)
        mixed = weights.astype(np.float32) @ updates
        return RoundPlan(task.all_exits, dict(zip(pupils, mixed, strict=True)), weights, pupils, clients)

    def train(self, task: LocalTask) -> LocalResult:
        """Train the client's own model with a pull towards its mixture."""
        adjust = pull(task.network, self.mixture(task), self.proximal) if task.download else None
        result = LocalResult(task.run(lambda x, y: self.loss(task, x, y), adjust=adjust))
        self.report(task)
        return result


def attention(
    similarity: NDArray[np.float64], own: NDArray[np.int64], sharpness: float, self_weight: float
) -> NDArray[np.float64]:
    """Rows of weights ∝ exp(σ s_ij) over the others, which sum to 1 − w_ii; a single client has all the weight.

    ``similarity`` is (rows, clients); ``own`` (rows,) has the column of each row's own client.

    Examples
    --------
    >>> attention(np.array([[1.0, 0.5, 0.5]]), np.array([0]), 10.0, 0.3)
    array([[0.3 , 0.35, 0.35]])
    """
    rows = np.arange(len(own))
    s = sharpness * similarity
    s[rows, own] = -np.inf
    if s.shape[1] == 1:
        return np.ones_like(s)
    w = np.exp(s - s.max(axis=1, keepdims=True))
    w *= (1.0 - self_weight) / w.sum(axis=1, keepdims=True)
    w[rows, own] = self_weight
    return w
