"""pFedGraph-EE (Ye et al., ICML 2023): a collaboration graph gives the weights with which models are mixed.

    server, round t                                            client i, round t
      Δ_j: client j's model since the common initial one         θ_i ← u_i
      s_ij = cos(Δ_i, Δ_j), above 0.9 as good as 1               minimise Σ_k CE(z_k, y)/m − λ cos(θ_i − θ_0, u_i − θ_0)
      w_i ← argmin_{w∈Δ} −Σ_j s_ij w_j + μ‖w − p‖²               send Δ_i
      u_i ← Σ_j w_ij θ_j

The QP is that of CAFEDistill's teachers, solved by the same projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.core.options import setting
from cafe_flwr.data.split import Split
from cafe_flwr.methods.client import LocalResult, LocalTask, Tensors
from cafe_flwr.methods.server import RoundPlan, ServerRound
from cafe_flwr.methods.whole_model import WholeModel, add_updates
from cafe_flwr.teaching import cosine_similarity, teacher_weights


@dataclass(frozen=True, kw_only=True)
class PFedGraph(WholeModel):
    """Models mixed by a learned collaboration graph."""

    name: ClassVar[str] = "pfedgraph"

    mu: float = setting(0.8, "μ of the graph's QP: 0 = oneself only, large = all in proportion to their data.", ge=0)
    same_above: float = setting(0.9, "Models more similar than this count as equal.", ge=-1, le=1)
    alignment: float = setting(0.01, "Weight λ of the local term that keeps a model in its mixture's direction.", ge=0)

    def plan(self, task: ServerRound) -> RoundPlan:
        """Mix a model for every participant; a new one gets the average of all."""
        clients = task.teachers
        if not clients:
            return RoundPlan(task.all_exits)
        updates = task.uploads(clients)
        examples = task.examples(clients)
        similarity = cosine_similarity(updates)
        similarity[similarity > self.same_above] = 1.0
        rows = np.zeros((len(task.participants), len(clients)))
        for row, client in enumerate(task.participants):
            if client in task.known:
                rows[row] = similarity[clients.index(client)]
        weights = teacher_weights(rows, examples / examples.sum(), self.mu)
        mixed = weights.astype(np.float32) @ updates
        downloads = dict(zip(task.participants, mixed, strict=True))
        return RoundPlan(task.all_exits, downloads, weights, task.participants, clients)

    def receive(self, tensors: Tensors, download: Tensors, initial: Tensors, data: Split | None = None) -> Tensors:
        """Start from the mixture."""
        return {**tensors, **add_updates(initial, download)} if download else tensors

    def train(self, task: LocalTask) -> LocalResult:
        """Train from the mixture, with a term that keeps its direction."""
        target = torch.cat([t.flatten() for t in task.download.values()]) if task.download else None

        def loss(x: Tensor, y: Tensor) -> Tensor:
            total = self.loss(task, x, y)
            if target is None or not self.alignment:
                return total
            return total - self.alignment * F.cosine_similarity(_update(task), target, dim=0)

        result = LocalResult(task.run(loss))
        self.report(task)
        return result


def _update(task: LocalTask) -> Tensor:
    parameters: Mapping[str, Tensor] = dict(task.network.named_parameters())
    sent = {name: task.initial[name] for name in task.network.whole_names()}
    return torch.cat([(parameters.get(name, t) - t).flatten() for name, t in sent.items()])
