"""How the report of a run looks: its figures and the page around them. What the records say is in ``report.py``."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe_flwr import report
from cafe_flwr.report import Run, duration, fixed, number, numbers, percent, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawn = tuple[Figure, str] | None  # a figure with the sentence that says how to read it

# Figures are drawn in stand-in colours that become the page's CSS variables: one drawing for light and dark mode.
INK, MUTED, LINE, PAPER = "#0b0001", "#0b0002", "#0b0003", "#0b0004"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper"}
MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼"}  # of exits 1, 2, …: in figures and in the key
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def colour(k: int) -> str:
    """Stand-in colour of exit k."""
    return f"#0a00{k:02x}"


def canvas(height: float = 2.8, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the width of a text column, with ``rows`` bare axes above each other."""
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
    """A panel per label over the rounds; of two lines of one colour the second is dashed."""
    figure, axes = canvas(height, rows=len(panels))
    t = [line["round"] for line in run.rounds]
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for values, line_colour in lines:
            again = line_colour in [line.get_color() for line in axis.lines]
            style: dict[str, Any] = {"lw": 1.0, "ls": (0, (3, 2)), "mfc": PAPER} if again else {"lw": 1.8}
            axis.plot(t, values, color=line_colour, marker="o" if len(t) < 3 else "", **style)
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
    students = np.array([[len(line.get("participants") or []) * (run.num_exits - 1)] for line in run.rounds])
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
    x = np.linspace(t[0], t[-1], 200)
    axis.plot(x, np.minimum(2 * x / rounds, 1), color=PAPER, lw=2.5)
    axis.plot(x, np.minimum(2 * x / rounds, 1), color=INK, lw=1.5, ls=(0, (1, 1.5)))
    return figure, f"{text}; dotted: the ramp R(t) = min(2t/T, 1) that lets them in."


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
    """Accuracy per exit over all test examples together, as the curve counts it: clients weigh what they tested."""
    tests = {row["client"]: number(row.get("test")) for row in run.get("clients")}
    weights = np.array([tests.get(client, np.nan) for client in run.accuracy.index])
    if not weights.size or not np.isfinite(weights).all() or not weights.sum() > 0:
        return run.per_exit("accuracy_per_exit")
    return [float(np.nansum(run.accuracy[k] * weights) / weights.sum()) for k in run.accuracy]


def draw_cost(run: Run) -> Drawn:
    """Accuracy against MACs: every threshold, every exit on its own, the chosen point."""
    macs, accuracy = np.array(run.per_exit("macs_per_exit")), pooled_accuracy(run)
    length = len(run.get("curve", "macs") or [])
    x, y = (np.array(numbers(run.get("curve", key), length)) for key in ("macs", "accuracy"))
    if not (macs[-1] > 0 and np.isfinite([*y, *accuracy]).any()):
        return None
    figure, (axis,) = canvas()
    axis.plot(100 * x / macs[-1], y, color=MUTED, lw=1.6, zorder=1)
    for k in range(1, run.num_exits + 1):
        mark = [*MARKS][(k - 1) % 5]
        axis.scatter(100 * macs[k - 1] / macs[-1], accuracy[k - 1], s=45, color=colour(k), marker=mark, lw=0, zorder=2)
    chosen = 100 - 100 * run.number("dynamic", "macs_reduction"), run.number("dynamic", "accuracy")
    axis.scatter(*chosen, s=120, facecolor="none", edgecolor=INK, lw=1.6, zorder=3)
    axis.margins(0.06, 0.08)
    axis.set(xlabel="MACs per input, % of running all exits", ylabel="accuracy")
    return figure, (
        "Line: each input leaves at the first exit that is confident enough, a point per threshold; marks: all leave "
        "at that exit; ring: the threshold chosen on calibration data. Up and left is better."
    )


def draw_exits(run: Run) -> Drawn:
    """Where inputs leave at the chosen threshold."""
    shares = run.per_exit("dynamic", "exit_shares")
    if not np.isfinite(shares).any():
        return None
    bars = {f"exit {k}": (share, percent(share), colour(k)) for k, share in enumerate(shares, start=1)}
    return draw_bars(bars), "A bar is the share of the test inputs that leave at that exit, at the chosen threshold."


