"""Base class of methods: which tensors travel, what a client minimises, and what the server combines."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from cafe_flwr.core.options import check_settings, section, setting
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
from cafe_flwr.wire.capacity import ClientSpec


class _ByName:
    """Attribute that may be set to the name of an objective, and is read as the objective."""

    def __get__(self, method: Method | None, kind: type[Method]) -> Objective:
        return CrossEntropy() if method is None else vars(method)["objective"]

    def __set__(self, method: Method, given: Objective | str) -> None:
        vars(method)["objective"] = objective_named(given)


@section("")
@dataclass(frozen=True, kw_only=True)
class ObjectiveName:
    """Declares the setting that names a method's objective."""

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

    The base class is FedPer: the backbone is averaged, the classifiers are personal, and all exits train on the mean of
    their cross-entropies. A method overrides what it does differently: *what travels* (the four lists of names), the
    *server half* (``plan``), the *client half* (``receive``, ``train`` or just ``loss``, ``deploy``). docs/methods.md
    shows how to add one. Settings are scalars, made with :func:`setting`: clients build the same object from them.

    Attributes
    ----------
    name
        As in ``method = "fedper"``, and of the table of the method's own settings.
    refuses
        Common settings that this method cannot take, with the reason.
    phases
        Number of phases of a round's training; they share the round's steps if ``equal_steps``.
    objective
        What a client minimises at every exit: an :class:`cafe_flwr.training.objectives.Objective`, or its name.
    prior, distill, equal_steps, classifier_start
        Common settings of all methods.
    """

    name: ClassVar[str]
    refuses: ClassVar[Mapping[str, str]] = {}
    phases: ClassVar[int] = 1

    objective: _ByName = _ByName()
    prior: bool = setting(False, "Add the log of the client's own class shares to its logits, in training and after.")
    distill: bool = setting(False, "Let the mean of a client's exits teach each of them (temperature 3).")
    equal_steps: bool = setting(
        True,
        "Methods with two phases a round share its steps between them; false: each phase takes all, as published.",
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
        """Names of :func:`settings_of` that the chosen objective does not use."""
        return all_flat_fields().keys() - flat_fields(type(self.objective)).keys()

    def extra_tensors(self, network: EarlyExitNetwork) -> dict[str, Tensor]:
        """Initial values of tensors a client has beside its network's."""
        return {}

    def shared_names(self, network: EarlyExitNetwork) -> list[str]:
        """Tensors that are averaged over clients, weighted by their examples."""
        return network.shared_names()

    def personal_names(self, network: EarlyExitNetwork) -> list[str]:
        """Tensors that stay on the client's disk from round to round."""
        return network.personal_names()

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """Tensors that each client sends without averaging."""
        return []

    def download_names(self, network: EarlyExitNetwork) -> list[str]:
        """Tensors that a client alone receives; they have the shapes of the client's tensors of these names."""
        return []

    def check(self, network: EarlyExitNetwork) -> None:
        """Raise ValueError if the method cannot run with this network."""

    def comparable(self, kind: ClientSpec) -> Hashable:
        """A key: clients learn from one another if it is equal; by default, if they have the same network."""
        return kind.name

    def uniform_weights(self, unequal: bool) -> bool:
        """Whether clients weigh the same in the average, and not by examples; ``unequal``: some hold only a part."""
        return False

    def plan(self, task: ServerRound) -> RoundPlan:
        """What the participants train and receive; by default they train all exits."""
        return RoundPlan(task.all_exits)

    def conclude(self, task: ServerRound, plan: RoundPlan, records: Mapping[int, ClientRecord]) -> Conclusion:
        """What the server keeps of a round's reports (``records``, by client); by default all of them, unchanged.

        ``task`` and ``plan`` are those of the planning: ``task.known`` is from before the round.
        """
        return Conclusion(records, task.pairs, plan)

    def receive(self, tensors: Tensors, download: Tensors, initial: Tensors, data: Split | None = None) -> Tensors:
        """The client's tensors at the start of a round.

        Parameters
        ----------
        tensors
            The averaged shared ones, and the personal ones of the client's last round.
        download
            What the server sent to this client alone; may be empty.
        initial
            Initial weights of the client's network.
        data
            Its training split; None to get a result that does not depend on it, which the server can work out.
        """
        return tensors

    def train(self, task: LocalTask) -> LocalResult:
        """One round of local training."""
        return LocalResult(task.run(lambda x, y: self.loss(task, x, y)))

    def loss(self, task: LocalTask, x: Tensor, y: Tensor) -> Tensor:
        """Loss of a batch; by default the mean over exits of the cross-entropy."""
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
        """Σ_k a_k CE(z_k, y) over all exits, or with another objective's terms instead of cross-entropies.

        a_k are ``weights``, by default the objective's (1/m for cross-entropy). ``distill`` adds self-distillation with
        the same weights. ``shift`` is what the method has added to the logits.
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
        """Loss of every exit, (m,): its cross-entropy, or that of another objective."""
        if task.objective_state is None:
            task.objective_state = self.objective.init(task.network, task.rng(f"objective {task.steps}"))
        return self.objective.losses(task.objective_state, (x, y), logits, exits=exits, shift=shift, teacher=teacher)

    def offset(self, data: Split, num_classes: int) -> Tensor | None:
        """What is added to the client's logits at every exit, in training and after; None if nothing."""
        return log_prior(class_counts(data.y, num_classes)) if self.prior else None

    def deploy(self, tensors: Tensors) -> Tensors:
        """The personal network, under the network's names, from all tensors of the client."""
        return tensors

    def finish(self, task: LocalTask) -> None:
        """Fine-tune after the last round."""

    def extra_rounds(self) -> int:
        """Rounds' worth of local steps that ``finish`` takes."""
        return 0


def check_equal_exits(network: EarlyExitNetwork, what: str, advice: str) -> None:
    """ValueError, with the advice, if the exits have different widths, since ``what`` compares exits."""
    widths = network.feature_widths
    if len(set(widths)) > 1:
        raise ValueError(
            f"{what} needs exits of one width, and this network's have {', '.join(map(str, widths))}: {advice}"
        )


def check_selection(network: EarlyExitNetwork, selection: str, key: str) -> None:
    """ValueError if students are to be ordered by cosines of classifiers of different widths; ``key``: what to set."""
    if selection in ("shallow-first", "deep-first"):
        what = f"selection = {selection!r} by the cosine of an exit's classifier and the last one's"
        check_equal_exits(network, what, f"set {key} to 'none' or 'random'")


def settings_of(method: Method) -> dict[str, Any]:
    """The method's settings by name, as they travel: its objective's under flat names, then its own."""
    own = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "objective"}
    return flat_settings(method.objective) | own


def phase(method: Method, number: int) -> tuple[int, int]:
    """The part of the round's steps that a phase takes: its share, or (0, 1), all of them, as published."""
    return (number, method.phases) if method.equal_steps else (0, 1)
