"""What a method of federated learning is: which tensors travel, what a client minimises, what the server combines."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from cafe_flwr.core.options import check_settings, section
from cafe_flwr.core.options import setting as setting  # methods declare their settings with it
from cafe_flwr.data.split import Split
from cafe_flwr.methods.client import LocalResult, LocalTask, Tensors
from cafe_flwr.methods.server import ClientRecord, Conclusion, RoundPlan, ServerRound
from cafe_flwr.methods.starts import STARTS
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.training.class_prior import class_counts, log_prior
from cafe_flwr.training.losses import self_distillation
from cafe_flwr.training.objectives.base import Objective
from cafe_flwr.training.objectives.cross_entropy import CrossEntropy
from cafe_flwr.training.objectives.registry import (
    OBJECTIVES,
    all_flat_fields,
    flat_fields,
    flat_settings,
    objective_named,
)
from cafe_flwr.wire.capacity import Kind


class _ByName:
    """Lets the constructor of a method take its objective by name; what is read is the objective."""

    def __get__(self, method: Method | None, kind: type[Method]) -> Objective:
        return CrossEntropy() if method is None else vars(method)["objective"]

    def __set__(self, method: Method, given: Objective | str) -> None:
        vars(method)["objective"] = objective_named(given)


@section("")
@dataclass(frozen=True, kw_only=True)
class ObjectiveName:
    """How the name of a method's objective is declared."""

    objective: str = setting(
        "cross-entropy",
        "What a client minimises at every exit, see docs/objectives.md.",
        key="objective",
        choices=tuple(OBJECTIVES),
    )


@section("train")
@dataclass(frozen=True, kw_only=True)
class Method:
    """Both halves of a method; a subclass is a frozen dataclass of the method's own settings, in a file of its own.

    As it stands here it is FedPer: the backbone is averaged, the classifiers are personal, all exits train on the mean
    of their cross-entropies. A method overrides what it does otherwise: first *what travels* (the four lists of names),
    then the *server half* (``plan``), then the *client half* (``receive``, ``train`` or just ``loss``, ``deploy``).
    docs/methods.md shows how to add one.

    Settings are scalars, made with :func:`setting`: they travel to the clients, which build the same object from them.

    Attributes
    ----------
    name
        Of the method, as in ``method = "fedper"``; and of the table of its own settings.
    refuses
        Settings of every method that this one cannot take, with the reason.
    phases
        Things it trains one after the other in a round, which share the round's steps if ``equal_steps``.
    objective
        What a client minimises at every exit: an :class:`cafe_flwr.training.objectives.Objective`, or its name.
    prior, distill, equal_steps, classifier_start
        Settings of every method.
    """

    name: ClassVar[str]
    refuses: ClassVar[Mapping[str, str]] = {}
    phases: ClassVar[int] = 1

    objective: _ByName = _ByName()
    prior: bool = setting(False, "Add the log of the client's own class shares to its logits, in training and after.")
    distill: bool = setting(False, "Let the mean of a client's exits teach each of them (temperature 3).")
    equal_steps: bool = setting(
        True,
        "Methods that train two things in a round share the round's steps; false: each takes all, as published.",
        compare="own",
    )
    classifier_start: str = setting(
        "zero",
        "What personal classifiers start from: zeros, one random draw common to all clients, a draw of each client's "
        "own, or what the network was built with ('built', alike on all; not with cafedistill). Shared ones: as built.",
        choices=STARTS,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for switch, reason in self.refuses.items():
            if getattr(self, switch) != type(self).__dataclass_fields__[switch].default:
                raise ValueError(f"{switch} is not for {self.name}: {reason}")

    @property
    def is_taught(self) -> bool:
        """Whether a teacher takes part in the objective."""
        return self.objective.is_taught

    def unread(self) -> set[str]:
        """Which of :func:`settings_of` the objective chosen leaves unread."""
        return all_flat_fields().keys() - flat_fields(type(self.objective)).keys()

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
        weights = weights or self.objective.exit_weights(len(logits))
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
        """What every exit minimises, (m,): its cross-entropy, or its loss of another objective."""
        if task.objective_state is None:
            task.objective_state = self.objective.init(task.network, task.rng(f"objective {task.steps}"))
        return self.objective.losses(task.objective_state, (x, y), logits, exits=exits, shift=shift, teacher=teacher)

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
    """The method's settings as they travel, by name: those of its objective under flat names, then its own."""
    own = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "objective"}
    return flat_settings(method.objective) | own


def phase(method: Method, number: int) -> tuple[int, int]:
    """Which part of the round's steps a phase of a method takes: its share, or all of them as published."""
    return (number, method.phases) if method.equal_steps else (0, 1)