def draw_teachers(run: Run) -> Drawn:
    """Weights of all last exits in every client's teacher."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    clients = run.get("teacher_weights", "clients") or []
    students = run.get("teacher_weights", "rows") or clients  # with partial participation fewer than teachers
    weights = np.array([numbers(row, len(clients)) for row in run.get("teacher_weights", "weights") or []])
    if not np.isfinite(weights).any():
        return None
    figure, (axis,) = canvas(height=1.0 + 2.8 * min(1, len(students) / len(clients)))
    shades = LinearSegmentedColormap.from_list("weight", [to_rgba("#e0701c", 0), to_rgba("#e0701c", 1)])
    image = axis.imshow(weights, cmap=shades, vmin=0, interpolation="none")
    bar = figure.colorbar(image, shrink=0.7, aspect=18, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    for side, names in ((axis.xaxis, clients), (axis.yaxis, students)):
        ticks = range(0, len(names), -(-len(names) // 20))
        side.set_ticks(ticks, [str(names[i]) for i in ticks], fontsize=8)
    axis.grid(visible=False)
    axis.spines[:].set(visible=True, color=LINE)
    axis.set(xlabel="teacher (client whose last exit it is)", ylabel="student (client that learns)")
    return figure, "A row shows whose last exits make up a client's teacher; the stronger the colour, the more weight."


def draw_own_weight(run: Run) -> Drawn:
    """Weight of a client's own head in its teacher and the effective number of teachers, over rounds."""
    keys = {"weight of own head": "own_teacher_weight", "effective teachers": "effective_teachers"}
    panels = {label: [(run.over_rounds(key)[:, 0], colour(run.num_exits))] for label, key in keys.items()}
    if not np.isfinite([lines[0][0] for lines in panels.values()]).any():
        return None
    figure = draw_lines(run, panels, 3.8)
    for axis in figure.axes:
        axis.set_ylim(0, 1.1 * max(1.0, axis.dataLim.y1))
    return (
        figure,
        "Means over clients: who learns from itself alone has own weight 1 and one effective teacher (1/Σw²).",
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
    "Who teaches whom": {"Weights of the teachers": draw_teachers, "Own head over rounds": draw_own_weight},
    "Cost": {"Bytes": draw_bytes, "Time": draw_time},
}

