"""A variant of ours with classifiers shared class by class; class frequencies enter as each client's own log-prior.

Built on ``cafedistill-text``; until 0.1.0 its name was ``cafedistill-plus``.

    server, round t                                            client i, round t
      for every class c, over the clients that have it:          h_i^k ← h_i^k + ρ (T_i^k − h_i^k), every exit
        S_ij ← cos(φ̄_ic, φ̄_jc), class means of features          θ_i ← θ_i + ρ_θ (θ̄ − θ_i), the backbone
        w_i ← Proj_Δ( a + S_i/(2μ) ), a_j = n_jc/Σ_j n_jc        z_k ← h_i^k φ_k + log π_i, in training and after
        T_i[:,c] ← Σ_j w_ij h_j[:,c], every exit                 q ← mean_k softmax(z_k/τ), detached
      send θ̄, T_i                                                minimise Σ_k CE(z_k, y) + λ_k τ² KL(q ‖ z_k/τ)
      θ̄ ← Σ_i n_i θ_i / Σ_i n_i                                  send θ_i, h_i^1 … h_i^m, φ̄_i, class counts

Clients keep their own θ_i and h_i. docs/method.md has the reasons, docs/evidence.md the trail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.coordination import SELECTIONS, active_exits
from cafe_flwr.core.options import setting
from cafe_flwr.data.split import Split
from cafe_flwr.methods.base import Method, check_equal_exits, check_selection
from cafe_flwr.methods.client import LocalResult, LocalTask, Tensors, without_prefix
from cafe_flwr.methods.exit_agreement import classifier_similarity
from cafe_flwr.methods.server import RoundPlan, ServerRound
from cafe_flwr.methods.whole_model import UPDATE, add_updates, updates
from cafe_flwr.metrics.exits import exit_features
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.teaching import cosine_similarity, teacher_weights
from cafe_flwr.training.class_prior import class_counts, class_sums
from cafe_flwr.training.loop import snapshot
from cafe_flwr.training.losses import self_distillation
from cafe_flwr.training.objectives.base import logits_at

_COUNTS, _MEANS, _OWN = "class-counts", "class-means", "own."


@dataclass(frozen=True, kw_only=True)
class CafeDistillPrior(Method):
    """A log-prior, classifiers shared class by class, an elastic backbone, and all exits teaching."""

    name: ClassVar[str] = "cafedistill-prior"
    refuses: ClassVar[Mapping[str, str]] = {"distill": "it distils already"}

    classifier_start: str = setting(
        "built", "As for all methods; here fixed, since updates from it are sent.", choices=("built",)
    )
    prior: bool = setting(True, "Add the log of the client's own class shares to its logits, in training and after.")
    mu: float = setting(0.1, "μ of class-wise matching: small = those most like oneself, large = all.", gt=0)
    pull: float = setting(1.0, "Share ρ of the matched classifiers in what a client starts a round from.", ge=0, le=1)
    distill_weight: float = setting(1.0, "Weight λ of distillation for student exits; 0: none.", ge=0)
    last_weight: float = setting(0.3, "Weight of distillation for the last exit, in units of λ.", ge=0)
    temperature: float = setting(3.0, "Temperature τ of distillation.", gt=0)
    selection: str = setting("none", "Order in which student exits join.", choices=SELECTIONS)
    backbone_pull: float = setting(
        0.5, "Share of the average in the backbone a client starts a round from; the rest is its own.", ge=0, le=1
    )
    match_by: str = setting(
        "features",
        "Similarity of clients in a class: of their mean features of it, or of what they made of its classifiers.",
        choices=("features", "classifiers"),
    )
    same_above: float = setting(0.6, "Clients more similar than this in a class count as equal in it.", ge=-1, le=1)
    counts: str = setting(
        "exact",
        "Class counts that leave the client: as they are, with noise, or none (then the number of examples).",
        choices=("exact", "noised", "none"),
    )
    count_epsilon: float = setting(1.0, "Privacy ε of one example's label where counts are noised.", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match_by == "features" and self.counts != "exact":
            raise ValueError(
                f"counts = {self.counts!r} hides what match_by = 'features' would tell: set match_by to 'classifiers'"
            )

    def check(self, network: EarlyExitNetwork) -> None:
        """Class means are one tensor, and students are ordered by classifiers: both need exits of one width."""
        check_selection(network, self.selection, f"{self.name}.selection")
        if self.match_by == "features":
            key = f"{self.name}.match-by"
            check_equal_exits(network, f"{key} = 'features'", f"set {key} to 'classifiers'")

    def extra_tensors(self, network: EarlyExitNetwork) -> dict[str, Tensor]:
        """The client's own backbone, its classifiers' update since the common start, class means and counts."""
        tensors = network.state_dict()
        extra = {_OWN + name: tensors[name].clone() for name in network.shared_names()}
        extra |= {UPDATE + name: torch.zeros_like(tensors[name]) for name in network.classifier_names()}
        if self.match_by == "features":
            width = tensors[network.head_names(0)[0]].shape[1]
            extra[_MEANS] = torch.zeros(network.num_exits, network.num_classes, width)
        return extra | ({_COUNTS: torch.zeros(network.num_classes)} if self.counts != "none" else {})

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """Classifiers and own backbone."""
        return [*network.personal_names(), *(_OWN + name for name in network.shared_names())]

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """The updates of all classifiers since the common start, class means and counts."""
        means, counts = self.match_by == "features", self.counts != "none"
        return [*self.download_names(network), *([_MEANS] if means else []), *([_COUNTS] if counts else [])]

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """The matched classifiers of all exits, as updates since the common start."""
        return [UPDATE + name for name in network.classifier_names()]

    def plan(self, task: ServerRound) -> RoundPlan:
        """Choose the active students, and match classifiers class by class."""
        active = active_exits(
            min(task.server_round, task.num_rounds),
            task.num_rounds,
            task.reported_similarity,
            selection=self.selection,
            rng=task.rng,
            there=task.all_exits,
        )
        clients, pupils = task.teachers, task.pupils
        if not pupils:
            return RoundPlan(active)
        uploads = task.uploads(clients)
        shapes = dict(task.upload.entries)
        names = [name for name in task.upload.names if name.startswith(UPDATE)]
        num_classes = shapes[names[-1]][0]
        if self.counts == "none":
            counts = np.repeat(task.examples(clients)[:, None], num_classes, axis=1)
        else:
            counts = task.part(uploads, _COUNTS).astype(np.float64)
        # (clients, C, values of a class at all exits): a classifier has a row of weights and a bias for every class
        parts = [task.part(uploads, name).reshape(len(clients), num_classes, -1) for name in names]
        changes = np.concatenate(parts, axis=2)
        if self.match_by == "features":
            means = task.part(uploads, _MEANS).reshape(len(clients), task.num_exits, num_classes, -1)
            described = means.swapaxes(1, 2).reshape(len(clients), num_classes, -1)
        else:
            described = changes
        rows = np.searchsorted(clients, pupils)
        matched, weights = match_classes(changes, described, counts, rows, self.mu, self.same_above)
        pieces = np.split(matched, np.cumsum([part.shape[2] for part in parts])[:-1], axis=2)
        flat = np.concatenate([piece.reshape(len(pupils), -1) for piece in pieces], axis=1)
        return RoundPlan(active, dict(zip(pupils, flat, strict=True)), weights, pupils, clients)

    def receive(self, tensors: Tensors, download: Tensors, initial: Tensors, data: Split | None = None) -> Tensors:
        """Pull the own classifiers towards those matched, and the own backbone towards the average."""
        if not download:  # it has not trained yet
            return tensors
        matched = add_updates(initial, download)
        classifiers = {name: torch.lerp(tensors[name], t, self.pull) for name, t in matched.items()}
        own = without_prefix(tensors, _OWN)
        backbone = {name: torch.lerp(t, tensors[name], self.backbone_pull) for name, t in own.items()}
        return {**tensors, **classifiers, **backbone}

    def train(self, task: LocalTask) -> LocalResult:
        """Minimise the local loss; then compute class means and counts."""
        result = task.run(lambda x, y: self.loss(task, x, y))
        if self.counts != "none":
            counts = class_counts(task.data.y, task.network.num_classes)
            if self.counts == "noised":  # repeated noise cannot be averaged away
                counts = noised(counts, self.count_epsilon, task.private_rng(f"class counts {self.count_epsilon}"))
            task.state[_COUNTS] = counts
        if self.match_by == "features":
            task.state[_MEANS] = class_means(task.network, task.data)
        tensors = snapshot(task.network)
        task.state |= {_OWN + name: tensors[name] for name in task.network.shared_names()}
        task.state |= updates(task, task.network.classifier_names())
        return LocalResult(result, classifier_similarity(task.network))

    def loss(self, task: LocalTask, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropies and self-distillation of the active exits and the last."""
        exits = task.training_exits
        logits = logits_at(task.network, x, exits)
        total = self.exit_terms(task, x, y, logits, exits=exits).sum()
        if not self.distill_weight:
            return total
        learn = self_distillation(logits, temperature=self.temperature, last_weight=self.last_weight)
        return total + self.distill_weight * learn.sum()


