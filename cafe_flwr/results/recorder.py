"""Writes the files of a run's results folder, after every round and at the end."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.results.summary import summarise
from cafe_flwr.server.callbacks import RoundRecord, RunInfo
from cafe_flwr.server.checkpoints import Checkpoints, ServerState
from cafe_flwr.wire.evaluate import FinalReport
from cafe_flwr.wire.keys import PHASES

COLUMNS = ("round", "client", "phase", "exit", "accuracy", "loss", "ece", "examples")


class Recorder:
    """Writes a run's files: a line and a checkpoint after every round, tables and summary at the end.

    ``rounds.jsonl`` and ``checkpoint/clients.csv`` only grow, and every line is on disk when its round ends;
    ``clients.parquet`` is made from the latter when the run ends or fails.

    Parameters
    ----------
    folder
        Results folder from :func:`cafe_flwr.results.folder.open_results`; it has the run's name.
    settings
        Of the run, in kebab-case.
    resume_from
        State from which the run continues, if it does.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume_from: ServerState | None = None) -> None:
        self.folder = folder
        self._asked = {**settings, "name": folder.name}
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
        """Write the final evaluation and the summary."""
        assert self._run is not None
        self._append_rows(
            [r for f in reports for r in _rows(self._run.num_rounds, f.client, "final", f.exits, f.test_examples)]
        )
        rounds = [json.loads(line) for line in self._rounds.read_text().splitlines()]
        seconds = time.perf_counter() - self._started
        summary = summarise(self._asked, self._run, reports, rounds, self._plan, seconds)
        write_atomically(self.folder / "summary.json", to_json(summary, indent=2))

    def close(self) -> bool:
        """Make ``clients.parquet``, also after a run that failed; return False if the run never started."""
        if self._run is None:
            return False
        import pandas as pd

        parquet = self.folder / "clients.parquet"
        write_atomically(parquet, pd.read_csv(self._rows).to_parquet(index=False))
        return True

    def _append_rows(self, rows: Iterable[Sequence[Any]]) -> None:
        with open(self._rows, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
            file.flush()
            os.fsync(file.fileno())


def _is_before(row: str, server_round: int) -> bool:
    """Whether a row of the long table belongs to an earlier round, and not to the final evaluation."""
    number, _, phase, *_ = row.split(",")
    return int(number) < server_round and phase != "final"


def _rows(
    server_round: int, client: int, phase: str, exits: ExitMetrics, examples: int
) -> list[tuple[int, int, str, int, float, float, float, int]]:
    return [
        (server_round, client, phase, k + 1, exits.accuracy[k], exits.loss[k], exits.ece[k], examples)
        for k in range(len(exits.accuracy))
    ]