CSS = """
:root { --paper: #fff; --ink: #1c2430; --muted: #626d7c; --line: #dfe3e8; --panel: #f5f7f9; --warn: #b45309;
  --shallow: #64b0e0; --deep: #0f4a80; --teacher: #c2570c }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --ink: #e5e9ee; --muted: #98a3b1; --line: #343c46; --panel: #1c2229; --warn: #f0b35e;
  --shallow: #9ccbf0; --deep: #3b7fc0; --teacher: #f2a05c } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, Roboto, sans-serif }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 3rem 0 .9rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 0 0 .3rem }
.lede { font-size: 1.12rem; max-width: 46rem; margin: 1rem 0 1.5rem }
.quiet, figcaption, dt small { color: var(--muted); font-size: .88rem }
.quiet { margin: .2rem 0 }
.notes { border-left: 3px solid var(--warn); background: var(--panel); padding: .7rem 1rem; font-size: .92rem }
.notes p { margin: .2rem 0; overflow-wrap: anywhere }
.tiles, .pair { display: grid; align-items: start }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 2rem }
.tiles div { background: var(--panel); border-radius: 6px; padding: .8rem .95rem; font-size: .86rem; height: 100%;
  box-sizing: border-box; color: var(--muted) }
.tiles b { display: block; font-size: 1.4rem; font-weight: 600; color: var(--ink); white-space: nowrap }
.pair { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 2rem 2.5rem }
figure { margin: 0; min-width: 0; break-inside: avoid }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto }
svg text { font-family: inherit !important }
figcaption { margin-top: .5rem; max-width: 34rem }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0 0 1rem; padding: 0; font-size: .88rem }
.key i { font-style: normal; margin-right: .4em }
.scroll { overflow-x: auto }
.tall { max-height: 21rem; overflow: auto }
.tall th { position: sticky; top: 0; background: var(--paper) }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--muted); font-weight: 500; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child, .text td, .text th { text-align: left }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.final tr:last-child td { font-weight: 600 }
dt { font-weight: 600; margin-top: .6rem } dd { margin: 0; max-width: 46rem }
@media (max-width: 30rem) { th, td { padding-right: .55rem; font-size: .84rem } .final td { white-space: normal } }
@media print { body { font-size: 10.5pt } main { padding: 0; max-width: none } h2, .key { break-after: avoid }
  h2 { margin-top: 1.5rem } section { break-inside: avoid } .pair { grid-template-columns: 1fr 1fr }
  .tiles { grid-template-columns: repeat(6, 1fr) } .tiles b { font-size: 1.1rem }
  .tall { max-height: none; overflow: visible }
  .tall table { font-size: .72rem } .tall :is(th, td) { padding-right: .4rem } }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ name }} – report of a run</title>
<style>{{ css }}
:root { {% for share in blend %}
--exit-{{ loop.index }}: color-mix(in srgb, var(--deep) {{ share }}%, var(--shallow)); {% endfor %}
--exit-{{ m }}: var(--teacher) }</style></head><body><main>
<p class="quiet">Report of a run · cafe-flwr</p>
<h1>{{ name }}</h1>
<p class="lede">{{ summary }}</p>
{% if notes %}<div class="notes">{% for note in notes %}<p>{{ note }}</p>{% endfor %}</div>{% endif %}
<div class="tiles">{% for value, label in tiles %}<div><b>{{ value }}</b>{{ label }}</div>{% endfor %}</div>
<div class="scroll"><table class="final"><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="quiet">Accuracy on the clients' own test data; MACs include every exit head on the way.</p>
{% for title, figures in sections.items() %}<section><h2>{{ title }}</h2>
{% if title in ("Training", "Clients", "Leaving early") %}<p class="key">{% for mark in marks %}
<span><i style="color: var(--exit-{{ loop.index }})">{{ mark }}</i> exit {{ loop.index }}
{{- ", the teacher" if loop.last and m > 1 }}</span>{% endfor %}</p>{% endif %}
<div class="pair">{% for figure in figures %}
<figure><h3>{{ figure.title }}</h3>{{ figure.svg }}<figcaption>{{ figure.caption }}</figcaption></figure>{% endfor %}
{% if title == "Clients" and clients %}<figure><h3>Clients and their data</h3><div class="tall"><table>
<tr>{% for column in clients[0] %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in clients %}<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div><figcaption>Worst client first; examples of each split, classes it has seen, accuracy per
exit.</figcaption></figure>{% endif %}
</div></section>
{% endfor %}
<h2>Left out of rounds</h2>
{% if left_out %}<div class="scroll"><table class="text"><tr><th>client</th><th>rounds</th><th>reason</th></tr>
{% for (client, reason), when in left_out.items() %}
<tr><td>{{ client }}</td><td>{{ when }}</td><td>{{ reason }}</td></tr>
{% endfor %}</table></div>
{% else %}<p>{{ "No client was left out of a round." if rounds else "Not known: no rounds on record." }}</p>{% endif %}
<h2>Settings and versions</h2><div class="pair">
{% for title, entries in tables.items() %}{% if entries %}
<table class="text"><tr><th>{{ title }}</th><th></th></tr>{% for key, value in entries.items() %}
<tr><td>{{ key }}</td><td>{{ value | tojson if value is boolean else value }}</td></tr>
{% endfor %}</table>{% endif %}{% endfor %}</div>
<h2>Words</h2><dl>{% for word, meaning in glossary.items() %}<dt>{{ word }}</dt><dd>{{ meaning }}</dd>{% endfor %}</dl>
</main></body></html>
"""

GLOSSARY = {
    "exit": "A place in the network where it can answer and stop. Exit 1 comes first and costs least.",
    "head": "The linear classifier of an exit. A personal head stays on its client; the backbone is shared.",
    "teacher, student": "A network's last exit teaches, the exits before it learn to answer like it. In CAFEDistill a "
    "client's teacher is a mixture of the last exits of similar clients.",
    "before / after local training": "Accuracy as the client receives its network from the server, and after the "
    "client's own gradient steps of the round.",
    "MACs": "Multiply-adds for one input, the measure of cost. Who leaves early saves those of the layers not run.",
    "threshold": "An input leaves at the first exit whose highest class probability reaches the threshold.",
    "ECE": "Expected calibration error: how far stated confidence and accuracy differ on average; 0 is best.",
    "worst 10 % of clients": "Mean accuracy of the tenth of the clients with the lowest accuracy.",
    "FedAvg": "Federated averaging, the plain method that sends the whole network back and forth in every round.",
}


def count(number_of: object, noun: str) -> str:
    """``1 exit``, ``3 exits``; a number that is not known is ``some``."""
    return f"{'Some' if number_of is None else number_of} {noun}{'' if number_of == 1 else 's'}"


