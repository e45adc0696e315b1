"""The page of a comparison: bars with error bars, paired differences and accuracy–MACs curves beside the tables."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe_flwr.experiments.comparison import Comparison, ConditionTable, RowResult
from cafe_flwr.experiments.file import settings_words, words
from cafe_flwr.experiments.tables import markdown_rows, notes, points, share
from cafe_flwr.results.figures import INK, LINE, MARKS, MUTED, canvas, colour, svg
from cafe_flwr.results.page import CSS, GLOSSARY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = ("#0f6ab4", "#c2570c", "#2e7d32", "#8e3b8a", "#b3261e", "#00838f", "#7a6a00", "#5d4037")
DARK = ("#6db3f2", "#f2a05c", "#7fd087", "#d79bd3", "#f28b82", "#5fd0dc", "#d6c64a", "#c8a99a")
STROKES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))  # where colours look alike

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ title }} – comparison</title>
<style>{{ css }}
:root { {% for c in light %}--exit-{{ loop.index }}: {{ c }}; {% endfor %}}
@media screen and (prefers-color-scheme: dark) { :root { {% for c in dark -%}
--exit-{{ loop.index }}: {{ c }}; {% endfor %}} }
.reference td { font-weight: 600 }
.rows td:first-child { white-space: normal; min-width: 8rem; max-width: 14rem }
pre { overflow-x: auto; background: var(--panel); padding: .8rem 1rem; font-size: .84rem }
</style></head><body><main>
<p class="quiet">Comparison · cafe-flwr</p>
<h1>{{ title }}</h1>
<p class="lede">{{ lede }}</p>
{% for section in sections %}<section><h2>{{ section.title }}</h2>
<div class="scroll"><table class="rows"><tr>{% for cell in section.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr{% if row[0] == section.reference %} class="reference"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<div class="notes"><p>Accuracies in %, of the last round, on the clients' own test data.</p>
{% for note in section.notes %}<p>{{ note }}</p>{% endfor %}</div>
<h3>&nbsp;</h3><div class="pair">{% for figure in section.figures %}
<figure><h3>{{ figure.title }}</h3>{{ figure.svg }}<figcaption>{{ figure.caption }}</figcaption></figure>{% endfor %}
</div></section>
{% endfor %}
{% if sweeps %}<h2>How settings were chosen</h2>
<p>{{ sweep_words }}</p><div class="scroll tall"><table class="text">
<tr><th>row</th><th>condition</th><th>trial</th><th>validation accuracy in %</th><th></th></tr>
{% for cells in sweeps %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
<h2>The experiment</h2><pre>{{ yaml }}</pre>
<h2>Words</h2><dl>{% for word, meaning in glossary.items() %}<dt>{{ word }}</dt><dd>{{ meaning }}</dd>{% endfor %}</dl>
</main></body></html>
"""

WORDS = {
    "row": "A method with its settings, run once with every seed.",
    "mean over exits": "Accuracy averaged over the network's exits, then over clients.",
    "last five rounds": "The mean over exits after each of the last five rounds, averaged.",
    "ensemble of exits": "Accuracy of the averaged class probabilities of all exits.",
    "area under accuracy–MACs": "Mean accuracy over MACs budgets, from the cheapest answer to the full network.",
    "difference": "Row minus reference, seed by seed: positive where the row is better. Its ± is the standard "
    "deviation of these differences, in brackets the standard error of their mean.",
}


def row_colours(table: ConditionTable) -> dict[str, str]:
    """Colours by label, the same in all figures: for the best rows and the reference; the others are grey."""
    chosen = [row.label for row in table.rows if row.runs]
    chosen = [table.reference, *(label for label in chosen if label != table.reference)][: len(LIGHT)]
    colours = {label: colour(k) for k, label in enumerate(chosen, start=1)}
    return {row.label: colours.get(row.label, MUTED) for row in table.rows}


def _plain(label: str, width: int = 18) -> str:
    """A label for a figure: broken into lines, and no formula whatever is in it."""
    return textwrap.fill(label, width).replace("$", r"\$")


