"""What a method of federated learning is: which tensors travel, what a client minimises, what the server combines."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cafe_flwr.core.options import setting as setting  # methods declare their settings with it
from cafe_flwr.core.schema import Schema
from cafe_flwr.data.federation import Split
from cafe_flwr.methods.pairs import Pairs
from cafe_flwr.methods.starts import STARTS
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.preprocessing import Augmentation
from cafe_flwr.training.class_prior import class_counts, log_prior
from cafe_flwr.training.loop import LocalBudget, train
from cafe_flwr.training.losses import cross_entropies, self_distillation
from cafe_flwr.training.objectives.base import Lesson, Objective
from cafe_flwr.wire.capacity import Kind

Tensors = Mapping[str, Tensor]


@dataclass
class LocalTask:
    """One client's work in one round.

    Attributes
    ----------
    network
        Holds what the client starts from; trained in place.
    data
        Training split.
    active
        (m−1,): whether student exit k trains.
    download
        What the server sent to this client alone, by name; empty if nothing.
    budget
        Steps, batch size and optimiser settings.
    rng
        The client's random generator of this round for a purpose.
    private_rng
        A random generator for a purpose, always the same one, from a secret that never leaves the client's disk; what
        the server must not foresee, such as noise, comes from it.
    server_round, num_rounds
        t and T.
    state
        The client's tensors beside the network's (``Method.extra_tensors``), by name; the method replaces entries.
    initial
        The weights that the client's network started from, by name.
    steps
        Gradient steps taken so far.
    lesson
        The objective at work in the training that runs now, if it has been asked for.
    augment
        How training varies the inputs of a batch; None: not at all.
    momentum
        What the optimiser remembers from the client's last round, by name; replaced when the task has run. Unused
        unless the budget keeps it.
    runs
        How often the task has run so far.
    """

    network: EarlyExitNetwork
    data: Split
    active: Sequence[bool]
    download: Tensors
    budget: LocalBudget
    rng: Callable[[str], np.random.Generator]
    private_rng: Callable[[str], np.random.Generator] = field(default=lambda purpose: np.random.default_rng())
    server_round: int = 1
    num_rounds: int = 1
    state: dict[str, Tensor] = field(default_factory=dict)
    initial: Tensors = field(default_factory=dict)
    steps: int = 0
    lesson: Lesson | None = None
    augment: Augmentation | None = None
    momentum: dict[str, Tensor] = field(default_factory=dict)
    runs: int = 0

    @property
    def training_exits(self) -> list[int]:
        """The active student exits and the last one, counted from 0."""
        return [*(k for k, active in enumerate(self.active) if active), self.network.num_exits - 1]

    def run(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        only: Sequence[str] = (),
        also: Sequence[Tensor] = (),
        adjust: Callable[[], None] | None = None,
        part: tuple[int, int] = (0, 1),
        times: int = 1,
        purpose: str = "batches",
    ) -> float:
        """Train the network on a loss of (x, y), and count the steps.

        The objective begins anew: its teacher is the network as it stands before the first step. Where momentum is
        kept, the n-th run of a round goes on with that of the n-th run of the client's last round for this purpose.

        Parameters
        ----------
        loss
            (x, y) → scalar.
        only
            Parameters of the network to train; all if empty.
        also
            Parameters to train that are not the network's.
        adjust
            Called after every backward pass, to change the gradients.
        part
            (i, n): take the i-th of n nearly equal parts of the round's steps.
        times
            Rounds' worth of steps.
        purpose
            Of the random generator that draws the mini-batches.

        Returns
        -------
        Mean loss over the steps.
        """
        self.lesson = None
        of_this = f"{purpose}/{self.runs}/"
        kept = without_prefix(self.momentum, of_this) if self.budget.keep_momentum else None
        outcome = train(
            self.network,
            self.data,
            loss,
            self.budget,
            self.rng(purpose),
            only=only,
            also=also,
            adjust=adjust,
            after_step=self._after_step,
            part=part,
            times=times,
            augment=self.augment,
            kept=kept,
        )
        self.lesson = None
        self.runs += 1
        if kept is not None:
            others = {name: t for name, t in self.momentum.items() if not name.startswith(of_this)}
            self.momentum = others | {of_this + name: t for name, t in kept.items()}
        self.steps += outcome.steps
        return outcome.loss

    def _after_step(self) -> None:
        if self.lesson is not None:
            self.lesson.after_step()


@dataclass(frozen=True)
class LocalResult:
    """What a client reports besides its tensors: mean training loss, and the similarity of each student exit if any."""

    loss: float
    similarity: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ClientRecord:
    """What the server knows of a client: its last report.

    Attributes
    ----------
    num_examples
        Training examples.
    seen
        Round of the report.
    upload
        What the method had it send of its own, or what the server has made of that for it (``Method.conclude``), flat.
        CAFEDistill: the mixture that the client's last classifier becomes, which waits here until it is next asked.
    similarity
        (m−1,): how similar its student exits are to its last exit; NaN for exits that it does not hold.
    kind
        What it holds (:class:`cafe_flwr.wire.capacity.Kind`), by name.
    level
        CAFEDistill: its deepest exit that has trained as a student, counted from 0.
    """

    num_examples: int
    seen: int
    upload: NDArray[np.float32]
    similarity: NDArray[np.float64]
    kind: str = ""
    level: int = 0


@dataclass(frozen=True)
class ServerRound:
    """What the server knows when it plans a round.

    Where clients are not alike, a round is planned once for all those that can learn from one another
    (``Method.comparable``).

    Attributes
    ----------
    server_round, num_rounds
        t and T. t = T + 1: after the last round; what a client is sent then, it is evaluated with.
    participants
        Clients of the round, in order.
    num_exits
        m; the most that a participant holds.
    known
        The last reports of all clients that ever reported.
    upload
        What is in a report's flat array.
    rng
        Random generator of this round.
    held
        How many exits participants hold, by client; those that are not named hold all.
    pairs
        Similarities of clients that have met in a round.
    seed
        Of the run.
    trains
        Whether the participants train; if not, they evaluate what they hold.
    """

    server_round: int
    num_rounds: int
    participants: Sequence[int]
    num_exits: int
    known: Mapping[int, ClientRecord]
    upload: Schema
    rng: np.random.Generator
    held: Mapping[int, int] = field(default_factory=dict)
    pairs: Pairs = field(default_factory=Pairs)
    seed: int = 0
    trains: bool = True

    @property
    def all_exits(self) -> NDArray[np.bool_]:
        """Every student exit of every participant, (participants, m−1), as ``RoundPlan.active`` has them.

        A client that holds d exits has d − 1 students.
        """
        held = np.array([self.held.get(client, self.num_exits) for client in self.participants], dtype=np.int64)
        return np.arange(1, self.num_exits) < held[:, None]

    @property
    def reported_similarity(self) -> NDArray[np.float64]:
        """What the participants last said of their student exits, (participants, m−1); NaN if nothing yet."""
        similarity = np.full((len(self.participants), self.num_exits - 1), np.nan)
        for row, client in enumerate(self.participants):
            if client in self.known:
                similarity[row] = self.known[client].similarity[: self.num_exits - 1]
        return similarity

    @property
    def teachers(self) -> list[int]:
        """Clients that have reported."""
        return sorted(self.known)

    @property
    def pupils(self) -> list[int]:
        """Participants that have reported before."""
        return sorted(set(self.participants) & set(self.known))

    def uploads(self, clients: Sequence[int]) -> NDArray[np.float32]:
        """Flat uploads of the clients, (clients, values)."""
        return np.stack([self.known[c].upload for c in clients])

    def examples(self, clients: Sequence[int]) -> NDArray[np.float64]:
        """Training examples of the clients."""
        return np.array([self.known[c].num_examples for c in clients], dtype=np.float64)

    def part(self, uploads: NDArray[np.float32], *names: str) -> NDArray[np.float32]:
        """The named tensors of flat uploads (clients, …), side by side: (clients, values)."""
        ends = np.cumsum(self.upload.sizes)
        spans = [slice(ends[i] - self.upload.sizes[i], ends[i]) for i in map(self.upload.names.index, names)]
        return np.concatenate([uploads[:, span] for span in spans], axis=1)


@dataclass(frozen=True)
class RoundPlan:
    """What the server has decided for a round.

    Attributes
    ----------
    active
        (participants, m−1) bool, rows in the order of the participants.
    downloads
        Flat arrays for single clients, by client.
    weights
        Who learns from whom: (rows: ``weight_rows``, columns: ``weight_columns``), for the records; None without.
    suspicious
        Clients whose weight as teachers was bounded (:mod:`cafe_flwr.methods.robust_teachers`), with the reason.
    """

    active: NDArray[np.bool_]
    downloads: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    weights: NDArray[np.float64] | None = None
    weight_rows: Sequence[int] = ()
    weight_columns: Sequence[int] = ()
    suspicious: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conclusion:
    """What the server has made of a round's reports.

    Attributes
    ----------
    records
        What it keeps of every client that reported well.
    pairs
        Similarities of clients, those of this round included.
    plan
        The round's plan, with the weights found now where the method mixes at the end of a round.
    unmoved
        Clients whose classifier came back as it was sent.
    """

    records: Mapping[int, ClientRecord]
    pairs: Pairs
    plan: RoundPlan
    unmoved: Sequence[int] = ()


def joined_plans(
    participants: Sequence[int], plans: Sequence[tuple[Sequence[int], RoundPlan]], num_exits: int
) -> RoundPlan:
    """The plans for several groups of the participants as one: across groups nobody learns from anybody.

    Parameters
    ----------
    participants
        Clients of the round, in order.
    plans
        Of every group: its participants, and the plan for them.
    num_exits
        m of the federation; a group's clients may all hold less.
    """
    if len(plans) == 1 and plans[0][1].active.shape[1] == num_exits - 1:
        return plans[0][1]
    row_of = {client: row for row, client in enumerate(participants)}
    active = np.zeros((len(participants), num_exits - 1), dtype=bool)
    for clients, plan in plans:
        active[[row_of[client] for client in clients], : plan.active.shape[1]] = plan.active
    downloads = {client: flat for _, plan in plans for client, flat in plan.downloads.items()}
    suspicious = {client: reason for _, plan in plans for client, reason in plan.suspicious.items()}
    taught = [plan for _, plan in plans if plan.weights is not None]
    if not taught:
        return RoundPlan(active, downloads, suspicious=suspicious)
    rows = sorted(client for plan in taught for client in plan.weight_rows)
    columns = sorted(client for plan in taught for client in plan.weight_columns)
    weights = np.zeros((len(rows), len(columns)))
    for plan in taught:
        where = np.searchsorted(rows, plan.weight_rows), np.searchsorted(columns, plan.weight_columns)
        weights[np.ix_(*where)] = plan.weights
    return RoundPlan(active, downloads, weights, rows, columns, suspicious)


@dataclass(frozen=True, kw_only=True)
class Method(Objective):
    """Both halves of a method; a subclass is a frozen dataclass of the method's own settings, in a file of its own.

    As it stands here it is FedPer: the backbone is averaged, the classifiers are personal, all exits train on the mean
    of their cross-entropies. A method overrides what it does otherwise: first *what travels* (the four lists of names),
    then the *server half* (``plan``), then the *client half* (``receive``, ``train`` or just ``loss``, ``deploy``).
    docs/methods.md shows how to add one.

    Settings are scalars, made with :func:`setting`: they travel to the clients, which build the same object from them.

    Attributes
    ----------
    name
        Of the method, as in ``method = "fedper"``.
    prefix
        Before the names of its settings in a run's settings: ``ditto-`` and ``pull`` make ``ditto-pull``.
    refuses
        Settings of every method that this one cannot take, with the reason.
    phases
        Things it trains one after the other in a round, which share the round's steps if ``equal_steps``.
    prior, distill, equal_steps, classifier_start
        Settings of every method, beside those of its objective.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]
    refuses: ClassVar[Mapping[str, str]] = {}
    phases: ClassVar[int] = 1

    prior: bool = setting(False, "Add the log of the client's own class shares to its logits, in training and after.")
    distill: bool = setting(False, "Let the mean of a client's exits teach each of them (temperature 3).")
    equal_steps: bool = setting(
        True, "Methods that train two things in a round share the round's steps; false: each takes all, as published."
    )
    classifier_start: str = setting(
        "zero",
        "What personal classifiers start from: zeros, one random draw common to all clients, a draw of each client's "
        "own, or what the network was built with ('built', alike on all; not with cafedistill). Shared ones: as built.",
        choices=STARTS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for switch, reason in self.refuses.items():
            if getattr(self, switch):
                raise ValueError(f"{switch} is not for {self.name}: {reason}")

    # --- what travels ---

    def extra_tensors(self, network: EarlyExitNetwork) -> dict[str, Tensor]:
        """Tensors a client has beside its network's, with what they start from."""
        return {}

    def shared_names(self, network: EarlyExitNetwork) -> list[str]:
        """Tensors that are averaged over clients, by their examples."""
        return network.shared_names()

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """Tensors that stay on the client's disk from round to round."""
        return network.personal_names()

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """Tensors each client sends as its own, not averaged."""
        return []

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """Names and shapes of what a client receives as its own."""
        return []

    def check(self, network: EarlyExitNetwork) -> None:
        """Raise ValueError if the method cannot run with this network."""

    # --- server half ---

    def comparable(self, kind: Kind) -> Hashable:
        """Clients learn from one another whose kinds give the same here; by default, those with the same network."""
        return kind.name

    def plain_mean(self, unequal: bool) -> bool:
        """Whether clients count alike in the average of what is shared; by default they count by their examples.

        ``unequal``: some clients hold a part of the network only.
        """
        return False

    def plan(self, task: ServerRound) -> RoundPlan:
        """What the participants are told. By default: train all exits."""
        return RoundPlan(task.all_exits)

    def conclude(self, task: ServerRound, plan: RoundPlan, records: Mapping[int, ClientRecord]) -> Conclusion:
        """What is kept of a round. By default: the reports as they are.

        Parameters
        ----------
        task, plan
            As the round was planned; ``task.known`` is from before the round.
        records
            Of the participants that reported well.
        """
        return Conclusion(records, task.pairs, plan)

    # --- client half ---

    def receive(self, tensors: Tensors, download: Tensors, initial: Tensors, data: Split | None = None) -> Tensors:
        """The client's tensors at the start of a round.

        Parameters
        ----------
        tensors
            The shared ones as averaged, the personal ones as left.
        download
            What the server sent to this client alone; empty if nothing.
        initial
            The weights that the client's network started from.
        data
            Its training split; None where the server must know the outcome: then what does not depend on it.
        """
        return tensors

    def train(self, task: LocalTask) -> LocalResult:
        """One round of local training."""
        return LocalResult(task.run(lambda x, y: self.loss(task, x, y)))

    def loss(self, task: LocalTask, x: Tensor, y: Tensor) -> Tensor:
        """Loss of a batch: by default the mean over exits of the cross-entropy."""
        return self.exits_loss(task, x, y, task.network(x))

    def exits_loss(
        self,
        task: LocalTask,
        x: Tensor,
        y: Tensor,
        logits: Sequence[Tensor],
        weights: Sequence[float] = (),
        *,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Σ_k a_k CE(z_k, y) of all exits, or another objective's terms in the place of the cross-entropies.

        a_k are the objective's weights, 1/m for cross-entropy, unless given; with ``distill``, self-distillation is
        added with the same weights. ``shift`` is what the method has added to the logits.
        """
        weights = weights or self.weights(len(logits))
        terms = self.exit_terms(task, x, y, logits, shift=shift)
        if self.distill:
            terms = terms + self_distillation(logits)
        return terms @ torch.tensor(weights, dtype=terms.dtype, device=terms.device)

    def exit_terms(
        self,
        task: LocalTask,
        x: Tensor,
        y: Tensor,
        logits: Sequence[Tensor],
        *,
        exits: Sequence[int] = (),
        shift: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """What every exit minimises, (m,): its cross-entropy, or its term of another objective (``Lesson.terms``)."""
        if self.objective == "cross-entropy":
            return cross_entropies(logits, y)
        if task.lesson is None:
            task.lesson = self.begin(task.network, task.rng(f"objective {task.steps}"))
        return task.lesson.terms(x, y, logits, exits=exits, shift=shift, teacher=teacher)

    def offset(self, data: Split, num_classes: int) -> Tensor | None:
        """What is added to the client's logits at every exit, in training and after: its log-prior, or nothing."""
        return log_prior(class_counts(data.y, num_classes)) if self.prior else None

    def deploy(self, tensors: Tensors) -> Tensors:
        """The tensors of the client's personal network, under the network's names, from all that the client has."""
        return tensors

    def finish(self, task: LocalTask) -> None:
        """Fine-tune after the last round."""

    def extra_rounds(self) -> int:
        """Rounds' worth of local steps that ``finish`` takes."""
        return 0


def check_equal_exits(network: EarlyExitNetwork, what: str, advice: str) -> None:
    """ValueError, with the advice, where what is asked for compares exits and theirs have different widths."""
    widths = network.feature_widths
    if len(set(widths)) > 1:
        raise ValueError(
            f"{what} needs exits of one width, and this network's have {', '.join(map(str, widths))}: {advice}"
        )


def check_selection(network: EarlyExitNetwork, selection: str, key: str) -> None:
    """ValueError where students are ordered by cosines of classifiers that cannot be taken; ``key`` is what to set."""
    if selection in ("shallow-first", "deep-first"):
        what = f"selection = {selection!r} by the cosine of an exit's classifier and the last one's"
        check_equal_exits(network, what, f"set {key} to 'none' or 'random'")


def settings_of(method: Method) -> dict[str, Any]:
    """The method's own settings, by name."""
    return {f.name: getattr(method, f.name) for f in fields(method)}


def without_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, under the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def phase(method: Method, number: int) -> tuple[int, int]:
    """Which part of the round's steps a phase of a method takes: its share, or all of them as published."""
    return (number, method.phases) if method.equal_steps else (0, 1)
