"""The records of a run, read from its results folder, and the formats of their numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

FILES = {  # the files of a run, and what follows if one is missing
    "settings.json": "the settings are unknown",
    "rounds.jsonl": "nothing can be shown over rounds",
    "clients.parquet": "single clients are shown only as far as summary.json has them",
    "summary.json": "the run is not over or was stopped, and the figures are those of the last round on record",
}


def number(value: object) -> float:
    """``value`` as a float; NaN if it is absent, null or no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def numbers(values: object, length: int) -> list[float]:
    """Exactly ``length`` floats from a list in a JSON file, NaN for missing ones."""
    items = [number(value) for value in values] if isinstance(values, Sequence) else []
    return items[:length] + [math.nan] * (length - len(items))


def fixed(value: float) -> str:
    """A number with three decimals, a dash for NaN."""
    return f"{value:.3f}" if math.isfinite(value) else "–"


def percent(share: float) -> str:
    """A share as a whole percentage: 0.41 is ``41 %``."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else "–"


def scaled(value: float, unit: str = "") -> str:
    """A count with a decimal prefix: ``scaled(38_200, "B")`` is ``38.2 kB``."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip() if math.isfinite(value) else "–"


def duration(seconds: float) -> str:
    """Seconds in words: ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Run:
    """The records of one run; missing ones are derived from the others where possible."""

    settings: dict[str, Any]
    summary: dict[str, Any]  # of ``summary.json``; missing entries are derived from the other records
    rounds: list[dict[str, Any]]  # lines of ``rounds.jsonl`` in order, each round once (the last line about it)
    accuracy: pd.DataFrame  # last on record: a row per client, a column per exit 1..m
    notes: list[str]  # sentences on what is missing, unreadable or filled in
    evaluation: dict[str, Any] = field(default_factory=dict)  # only an evaluated run has one

    @property
    def num_exits(self) -> int:
        """Number of exits, m."""
        return len(self.accuracy.columns)

    def get(self, *keys: str) -> Any:
        """An entry of the summary, by a path of keys; None where it was not recorded."""
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def number(self, *keys: str) -> float:
        """An entry of the summary as a float; NaN where it was not recorded."""
        return number(self.get(*keys))

    def per_exit(self, *keys: str) -> list[float]:
        """The m numbers of an entry of the summary."""
        return numbers(self.get(*keys), self.num_exits)

    def over_rounds(self, key: str, width: int = 1) -> NDArray[np.float64]:
        """Array (rounds, width) of what the rounds recorded under ``key``: a number or a list of numbers."""
        import numpy as np

        values = [line.get(key) for line in self.rounds]
        rows = [numbers(value if isinstance(value, list) else [value], width) for value in values]
        return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def read_run(folder: Path) -> Run:
    """Read the records in a run's folder; FileNotFoundError if it holds none of a run's files."""
    import pandas as pd

    if not any((folder / name).is_file() for name in FILES):
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: expected results/<name>/ with {', '.join(FILES)}, found none of them"
        )
    readers = {".json": _read_json, ".jsonl": _read_lines, ".parquet": _read_table}
    records, notes = [], []
    for name, consequence in FILES.items():
        try:
            records.append(readers[Path(name).suffix](folder / name))
        except (OSError, ValueError, TypeError, KeyError) as error:
            problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            notes.append(f"{name} {problem}: {consequence}.")
            records.append({})
    settings, lines, measured, recorded = records
    evaluation = _read_evaluation(folder / "evaluation.json", notes)
    rounds = [lines[t] for t in sorted(lines)]

    of_clients = [row for row in recorded.get("clients") or [] if isinstance(row, Mapping) and "client" in row]
    known = {row["client"]: dict(enumerate(row.get("accuracy_per_exit") or [], start=1)) for row in of_clients}
    accuracy = measured.get("accuracy", pd.DataFrame.from_dict(known, orient="index", dtype=float))
    lists = [recorded.get("accuracy_per_exit"), recorded.get("macs_per_exit"), list(accuracy)]
    lists += [line.get("accuracy_per_exit") for line in rounds[-1:]]
    num_exits = max(1, *(len(values) for values in lists if isinstance(values, list)))
    accuracy = accuracy.reindex(columns=range(1, num_exits + 1))

    derived = _derive(rounds, accuracy, measured)
    derived |= {key: settings.get(key) for key in ("method", "dataset", "seed")} | {"name": folder.name}
    derived["num_rounds"] = derived["num_rounds"] or settings.get("num-server-rounds")
    missing = {key: value for key, value in derived.items() if recorded.get(key) in (None, [])}
    filled = {key: value for key, value in missing.items() if value is not None and value == value}  # NaN tells nothing
    if recorded and filled:
        notes.append(f"Not in summary.json, taken from the other records: {', '.join(filled)}.")
    return Run(settings, {**recorded, **filled, "clients": of_clients}, rounds, accuracy, notes, evaluation)


def _read_evaluation(path: Path, notes: list[str]) -> dict[str, Any]:
    """The evaluation, empty if there is none; a file that cannot be read is noted."""
    try:
        return _read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        notes.append(f"evaluation.json cannot be read ({error}): calibration and risk are not shown.")
        return {}


def _read_json(path: Path) -> dict[Any, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _read_lines(path: Path) -> dict[Any, Any]:
    """Lines by round; lines that cannot be read are skipped, since a killed run leaves half of one."""
    lines = {}
    for text in path.read_bytes().splitlines():  # of bytes, since texts may have ends of lines that JSON has not
        try:
            line = dict(json.loads(text))
            lines[int(line["round"])] = line
        except (ValueError, TypeError, KeyError):
            continue
    return lines


def _read_table(path: Path) -> dict[Any, Any]:
    """Accuracy and ECE, clients × exits, of the final evaluation or else of the last round's."""
    import pandas as pd

    table = pd.read_parquet(path)
    for phase in ("final", "before", "after"):
        rows = table[table["phase"] == phase]
        if len(rows):
            last = rows[rows["round"] == rows["round"].max()].groupby(["client", "exit"])
            return {key: last[key].mean().unstack() for key in ("accuracy", "ece") if key in table}
    return {}


def _derive(rounds: list[dict[str, Any]], accuracy: pd.DataFrame, measured: dict[str, Any]) -> dict[str, Any]:
    """Entries of the summary derived from the other records; None where they cannot be."""
    last = rounds[-1] if rounds else {}
    per_exit = accuracy.mean().tolist() if len(accuracy) else numbers(last.get("accuracy_per_exit"), accuracy.shape[1])
    seen = [value for value in per_exit if math.isfinite(value)]
    visits = sum(len(line.get("participants") or []) for line in rounds)
    phases = [line.get("seconds") for line in rounds]
    seconds = sum(number(phase.get("total")) if isinstance(phase, Mapping) else number(phase) for phase in phases)
    return {
        "num_rounds": last.get("num_rounds"),
        "num_clients": len(accuracy) or len(last.get("participants") or []) or None,
        "accuracy_per_exit": per_exit if seen else None,
        "accuracy": sum(seen) / len(seen) if seen else None,
        "accuracy_last_exit": per_exit[-1] if seen else None,
        "ece_per_exit": measured["ece"].mean().tolist() if "ece" in measured else None,
        **{
            f"bytes_{way}_per_client_round": sum(line.get(f"bytes_{way}") or 0 for line in rounds) / visits
            for way in (("up", "down") if visits else ())
        },
        "seconds": seconds if rounds and math.isfinite(seconds) else None,
    }
