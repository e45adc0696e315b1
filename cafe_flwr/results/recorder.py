"""What a run leaves behind: callbacks after every round, and the files of a results folder."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from cafe_flwr.core.log import logger
from cafe_flwr.core.older_settings import of_saved_run
from cafe_flwr.methods.base import RoundPlan
from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.personal.store import Checkpoints, ServerState, to_json, write_atomically
from cafe_flwr.results.summary import mean, mean_rows, summarise
from cafe_flwr.settings import Settings
from cafe_flwr.wire.capacity import Kind
from cafe_flwr.wire.messages import PHASES, ClientReport, FinalReport

COLUMNS = ("round", "client", "phase", "exit", "accuracy", "loss", "ece", "examples")

# Settings that may differ when a run is resumed: they do not change its numbers.
_FREE_ON_RESUME = {
    *("resume", "results-dir", "state-dir", "wait-seconds", "round-timeout", "round-retries", "min-available-nodes"),
}


@dataclass(frozen=True)
class RunInfo:
    """A run, when it starts.

    Attributes
    ----------
    run
        Its token.
    first_round, num_rounds
        The round it starts with, and T.
    clients
        Clients there are.
    num_exits, num_parameters, macs_per_exit
        Of the network; MACs are cumulative.
    kinds
        What each client holds that has been there; clients that come later are added.
    """

    run: str
    first_round: int
    num_rounds: int
    clients: Sequence[int]
    num_exits: int
    num_parameters: int
    macs_per_exit: Sequence[int]
    kinds: Mapping[int, Kind] = field(default_factory=dict)


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
        Active exits, and how much of whom is in whose mixture.
    reports
        Results of the clients, in their order.
    learning_rate
        Of this round.
    bytes_down, bytes_up
        Of all messages of the round.
    seconds
        ``total`` (wall clock), ``train`` and ``evaluate`` (sums over clients), ``server`` and ``other``.
    suspicious
        Clients whose influence on others was bounded, with the reason.
    failed_tries
        Tries of this round before the one that counts, each with the clients left out and the reasons.
    notes
        What nodes said of their clients' state, in words.
    names
        Names of the participants' nodes, where they have one.
    students
        Student exits that the participants hold.
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
    """What may be called at the start, after every round and at the end of a run."""

    def on_start(self, run: RunInfo) -> None:
        """Before the first round."""

    def on_round(self, record: RoundRecord, state: ServerState) -> None:
        """After a round, with the server's state."""

    def on_finish(self, reports: Sequence[FinalReport]) -> None:
        """After the last round, with the evaluation of every personal network."""


class Results(NamedTuple):
    """A results folder that is ready: its path, the state to resume from, and the lock that keeps others out."""

    folder: Path
    state: ServerState | None
    lock: IO[str]


def open_results(settings: Settings) -> Results:
    """Make the run's results folder ready, before the first round.

    An earlier run of the same name is not overwritten: it is moved aside to ``<name>.1``, ``<name>.2``, …
    With ``resume`` its folder is used, and its last checkpoint returned.

    Raises
    ------
    ValueError
        If the folder cannot be written, holds something else or a run that is still under way, or there is nothing to
        resume.
    """
    folder = settings.results
    run_config = settings.to_run_config()
    try:
        state = None
        if settings.resume:
            state = _resumable(folder, run_config)
        elif not is_bare(folder):
            _move_aside(folder)
        lock = _lock(folder)
        write_atomically(folder / "settings.json", to_json(run_config, indent=2))
    except OSError as error:
        raise ValueError(f"cannot write results to {folder}: {error}. Set results-dir to a folder you own") from error
    logger.info("Results: %s", folder)
    return Results(folder, state, lock)


def is_bare(folder: Path) -> bool:
    """Whether a folder is not there, is empty, or was left by a run that ended before it wrote its settings."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return all(name == ".lock" or name.startswith(".settings.json.") for name in names)


def _lock(folder: Path) -> IO[str]:
    """Hold the folder until the file is closed, or the process ends however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115 (open as long as the run)
    try:
        import fcntl
    except ImportError:  # not on Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another run is still writing to {folder}: stop it (`flwr ls`, `flwr stop`) or choose another name"
        ) from None
    return file


def _resumable(folder: Path, run_config: Mapping[str, Any]) -> ServerState:
    state = Checkpoints(folder / "checkpoint").load()
    if state is None:
        raise ValueError(f"resume = true, but there is no checkpoint in {folder / 'checkpoint'}")
    try:
        before = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot resume {folder}: its settings.json cannot be read ({error})") from error
    try:
        before = of_saved_run(before)
    except ValueError as error:
        raise ValueError(f"cannot resume {folder}: {error}") from None
    was = {**Settings.from_run_config({}).to_run_config(), **before}  # an earlier version knew fewer
    changed = [
        f"{key} was {was[key]!r}, now {value!r}"
        for key, value in run_config.items()
        if key not in _FREE_ON_RESUME and was[key] != value
    ]
    if changed:
        raise ValueError(f"cannot resume {folder} with other settings: {'; '.join(changed)}")
    return state


