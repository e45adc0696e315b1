"""CAFEDistill as its authors run it (arXiv 2601.10015; *Federated Personalization of Early-Exit Networks*, CIKM 2026).

Student exits begin to train in order of depth, first on the clients with the least conflict, and learn from the
client's own last exit. The last classifiers of clients with similar updates are mixed; each client goes on from its
mixture.

    server, round t                                          client i, round t
      C ← min(S, 0) of the participants                        h_i^m ← h̄_i of the last round
      R ← clip( (2t/T)(1 − 1/m) + ΣC/n², 0, 1 − 1/m )          minimise 1/m [ Σ_{k<ℓ} CE(z_k, y) + CE(z_m, y) ]
      ℓ ← ⌊R·m·n⌋ exits, least conflict Σ_j C_ij first             + λ Σ_{k≤ℓ} τ² KL( sg z_m/τ ‖ z_k/τ )
      send shared part, h̄_i, ℓ_i                               send shared part, h_i^m; keep the other classifiers
      average the shared parts by n_i
      S_ij ← cos(Δ_i, Δ_j), Δ_i = h_i^m as it came − as it was sent
      w_i ← argmin_{w∈Δ} −Σ_j S_ij w_j + μ‖w − 1/n‖²
      h̄_i ← Σ_j w_ij h_j^m, all at once

docs/method.md says what was taken from the authors' code, and which mistakes of it are not copied.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.coordination import conflict_ramp, student_levels
from cafe_flwr.core.options import setting
from cafe_flwr.core.schema import Schema
from cafe_flwr.data.split import Split
from cafe_flwr.methods.base import Method, check_equal_exits
from cafe_flwr.methods.client import LocalTask, Tensors
from cafe_flwr.methods.robust_teachers import guarded_weights
from cafe_flwr.methods.server import ClientRecord, Conclusion, RoundPlan, ServerRound
from cafe_flwr.methods.starts import classifier_start
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.teaching import check_solver, cosine_similarity, teacher_weights
from cafe_flwr.training.losses import distillation
from cafe_flwr.training.objectives.base import exits_at
from cafe_flwr.wire.capacity import ClientSpec


@dataclass(frozen=True, kw_only=True)
class CafeDistillMethod(Method):
    """Both halves of CAFEDistill, and its ablations."""

    name: ClassVar[str] = "cafedistill"
    refuses: ClassVar[Mapping[str, str]] = {"distill": "it distils already"}

    mu: float = setting(
        0.6,
        "μ of matching (the authors' α): small = only those whose updates agree most, large = all alike.",
        key="mu",
        gt=0,
    )
    distill_weight: float = setting(
        1.0, "λ, the weight of distillation in the local loss; 0: no distillation.", key="distill-weight", ge=0
    )
    temperature: float = setting(2.0, "τ of distillation.", key="temperature", gt=0)
    conflict: str = setting(
        "clients",
        "Conflict that orders students and slows them down: cosines between the updates of clients, as released, or "
        "between each student exit and the last exit of a client.",
        choices=("clients", "exits"),
    )
    selection: str = setting(
        "shallow-first",
        "Order in which student exits join; 'none' is an ablation: all from round 1.",
        choices=("shallow-first", "none"),
    )
    match_by: str = setting(
        "updates",
        "Match clients by the updates of their classifiers in the round, or ('parameters', an ablation) by the "
        "classifiers themselves.",
        choices=("updates", "parameters"),
    )
    write_back: bool = setting(
        True, "The mixture becomes the client's own classifier; false is an ablation: it only teaches the other exits."
    )
    solver: str = setting("exact", "Of the matching QP: 'exact' or a solver of qpsolvers, e.g. 'osqp'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver != "exact":
            check_solver(self.solver, "cafedistill.solver")
        if self.classifier_start == "built":
            raise ValueError(
                f"classifier_start = 'built' is not for {self.name}: the server must know what classifiers start from. "
                "Set it to zero, common or own"
            )

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """The last exit's classifier."""
        return network.head_names(network.num_exits - 1)

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """The mixture, under the names of the upload."""
        return self.upload_names(network)

    def check(self, network: EarlyExitNetwork) -> None:
        """Only ``conflict = "exits"`` compares exits of one network."""
        if self.conflict == "exits":
            check_equal_exits(network, "conflict = 'exits'", "set conflict to 'clients'")

    def comparable(self, kind: ClientSpec) -> Hashable:
        """Clients that send the same classifiers: exit k is mixed with exit k."""
        return kind.upload.entries

    def plan(self, task: ServerRound) -> RoundPlan:
        """Choose the active students, and send the mixtures of the last round."""
        clients = task.participants
        levels = np.array([task.known[c].level if c in task.known else 0 for c in clients], dtype=np.int64)
        if self.selection == "none":
            levels[:] = max(task.num_exits - 2, 0)
        elif task.trains:
            agreement, slow_down = self._agreement(task)
            share = conflict_ramp(task.server_round, task.num_rounds, task.num_exits, slow_down)
            levels = student_levels(levels, share, agreement)
        active = (np.arange(task.num_exits - 1) <= levels[:, None]) & task.all_exits
        pupils = task.pupils
        if not pupils:
            return RoundPlan(active)
        waiting = task.uploads(pupils)
        if not self.write_back:
            waiting = self._mix(task, waiting, task.pairs.among(pupils) + np.eye(len(pupils)))[0]
        return RoundPlan(active, dict(zip(pupils, waiting, strict=True)))

    def _agreement(self, task: ServerRound) -> tuple[NDArray[np.float64], float]:
        """Agreement of each participant's exits, (n, m−1), and the mean of all conflicts; both ≤ 0."""
        if self.conflict == "exits":
            conflicts = np.minimum(np.nan_to_num(task.reported_similarity), 0.0)
            return conflicts, float(conflicts.mean()) if conflicts.size else 0.0
        conflicts = np.minimum(task.pairs.among(task.participants), 0.0)
        sums = np.repeat(conflicts.sum(axis=0)[:, None], task.num_exits - 1, axis=1)
        return sums, float(conflicts.mean())

    def conclude(self, task: ServerRound, plan: RoundPlan, records: Mapping[int, ClientRecord]) -> Conclusion:
        """Match the clients that trained, and mix their uploads; the records keep the mixtures for the next request."""
        clients = sorted(records)
        after = np.stack([records[client].upload for client in clients])
        before = np.stack([self._sent(task, client) for client in clients])
        last = self._last(task)
        moves = (after - before)[:, last]
        similarity = cosine_similarity(moves if self.match_by == "updates" else after[:, last])
        mixed, weights, doubts = self._mix(task, after, similarity)
        kept = mixed if self.write_back else after
        row_of = {client: row for row, client in enumerate(task.participants)}
        levels = [max(0, int(plan.active[row_of[client]].sum()) - 1) for client in clients]
        return Conclusion(
            records={c: replace(records[c], upload=kept[i], level=levels[i]) for i, c in enumerate(clients)},
            pairs=task.pairs.updated(clients, similarity),
            plan=replace(
                plan,
                weights=weights,
                weight_rows=clients,
                weight_columns=clients,
                suspicious={clients[i]: reason for i, reason in doubts.items()},
            ),
            unmoved=[client for client, move in zip(clients, moves, strict=True) if not move.any()],
        )

    def _mix(
        self, task: ServerRound, sent: NDArray[np.float32], similarity: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], dict[int, str]]:
        """Mixtures of uploads (n, values), the weights (n, n), and suspicious rows with the reason.

        Only norms are suspicious here, not directions: classifiers that start at zero have little in common in the
        first rounds, and an update of another direction gets no weight anyway.
        """
        uniform = np.full(len(sent), 1.0 / len(sent))
        weights = teacher_weights(similarity, uniform, self.mu, self.solver)
        heads, everyone = sent[:, self._last(task)], np.arange(len(sent))
        weights, doubts = guarded_weights(weights, similarity, uniform, self.mu, heads, everyone, min_cosine=-1.0)
        return weights.astype(np.float32) @ sent, weights, doubts

    @staticmethod
    def _last(task: ServerRound) -> slice:
        """Place of the last exit's weight and bias in an upload."""
        return slice(-sum(task.upload.sizes[-2:]), None)

    def _sent(self, task: ServerRound, client: int) -> NDArray[np.float32]:
        """What the client's upload was at the start of the round: the mixture it received, or its initial value."""
        if client in task.known:
            return task.known[client].upload
        start = classifier_start(task.upload.entries, self.classifier_start, task.seed, client)
        return Schema(task.upload.entries).pack(start)

    def receive(self, tensors: Tensors, download: Tensors, initial: Tensors, data: Split | None = None) -> Tensors:
        """The mixture becomes the client's own last classifier."""
        return {**tensors, **download} if self.write_back else tensors

    def loss(self, task: LocalTask, x: Tensor, y: Tensor) -> Tensor:
        """L = (1/m) [ Σ_{k<ℓ} CE(z_k, y) + CE(z_{m−1}, y) ] + λ Σ_{k≤ℓ} τ² KL( sm(sg z_{m−1}/τ) ‖ sm(z_k/τ) ).

        sm is the softmax. Exits count from 0; those above the level ℓ, but the last, are not computed. The deepest
        student learns only from the last exit. Another objective's terms take the place of the cross-entropies.
        """
        network, exits = task.network, task.training_exits
        features, logits = exits_at(network, x, exits)
        *students, last = logits
        with_labels = [*range(len(students) - 1), len(students)]  # all but the deepest student
        terms = self.exit_terms(task, x, y, [logits[i] for i in with_labels], exits=[exits[i] for i in with_labels])
        total = terms.sum() / network.num_exits
        if not self.distill_weight:
            return total
        teacher = last if self.write_back or not task.download else task.logits_as_taught(features[-1])
        for student in students:
            total = total + self.distill_weight * distillation(student, teacher, self.temperature)
        return total
