"""Calibration and risk of the exits from ``evaluation.json``, for the terminal and the report page.

What the file lacks is not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe_flwr.metrics.selective import POOLED, RISK_OF, VOID
from cafe_flwr.results.figures import INK, MARKS, MUTED, PAPER, canvas, colour
from cafe_flwr.results.run import Run, fixed, number, numbers, percent

if TYPE_CHECKING:
    from rich.table import Table

    from cafe_flwr.results.figures import Drawn

TITLE = "Calibration and risk"
WORDS = {
    "temperature": "A number per exit that divides its logits, so that stated confidence fits accuracy; fitted on "
    "calibration data.",
    "coverage, risk": "Share of the inputs that is answered (early), and share of errors among those answers.",
    "certified": "Thresholds with a statistical guarantee for the risk, from the client's own calibration data; it "
    "holds for inputs like those.",
}


def entries(owner: Any, key: str) -> list[Mapping[str, Any]]:
    """The objects of a list in a JSON object; none where there is no such list."""
    found = owner.get(key) if isinstance(owner, Mapping) else None
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def entry(owner: Any, *keys: str) -> Any:
    """A value in nested JSON objects, None where it is missing."""
    for key in keys:
        owner = owner.get(key) if isinstance(owner, Mapping) else None
    return owner


def columns(evaluation: Mapping[str, Any]) -> list[str]:
    """Headings of :func:`rows`."""
    return ["input", "accuracy per exit", "ECE of the last exit", *(f"α = {risk:g}" for risk in _risks(evaluation))]


def rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Cells per condition: means over clients, then realised risk and coverage at the pooled thresholds."""
    cells = []
    for condition in entries(evaluation, "conditions"):
        name, severity = condition.get("corruption"), condition.get("severity")
        exits = entry(condition, "exits", "accuracy", "mean") or []
        ece = entry(condition, "exits", "ece", "mean") or [None]
        found = {risk: _at_risk(evaluation, condition, risk) for risk in _risks(evaluation)}
        cells.append(
            [
                "as it is" if name == "none" else f"{name} {severity}",
                " ".join(fixed(number(value)) for value in exits),
                fixed(number(ece[-1])),
                *found.values(),
            ]
        )
    return cells


def labels(evaluation: Mapping[str, Any]) -> list[str]:
    """Remark on the guarantees for each of :func:`rows`; empty where they hold."""
    return [str(condition.get("label") or "") for condition in entries(evaluation, "conditions")]


def _risks(evaluation: Mapping[str, Any]) -> list[float]:
    return [number(risk) for risk in evaluation.get("risks") or []]


def _pooled(condition: Any, risk: float) -> Mapping[str, Any]:
    """Measures of all test examples together under the pooled thresholds for a risk."""
    for row in entries(condition, "dynamic"):
        if row.get("thresholds") == "pooled" and number(row.get("risk")) == risk:
            return row.get("all") or {}
    return {}


def _at_risk(evaluation: Mapping[str, Any], condition: Mapping[str, Any], risk: float) -> str:
    seen = _pooled(condition, risk)
    coverage = number(seen.get("coverage"))
    if coverage > 0:
        return f"{fixed(number(seen.get(_measure(evaluation))))} at {percent(coverage)}"
    return "none leaves" if coverage == 0 else "–"


def _measure(evaluation: Mapping[str, Any]) -> str:
    return RISK_OF.get(str(evaluation.get("guarantee")), "selective_risk")


