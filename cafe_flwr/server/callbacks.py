"""Callbacks of a run, and the records they receive: at its start, after every round and at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cafe_flwr.core.numbers import mean, mean_rows
from cafe_flwr.methods.server import RoundPlan
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.directory import Directory
from cafe_flwr.wire.capacity import ClientSpec
from cafe_flwr.wire.evaluate import FinalReport
from cafe_flwr.wire.keys import PHASES
from cafe_flwr.wire.reports import ClientReport


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run when it starts.

    Attributes
    ----------
    run
        Token of the run.
    first_round, num_rounds
        The round it starts with, and T.
    clients
        Clients that are present.
    num_exits, num_parameters, macs_per_exit
        Of the network; MACs are cumulative.
    kinds
        What each client seen so far holds; clients that come later are added.
    """

    run: str
    first_round: int
    num_rounds: int
    clients: Sequence[int]
    num_exits: int
    num_parameters: int
    macs_per_exit: Sequence[int]
    kinds: Mapping[int, ClientSpec] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: Directory, state: ServerState, num_rounds: int) -> RunInfo:
        """The run that goes on from ``state`` with the clients present."""
        info, clients = directory.reference, sorted(directory.hosts)
        sizes = info.num_exits, info.num_parameters, directory.agreement.macs
        return cls(state.run, state.round + 1, num_rounds, clients, *sizes, directory.held)


@dataclass(frozen=True)
class RoundRecord:
    """A finished round.

    Attributes
    ----------
    server_round, num_rounds
        t and T.
    participants, left_out
        Clients asked; and those whose result was not used, with the reason.
    plan
        Active exits and mixture weights.
    reports
        Results in ascending order of clients.
    learning_rate, bytes_down, bytes_up
        Of this round; bytes of all its messages.
    seconds
        ``total`` (wall clock), ``train`` and ``evaluate`` (sums over clients), ``server`` and ``other``.
    suspicious
        Clients whose influence on others was bounded, with the reason.
    failed_tries
        Earlier tries of this round, each with the clients left out and the reasons.
    notes
        Remarks of nodes on their clients' state, by client.
    names
        Names of the participants' nodes that have one, by client.
    students
        Number of student exits that the participants hold.
    """

    server_round: int
    num_rounds: int
    participants: Sequence[int]
    left_out: Mapping[int, str]
    plan: RoundPlan
    reports: Sequence[ClientReport]
    learning_rate: float
    bytes_down: int
    bytes_up: int
    seconds: Mapping[str, float]
    suspicious: Mapping[int, str] = field(default_factory=dict)
    failed_tries: Sequence[Mapping[int, str]] = ()
    notes: Mapping[int, str] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    students: int = 0

    def accuracy_per_exit(self, phase: str = "before") -> list[float]:
        """Mean over clients, (m,), before or after local training."""
        return mean_rows(getattr(report, phase).accuracy for report in self.reports)

    @property
    def evaluated(self) -> bool:
        """Whether clients evaluated in this round."""
        return any(not math.isnan(a) for report in self.reports for a in report.before.accuracy)

    @property
    def active_exits(self) -> list[int]:
        """Number of clients whose student exit k trains, (m−1,)."""
        return [int(n) for n in self.plan.active.sum(axis=0)]

    def line(self) -> str:
        """The round in one line, for the terminal."""
        width = len(str(self.num_rounds))
        left_out = f" ({len(self.left_out)} left out)" if self.left_out else ""
        left_out += f" (try {len(self.failed_tries) + 1})" if self.failed_tries else ""
        before, after = (" ".join(f"{a:.3f}" for a in self.accuracy_per_exit(p)) for p in PHASES)
        accuracy = f"accuracy {before} → {after} · " if self.evaluated else ""
        return (
            f"[ROUND {self.server_round:{width}}/{self.num_rounds}] "
            f"{len(self.reports)} clients{left_out} · students {'/'.join(map(str, self.active_exits)) or '–'} · "
            f"{accuracy}{self.seconds['total']:.1f} s"
        )

    def to_json(self) -> dict[str, Any]:
        """The line of ``rounds.jsonl``."""
        own, effective = _teaching(self.plan)
        return {
            "round": self.server_round,
            "num_rounds": self.num_rounds,
            "participants": list(self.participants),
            "left_out": _by_client(self.left_out),
            "failed_tries": [_by_client(reasons) for reasons in self.failed_tries],
            "suspicious": _by_client(self.suspicious),
            "notes": _by_client(self.notes),
            "names": _by_client(self.names),
            "active_exits": self.active_exits,
            "students": self.students,
            "accuracy_per_exit": self.accuracy_per_exit("before"),
            "accuracy_per_exit_after": self.accuracy_per_exit("after"),
            "local_steps": mean(report.local_steps for report in self.reports),
            "train_loss": mean(report.train_loss for report in self.reports),
            "learning_rate": self.learning_rate,
            "similarity_per_exit": mean_rows(report.similarity for report in self.reports),
            "own_teacher_weight": own,
            "effective_teachers": effective,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": dict(self.seconds),
        }


class RoundCallback(Protocol):
    """Called at the start, after every round and at the end of a run."""

    def on_start(self, run: RunInfo) -> None:
        """Before the first round."""

    def on_round(self, record: RoundRecord, state: ServerState) -> None:
        """After a round, with the server's state."""

    def on_finish(self, reports: Sequence[FinalReport]) -> None:
        """After the last round, with the evaluation of every personal network."""


def _by_client(words: Mapping[int, str]) -> dict[str, str]:
    """Texts by client with string keys, as JSON needs them."""
    return {str(client): text for client, text in sorted(words.items())}


def _teaching(plan: RoundPlan) -> tuple[float | None, float | None]:
    """Mean weight of clients' own classifiers in their mixtures, and mean effective number of teachers, 1/Σw²."""
    if plan.weights is None or not len(plan.weights):
        return None, None
    columns = {client: column for column, client in enumerate(plan.weight_columns)}
    own = [
        plan.weights[row, columns[client]] if client in columns else 0.0 for row, client in enumerate(plan.weight_rows)
    ]
    return float(np.mean(own)), float(np.mean(1.0 / (plan.weights**2).sum(axis=1)))
