"""Writes the files of a run's results folder, after every round and at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cafe_flwr.core.files import to_json, write_atomically
from cafe_flwr.metrics.exits import ExitMetrics
from cafe_flwr.results.history import History
from cafe_flwr.results.summary import summarise
from cafe_flwr.server.callbacks import RoundRecord, RunInfo
from cafe_flwr.server.checkpoints import Checkpoints, ServerState
from cafe_flwr.wire.evaluate import FinalReport
from cafe_flwr.wire.keys import PHASES


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
        self._history = History(folder)
        self._plan = resume_from.plan if resume_from else None
        self._run: RunInfo | None = None
        self._started = time.perf_counter()

    def on_start(self, run: RunInfo) -> None:
        """Drop what was written after the checkpoint that the run resumes from."""
        self._run = run
        self._started = time.perf_counter()
        if run.first_round == 1:
            self._history.begin()
        else:
            self._history.cut(run.first_round - 1)

    def on_round(self, record: RoundRecord, state: ServerState) -> None:
        """Write the round, then the checkpoint: a resumed run drops lines that have no checkpoint."""
        rows = [
            row
            for report in record.reports
            for phase in PHASES
            if record.evaluated
            for row in _rows(record.server_round, report.client, phase, getattr(report, phase), report.test_examples)
        ]
        self._history.add(rows, record.to_json())
        self.checkpoints.save(state)
        self._plan = state.plan

    def on_finish(self, reports: Sequence[FinalReport]) -> None:
        """Write the final evaluation and the summary."""
        assert self._run is not None
        self._history.add(
            [r for f in reports for r in _rows(self._run.num_rounds, f.client, "final", f.exits, f.test_examples)]
        )
        seconds = time.perf_counter() - self._started
        summary = summarise(self._asked, self._run, reports, self._history.read(), self._plan, seconds)
        write_atomically(self.folder / "summary.json", to_json(summary, indent=2))

    def close(self) -> bool:
        """Make ``clients.parquet``, also after a run that failed; return False if the run never started."""
        if self._run is None:
            return False
        import pandas as pd

        parquet = self.folder / "clients.parquet"
        write_atomically(parquet, pd.read_csv(self._history.rows).to_parquet(index=False))
        return True


def _rows(
    server_round: int, client: int, phase: str, exits: ExitMetrics, examples: int
) -> list[tuple[int, int, str, int, float, float, float, int]]:
    return [
        (server_round, client, phase, k + 1, exits.accuracy[k], exits.loss[k], exits.ece[k], examples)
        for k in range(len(exits.accuracy))
    ]