def _move_aside(folder: Path) -> None:
    if not (folder / "settings.json").exists():
        raise ValueError(f"{folder} exists and is not a run of cafe-flwr: choose another name or results-dir")
    _lock(folder).close()  # not while a run writes there
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    logger.info("The earlier run of this name is now %s", aside)


class Recorder:
    """Writes a run's files: a line and a checkpoint after every round, tables and report at the end.

    Parameters
    ----------
    folder
        Results folder, as :func:`open_results` made it.
    settings
        Of the run.
    resume_from
        State that the run goes on from.

    Notes
    -----
    ``rounds.jsonl`` and ``checkpoint/clients.csv`` only grow, and every line is on disk when the round ends;
    ``clients.parquet`` is made from the latter when the run ends, however it ends.
    """

    def __init__(self, folder: Path, settings: Settings, resume_from: ServerState | None = None) -> None:
        self.folder = folder
        self.settings = settings
        self.checkpoints = Checkpoints(folder / "checkpoint")
        self._rows = folder / "checkpoint" / "clients.csv"
        self._rounds = folder / "rounds.jsonl"
        self._plan = resume_from.plan if resume_from else None
        self._run: RunInfo | None = None
        self._started = time.perf_counter()

    def on_start(self, run: RunInfo) -> None:
        """Drop what was written after the checkpoint that the run resumes from."""
        self._run = run
        self._started = time.perf_counter()
        self._rows.parent.mkdir(parents=True, exist_ok=True)
        if run.first_round == 1:
            write_atomically(self._rounds, "")
            write_atomically(self._rows, ",".join(COLUMNS) + "\n")
            return
        lines = self._rounds.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["round"] < run.first_round]
        write_atomically(self._rounds, "".join(kept))
        header, *rows = self._rows.read_text().splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and _is_before(row, run.first_round)]
        write_atomically(self._rows, "".join([header, *kept]))

    def on_round(self, record: RoundRecord, state: ServerState) -> None:
        """Write the round, then the checkpoint: a resumed run drops lines that have no checkpoint."""
        rows = [
            row
            for report in record.reports
            for phase in PHASES
            if record.evaluated
            for row in _rows(record.server_round, report.client, phase, getattr(report, phase), report.test_examples)
        ]
        self._append_rows(rows)
        with open(self._rounds, "a") as file:
            file.write(to_json(record.to_json()))
            file.flush()
            os.fsync(file.fileno())
        self.checkpoints.save(state)
        self._plan = state.plan

    def on_finish(self, reports: Sequence[FinalReport]) -> None:
        """Write summary, tables and report."""
        assert self._run is not None
        self._append_rows(
            [r for f in reports for r in _rows(self._run.num_rounds, f.client, "final", f.exits, f.test_examples)]
        )
        rounds = [json.loads(line) for line in self._rounds.read_text().splitlines()]
        seconds = time.perf_counter() - self._started
        summary = summarise(self.settings, self._run, reports, rounds, self._plan, seconds)
        write_atomically(self.folder / "summary.json", to_json(summary, indent=2))

    def close(self) -> None:
        """Make ``clients.parquet`` and the report from what there is; also after a run that failed."""
        if self._run is None:
            return
        import pandas as pd

        from cafe_flwr.results.run import write_report

        parquet = self.folder / "clients.parquet"
        write_atomically(parquet, pd.read_csv(self._rows).to_parquet(index=False))
        try:
            logger.info("Report: %s", write_report(self.folder))
        except Exception:  # the run's own outcome, or error, counts more than its page
            logger.exception("No report could be written; try: cafe-flwr report %s", self.folder)

    def _append_rows(self, rows: Iterable[Sequence[Any]]) -> None:
        with open(self._rows, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
            file.flush()
            os.fsync(file.fileno())


def _by_client(words: Mapping[int, str]) -> dict[str, str]:
    """Words about clients, as JSON has them."""
    return {str(client): text for client, text in sorted(words.items())}


def _is_before(row: str, server_round: int) -> bool:
    """Whether a row of the long table belongs to an earlier round, and not to the evaluation at the end."""
    number, _, phase, *_ = row.split(",")
    return int(number) < server_round and phase != "final"


def _rows(
    server_round: int, client: int, phase: str, exits: ExitMetrics, examples: int
) -> list[tuple[int, int, str, int, float, float, float, int]]:
    return [
        (server_round, client, phase, k + 1, exits.accuracy[k], exits.loss[k], exits.ece[k], examples)
        for k in range(len(exits.accuracy))
    ]


def _teaching(plan: RoundPlan) -> tuple[float | None, float | None]:
    """Mean weight of what is a client's own in its mixture, and mean effective number of clients in it, 1/Σw²."""
    if plan.weights is None or not len(plan.weights):
        return None, None
    columns = {client: column for column, client in enumerate(plan.weight_columns)}
    own = [
        plan.weights[row, columns[client]] if client in columns else 0.0 for row, client in enumerate(plan.weight_rows)
    ]
    return float(np.mean(own)), float(np.mean(1.0 / (plan.weights**2).sum(axis=1)))
