"""The figures of a run's report, as SVG that follows the page's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe_flwr.results.run import Run, duration, fixed, number, numbers, percent, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawn = tuple[Figure, str] | None  # a figure with its caption

# Figures are drawn in stand-in colours that become the page's CSS variables: one drawing for light and dark mode.
INK, MUTED, LINE, PAPER = "#0b0001", "#0b0002", "#0b0003", "#0b0004"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper"}
MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼"}  # of exits 1, 2, …: in figures and in the key
LEARNING = "Who learns from whom"
MIXED = {
    "cafedistill": "last classifiers are mixed into a client's own",
    "cafedistill-plus": "classifiers are mixed into a client's own",
    "cafedistill-text": "last classifiers teach a client",
    "cafedistill-prior": "classifiers are mixed for a client",
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def colour(k: int) -> str:
    """Stand-in colour of exit k."""
    return f"#0a00{k:02x}"


def canvas(height: float = 2.8, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure as wide as a text column, with ``rows`` plain axes above each other."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(LINE)
        axis.tick_params(length=0, labelsize=9, labelcolor=MUTED)
        axis.xaxis.label.set(color=MUTED, size=9.5)
        axis.yaxis.label.set(color=MUTED, size=9.5)
        axis.grid(axis="y", color=LINE, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    return figure, axes


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as inline SVG: text stays text, colours are the page's, ids are unique on the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # these exist as rc parameters only
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    head, body = buffer.getvalue().split("<svg", 1)[1].split(">", 1)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", body)
    body = re.sub("#0a00([0-9a-f]{2})", lambda match: f"var(--exit-{int(match[1], 16)})", body)
    body = re.sub("#0b000[1-4]", lambda match: f"var(--{VARIABLES[match[0]]})", body)
    box = re.search('viewBox="[^"]*"', head)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{label}">{body}'


def draw_lines(run: Run, panels: dict[str, list[tuple[Any, str]]], height: float) -> Figure:
    """A panel per label over the rounds; the second line of a colour is dashed."""
    figure, axes = canvas(height, rows=len(panels))
    t = [line["round"] for line in run.rounds]
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for values, line_colour in lines:
            again = line_colour in [line.get_color() for line in axis.lines]
            style: dict[str, Any] = {"lw": 1.0, "ls": (0, (3, 2)), "mfc": PAPER} if again else {"lw": 1.8}
            known = np.isfinite(np.asarray(values, dtype=np.float64))  # clients need not evaluate in every round
            points = np.asarray(t)[known], np.asarray(values)[known]
            axis.plot(*points, color=line_colour, marker="o" if known.sum() < 3 else "", **style)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("round")
    return figure


def draw_bars(bars: dict[str, tuple[float, str, str]]) -> Figure:
    """Horizontal bars: name → length, label, colour."""
    figure, (axis,) = canvas(height=0.25 + 0.42 * len(bars))
    lengths, labels, colours = zip(*bars.values(), strict=True)
    axis.bar_label(axis.barh([*bars], lengths, height=0.55, color=colours), labels, color=INK, fontsize=9.5, padding=4)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_xticks([])
    axis.invert_yaxis()
    axis.margins(x=0.3)
    return figure


def draw_accuracy(run: Run) -> Drawn:
    """Accuracy per exit over rounds."""
    before, after = (run.over_rounds(f"accuracy_per_exit{s}", run.num_exits) for s in ("", "_after"))
    if not np.isfinite([before, after]).any():
        return None
    lines = [(phase[:, k], colour(k + 1)) for phase in (before, after) for k in range(run.num_exits)]
    text = "Solid: as a client receives its network, before local training; dashed: after it. Higher is better."
    return draw_lines(run, {"accuracy, mean over clients": lines}, 2.8), text


def draw_ramp(run: Run) -> Drawn:
    """Share of the student exits that train, by depth, under the ramp R(t)."""
    active = run.over_rounds("active_exits", run.num_exits - 1)
    students = np.array([[_students(line, run.num_exits)] for line in run.rounds])
    if not np.isfinite(active).any() or not students.all():
        return None
    figure, (axis,) = canvas()
    t, rounds = np.array([line["round"] for line in run.rounds]), run.number("num_rounds")
    top = np.cumsum(np.nan_to_num(active) / students, axis=1)
    for k in range(1, run.num_exits):
        below = top[:, k - 2] if k > 1 else np.zeros(len(t))
        axis.stairs(top[:, k - 1], [*(t - 0.5), t[-1] + 0.5], baseline=below, fill=True, color=colour(k), lw=0)
    axis.set(xlabel="round", ylabel="share of all student exits", ylim=(0, 1.05))
    text = "Bands: student exits of each depth that train, as a share of all students of the round's clients"
    if top[:, -1].min() > 0.999 or not rounds > 0:
        return figure, f"{text}; here all of them from the first round on."
    released = run.get("method") in ("cafedistill", "cafedistill-plus")
    x = np.linspace(t[0], t[-1], 200)
    ramp = np.minimum(2 * (x - released) / rounds, 1)
    axis.plot(x, ramp, color=PAPER, lw=2.5)
    axis.plot(x, ramp, color=INK, lw=1.5, ls=(0, (1, 1.5)))
    if not released:
        return figure, f"{text}; dotted: the ramp R(t) = min(2t/T, 1) that lets them in."
    return figure, (
        f"{text}; dotted: the ramp min(2(t − 1)/T, 1) that lets them in. The first trains from the start, and "
        "conflicts between clients hold the others back."
    )


def _students(line: Mapping[str, Any], num_exits: int) -> int:
    """Student exits of a round's clients; where not recorded, as if every client held all exits."""
    return int(line.get("students") or len(line.get("participants") or []) * (num_exits - 1))