def remarks(evaluation: Mapping[str, Any]) -> list[str]:
    """Remarks on the rows: whose thresholds they use, what is guaranteed, which clients are certified."""
    measure = _measure(evaluation).replace("_", " ")
    lines = [f"α = …: {measure} seen on test inputs, at the share that leaves early. Thresholds {POOLED}."]
    if len(entries(evaluation, "conditions")) > 1:
        lines.append(f"Corrupted inputs: {VOID}.")
    clients = entries(evaluation, "clients")
    own = [(c.get("client"), certificate) for c in clients for certificate in entries(c, "certificates")]
    for risk in _risks(evaluation):
        given = [(client, c) for client, c in own if number(c.get("risk")) == risk]
        refused = [(client, str(c.get("reason"))) for client, c in given if not c.get("certified")]
        if given:
            why = f", e.g. client {refused[0][0]}: {refused[0][1]}" if refused else ""
            certified = len(given) - len(refused)
            lines.append(f"α = {risk:g}: {certified} of {len(given)} clients certified by their own data{why}.")
    return [*lines, *map(str, evaluation.get("notes") or [])]


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """The table for the terminal: a row for unchanged inputs, and one for every corruption and severity.

    ``evaluation`` is what :func:`cafe_flwr.personal.evaluation.evaluate_run` returns, the contents of
    ``evaluation.json``.

    Examples
    --------
    >>> accuracy = {"mean": [0.5, 0.7]}
    >>> clean = {"corruption": "none", "severity": 0, "exits": {"accuracy": accuracy}, "dynamic": []}
    >>> rows({"risks": [0.05], "conditions": [clean]})
    [['as it is', '0.500 0.700', '–', '–']]
    >>> evaluation_table({"name": "demo", "risks": [0.05], "conditions": [clean]}).row_count
    1
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"{evaluation.get('name')}: calibration and risk on the clients' test data"),
        caption=Text("\n".join(remarks(evaluation))),
        box=box.SIMPLE_HEAD,
        caption_justify="left",
    )
    for column in columns(evaluation):
        table.add_column(column, justify="left" if column == "input" else "right")
    for cells in rows(evaluation):
        table.add_row(*map(Text, cells))
    return table


def draw_reliability(run: Run) -> Drawn:
    """Accuracy against stated confidence, by exit."""
    bins = run.evaluation.get("reliability")
    known = [entries({"bins": exit_bins}, "bins") for exit_bins in bins] if isinstance(bins, list) else []
    if not any(known):
        return None
    figure, (axis,) = canvas(3.4)
    axis.plot([0, 100], [0, 100], color=MUTED, lw=1, ls=(0, (3, 2)), zorder=1)
    for k, exit_bins in enumerate(known, start=1):
        x, y = (100 * np.array([number(b.get(key)) for b in exit_bins]) for key in ("confidence", "accuracy"))
        share = np.array([number(b.get("share")) for b in exit_bins])
        axis.plot(x, y, color=colour(k), lw=0.9, zorder=2)
        axis.scatter(
            x, y, s=6 + 220 * share, color=colour(k), marker=[*MARKS][(k - 1) % 5], lw=0, zorder=3, clip_on=False
        )
    axis.set(xlabel="stated confidence, %", ylabel="accuracy, %", xlim=(0, 102), ylim=(0, 102))
    errors = numbers(run.evaluation.get("ece_of_all_examples"), len(known))
    ece = ", ".join(f"exit {k} {fixed(error)}" for k, error in enumerate(errors, start=1))
    return figure, (
        "Test inputs of all clients in bins of confidence, after temperature scaling; the bigger a mark, the more of "
        f"them. On the dashed line confidence is accuracy; below it the exit is too sure. ECE over all of them: {ece}."
    )


def draw_risk_coverage(run: Run) -> Drawn:
    """Errors among the most confident inputs, by exit and for the dynamic network."""
    curves = entries(run.evaluation, "risk_coverage")
    if not any(curve.get("coverage") for curve in curves):
        return None
    figure, (axis,) = canvas(3.4)
    for k, curve in enumerate(curves, start=1):
        length = len(curve.get("coverage") or [])
        x, y = (100 * np.array(numbers(curve.get(key), length)) for key in ("coverage", "risk"))
        dynamic = curve.get("of") == "dynamic"
        style: dict[str, Any] = {"color": INK, "ls": (0, (3, 2))} if dynamic else {"color": colour(k)}
        axis.plot(x, y, lw=1.6, marker="o" if length == 1 else "", ms=4, **style)
    for risk in _risks(run.evaluation):
        seen = _pooled(next(iter(entries(run.evaluation, "conditions")), {}), risk)
        at = 100 * number(seen.get("coverage")), 100 * number(seen.get("selective_risk"))
        if np.isfinite(at).all():
            axis.scatter(*at, s=60, facecolor=PAPER, edgecolor=INK, lw=1.4, zorder=3)
            axis.annotate(
                f"{risk:g}", at, xytext=(-7, 3), textcoords="offset points", color=INK, fontsize=8.5, ha="right"
            )
    axis.margins(0.03, 0.08)
    axis.set(xlabel="coverage, % of the test inputs", ylabel="risk, % of errors among them", xlim=(0, 102))
    axis.set_ylim(bottom=-0.5)
    return figure, (
        "Coloured: an exit answers only its most confident inputs. Dashed: inputs that leave before the last exit, one "
        "threshold for all exits. Rings: thresholds calibrated for the risk α beside them, pooled over clients "
        "(exploratory); a ring above its α realised more than was asked for. Low and right is better."
    )


def draw_exits_at_risk(run: Run) -> Drawn:
    """Where inputs leave at the pooled thresholds, by risk."""
    clean = next(iter(entries(run.evaluation, "conditions")), {})
    found = {risk: numbers(_pooled(clean, risk).get("exit_shares"), run.num_exits) for risk in _risks(run.evaluation)}
    found = {risk: shares for risk, shares in found.items() if np.isfinite(shares).all()}
    if not found:
        return None
    figure, (axis,) = canvas(0.7 + 0.5 * len(found))
    names = [f"α = {risk:g}" for risk in found]
    left = np.zeros(len(found))
    for k, shares in enumerate(100 * np.array([*found.values()]).T, start=1):
        labels = [percent(share / 100) if share >= 8 else "" for share in shares]
        bars = axis.barh(names, shares, left=left, height=0.6, color=colour(k), edgecolor=PAPER, lw=1)
        axis.bar_label(bars, labels, label_type="center", color=PAPER, fontsize=9)
        left += shares
    axis.grid(visible=False)
    axis.invert_yaxis()
    axis.set(xlabel="% of the test inputs", xlim=(0, 100))
    return figure, (
        "A bar is divided by the exit at which inputs leave when at most the share α of those that leave early may be "
        f"wrong. Thresholds {POOLED}."
    )


def draw_curves(run: Run) -> Drawn:
    """Accuracy against MACs, of clean inputs and by severity of corruption."""
    macs = numbers(run.evaluation.get("macs_per_exit"), run.num_exits)
    curves: dict[int, list[tuple[Any, Any]]] = {}
    for condition in entries(run.evaluation, "conditions"):
        length = len(entry(condition, "curve", "macs") or [])
        points = tuple(np.array(numbers(entry(condition, "curve", key), length)) for key in ("macs", "accuracy"))
        if length and isinstance(condition.get("severity"), int):
            curves.setdefault(condition["severity"], []).append(points)  # type: ignore[arg-type]
    if not curves or not macs[-1] > 0:
        return None
    figure, (axis,) = canvas(3.0)
    ends = {}
    for severity, of_severity in sorted(curves.items()):
        x, y = np.mean(of_severity, axis=0)
        style: dict[str, Any] = {"ls": (0, (3, 2)), "lw": 1.2} if severity else {"lw": 1.8}
        axis.plot(100 * x / macs[-1], y, color=MUTED if severity else INK, **style)
        ends[f"severity {severity}" if severity else "as it is"] = y[-1]
    low, high = axis.get_ylim()
    place = np.inf
    for label, y_end in sorted(ends.items(), key=lambda item: -item[1]):
        place = min(y_end, place - 0.065 * (high - low))  # labels of lines that end together stand below each other
        axis.text(101.5, place, label, color=MUTED, fontsize=8.5, va="center_baseline")
    axis.set(xlabel="MACs per input, % of running all exits", ylabel="accuracy", xticks=range(20, 101, 20))
    axis.set_xlim(right=122)
    return figure, (
        "Each input leaves at the first exit that is confident enough; a line runs over the thresholds. Dashed: mean "
        f"over the corruptions of a severity, {VOID}. Up and left is better."
    )


FIGURES: dict[str, Callable[[Run], Drawn]] = {
    "Reliability": draw_reliability,
    "Risk against coverage": draw_risk_coverage,
    "Where inputs leave, by risk": draw_exits_at_risk,
    "Accuracy against cost, corrupted inputs too": draw_curves,
}
