"""FedPAC-EE (Xu et al., arXiv 2306.11867): features aligned over clients, classifiers combined over similar ones.

    server, round t                                            client i, round t
      c_k ← Σ_i n_ik φ̄_ik / Σ_i n_ik (class prototypes)          h_i^k ← combined classifiers
      α_i ← argmin_{α∈Δ} αᵀ(diag(v) + D_i)α                      1. minimise Σ_k CE(z_k, y)/m over the classifiers
        D_i[a,b] = ⟨H_i − H_a, H_i − H_b⟩                         2. minimise Σ_k [CE(z_k, y) + λ‖φ_k − c_y‖²/d]/m
      h_i^k ← Σ_j α_ij h_j^k                                        over the backbone
      average the backbones by n_i                               send backbone, h_i^k, H_i, v_i, class counts

H_i has for every class c and exit the mean feature times the class's share, π_ic φ̄_ic: differences of H measure the
bias of other clients' classifiers. v_i, the within-class terms of E‖φ‖² over n_i, measures the variance. Statistics of
all exits are concatenated, so that a client has one combination for all its exits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.core.options import setting
from cafe_flwr.data.split import Split
from cafe_flwr.methods.base import Method, check_equal_exits, phase
from cafe_flwr.methods.client import LocalResult, LocalTask, Tensors
from cafe_flwr.methods.server import RoundPlan, ServerRound
from cafe_flwr.metrics.exits import exit_features
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.teaching import simplex_qp
from cafe_flwr.training.class_prior import class_counts, class_sums
from cafe_flwr.training.objectives.base import exits_at

_MEANS, _VARIANCE, _COUNTS, _PROTOTYPES = "class-means", "variance", "class-counts", "prototypes"


@dataclass(frozen=True, kw_only=True)
class FedPAC(Method):
    """A shared backbone with feature alignment, and combined personal classifiers."""

    name: ClassVar[str] = "fedpac"
    phases: ClassVar[int] = 2

    alignment: float = setting(1.0, "Weight λ of feature alignment.", ge=0)

    def check(self, network: EarlyExitNetwork) -> None:
        """Class statistics are one tensor: exits need one width."""
        check_equal_exits(network, f"method = {self.name!r}", "choose fedper or fedrep, or another network")

    def extra_tensors(self, network: EarlyExitNetwork) -> dict[str, Tensor]:
        """Class statistics and prototypes of every exit."""
        width = network.state_dict()[network.head_names(0)[0]].shape[1]
        features = torch.zeros(network.num_exits, network.num_classes, width)
        return {
            _MEANS: features,
            _VARIANCE: torch.zeros(1),
            _COUNTS: torch.zeros(network.num_classes),
            _PROTOTYPES: features.clone(),
        }

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """Classifiers and class statistics."""
        return [*network.classifier_names(), _MEANS, _VARIANCE, _COUNTS]

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """Combined classifiers and the prototypes of all classes."""
        return [*network.classifier_names(), _PROTOTYPES]

    def plan(self, task: ServerRound) -> RoundPlan:
        """Class prototypes, and each known participant's combination of classifiers."""
        clients, pupils = task.teachers, task.pupils
        if not pupils:
            return RoundPlan(task.all_exits)
        uploads = task.uploads(clients)
        means, counts = task.part(uploads, _MEANS), task.part(uploads, _COUNTS)
        variance = task.part(uploads, _VARIANCE)[:, 0]
        heads = task.part(uploads, *(n for n in task.upload.names if n not in (_MEANS, _VARIANCE, _COUNTS)))
        by_class = means.reshape(len(clients), task.num_exits, counts.shape[1], -1)
        total = np.einsum("i,ikcd->kcd", task.examples(clients), by_class.astype(np.float64))
        prototypes = total / np.maximum(counts.sum(axis=0), 1.0)[None, :, None]
        weights = combinations(means, variance)[np.searchsorted(clients, pupils)]
        mixed = weights.astype(np.float32) @ heads
        flat = prototypes.astype(np.float32).ravel()
        downloads = {c: np.concatenate([h, flat]) for c, h in zip(pupils, mixed, strict=True)}
        return RoundPlan(task.all_exits, downloads, weights, pupils, clients)

    def receive(self, tensors: Tensors, download: Tensors, initial: Tensors, data: Split | None = None) -> Tensors:
        """Start from the combined classifiers."""
        return {**tensors, **{name: t for name, t in download.items() if name != _PROTOTYPES}}

    def train(self, task: LocalTask) -> LocalResult:
        """Classifiers first, then the backbone with alignment; then the statistics."""
        network = task.network
        prototypes = task.download.get(_PROTOTYPES)

        def aligned(x: Tensor, y: Tensor) -> Tensor:
            features, logits = exits_at(network, x, range(network.num_exits))
            total = self.exits_loss(task, x, y, logits)
            if prototypes is None:
                return total
            return total + self.alignment * (torch.stack(features) - prototypes[:, y]).square().mean()

        heads, backbone = network.classifier_names(), network.shared_names()
        task.run(lambda x, y: self.loss(task, x, y), only=heads, part=phase(self, 0))
        result = LocalResult(task.run(aligned, only=backbone, part=phase(self, 1)))
        task.state |= class_statistics(network, task)
        return result


def class_statistics(network: EarlyExitNetwork, task: LocalTask) -> dict[str, Tensor]:
    """Class means (times class share), variance and counts of the training features at all exits."""
    y, phi = task.data.y, exit_features(network, task.data.x)
    counts = class_counts(y, network.num_classes)
    means = class_sums(phi, y, network.num_classes) / len(y)  # π_c φ̄_c
    # Σ_c π_c E[‖φ‖² | c] − π_c² ‖φ̄_c‖², over n
    variance = (phi.square().sum() / len(y) - means.square().sum()) / len(y)
    return {_MEANS: means, _VARIANCE: variance.reshape(1), _COUNTS: counts}


def combinations(means: NDArray[np.floating], variance: NDArray[np.floating]) -> NDArray[np.float64]:
    """Weights α_i = argmin_{α∈Δ} αᵀ(diag(v) + D_i)α of every client, rows on the simplex.

    ``means`` is H, (n, values), the flat class statistics of the clients; ``variance`` is v, (n,).

    Examples
    --------
    >>> combinations(np.array([[0.0], [0.0], [9.0]]), np.array([1.0, 3.0, 1.0]))[0].round(3)
    array([0.743, 0.248, 0.009])
    """
    h = np.asarray(means, dtype=np.float64)
    gram = h @ h.T
    weights = np.eye(len(h))
    for i in range(len(h)):
        distance = gram[i, i] - gram[i][:, None] - gram[i][None, :] + gram
        problem = np.diag(np.asarray(variance, dtype=np.float64)) + distance
        scale = np.trace(problem) / len(h)
        if scale > 0 and (w := simplex_qp(problem / scale, np.zeros(len(h)))) is not None:
            weights[i] = w
    return weights