def class_means(network: EarlyExitNetwork, data: Split) -> Tensor:
    """Mean features of every class minus the mean of all examples, (m, C, d); 0 for absent classes."""
    phi = exit_features(network, data.x)
    phi = phi - phi.mean(dim=1, keepdim=True)
    counts = class_counts(data.y, network.num_classes).clamp_min(1.0)
    sums = class_sums(phi, data.y, network.num_classes)
    means = sums / counts[:, None]
    # With a single class the difference is rounding noise, which has no meaningful direction.
    noise = means.norm(dim=2, keepdim=True) < 1e-4 * sums.shape[2] ** 0.5
    return means.masked_fill(noise, 0.0)


def match_classes(
    updates: NDArray[np.float32],
    described: NDArray[np.float32],
    counts: NDArray[np.float64],
    rows: NDArray[np.int64],
    mu: float,
    same_above: float = 1.0,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Mix every class over the clients that have it: w_i^c = Proj_Δ( a_c + S_i^c/(2μ) ), a_jc = n_jc/Σ_j n_jc.

    Parameters
    ----------
    updates
        (clients, C, values): updates of the clients' classifiers since the common start, class by class.
    described
        (clients, C, values): S_ij^c is the cosine of these.
    counts
        n_jc, (clients, C), 0 or more.
    rows
        Clients to mix for.
    mu, same_above
        μ > 0; similarities above ``same_above`` count as 1.

    Returns
    -------
    Mixed updates, (rows, C, values), a client's own for classes that nobody has; and weights (rows, clients), averaged
    over classes by their frequency.

    Examples
    --------
    >>> updates = np.array([[[3.0, 4.0]], [[4.0, 3.0]]], dtype=np.float32)
    >>> mixed, weights = match_classes(updates, updates, np.ones((2, 1)), np.array([0]), mu=0.5)
    >>> weights.round(2), mixed[0, 0].round(2)
    (array([[0.52, 0.48]]), array([3.48, 3.52], dtype=float32))
    """
    mixed = updates[rows].copy()
    overall = np.zeros((len(rows), len(updates)))
    for c in np.flatnonzero(counts.sum(axis=0) > 0):
        holders = np.flatnonzero(counts[:, c] > 0)
        of_class = counts[holders, c]
        similarity = cosine_similarity(described[:, c])[np.ix_(rows, holders)]
        similarity[similarity > same_above] = 1.0
        weights = teacher_weights(similarity, of_class / of_class.sum(), mu)
        mixed[:, c] = weights.astype(np.float32) @ updates[holders, c]
        overall[:, holders] += weights * of_class.sum()
    total = counts.sum()
    return mixed, overall / total if total > 0 else overall


def noised(counts: Tensor, epsilon: float, rng: np.random.Generator) -> Tensor:
    """Counts with Laplace noise of scale 2/ε, never below 0: ε-differentially private for the label of one example.

    A label that changes moves two counts by 1; the number of examples is not hidden.
    """
    noise = torch.from_numpy(rng.laplace(scale=2.0 / epsilon, size=len(counts)))
    return (counts + noise.float()).clamp_min(0.0)