def plain_words(run: Run) -> str:
    """The run in a few sentences: what was trained, how good it is, at what cost."""
    m, clients, rounds = run.num_exits, run.get("num_clients"), run.get("num_rounds")
    done = run.rounds[-1]["round"] if run.rounds else rounds
    text = f"{count(clients, 'client')} trained networks with {count(m, 'exit')}"
    text += f" on {run.get('dataset')}" if run.get("dataset") else ""
    text += f" with the method {run.get('method')}" if run.get("method") else ""
    span = count(done, "round") if done == rounds else f"{done} of {rounds} rounds"
    text += f", for {span}." if done is not None else "."
    accuracy, last, worst = run.number("accuracy"), run.number("accuracy_last_exit"), report.spread(run)[-1][2]
    if np.isfinite(accuracy):
        text += f" A client's network labels {percent(accuracy)} of the client's test data correctly"
        text += f" on average over its exits ({percent(last)} at the last)" if m > 1 else ""
        text += f"; for the worst tenth of the clients it is {percent(worst)}." if np.isfinite(worst) else "."
    saved, dynamic, full = (run.number("dynamic", key) for key in ("macs_reduction", "accuracy", "accuracy_full"))
    if report.dynamic_line(run) and saved > 0:
        text += " When every input leaves at the first exit that is confident enough, its answer costs on average "
        text += f"{percent(saved)} fewer multiply-adds (MACs), at accuracy {fixed(dynamic)} instead of {fixed(full)}."
    return text + (f" What travelled: {report.bytes_line(run)}." if report.bytes_line(run) else "")


def left_out(run: Run) -> dict[tuple[str, str], str]:
    """Clients whose work did not enter some rounds: client and reason → the rounds, ``5, 7–9``."""
    found: dict[tuple[str, str], list[int]] = {}
    for line in run.rounds:
        for client, reason in (line.get("left_out") or {}).items():
            found.setdefault((str(client), str(reason)), []).append(line["round"])
    spans = {}
    for key, rounds in found.items():
        ends = zip((t for t in rounds if t - 1 not in rounds), (t for t in rounds if t + 1 not in rounds), strict=True)
        spans[key] = ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in ends)
    return spans


def key_figures(run: Run) -> list[tuple[str, str]]:
    """What goes into the tiles: value and label."""
    up, down, fedavg = (run.number(f"bytes_{way}_per_client_round") for way in ("up", "down", "fedavg"))
    tiles = [
        (run.number("accuracy"), fixed, "accuracy, mean over exits and clients"),
        (run.number("accuracy_last_exit"), fixed, "accuracy of the last exit"),
        (report.spread(run)[-1][2], fixed, "accuracy, worst 10 % of clients"),
        (run.number("macs_reduction_at_equal_accuracy"), percent, "fewer MACs at equal accuracy"),
        ((up + down) / (2 * fedavg), percent, "of the bytes of FedAvg"),
        (run.number("seconds"), duration, "wall clock"),
    ]
    return [(write(value), label) for value, write, label in tiles if np.isfinite(value)]


def client_rows(run: Run) -> list[dict[str, str]]:
    """Every client's data and accuracies, worst client first."""
    facts = {row["client"]: row for row in run.get("clients")}
    known = [key for key in ("train", "calibration", "test", "classes") if any(key in row for row in facts.values())]
    return [
        {"client": str(client)}
        | {key: str(facts.get(client, {}).get(key, "–")) for key in known}
        | {f"exit {k}": fixed(value) for k, value in run.accuracy.loc[client].items()}
        for client in run.accuracy.mean(axis=1).sort_values().index
    ]


def render(run: Run) -> str:
    """The whole page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    sections: dict[str, list[dict[str, str]]] = {}
    absent = []
    for section, drawings in SECTIONS.items():
        for title, draw in drawings.items():
            drawn = draw(run)
            if drawn is None:
                absent += [title] if draw is not draw_ramp or run.num_exits > 1 else []  # one exit: no students
                continue
            drawing = Markup(svg(drawn[0], draw.__name__, title))  # its text is ours and numbers, nothing to escape
            sections.setdefault(section, []).append({"title": title, "svg": drawing, "caption": drawn[1]})
    notes = [*run.notes, *([f"Not recorded in this run, so not shown: {'; '.join(absent)}."] if absent else [])]
    m = run.num_exits
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    return page.render(
        name=run.get("name"),
        css=Markup(CSS),
        m=m,
        blend=[100 * k // max(m - 2, 1) for k in range(m - 1)],
        marks=[[*MARKS.values()][k % 5] for k in range(m)],
        summary=plain_words(run).replace(" %", "\u00a0%"),
        notes=notes,
        tiles=key_figures(run),
        columns=report.COLUMNS,
        rows=report.table_rows(run),
        sections=sections,
        clients=client_rows(run),
        left_out=left_out(run),
        rounds=run.rounds,
        tables={"Setting": run.settings, "Version": run.get("versions") or {}},
        glossary=GLOSSARY,
    )
