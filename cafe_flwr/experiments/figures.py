"""The figures of a comparison: bars with error bars, paired differences and accuracy–MACs curves."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe_flwr.experiments.comparison import ConditionTable, RowResult
from cafe_flwr.experiments.tables import points, share
from cafe_flwr.results.figures import INK, LINE, MARKS, MUTED, canvas, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cafe_flwr.results.figures import Drawn

LIGHT = ("#0f6ab4", "#c2570c", "#2e7d32", "#8e3b8a", "#b3261e", "#00838f", "#7a6a00", "#5d4037")
DARK = ("#6db3f2", "#f2a05c", "#7fd087", "#d79bd3", "#f28b82", "#5fd0dc", "#d6c64a", "#c8a99a")
STROKES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))  # where colours look alike


def row_colours(table: ConditionTable) -> dict[str, str]:
    """Colours by label, the same in all figures: for the best rows and the reference; the others are grey."""
    chosen = [row.label for row in table.rows if row.runs]
    chosen = [table.reference, *(label for label in chosen if label != table.reference)][: len(LIGHT)]
    colours = {label: colour(k) for k, label in enumerate(chosen, start=1)}
    return {row.label: colours.get(row.label, MUTED) for row in table.rows}


def _plain(label: str, width: int = 18) -> str:
    """A label for a figure: broken into lines, and never read as a formula."""
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


def draw_accuracy(table: ConditionTable) -> Drawn:
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


def draw_differences(table: ConditionTable) -> Drawn:
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


def draw_curves(table: ConditionTable) -> Drawn:
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
    curves = [run.curve for run in row.runs.values() if len(run.curve.macs)]
    if len({len(curve.macs) for curve in curves}) != 1:
        return None
    return np.mean([curve.accuracy for curve in curves], axis=0), np.mean([curve.macs for curve in curves], axis=0)


FIGURES = {
    "Accuracy, mean over exits": draw_accuracy,
    "Difference to the reference": draw_differences,
    "Accuracy against cost": draw_curves,
}
