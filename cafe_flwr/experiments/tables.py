"""A comparison as tables: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafe_flwr.core.files import write_atomically
from cafe_flwr.experiments.comparison import EQUAL_MACS, Comparison, ConditionTable, RowResult
from cafe_flwr.experiments.contents import settings_words, words
from cafe_flwr.experiments.statistics import Statistic, statistic
from cafe_flwr.results.run import scaled

if TYPE_CHECKING:
    from rich.table import Table

BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"


def share(value: Statistic, spread: bool = True) -> str:
    """Per cent with one decimal: ``65.3 ± 3.7``; a dash for NaN."""
    if math.isnan(value.mean):
        return "–"
    return f"{100 * value.mean:.1f}" + (f" ± {100 * value.std:.1f}" if spread and math.isfinite(value.std) else "")


def points(value: Statistic) -> str:
    """A difference in percentage points with its standard deviation: ``+1.3 ± 0.4``."""
    if math.isnan(value.mean):
        return "–"
    return f"{100 * value.mean:+.1f}".replace("-", "−") + (
        f" ± {100 * value.std:.1f}" if math.isfinite(value.std) else ""
    )


def equal_macs(row: RowResult, spread: bool = True) -> str:
    """MACs at equal accuracy in per cent, over the seeds that reach it; with their number if not all do."""
    value, seeds = row.of(EQUAL_MACS), sum(EQUAL_MACS in run.figures for run in row.runs.values())
    if not value.seeds:
        return "never" if seeds else "–"
    text = share(value, spread)
    return text if value.seeds == seeds else f"{text} ({value.seeds}/{seeds})"


def row_name(row: RowResult) -> str:
    """The label, with the number of seeds if some are missing."""
    seeds = len(row.runs) + len(row.missing)
    return row.label if not row.missing or not row.runs else f"{row.label} ({len(row.runs)} of {seeds} seeds)"


def notes(comparison: Comparison, table: ConditionTable) -> list[str]:
    """Sentences below a table: budget, checks, how MACs are compared, trials, missing runs."""
    experiment = comparison.experiment
    lines = ["SMOKE RUN: it shows that everything runs; its figures mean nothing"] if experiment.is_smoke else []
    lines += [f"budget: {table.budget}", *table.fairness]
    if table.baseline:
        accuracy = share(statistic(run.full_accuracy for run in table.row(table.baseline).runs.values()), spread=False)
        lines.append(
            "MACs at equal accuracy: % of the full network's MACs at which a row is as accurate as the last exit of "
            f"the best baseline in published form, {table.baseline} ({accuracy} % of all test examples), seed by seed"
        )
    else:
        lines.append("MACs at equal accuracy: no baseline in published form has finished")
    lines.append(
        "bytes: of a client and round, all clients on one node, where shared tensors travel once for all of them"
    )
    if len(experiment.seeds) == 1:
        lines.append("one seed: no spread can be given, and differences of a few points may be chance")
    else:
        lines.append(f"± is the standard deviation over {len(experiment.seeds)} seeds")
    if experiment.sweep:
        lines += _sweep_notes(comparison, table)
    for row in table.rows:
        for reason in dict.fromkeys(row.missing.values()):
            seeds = ", ".join(str(seed) for seed, why in row.missing.items() if why == reason)
            lines.append(f"{row.label}, seed {seeds}: {'' if reason.startswith('no') else 'failed: '}{reason}")
    return lines


def _sweep_notes(comparison: Comparison, table: ConditionTable) -> list[str]:
    assert comparison.experiment.sweep is not None
    seeds = ", ".join(map(str, comparison.experiment.sweep.seeds))
    picked = "; ".join(f"{row.label}: {settings_words(row.chosen)}" for row in table.rows if row.chosen)
    trials = max((row.trials for row in table.rows), default=0)
    lines = [f"settings chosen on validation data, from {trials} trials a row (seeds {seeds}): {picked or 'none yet'}"]
    for sweep in comparison.sweeps:
        if sweep.condition == table.condition:
            lines += [f"{sweep.row}, a trial failed: {reason}" for reason in sweep.failures]
    return lines


def failure_of(row: RowResult) -> str:
    """Why a row has no figures; empty if it has."""
    return "" if row.runs or not row.missing else next(iter(row.missing.values())).partition(" (log: ")[0]


def terminal_table(comparison: Comparison, table: ConditionTable) -> Table:
    """The main columns, for a terminal 120 characters wide; the files have all of them, with their spread."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    exits = [*range(1, table.exits + 1)] if table.exits <= 4 else [1, table.exits]
    title = ": ".join(filter(None, [comparison.title, words(table.condition)]))
    grid = Table(
        title=Text(f"{title} (accuracies in %, last round)"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    grid.add_column("", min_width=15, overflow="fold")
    heads = ["mean\nover exits", *(f"exit\n{k}" for k in exits), "en-\nsemble", "worst\n10 %", "after\ntraining"]
    heads += ["area", "MACs at\nequal acc.", "kB per\nround", "s"]
    heads += ["difference\nto " + textwrap.fill(table.reference, 11)]
    for head in heads:
        grid.add_column(head, justify="right", no_wrap=True)
    names = [f"accuracy_exit_{k}" for k in exits]
    names += ["accuracy_ensemble", "accuracy_worst_tenth", "accuracy_after_training", "accuracy_macs_area"]
    for row in table.rows:
        if failure := failure_of(row):
            grid.add_row(Text(row.label), Text("not run") if failure.startswith("no") else Text("failed", style="red"))
            continue
        cells = [row_name(row), share(row.of("accuracy")), *(share(row.of(name), spread=False) for name in names)]
        cells += [equal_macs(row, spread=False), f"{row.of('bytes_per_client_round').mean / 1e3:.1f}"]
        cells += [f"{row.of('seconds').mean:.0f}", difference_cell(table, row)]
        grid.add_row(*map(Text, cells), style="bold" if row.label == table.reference else "")
    return grid


def difference_cell(table: ConditionTable, row: RowResult) -> str:
    """The paired difference, or ``reference`` for the reference itself."""
    return "reference" if row.label == table.reference else points(table.difference(row))


def markdown_rows(comparison: Comparison, table: ConditionTable) -> list[list[str]]:
    """All columns of a table as text, for Markdown and the page: the header, then a list per row."""
    exits = range(1, table.exits + 1)
    head = ["method", "mean over exits", *(f"exit {k}" for k in exits), "ensemble of exits", "worst 10 % of clients"]
    adapted = any(math.isfinite(row.of("accuracy_adapted").mean) for row in table.rows)
    five = comparison.experiment.settings.get("federation.evaluate-every") == 1  # else they are no five rounds in a row
    head += ["last five rounds"] if five else []
    head += ["after local training", *(["log-prior re-estimated"] if adapted else [])]
    head += ["area under accuracy–MACs", "MACs at equal accuracy", "bytes up + down"]
    head += ["seconds", "local steps", "trials", f"difference to {table.reference} ± std (std. error)"]
    rows = [head]
    names = ["accuracy", *(f"accuracy_exit_{k}" for k in exits), "accuracy_ensemble", "accuracy_worst_tenth"]
    names += ["accuracy_last_five"] if five else []
    names += ["accuracy_after_training", *(["accuracy_adapted"] if adapted else []), "accuracy_macs_area"]
    for row in table.rows:
        if failure := failure_of(row):
            rows.append([row.label, failure, *[""] * (len(head) - 2)])
            continue
        up, down = (row.of(f"bytes_{way}_per_client_round").mean for way in ("up", "down"))
        seconds = row.of("seconds")
        gap = table.difference(row)
        error = f" ({100 * gap.error:.1f})" if math.isfinite(gap.error) and row.label != table.reference else ""
        cells = [row_name(row), *(share(row.of(name)) for name in names), equal_macs(row)]
        cells += [f"{scaled(up, 'B')} + {scaled(down, 'B')}"]
        cells += [f"{seconds.mean:.0f}" + (f" ± {seconds.std:.0f}" if math.isfinite(seconds.std) else "")]
        cells += [f"{row.of('local_steps_per_client').mean:g}", str(row.trials), difference_cell(table, row) + error]
        rows.append(cells)
    return rows


def markdown(comparison: Comparison) -> str:
    """All tables with their notes."""
    parts = []
    for table in comparison.tables:
        if table.condition:
            parts.append(f"**{words(table.condition)}**")
        head, *rows = [[cell.replace("|", "\\|") for cell in cells] for cells in markdown_rows(comparison, table)]
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
        parts.append(
            "\n".join(f"- {line}" for line in ["accuracies in %, of the last round", *notes(comparison, table)])
        )
    return "\n\n".join(parts) + "\n"


def between_markers(path: Path) -> tuple[str, str]:
    """The text before and after the place for the tables in a Markdown file, markers included.

    Raises ValueError if the file cannot be read, or does not have the two markers once each and in order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be updated: {error}") from None
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} should have the lines '{BEGIN}' and '{END}' once each, in this order")
    return text[: text.index(BEGIN)] + BEGIN, text[text.index(END) :]


def update_markdown(path: Path, comparison: Comparison) -> None:
    """Put the tables between the markers of a Markdown file; raises as :func:`between_markers`."""
    before, after = between_markers(path)
    write_atomically(path, f"{before}\n\n{markdown(comparison)}\n{after}")


def figure_names(comparison: Comparison) -> list[str]:
    """Names of all figures that a run has, in order."""
    runs = (run for table in comparison.tables for row in table.rows for run in row.runs.values())
    return list(dict.fromkeys(name for run in runs for name in run.figures))


def run_lines(comparison: Comparison) -> list[dict[str, Any]]:
    """A line per run; figures are shares, bytes and seconds; ``difference`` is of ``accuracy``."""
    lines: list[dict[str, Any]] = []
    for table in comparison.tables:
        reference = table.row(table.reference).by_seed("accuracy")
        for row in table.rows:
            for seed in comparison.experiment.seeds:
                line = {**dict(table.condition), "row": row.label, "method": row.method, "seed": seed}
                run = row.runs.get(seed)
                line["state"] = "finished" if run else row.missing[seed]
                line |= {name: run.figures.get(name, math.nan) if run else "" for name in figure_names(comparison)}
                if run and seed in reference:
                    line[f"difference to {table.reference}"] = run.figures["accuracy"] - reference[seed]
                lines.append(line)
    return lines


def table_lines(comparison: Comparison) -> list[dict[str, Any]]:
    """A line per row and condition: mean and standard deviation of all figures, and differences to the reference."""
    lines: list[dict[str, Any]] = []
    for table in comparison.tables:
        for row in table.rows:
            line: dict[str, Any] = {**dict(table.condition), "row": row.label, "method": row.method}
            line |= {"seeds": len(row.runs), "trials": row.trials, "chosen": settings_words(row.chosen)}
            line |= {"reference": table.reference, "baseline": table.baseline or ""}
            for name in figure_names(comparison):
                value = row.of(name)
                line |= {f"{name}_mean": value.mean, f"{name}_std": value.std}
                if name == EQUAL_MACS:
                    line[f"{name}_seeds"] = value.seeds
                if name.startswith("accuracy"):
                    gap = table.difference(row, name)
                    line |= {f"{name}_difference_mean": gap.mean, f"{name}_difference_std": gap.std}
                    line |= {f"{name}_difference_error": gap.error}
            lines.append(line)
    return lines


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Text of a CSV file; NaN is an empty field."""
    import pandas as pd

    return pd.DataFrame(lines, dtype=object).to_csv(index=False, lineterminator="\n")
