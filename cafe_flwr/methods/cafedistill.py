"""CAFEDistill (arXiv 2601.10015): student exits join shallow first and least conflicting first, and learn from the last
exits of similar clients.

    server, round t                                          client i, round t
      active ← first N_t = ⌈R(t)(m−1)n⌉ student exits          z̃ ← h̄_i · φ_m(x), detached
      w_i ← argmin_{w∈Δ} −Σ_j s_ij w_j + μ‖w − p‖²             minimise CE(z_m, y)
      h̄_i ← Σ_j w_ij h_j^m                                       + Σ_{k active} CE(z_k, y) + λ τ² KL(z̃/τ ‖ z_k/τ)
      send shared part, h̄_i, active_i                          send shared part, h_i^m, cos(h_i^k, h_i^m)
      average the shared parts by n_i                          keep h_i^1 … h_i^m

docs/method.md has every formula and says what the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.coordination import SELECTIONS, active_exits
from cafe_flwr.losses import distillation
from cafe_flwr.methods.base import ClientRecord, LocalResult, LocalTask, RoundPlan
from cafe_flwr.networks import EarlyExitNetwork
from cafe_flwr.teaching import TEACHERS, cosine_similarity, teacher_weights
from cafe_flwr.training import batches, train

PROXIES = ("parameters", "gradients")


@dataclass(frozen=True)
class CafeDistillMethod:
    """Both halves of CAFEDistill, and its ablations.

    Attributes
    ----------
    mu
        μ of the teacher QP.
    distill_weight
        λ; at 0 the students learn from labels alone.
    temperature
        τ.
    selection
        Order in which student exits join, see :func:`cafe_flwr.coordination.active_exits`.
    teachers
        ``"matched"`` by the QP; ``"uniform"``: all alike, w = 1/n; ``"own"``: each client's own last exit, nothing is
        exchanged.
    similarity_proxy
        What a client reports as the similarity of exit k to its last exit: ``"parameters"``, the cosine of the two
        classifiers, or ``"gradients"``, the cosine of the two losses' gradients on the shared stages 1..k.
    solver
        Of the teacher QP, see :func:`cafe_flwr.teaching.teacher_weights`.
    max_staleness
        A client away for more rounds than this no longer teaches, and teaches itself in its first round back; 0: it
        always does, with its last head.
    """

    name: ClassVar[str] = "cafedistill"

    mu: float = 0.5
    distill_weight: float = 1.0
    temperature: float = 3.0
    selection: str = "shallow-first"
    teachers: str = "matched"
    similarity_proxy: str = "parameters"
    solver: str = "exact"
    max_staleness: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("selection", SELECTIONS), ("teachers", TEACHERS), ("similarity_proxy", PROXIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")

    # --- what travels ---

    def shared_names(self, network: EarlyExitNetwork) -> list[str]:
        """Stages and projections."""
        return network.shared_names()

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """The classifiers of all exits."""
        return network.personal_names()

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """The last exit's classifier, if it may teach others."""
        return [] if self.teachers == "own" else network.head_names(network.num_exits - 1)

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """The teacher's classifier, under the names of the last exit's."""
        return self.upload_names(network)

    # --- server half ---

    def plan(
        self,
        server_round: int,
        num_rounds: int,
        participants: Sequence[int],
        num_exits: int,
        known: Mapping[int, ClientRecord],
        rng: np.random.Generator,
    ) -> RoundPlan:
        """Coordinate the students and match the teachers of one round."""
        similarity = np.full((len(participants), num_exits - 1), np.nan)
        for row, client in enumerate(participants):
            if client in known:
                similarity[row] = known[client].similarity
        active = active_exits(server_round, num_rounds, similarity, selection=self.selection, rng=rng)

        teachers = [c for c in sorted(known) if not self._is_stale(known[c], server_round)]
        pupils = sorted(set(participants) & set(teachers))  # in its first round a client teaches itself
        if self.teachers == "own" or not pupils:
            return RoundPlan(active)
        heads = np.stack([known[c].upload for c in teachers])
        examples = np.array([known[c].num_examples for c in teachers], dtype=np.float64)
        if self.teachers == "uniform":
            weights = np.full((len(pupils), len(teachers)), 1.0 / len(teachers))
        else:
            rows = cosine_similarity(heads)[np.searchsorted(teachers, pupils)]
            weights = teacher_weights(rows, examples / examples.sum(), self.mu, self.solver)
        mixed = weights.astype(np.float32) @ heads
        return RoundPlan(active, dict(zip(pupils, mixed, strict=True)), weights, pupils, teachers)

    def _is_stale(self, record: ClientRecord, server_round: int) -> bool:
        return bool(self.max_staleness) and server_round - 1 - record.seen > self.max_staleness

    # --- client half ---

    def train(self, task: LocalTask) -> LocalResult:
        """Minimise the local loss, then report how similar every student exit is to the last exit."""

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return self.local_loss(task.network, x, y, task.active, task.download)

        mean_loss = train(task.network, task.data, loss, task.budget, task.rng("batches"))
        return LocalResult(mean_loss, self._similarity(task))

    def local_loss(
        self,
        network: EarlyExitNetwork,
        x: Tensor,
        y: Tensor,
        active: Sequence[bool],
        teacher: Mapping[str, Tensor],
    ) -> Tensor:
        """L_i = CE(z_m, y) + Σ_{k active} [ CE(z_k, y) + λ·τ²·KL( softmax(z̃/τ) ‖ softmax(z_k/τ) ) ].

        Parameters
        ----------
        network, x, y
            The client's network and a batch.
        active
            (m−1,): which student exits train. The others are not even computed.
        teacher
            The teacher's classifier; empty: the client's own last exit teaches.
        """
        last = network.num_exits - 1
        students = []
        for k in range(last):
            x = network.stage(k, x)
            if active[k]:
                students.append(network.exit(k, x)[1])
        features, logits = network.exit(last, network.stage(last, x))
        total = F.cross_entropy(logits, y)
        if not students:
            return total
        taught = F.linear(features, *(teacher[n] for n in network.head_names(last))) if teacher else logits
        for student in students:
            total = total + F.cross_entropy(student, y)
            if self.distill_weight:
                total = total + self.distill_weight * distillation(student, taught, self.temperature)
        return total

    def _similarity(self, task: LocalTask) -> list[float]:
        network, last = task.network, task.network.num_exits - 1
        if self.similarity_proxy == "gradients":
            size = task.budget.batch_size
            positions = next(batches(len(task.data), size, size, task.rng("similarity")))
            index = torch.from_numpy(positions)
            return gradient_similarity(network, task.data.x[index], task.data.y[index])
        tensors = network.state_dict()
        heads = [torch.cat([tensors[n].flatten() for n in network.head_names(k)]) for k in range(last + 1)]
        return [F.cosine_similarity(head, heads[last], dim=0).item() for head in heads[:last]]


def gradient_similarity(network: EarlyExitNetwork, x: Tensor, y: Tensor) -> list[float]:
    """Cosine of the gradients of exit k's and the last exit's cross-entropy on stages 1..k, for every student exit.

    The conflict itself, on one batch, where the classifiers' cosine is a proxy (docs/method.md, beyond the paper).
    """
    network.eval()  # a look, that no running statistics may notice
    losses = [F.cross_entropy(z, y) for z in network(x)]
    stages = [[p for p in network.stages[k].parameters() if p.requires_grad] for k in range(network.num_exits - 1)]

    def gradient(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(loss, parameters, retain_graph=True)) if parameters else []

    of_last = [g.flatten() for g in gradient(losses[-1], [p for stage in stages for p in stage])]
    result, so_far = [], 0
    for k in range(len(stages)):
        so_far += len(stages[k])
        own = [g.flatten() for g in gradient(losses[k], [p for stage in stages[: k + 1] for p in stage])]
        similarity = F.cosine_similarity(torch.cat(own), torch.cat(of_last[:so_far]), dim=0).item() if own else 0.0
        result.append(similarity)
    return result