def _row_axis(rows: list[RowResult]) -> tuple[Figure, Axes]:
    """Axes with a line per row, the best on top."""
    height = 0.55 + sum(0.3 if len(row.label) <= 18 else 0.36 for row in rows)
    figure, (axis,) = canvas(height)
    axis.grid(visible=False)
    axis.grid(axis="x", color=LINE, linewidth=0.8)
    axis.spines["bottom"].set_visible(False)
    axis.set_yticks(range(len(rows)), [_plain(row.label) for row in rows], fontsize=8.5, color=INK)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    return figure, axis


def draw_accuracy(table: ConditionTable) -> tuple[Figure, str] | None:
    """Mean accuracy over exits with its spread over seeds, and every exit."""
    rows = [row for row in table.rows if row.runs]
    if not rows:
        return None
    figure, axis = _row_axis(rows)
    colours, place = row_colours(table), np.arange(len(rows))
    values = [row.of("accuracy") for row in rows]
    axis.barh(place, [100 * v.mean for v in values], height=0.6, color=[colours[row.label] for row in rows], alpha=0.55)
    for k in range(1, table.exits + 1):
        means = [100 * row.of(f"accuracy_exit_{k}").mean for row in rows]
        axis.scatter(means, place, s=16, marker=[*MARKS][(k - 1) % 5], facecolor="none", edgecolor=MUTED, lw=0.9)
    ends = [100 * (v.mean + (0 if math.isnan(v.std) else v.std)) for v in values]
    for y, v in zip(place, values, strict=True):
        if math.isfinite(v.std):
            axis.errorbar(100 * v.mean, y, xerr=100 * v.std, color=INK, lw=1.3, capsize=3)
    most = max([*ends, *(100 * row.of(f"accuracy_exit_{k}").mean for row in rows for k in range(1, table.exits + 1))])
    for y, v in zip(place, values, strict=True):
        axis.annotate(share(v, spread=False), (1.04 * most, y), va="center", fontsize=8.5, color=INK)
    axis.set_xlim(0, 1.2 * most)
    axis.set_xlabel("accuracy in %, mean over exits and clients")
    marks = ", ".join(f"{[*MARKS.values()][(k - 1) % 5]} exit {k}" for k in range(1, table.exits + 1))
    return figure, f"Bars: mean over seeds, with ± one standard deviation over seeds; marks: {marks}."


def draw_differences(table: ConditionTable) -> tuple[Figure, str] | None:
    """Paired differences to the reference, every seed and their spread."""
    rows = [row for row in table.rows if row.runs and row.label != table.reference and table.difference(row).seeds]
    if not rows:
        return None
    figure, axis = _row_axis(rows)
    colours, reference = row_colours(table), table.row(table.reference).by_seed("accuracy")
    axis.axvline(0, color=INK, lw=1)
    for y, row in enumerate(rows):
        gap = table.difference(row)
        seeds = [100 * (a - reference[seed]) for seed, a in row.by_seed("accuracy").items() if seed in reference]
        axis.scatter(seeds, [y] * len(seeds), s=14, facecolor="none", edgecolor=MUTED, lw=0.9, zorder=3)
        spread = 100 * gap.std if math.isfinite(gap.std) else None
        axis.errorbar(100 * gap.mean, y, xerr=spread, fmt="o", ms=5, color=colours[row.label], capsize=3, lw=1.5)
        axis.annotate(points(gap), (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=INK)
    axis.set_xlabel("points of accuracy, mean over exits")
    text = (
        "Row minus reference with the same seed: rings are seeds, the dot their mean ± one standard deviation. Right "
    )
    return figure, f"{text}of the line: better than {table.reference}."


def draw_curves(table: ConditionTable) -> tuple[Figure, str] | None:
    """Accuracy against MACs of every row, mean over seeds."""
    curves = {row.label: curve for row in table.rows if (curve := mean_curve(row)) is not None}
    if not curves:
        return None
    colours = row_colours(table)
    coloured = [label for label in curves if colours[label] != MUTED]
    figure, (axis,) = canvas(3.1 + 0.17 * math.ceil(len(coloured) / 2))
    for label, (accuracy, macs) in reversed(curves.items()):
        if label in coloured:
            stroke = STROKES[coloured.index(label) % len(STROKES)]
            axis.plot(100 * macs, 100 * accuracy, color=colours[label], lw=1.8, ls=stroke, label=_plain(label, 26))
        else:
            axis.plot(100 * macs, 100 * accuracy, color=LINE, lw=1.2, zorder=1)
    axis.set(xlabel="MACs per input, % of running all exits", ylabel="accuracy in %")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=INK
    )
    grey = [label for label in curves if label not in coloured]
    text = (
        "Every input leaves at the first exit that is confident enough; a line follows the threshold, mean over seeds. "
    )
    return figure, text + "Up and left is better." + (f" Grey: {', '.join(grey)}." if grey else "")


