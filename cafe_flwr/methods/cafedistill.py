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

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.coordination import SELECTIONS, active_exits
from cafe_flwr.devices import device_of, moved
from cafe_flwr.losses import distillation
from cafe_flwr.methods.base import (
    ClientRecord,
    LocalResult,
    LocalTask,
    Method,
    RoundPlan,
    ServerRound,
    check_equal_exits,
    setting,
)
from cafe_flwr.networks import EarlyExitNetwork
from cafe_flwr.robustness import guarded_weights
from cafe_flwr.teaching import TEACHERS, check_solver, cosine_similarity, teacher_weights
from cafe_flwr.training import batches

PROXIES = ("parameters", "gradients")
PEERS = ("all", "alike", "deeper")


@dataclass(frozen=True, kw_only=True)
class CafeDistillMethod(Method):
    """Both halves of CAFEDistill, and its ablations."""

    name: ClassVar[str] = "cafedistill"
    prefix: ClassVar[str] = ""
    refuses: ClassVar[Mapping[str, str]] = {"distill": "it distils already"}
    compares: ClassVar[bool] = True  # classifiers of one width

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
        "Whose classifiers teach a client where depths or modalities differ: last exits of all, of the same network "
        "only, or of its own last exit those of all who hold it ('deeper': clients send all their classifiers).",
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
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver != "exact":
            check_solver(self.solver)

    # --- what travels ---

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """The last exit's classifier, if it may teach others; all exits', if those of fewer exits learn from them."""
        if self.teachers == "own":
            return []
        return network.classifier_names() if self.peers == "deeper" else network.head_names(network.num_exits - 1)

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """The teacher's classifier, under the names of the last exit's."""
        return [] if self.teachers == "own" else network.head_names(network.num_exits - 1)

    def check(self, network: EarlyExitNetwork) -> None:
        """What compares or mixes classifiers of different exits needs them of one shape."""
        if self.similarity_proxy == "parameters":
            check_selection(network, self.selection, "similarity-proxy to 'gradients', or selection")
        if self.peers == "deeper":
            check_equal_exits(network, "peers = 'deeper'", "set peers to 'alike' or 'all'")

    # --- server half ---

    def plan(self, task: ServerRound) -> RoundPlan:
        """Coordinate the students and match the teachers of one round."""
        t = min(task.server_round, task.num_rounds)
        similarity = reported_similarity(task)
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
        """Pupils, those who may teach them (and they among these), and the classifiers that do, (teachers, values)."""
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

    # --- client half ---

    def train(self, task: LocalTask) -> LocalResult:
        """Minimise the local loss, then report how similar every student exit is to the last exit."""

        mean_loss = task.run(lambda x, y: self.loss(task, x, y))
        return LocalResult(mean_loss, self._similarity(task))

    def loss(self, task: LocalTask, x: Tensor, y: Tensor) -> Tensor:
        """L_i = CE(z_m, y) + Σ_{k active} [ CE(z_k, y) + λ·τ²·KL( softmax(z̃/τ) ‖ softmax(z_k/τ) ) ].

        Exits that are not active are not even computed. z̃ are the last features under the classifier received; in
        round 1 the client's own last exit. Another objective's terms take the place of the cross-entropies; if the
        matched teacher takes the place of its EMA teacher, λ's term, which would say the same again, falls away.
        """
        network, exits, h = task.network, training_exits(task), x
        logits = []
        for k in range(network.num_exits):
            h = network.stage(k, h)
            if k in exits:
                features, z = network.exit(k, h)
                logits.append(z)
        taught = z
        if task.download:
            taught = F.linear(features, *(task.download[name] for name in network.head_names(exits[-1])))
            taught = taught if network.offset is None else taught + network.offset
        taught = taught.detach()
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
        if self.similarity_proxy == "gradients":
            size = task.budget.batch_size
            positions = next(batches(len(task.data), size, size, task.rng("similarity")))
            index, device = torch.from_numpy(positions), device_of(network)
            return gradient_similarity(network, moved(task.data.x[index], device), moved(task.data.y[index], device))
        return classifier_similarity(network)


def training_exits(task: LocalTask) -> list[int]:
    """The active student exits and the last one, counted from 0."""
    return [*(k for k, active in enumerate(task.active) if active), task.network.num_exits - 1]


def reported_similarity(task: ServerRound) -> NDArray[np.float64]:
    """What the participants last said of their student exits, (participants, m−1); NaN if nothing yet."""
    similarity = np.full((len(task.participants), task.num_exits - 1), np.nan)
    for row, client in enumerate(task.participants):
        if client in task.known:
            similarity[row] = task.known[client].similarity[: task.num_exits - 1]
    return similarity


def check_selection(network: EarlyExitNetwork, selection: str, key: str) -> None:
    """ValueError where students are ordered by cosines of classifiers that cannot be taken; ``key`` is what to set."""
    if selection in ("shallow-first", "deep-first"):
        what = f"selection = {selection!r} by the cosine of an exit's classifier and the last one's"
        check_equal_exits(network, what, f"set {key} to 'none' or 'random'")


def classifier_similarity(network: EarlyExitNetwork) -> list[float]:
    """Cosine of every student exit's classifier and the last exit's, (m−1,); NaN where exits have different widths."""
    if len(set(network.feature_widths)) > 1:
        return [math.nan] * (network.num_exits - 1)
    tensors, last = network.state_dict(), network.num_exits - 1
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