def draw_clients(run: Run) -> Drawn:
    """Accuracy of every client at every exit, worst client first."""
    mean = run.accuracy.mean(axis=1).dropna().sort_values()
    if mean.empty:
        return None
    ranked, place, worst = run.accuracy.loc[mean.index], np.arange(len(mean)), min(5, max(1, round(len(mean) / 10)))
    figure, (axis,) = canvas()
    axis.vlines(place, ranked.min(axis=1), ranked.max(axis=1), color=LINE, lw=1.5, zorder=1)
    for k in range(1, run.num_exits + 1):
        axis.scatter(
            place,
            ranked[k],
            s=20 if len(mean) <= 40 else 7,
            color=colour(k),
            marker=[*MARKS][(k - 1) % 5],
            lw=0,
            zorder=2,
        )
    ticks = place[:: -(-len(mean) // 20)]
    axis.set_xticks(ticks, [str(client) for client in mean.index[ticks]], fontsize=8)
    axis.set(xlabel="client, worst on the left", ylabel="accuracy on own test data")
    names = ", ".join(f"client {client} ({fixed(value)})" for client, value in mean[:worst].items())
    return figure, f"A column is a client, a mark one of its exits. Worst on average over its exits: {names}."


def pooled_accuracy(run: Run) -> list[float]:
    """Accuracy per exit over all test examples together, as in the curve: clients are weighted by test examples."""
    tests = {row["client"]: number(row.get("test")) for row in run.get("clients")}
    weights = np.array([tests.get(client, np.nan) for client in run.accuracy.index])
    if not weights.size or not np.isfinite(weights).all() or not weights.sum() > 0:
        return run.per_exit("accuracy_per_exit")
    held = [weights * run.accuracy[k].notna().to_numpy() for k in run.accuracy]
    return [
        float(np.nansum(run.accuracy[k] * w) / w.sum()) if w.sum() else np.nan
        for k, w in zip(run.accuracy, held, strict=True)
    ]


def draw_cost(run: Run) -> Drawn:
    """Accuracy against MACs: of every threshold, of every exit alone, and of the chosen threshold."""
    macs, accuracy = np.array(run.per_exit("macs_per_exit")), pooled_accuracy(run)
    length = len(run.get("curve", "macs") or [])
    x, y = (np.array(numbers(run.get("curve", key), length)) for key in ("macs", "accuracy"))
    if not (macs[-1] > 0 and np.isfinite([*y, *accuracy]).any()):
        return None
    full = np.nanmax(x, initial=0.0) or macs[-1]  # where clients hold different depths, less than the deepest
    figure, (axis,) = canvas()
    axis.plot(100 * x / full, y, color=MUTED, lw=1.6, zorder=1)
    thresholds = np.array(numbers(run.get("curve", "threshold"), length))
    for threshold in (0.3, 0.5, 0.7, 0.9):
        for i in np.flatnonzero(np.abs(thresholds - threshold) < 1e-6):
            at = 100 * x[i] / full, y[i]
            axis.scatter(*at, s=12, color=MUTED, lw=0, zorder=1)
            axis.annotate(f"{threshold:g}", at, xytext=(3, -11), textcoords="offset points", color=MUTED, fontsize=8)
    for k in range(1, run.num_exits + 1):
        mark = [*MARKS][(k - 1) % 5]
        axis.scatter(100 * macs[k - 1] / full, accuracy[k - 1], s=45, color=colour(k), marker=mark, lw=0, zorder=2)
    chosen = 100 - 100 * run.number("dynamic", "macs_reduction"), run.number("dynamic", "accuracy")
    axis.scatter(*chosen, s=120, facecolor="none", edgecolor=INK, lw=1.6, zorder=3)
    axis.margins(0.06, 0.08)
    axis.set(xlabel="MACs per input, % of running all exits", ylabel="accuracy")
    return figure, (
        "Line: each input leaves at the first exit that is confident enough, some thresholds beside it; marks: all "
        "leave at that exit; ring: the threshold chosen on calibration data. Up and left is better."
    )


def draw_exits(run: Run) -> Drawn:
    """Where inputs leave at the chosen threshold."""
    shares = run.per_exit("dynamic", "exit_shares")
    if not np.isfinite(shares).any():
        return None
    bars = {f"exit {k}": (share, percent(share), colour(k)) for k, share in enumerate(shares, start=1)}
    return draw_bars(bars), "A bar is the share of the test inputs that leave at that exit, at the chosen threshold."


def draw_weights(run: Run) -> Drawn:
    """Weight of every client in the mixture of every other."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    clients = run.get("teacher_weights", "clients") or []
    rows = run.get("teacher_weights", "rows") or clients  # some methods mix for participants what all have sent
    weights = np.array([numbers(row, len(clients)) for row in run.get("teacher_weights", "weights") or []])
    if not np.isfinite(weights).any():
        return None
    figure, (axis,) = canvas(height=1.0 + 2.8 * min(1, len(rows) / len(clients)))
    shades = LinearSegmentedColormap.from_list("weight", [to_rgba("#e0701c", 0), to_rgba("#e0701c", 1)])
    image = axis.imshow(weights, cmap=shades, vmin=0, interpolation="none")
    bar = figure.colorbar(image, shrink=0.7, aspect=18, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    for side, names in ((axis.xaxis, clients), (axis.yaxis, rows)):
        ticks = range(0, len(names), -(-len(names) // 20))
        side.set_ticks(ticks, [str(names[i]) for i in ticks], fontsize=8)
    axis.grid(visible=False)
    axis.spines[:].set(visible=True, color=LINE)
    axis.set(xlabel="client that is learnt from", ylabel="client that learns")
    what = MIXED.get(str(run.get("method")), "classifiers or models are mixed for a client")
    return figure, f"A row shows whose {what}; the stronger the colour, the more weight."


def draw_own_weight(run: Run) -> Drawn:
    """Weight of a client's own part in its mixture, and the effective number of clients in it, over rounds."""
    keys = {"weight of its own": "own_teacher_weight", "effective number of clients": "effective_teachers"}
    panels = {label: [(run.over_rounds(key)[:, 0], colour(run.num_exits))] for label, key in keys.items()}
    if not np.isfinite([lines[0][0] for lines in panels.values()]).any():
        return None
    figure = draw_lines(run, panels, 3.8)
    for axis in figure.axes:
        axis.set_ylim(0, 1.1 * max(1.0, axis.dataLim.y1))
    return (
        figure,
        "Means over clients: who learns from itself alone has own weight 1, and one client is in its mixture (1/Σw²).",
    )


def draw_bytes(run: Run) -> Drawn:
    """Bytes of a client and round, beside those of FedAvg."""
    ways = {"up": colour(1), "down": colour(1), "fedavg": LINE}
    values = {way: run.number(f"bytes_{way}_per_client_round") for way in ways}
    bars = {way: (value, scaled(value, "B"), ways[way]) for way, value in values.items() if np.isfinite(value)}
    if "fedavg" in bars:
        bars["FedAvg, each way"] = bars.pop("fedavg")
    text = "What one client sends (up) and receives (down) in a round; grey: FedAvg of the whole network in fp32."
    return (draw_bars(bars), text) if {"up", "down"} & {*bars} else None


def draw_time(run: Run) -> Drawn:
    """Seconds by phase, over all rounds."""
    by_round = [line["seconds"] for line in run.rounds if isinstance(line.get("seconds"), dict)]
    names = dict.fromkeys(name for line in by_round for name in line)
    phases = {name: float(np.nansum([number(line.get(name)) for line in by_round])) for name in names}
    total = phases.pop("total", np.nan)
    bars = {name: (seconds, duration(seconds), colour(1)) for name, seconds in phases.items()}
    text = "Seconds by phase, summed over rounds and, for what clients do, over clients, which may work side by side"
    return (draw_bars(bars), f"{text}; wall clock: {duration(total)}." if total > 0 else f"{text}.") if bars else None


SECTIONS: dict[str, dict[str, Callable[[Run], Drawn]]] = {
    "Training": {"Accuracy over rounds": draw_accuracy, "Which student exits train": draw_ramp},
    "Clients": {"Accuracy of every client": draw_clients},
    "Leaving early": {"Accuracy against cost": draw_cost, "Where inputs leave": draw_exits},
    LEARNING: {"Weights of the clients": draw_weights, "Own weight over rounds": draw_own_weight},
    "Cost": {"Bytes": draw_bytes, "Time": draw_time},
}
