"""CAFEDistill as read from the paper's abstract, before its authors' code was public; kept as an ablation.

Student exits begin to train in order of depth and of conflict, and learn from the last exits of similar clients. Unlike
in the published method (:mod:`cafe_flwr.methods.cafedistill`), the mixture does not become the client's own classifier,
and clients are matched by their classifiers, not by updates.

    server, round t                                          client i, round t
      active ← first N_t = ⌈R(t)(m−1)n⌉ student exits          z̃ ← h̄_i · φ_m(x), detached
      w_i ← argmin_{w∈Δ} −Σ_j s_ij w_j + μ‖w − p‖²             minimise CE(z_m, y)
      h̄_i ← Σ_j w_ij h_j^m                                       + Σ_{k active} CE(z_k, y) + λ τ² KL(z̃/τ ‖ z_k/τ)
      send shared part, h̄_i, active_i                          send shared part, h_i^m, cos(h_i^k, h_i^m)
      average the shared parts by n_i                          keep h_i^1 … h_i^m

docs/method.md has every formula and says how the two methods differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.coordination import SELECTIONS, active_exits
from cafe_flwr.core.options import setting
from cafe_flwr.methods.base import Method, check_equal_exits, check_selection
from cafe_flwr.methods.client import LocalResult, LocalTask
from cafe_flwr.methods.exit_agreement import PROXIES, classifier_similarity, gradient_similarity
from cafe_flwr.methods.robust_teachers import guarded_weights
from cafe_flwr.methods.server import ClientRecord, RoundPlan, ServerRound
from cafe_flwr.methods.starts import STARTS
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.placement import device_of, moved
from cafe_flwr.teaching import TEACHERS, check_solver, cosine_similarity, teacher_weights
from cafe_flwr.training.loop import batches
from cafe_flwr.training.losses import distillation
from cafe_flwr.training.objectives.base import exits_at
from cafe_flwr.wire.capacity import ClientSpec

PEERS = ("all", "alike", "deeper")


@dataclass(frozen=True, kw_only=True)
class CafeDistillText(Method):
    """Both halves of this reading, and its ablations."""

    name: ClassVar[str] = "cafedistill-text"
    refuses: ClassVar[Mapping[str, str]] = {"distill": "it distils already"}

    classifier_start: str = setting("built", "As for all methods; here as the network was built.", choices=STARTS)
    mu: float = setting(
        0.5, "μ of teacher matching: 0 = learn from oneself only, large = from all in proportion to their data.", ge=0
    )
    distill_weight: float = setting(1.0, "λ, the weight of distillation in the local loss; 0: no distillation.", ge=0)
    temperature: float = setting(3.0, "τ of distillation.", gt=0)
    selection: str = setting(
        "shallow-first",
        "Order in which student exits join: the published shallow-first, or an ablation ('none': all from round 1).",
        choices=SELECTIONS,
    )
    teachers: str = setting(
        "matched", "Whose last exits teach: matched by the QP, all alike, or only one's own.", choices=TEACHERS
    )
    peers: str = setting(
        "all",
        "Which classifiers teach a client where depths or modalities differ: last exits of all clients, those of "
        "clients with the same network, or ('deeper', clients send all classifiers) those of the client's own last "
        "exit.",
        choices=PEERS,
    )
    similarity_proxy: str = setting(
        "parameters",
        "How an exit's conflict with the last exit is measured: cosine of the classifiers, or of the gradients.",
        choices=PROXIES,
    )
    solver: str = setting("exact", "Of the teacher QP: 'exact' or a solver of qpsolvers, e.g. 'osqp'.")
    max_staleness: int = setting(
        0, "Forget the last exit of a client that has been away for more rounds than this; 0: never.", ge=0
    )
    objective_teacher: str = setting(
        "ema",
        "Who teaches in safe-kd and erde: the EMA teacher, or in its place the classifiers matched by the QP.",
        choices=("ema", "matched"),
        only={"objective": ("safe-kd", "erde")},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver != "exact":
            check_solver(self.solver, f"{self.name}.solver")

    def unread(self) -> set[str]:
        """Also ``objective_teacher``, where the objective has no teacher."""
        return super().unread() | (set() if self.is_taught else {"objective_teacher"})

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """The last exit's classifier; all classifiers if ``peers = "deeper"``; nothing if ``teachers = "own"``."""
        if self.teachers == "own":
            return []
        return network.classifier_names() if self.peers == "deeper" else network.head_names(network.num_exits - 1)

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """The teacher's classifier, under the names of the last exit's classifier."""
        return [] if self.teachers == "own" else network.head_names(network.num_exits - 1)

    def check(self, network: EarlyExitNetwork) -> None:
        """Comparing or mixing classifiers of different exits needs one shape."""
        if self.similarity_proxy == "parameters":
            check_selection(
                network, self.selection, f"{self.name}.similarity-proxy to 'gradients', or {self.name}.selection"
            )
        if self.peers == "deeper":
            check_equal_exits(network, f"{self.name}.peers = 'deeper'", "set it to 'alike' or 'all'")

    def comparable(self, kind: ClientSpec) -> Hashable:
        """Clients whose last classifiers have the same shape."""
        return tuple(shape for _, shape in kind.download.entries)

    def plan(self, task: ServerRound) -> RoundPlan:
        """Choose the active students, and match teachers."""
        t = min(task.server_round, task.num_rounds)
        similarity = task.reported_similarity
        active = active_exits(
            t, task.num_rounds, similarity, selection=self.selection, rng=task.rng, there=task.all_exits
        )

        teachers = [c for c in task.teachers if not self._is_stale(task.known[c], task.server_round)]
        pupils = sorted(set(task.participants) & set(teachers))  # in its first round a client teaches itself
        if self.teachers == "own" or not pupils or task.server_round > task.num_rounds:
            return RoundPlan(active)
        weights = np.zeros((len(pupils), len(teachers)))
        downloads: dict[int, NDArray[np.float32]] = {}
        suspicious: dict[int, str] = {}
        for learners, able, heads in self._groups(task, pupils, teachers):
            own = np.searchsorted(able, learners)
            found, doubts = self._match(heads, task.examples(able), own)
            weights[np.ix_(np.searchsorted(pupils, learners), np.searchsorted(teachers, able))] = found
            downloads |= zip(learners, found.astype(np.float32) @ heads, strict=True)
            suspicious |= {able[j]: reason for j, reason in doubts.items()}
        return RoundPlan(active, downloads, weights, pupils, teachers, suspicious)

    def _groups(
        self, task: ServerRound, pupils: Sequence[int], teachers: Sequence[int]
    ) -> Iterator[tuple[list[int], list[int], NDArray[np.float32]]]:
        """Groups of pupils, their possible teachers (pupils included), and these teachers' classifiers, (n, values)."""
        known = task.known
        if self.peers == "alike":
            for kind in sorted({known[client].kind for client in pupils}):
                able = [client for client in teachers if known[client].kind == kind]
                yield [client for client in pupils if client in able], able, task.uploads(able)
        elif self.peers == "deeper":
            size = sum(task.upload.sizes[-2:])  # of one exit's weight and bias
            exits = {client: len(known[client].upload) // size for client in teachers}
            for depth in sorted({exits[client] for client in pupils}):
                able = [client for client in teachers if exits[client] >= depth]
                heads = np.stack([known[client].upload[size * (depth - 1) : size * depth] for client in able])
                yield [client for client in pupils if exits[client] == depth], able, heads
        else:
            yield list(pupils), list(teachers), task.uploads(teachers)

    def _match(
        self, heads: NDArray[np.float32], examples: NDArray[np.float64], own: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """Teacher weights of the pupils ``heads[own]``, (pupils, heads), and suspicious heads with the reason."""
        prior = examples / examples.sum()
        if self.teachers == "uniform":
            rows, prior = np.zeros((len(own), len(heads))), np.full(len(heads), 1.0 / len(heads))
            weights = np.full(rows.shape, 1.0 / len(heads))
        else:
            rows = cosine_similarity(heads)[own]
            weights = teacher_weights(rows, prior, self.mu, self.solver)
        return guarded_weights(weights, rows, prior, self.mu, heads, own)

    def _is_stale(self, record: ClientRecord, server_round: int) -> bool:
        return bool(self.max_staleness) and server_round - 1 - record.seen > self.max_staleness

    def train(self, task: LocalTask) -> LocalResult:
        """Minimise the local loss, then report the similarity of every student exit to the last exit."""

        return LocalResult(task.run(lambda x, y: self.loss(task, x, y)), self._similarity(task))

    def loss(self, task: LocalTask, x: Tensor, y: Tensor) -> Tensor:
        """L_i = CE(z_m, y) + Σ_{k active} [ CE(z_k, y) + λ·τ²·KL( softmax(z̃/τ) ‖ softmax(z_k/τ) ) ].

        Inactive exits are not computed. z̃ are the logits of the last features under the classifier received; in round 1
        those of the client's own last exit. Another objective's terms take the place of the cross-entropies; if the
        matched teacher replaces its EMA teacher, the λ term is left out, since it would teach the same twice.
        """
        network, exits = task.network, task.training_exits
        features, logits = exits_at(network, x, exits)
        taught = (task.logits_as_taught(features[-1]) if task.download else logits[-1]).detach()
        matched = self.is_taught and self.objective_teacher == "matched"
        terms = self.exit_terms(task, x, y, logits, exits=exits, teacher=taught if matched else None)
        total = terms[-1]
        for student, term in zip(logits[:-1], terms[:-1], strict=True):
            total = total + term
            if self.distill_weight and not matched:
                total = total + self.distill_weight * distillation(student, taught, self.temperature)
        return total

    def _similarity(self, task: LocalTask) -> list[float]:
        network = task.network
        if self.similarity_proxy == "parameters":
            return classifier_similarity(network)
        size = task.budget.batch_size
        positions = next(batches(len(task.data), size, size, task.rng("similarity")))
        index, device = torch.from_numpy(positions), device_of(network)
        return gradient_similarity(network, moved(task.data.x[index], device), moved(task.data.y[index], device))
