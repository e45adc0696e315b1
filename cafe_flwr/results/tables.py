"""A run's results as tables and lines of text, for the terminal and the report page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cafe_flwr.metrics.clients import worst_share
from cafe_flwr.results.run import Run, duration, fixed, number, numbers, percent, read_run, scaled

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("", "accuracy ± std over clients", "worst 10 % of them", "MACs (share)", "ECE")


def spread(run: Run) -> list[tuple[float, float, float]]:
    """Mean, standard deviation and worst tenth over clients: for exits 1..m, then for the mean over exits."""
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
    """The rounds that ``last_five`` averages: ``mean after rounds 96–100``; with gaps, ``after 5 of rounds …``."""
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
    """A row per kind of network with its size and accuracy; empty where all clients hold the same."""
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
    """Accuracy per kind of network, in one line; empty where all clients hold the same."""
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
    """The table for the terminal: a row per exit and one for their mean, with savings, bytes and time in the caption.

    Raises FileNotFoundError if the folder holds none of a run's files.
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
