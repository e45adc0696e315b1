"""What a run did, for people: the table at the end in the terminal and one self-contained HTML page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
    from rich.table import Table

FILES = {  # what a run writes, and what it means when a file is not there
    "settings.json": "the settings are unknown",
    "rounds.jsonl": "nothing can be shown over rounds",
    "clients.parquet": "single clients are shown only as far as summary.json has them",
    "summary.json": "the run is not over or was stopped, and the figures are those of the last round on record",
}
COLUMNS = ("", "accuracy ± std over clients", "worst 10 % of them", "MACs (share)", "ECE")


def number(value: object) -> float:
    """``value`` as a float; NaN for what is absent, null or no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def numbers(values: object, length: int) -> list[float]:
    """Exactly ``length`` floats from a list of a JSON file, NaN for what is not there."""
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
    """Seconds as a person says them: ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Run:
    """The records of one run, completed where one record follows from another.

    Attributes
    ----------
    settings, summary
        The two JSON files; what ``summary.json`` lacks is filled in from the other records as far as they go.
    rounds
        The lines of ``rounds.jsonl`` in the order of the rounds, each round once (the last line about it).
    accuracy
        Last accuracy on record: a row per client, a column per exit 1..m.
    notes
        Sentences on what is missing, unreadable or filled in.
    evaluation
        Contents of ``evaluation.json``, which only an evaluated run has; empty without it.
    """

    settings: dict[str, Any]
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    accuracy: pd.DataFrame
    notes: list[str]
    evaluation: dict[str, Any] = field(default_factory=dict)

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
    """Read what a run left in its folder.

    Raises
    ------
    FileNotFoundError
        If the folder holds none of a run's files.
    """
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
    evaluation: dict[str, Any] = {}
    try:
        evaluation = _read_json(folder / "evaluation.json")
    except FileNotFoundError:
        pass  # a run need not be evaluated
    except (OSError, ValueError, TypeError) as error:
        notes.append(f"evaluation.json cannot be read ({error}): calibration and risk are not shown.")
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


def _read_json(path: Path) -> dict[Any, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _read_lines(path: Path) -> dict[Any, Any]:
    """Lines by round; a line that cannot be read (a killed run leaves half of one) counts as not written."""
    lines = {}
    for text in path.read_text(encoding="utf-8").splitlines():
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
    """What a summary would say, from the other records; None for what they do not tell."""
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


def spread(run: Run) -> list[tuple[float, float, float]]:
    """Mean, standard deviation and worst tenth over clients: for exits 1..m, then for the mean over exits."""
    from cafe_flwr.metrics.clients import worst_share

    columns = [*(run.accuracy[k] for k in run.accuracy), run.accuracy.mean(axis=1)]
    means = [*run.per_exit("accuracy_per_exit"), run.number("accuracy")]
    rows = [(mean, float(c.std(ddof=0)), worst_share(c)) for mean, c in zip(means, columns, strict=True)]
    std, worst = run.number("accuracy_std_over_clients"), run.number("accuracy_worst_tenth")
    if math.isfinite(std) and math.isfinite(worst):
        rows[-1] = (means[-1], std, worst)
    return rows


def table_rows(run: Run) -> list[list[str]]:
    """Cells of the final table, in the order of ``COLUMNS``: a row per exit, then the mean over exits."""
    macs, ece = run.per_exit("macs_per_exit"), run.per_exit("ece_per_exit")
    names = [*(f"exit {k}" for k in range(1, run.num_exits + 1)), "mean over exits"]
    cost = [*(f"{scaled(c)} ({percent(c / macs[-1])})" if math.isfinite(c) and macs[-1] else "–" for c in macs), ""]
    errors = [*ece, sum(ece) / len(ece)]
    return [
        [name, f"{fixed(mean)} ± {fixed(std)}", fixed(worst), c, fixed(error)]
        for name, (mean, std, worst), c, error in zip(names, spread(run), cost, errors, strict=True)
    ]


def last_five_words(run: Run) -> str:
    """Over which rounds ``last_five`` is a mean: ``mean after rounds 96–100``; with gaps, ``after 5 of rounds …``."""
    after = [round(t) for t in numbers(run.get("last_five", "rounds"), 5) if math.isfinite(t)]
    if len(after) < 2:
        return "after the last round"
    gaps = after[-1] - after[0] >= len(after)
    return f"mean after {f'{len(after)} of ' if gaps else ''}rounds {after[0]}–{after[-1]}"


def last_five_line(run: Run) -> str:
    """The mean over exits, averaged over the last rounds, in one line; empty where it was not recorded."""
    accuracy = run.number("last_five", "accuracy")
    return f"mean over exits, {last_five_words(run)}: {fixed(accuracy)}" if math.isfinite(accuracy) else ""


def kind_rows(run: Run) -> list[dict[str, str]]:
    """What clients hold that are not alike, and how good they are; empty where all are alike."""
    rows = []
    for kind in run.get("kinds") or []:
        accuracy = numbers(kind.get("accuracy_per_exit"), run.num_exits)
        own = number(kind.get("weight_of_own_kind"))
        rows.append(
            {
                "clients that hold": str(kind.get("name")),
                "clients": str(len(kind.get("clients") or [])),
                "parameters": scaled(number(kind.get("num_parameters"))),
                "MACs": scaled(numbers(kind.get("macs_per_exit"), kind.get("num_exits", 1))[-1]),
                "values sent": scaled(number(kind.get("bytes_up_per_client_round")), "B"),
                "accuracy, mean over exits": fixed(number(kind.get("accuracy"))),
                **{f"exit {k}": fixed(value) for k, value in enumerate(accuracy, start=1)},
                "weight of the same kind": percent(own),
            }
        )
    return rows


def kinds_line(run: Run) -> str:
    """Accuracy by what clients hold, in one line; empty where all are alike."""
    kinds = run.get("kinds") or []
    each = (f"{k.get('name')} {fixed(number(k.get('accuracy')))} ({len(k.get('clients') or [])})" for k in kinds)
    return f"mean over exits, by what clients hold (how many): {', '.join(each)}" if kinds else ""


def dynamic_line(run: Run) -> str:
    """What leaving early saves, in one line; empty where it was not recorded."""
    accuracy, full, saved = (run.number("dynamic", key) for key in ("accuracy", "accuracy_full", "macs_reduction"))
    threshold = run.number("dynamic", "threshold")
    if not math.isfinite(accuracy):
        return ""
    if not math.isfinite(threshold):
        return f"no threshold keeps the accuracy of the full network: every input runs all exits ({fixed(accuracy)})"
    cost = f"{percent(abs(saved))} {'more' if saved < 0 else 'fewer'} MACs at accuracy {fixed(accuracy)}"
    line = f"leaving at confidence ≥ {threshold:.3g}: {cost} (all exits run: {fixed(full)})"
    less = run.get("dynamic", "one_point_less")
    if not isinstance(less, Mapping):
        return line
    saved, accuracy = number(less.get("macs_reduction")), number(less.get("accuracy"))
    return f"{line}; with one point less allowed: {percent(saved)} fewer at {fixed(accuracy)}"


def bytes_line(run: Run) -> str:
    """What a client sends and receives in a round, in one line; empty where it was not recorded."""
    up, down, fedavg = (run.number(f"bytes_{way}_per_client_round") for way in ("up", "down", "fedavg"))
    if not math.isfinite(up + down):
        return ""
    line = f"{scaled(up, 'B')} up and {scaled(down, 'B')} down per client and round"
    return f"{line} (FedAvg of the whole network: {scaled(fedavg, 'B')} each way)" if math.isfinite(fedavg) else line


def final_table(folder: Path) -> Table:
    """What a person sees at the end of a run in the terminal.

    A row per exit and one for their mean; the caption says what leaving early saves, what travelled, how long it took
    and what is missing.

    Raises
    ------
    FileNotFoundError
        If the folder holds none of a run's files.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    run = read_run(Path(folder))
    seconds = run.number("seconds")
    lines = [
        kinds_line(run),
        last_five_line(run),
        dynamic_line(run),
        bytes_line(run),
        duration(seconds) if math.isfinite(seconds) else "",
        *run.notes,
    ]
    table = Table(
        title=Text(f"{run.get('name')}: accuracy on the clients' test data"),
        caption=Text("\n".join(filter(None, lines))),
        box=box.SIMPLE_HEAD,
        caption_justify="left",
    )
    for column in COLUMNS:
        table.add_column(
            column, justify="right" if column else "left", min_width=15 if column == "MACs (share)" else None
        )
    for cells in table_rows(run):
        table.add_row(*cells, style="" if cells[0].startswith("exit") else "bold")
    return table


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run and return its path: one page, nothing loaded from elsewhere.

    The page is written from what is there and says what is missing; a page that is there already is replaced at once.

    Raises
    ------
    FileNotFoundError
        If the folder holds none of a run's files.
    """
    from cafe_flwr.results.page import render

    page = render(read_run(Path(folder)))
    path = Path(folder) / "report.html"
    temporary = path.with_name(f".report-{os.getpid()}.html")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