def mean_curve(row: RowResult) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Accuracy and share of MACs by threshold, mean over the seeds; None where there is no curve."""
    curves = [run.curve for run in row.runs.values() if run.curve[0]]
    if not curves or len({len(accuracy) for accuracy, _ in curves}) > 1:
        return None
    accuracy, macs = np.mean([c[0] for c in curves], axis=0), np.mean([c[1] for c in curves], axis=0)
    return accuracy, macs


FIGURES = {
    "Accuracy, mean over exits": draw_accuracy,
    "Difference to the reference": draw_differences,
    "Accuracy against cost": draw_curves,
}


def lede(comparison: Comparison) -> str:
    """The comparison in a few sentences."""
    experiment = comparison.experiment
    seeds = len(experiment.seeds)
    text = f"{len(experiment.rows)} rows, {'one seed' if seeds == 1 else f'{seeds} seeds'} each"
    text += f", on {experiment.settings['dataset']}" if "dataset" in experiment.settings else ""
    text += f", {len(comparison.tables)} conditions." if len(comparison.tables) > 1 else "."
    for table in comparison.tables:
        if table.rows and table.rows[0].runs:
            best = table.rows[0]
            where = f"With {words(table.condition)} the" if table.condition else "The"
            text += f" {where} most accurate on average over exits is {best.label} ({share(best.of('accuracy'))} %)."
    return text


def _section(number: int, comparison: Comparison, table: ConditionTable) -> dict[str, Any]:
    from markupsafe import Markup

    head, *rows = markdown_rows(comparison, table)
    figures = []
    for name, draw in FIGURES.items():
        if (drawn := draw(table)) is not None:
            drawing = Markup(svg(drawn[0], f"{draw.__name__}-{number}", name))  # matplotlib has escaped its text
            figures.append({"title": name, "svg": drawing, "caption": drawn[1]})
    return {
        "title": words(table.condition) or "Results",
        "head": head,
        "rows": rows,
        "reference": table.reference,
        "notes": notes(comparison, table),
        "figures": figures,
    }


def _sweep_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for sweep in comparison.sweeps:
        for position, (trial, by_seed) in enumerate(zip(sweep.trials, sweep.accuracy, strict=True)):
            values = ", ".join("failed" if math.isnan(a) else f"{100 * a:.1f}" for a in by_seed.values()) or "not run"
            chosen = "chosen" * (position == sweep.best)
            rows.append([sweep.row, words(sweep.condition), settings_words(trial), values, chosen])
    return rows


def render(comparison: Comparison) -> str:
    """The whole page; nothing in it is loaded from elsewhere."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    sweep, path = comparison.experiment.sweep, comparison.folder / "experiment.yaml"
    said = (
        ""
        if sweep is None
        else (
            f"On {sweep.validation_share:.0%} of the clients' training data, the same number of trials for every row, "
            f"seeds {', '.join(map(str, sweep.seeds))}; the highest mean is chosen. No trial sees test data."
        )
    )
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    return page.render(
        title=comparison.title,
        css=Markup(CSS),
        light=LIGHT,
        dark=DARK,
        lede=lede(comparison),
        sections=[_section(i, comparison, table) for i, table in enumerate(comparison.tables)],
        sweeps=_sweep_rows(comparison),
        sweep_words=said,
        yaml=path.read_text(encoding="utf-8") if path.exists() else "",
        glossary=WORDS | {word: GLOSSARY[word] for word in ("exit", "MACs", "worst 10 % of clients", "FedAvg")},
    )
