"""How the report of a run looks: its figures and the page around them. What it says in words is in ``report.py``."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe_flwr.report import COLUMNS, Run, bytes_line, duration, fixed, left_out, number, numbers, percent
from cafe_flwr.report import plain_words, scaled, spread, table_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Figures are drawn in stand-in colours that become CSS variables, so that one drawing serves light and dark mode.
INK, MUTED, GRID, PAPER = "#0b0001", "#0b0002", "#0b0003", "#0b0004"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper"}
TEACHER, STUDENTS = ("#c2570c", "#f2a05c"), (("#64b0e0", "#c4e3f8"), ("#0f4a80", "#4a92d2"))  # (light, dark) mode
MARKERS = "osD^vP*X"


def exit_colours(num_exits: int) -> list[tuple[str, str]]:
    """Colours (light, dark mode) of exits 1..m: students from light to deep blue, the teacher, m, in orange."""
    from matplotlib.colors import to_hex, to_rgb

    def blend(mode: int, share: float) -> str:
        shallow, deep = (np.array(to_rgb(colour[mode])) for colour in STUDENTS)
        return to_hex(shallow + share * (deep - shallow))

    shares = np.linspace(0, 1, num_exits - 1) if num_exits > 2 else [0.6] * (num_exits - 1)
    return [*((blend(0, share), blend(1, share)) for share in shares), TEACHER]


def canvas(height: float = 3.0, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the width of a text column, with ``rows`` bare axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.0, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(GRID)
        axis.tick_params(length=0, labelsize=9, labelcolor=MUTED)
        axis.xaxis.label.set(color=MUTED, size=9.5)
        axis.yaxis.label.set(color=MUTED, size=9.5)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, axes


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as inline SVG: text stays text, colours are the page's, ids are unique on the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # SVG options exist as rc parameters only
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', text, count=1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub("#0a00([0-9a-f]{2})", lambda match: f"var(--exit-{int(match[1], 16)})", text)
    return re.sub("#0b000[1-4]", lambda match: f"var(--{VARIABLES[match[0]]})", text)


def colour(k: int) -> str:
    """Stand-in colour of exit k."""
    return f"#0a00{k:02x}"


def _steps(run: Run) -> list[int]:
    return [int(line["round"]) for line in run.rounds]


def accuracy_over_rounds(run: Run) -> tuple[Figure, str] | None:
    """Accuracy per exit over rounds, before and after local training."""
    keys = ("accuracy_per_exit", "accuracy_per_exit_after")
    before, after = (run.over_rounds(key, run.num_exits) for key in keys)
    if not np.isfinite([before, after]).any():
        return None
    figure, (axis,) = canvas()
    for k in range(1, run.num_exits + 1):
        axis.plot(_steps(run), before[:, k - 1], color=colour(k), lw=1.8, marker="o" if len(before) < 3 else "")
        axis.plot(_steps(run), after[:, k - 1], color=colour(k), lw=1.0, ls=(0, (3, 2)))
    axis.set(xlabel="round", ylabel="accuracy, mean over clients")
    return figure, "Solid: as a client received its network, before local training; dashed: after it. Higher is better."


def ramp(run: Run) -> tuple[Figure, str] | None:
    """Share of student exits that train, by depth, and the ramp R(t)."""
    active = run.over_rounds("active_exits", run.num_exits - 1)
    clients = np.array([len(line.get("participants") or []) for line in run.rounds], dtype=float)
    known = np.isfinite(active).all(axis=1) & (clients > 0) if active.size else np.zeros(0, dtype=bool)
    if not known.any():
        return None
    rounds, share = np.array(_steps(run))[known], active[known] / (clients[known, None] * (run.num_exits - 1))
    top = np.vstack([np.zeros(len(share)), share.cumsum(axis=1).T])
    edges = [*(rounds - 0.5), rounds[-1] + 0.5]
    figure, (axis,) = canvas()
    for k in range(1, run.num_exits):
        axis.stairs(top[k], edges, baseline=top[k - 1], fill=True, color=colour(k), lw=0)
    axis.set(xlabel="round", ylabel="share of all student exits", ylim=(0, 1.05))
    text = "Height of a band: the student exits of that depth that trained, of all clients' students"
    total = number(run.get("num_rounds"))
    if top[-1].min() > 0.999 or not total > 0:
        return figure, f"{text}; here all trained in every round."
    t = np.linspace(rounds[0], rounds[-1], 200)
    axis.plot(t, np.minimum(2 * t / total, 1), color=INK, lw=1.4, ls=(0, (1, 1.5)))
    return figure, f"{text}; the dotted line is the ramp R(t) = min(2t/T, 1), which lets shallow exits in first."


def clients_sorted(run: Run) -> tuple[Figure, str] | None:
    """Accuracy of every client at every exit, worst client first."""
    ranked = run.accuracy.loc[run.accuracy.mean(axis=1).dropna().sort_values().index]
    if ranked.empty:
        return None
    figure, (axis,) = canvas()
    place = np.arange(len(ranked))
    axis.vlines(place, ranked.min(axis=1), ranked.max(axis=1), color=GRID, lw=1.5, zorder=1)
    for k in ranked:
        axis.scatter(place, ranked[k], s=22, color=colour(k), marker=MARKERS[(k - 1) % 8], lw=0, zorder=2)
    worst = -(-len(ranked) // 10)
    named = place if len(place) <= 25 else place[: min(worst, 5)]
    axis.set_xticks(named, [str(client) for client in ranked.index[named]], fontsize=8)
    axis.set(xlabel="client, by accuracy over exits, worst on the left", ylabel="accuracy on own test data")
    names = (f"client {client} ({fixed(mean)})" for client, mean in ranked.mean(axis=1)[:min(worst, 5)].items())
    return figure, f"One column per client, one mark per exit; a long line means that exits disagree. Worst: {', '.join(names)}."


def accuracy_macs(run: Run) -> tuple[Figure, str] | None:
    """Accuracy against cost: every threshold, every exit on its own, the chosen point."""
    macs = np.array(run.per_exit("macs_per_exit"))
    curve = [run.get("curve", key) or [] for key in ("macs", "accuracy")]
    x, y = (np.array(numbers(values, min(map(len, curve)))) for values in curve)
    full = macs[-1] if macs[-1] > 0 else np.nanmax(x) if np.isfinite(x).any() else np.nan
    if not np.isfinite(full):
        return None
    figure, (axis,) = canvas()
    order = np.argsort(x)
    axis.plot(100 * x[order] / full, y[order], color=MUTED, lw=1.6, zorder=1)
    for k, (cost, accuracy) in enumerate(zip(macs, run.per_exit("accuracy_per_exit"), strict=True), start=1):
        axis.scatter(100 * cost / full, accuracy, s=42, color=colour(k), marker=MARKERS[(k - 1) % 8], lw=0, zorder=2)
    chosen = 100 * (1 - run.number("dynamic", "macs_reduction")), run.number("dynamic", "accuracy")
    axis.scatter(*chosen, s=110, facecolor="none", edgecolor=INK, lw=1.6, zorder=3)
    axis.set(xlabel="MACs per input, % of running all exits", ylabel="accuracy")
    return figure, (
        "Line: inputs leave at the first exit that is confident enough, one point per threshold; marks: everything "
        "leaves at that exit; ring: the threshold chosen on calibration data. Up and left is better."
    )


def exit_histogram(run: Run) -> tuple[Figure, str] | None:
    """Where inputs leave at the chosen threshold."""
    shares = np.array(run.per_exit("dynamic", "exit_shares"))
    if not np.isfinite(shares).any():
        return None
    figure, (axis,) = canvas()
    places = np.arange(1, run.num_exits + 1)
    bars = axis.bar(places, shares, width=0.6, color=[colour(k) for k in places])
    axis.bar_label(bars, [percent(share) for share in shares], color=INK, fontsize=10, padding=2)
    axis.set_xticks(places, [f"exit {k}" for k in places])
    axis.set_yticks([])
    axis.margins(y=0.12)
    return figure, "Height: share of the test inputs that leave at this exit when the chosen threshold is used."


def teacher_map(run: Run) -> tuple[Figure, str] | None:
    """Weights of the last exits in every client's teacher."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    clients, rows = (run.get("teacher_weights", key) or [] for key in ("clients", "weights"))
    weights = np.array([numbers(row, len(clients)) for row in rows])
    if not len(clients) or not np.isfinite(weights).any():
        return None
    figure, (axis,) = canvas(height=3.9)
    shades = LinearSegmentedColormap.from_list("weight", [to_rgba("#e0701c", 0), to_rgba("#e0701c", 1)])
    image = axis.imshow(weights, cmap=shades, vmin=0, interpolation="none")
    bar = figure.colorbar(image, ax=axis, shrink=0.7, aspect=18, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    ticks = range(0, len(clients), -(-len(clients) // 20))
    axis.set_xticks(ticks, [str(clients[i]) for i in ticks], fontsize=7.5)
    axis.set_yticks(ticks, [str(clients[i]) for i in ticks], fontsize=7.5)
    axis.grid(visible=False)
    axis.spines[:].set(visible=True, color=GRID)
    axis.set(xlabel="teacher: whose last exit", ylabel="student: which client")
    return figure, "A row shows whose last exits make up that client's teacher: darker is more weight, the diagonal is its own."


def own_weight(run: Run) -> tuple[Figure, str] | None:
    """Weight of a client's own head in its teacher, and the effective number of teachers, over rounds."""
    own, effective = (run.over_rounds(key)[:, 0] for key in ("own_teacher_weight", "effective_teachers"))
    if not np.isfinite([own, effective]).any():
        return None
    figure, (upper, lower) = canvas(height=3.9, rows=2)
    for axis, values, label in ((upper, own, "weight of own head"), (lower, effective, "effective teachers")):
        axis.plot(_steps(run), values, color=colour(run.num_exits), lw=1.8, marker="o" if len(values) < 3 else "")
        axis.set(ylabel=label, ylim=(0, 1.05 if axis is upper else max(2.0, 1.1 * np.nanmax([*values, 0]))))
    lower.set_xlabel("round")
    return figure, "Means over clients: 1 above and 1 below is learning from oneself alone; 1/Σw² counts the teachers that matter."


def _bars(names: list[str], values: list[float], labels: list[str], colours: list[str]) -> Figure:
    figure, (axis,) = canvas(height=0.5 + 0.42 * len(names))
    bars = axis.barh(names, values, height=0.55, color=colours)
    axis.bar_label(bars, labels, color=INK, fontsize=9.5, padding=4)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_xticks([])
    axis.invert_yaxis()
    axis.margins(x=0.3)
    return figure


def bytes_moved(run: Run) -> tuple[Figure, str] | None:
    """Bytes of a client and round."""
    values = [run.number(f"bytes_{way}_per_client_round") for way in ("up", "down", "fedavg")]
    if not np.isfinite(values[:2]).all():
        return None
    names, shown = ["up", "down", "FedAvg, each way"], 3 if np.isfinite(values[2]) else 2
    colours = [colour(1), colour(1), GRID]
    figure = _bars(names[:shown], values[:shown], [scaled(v, "B") for v in values[:shown]], colours[:shown])
    return figure, "Bytes of one client in one round; grey: what sending the whole network in fp32 would cost each way."


def time_spent(run: Run) -> tuple[Figure, str] | None:
    """Seconds by phase, over all rounds."""
    phases: dict[str, float] = {}
    for line in run.rounds:
        for phase, seconds in line["seconds"].items() if isinstance(line.get("seconds"), dict) else ():
            phases[phase] = phases.get(phase, 0) + (number(seconds) if np.isfinite(number(seconds)) else 0)
    total = phases.pop("total", sum(phases.values()))
    if not phases or not total > 0:
        return None
    labels = [f"{duration(value)} ({percent(value / total)})" for value in phases.values()]
    figure = _bars(list(phases), list(phases.values()), labels, [colour(1)] * len(phases))
    return figure, f"Wall-clock time by phase, summed over the rounds on record: {duration(total)} in all."


Draw = Callable[[Run], tuple["Figure", str] | None]
SECTIONS: dict[str, dict[str, Draw]] = {
    "Training": {"Accuracy over rounds": accuracy_over_rounds, "Which student exits train": ramp},
    "Clients": {"Accuracy of every client": clients_sorted},
    "Leaving early": {"Accuracy against cost": accuracy_macs, "Where inputs leave": exit_histogram},
    "Who teaches whom": {"Weights of the teachers": teacher_map, "Own head over rounds": own_weight},
    "Cost": {"Bytes": bytes_moved, "Time": time_spent},
}

CSS = """
:root { --paper: #fff; --ink: #1c2430; --muted: #626d7c; --line: #dfe3e8; --panel: #f5f7f9; --warn: #b45309 }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --ink: #e5e9ee; --muted: #98a3b1; --line: #343c46; --panel: #1c2229; --warn: #f0b35e } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 3rem 0 .9rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 0 0 .3rem }
.lede { font-size: 1.12rem; max-width: 46rem; margin: 1rem 0 1.5rem }
.quiet, figcaption, dt small { color: var(--muted); font-size: .88rem }
.quiet { margin: .2rem 0 }
.notes { border-left: 3px solid var(--warn); background: var(--panel); padding: .7rem 1rem; margin: 1.2rem 0; font-size: .92rem }
.notes p { margin: .2rem 0; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 2rem }
.tiles div { background: var(--panel); border-radius: 6px; padding: .8rem .95rem; font-size: .86rem; color: var(--muted) }
.tiles b { display: block; font-size: 1.55rem; line-height: 1.25; color: var(--ink); font-weight: 600; white-space: nowrap }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2rem 2.5rem }
figure { margin: 0; min-width: 0; break-inside: avoid }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto }
svg text { font-family: inherit !important }
figcaption { margin-top: .5rem; max-width: 34rem }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0 0 1rem; padding: 0; list-style: none; font-size: .88rem }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em; vertical-align: -.06em }
.scroll { overflow-x: auto }
.tall { max-height: 21rem; overflow: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--muted); font-weight: 500 }
th:first-child, td:first-child, .text td, .text th { text-align: left }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.final tr:last-child td { font-weight: 600 }
dt { font-weight: 600; margin-top: .6rem } dd { margin: 0; max-width: 46rem }
@media print { body { font-size: 11pt } main { padding: 0; max-width: none } h2 { break-after: avoid }
  .tall { max-height: none; overflow: visible } .pair { grid-template-columns: 1fr 1fr } }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ name }} – report of a run</title>
<style>{{ css }}
:root { {% for light, _ in colours %}--exit-{{ loop.index }}: {{ light }}; {% endfor %}}
@media screen and (prefers-color-scheme: dark) {
:root { {% for _, dark in colours %}--exit-{{ loop.index }}: {{ dark }}; {% endfor %}} }
</style></head><body><main>
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
{% if title in keyed %}<ul class="key">{% for _ in colours %}<li><i style="background: var(--exit-{{ loop.index }})"></i>
{{- "exit %d" % loop.index }}{{ ", the teacher" if loop.last and loop.length > 1 }}</li>{% endfor %}</ul>{% endif %}
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
{% for client, reason, rounds in left_out %}<tr><td>{{ client }}</td><td>{{ rounds }}</td><td>{{ reason }}</td></tr>
{% endfor %}</table></div>
{% else %}<p>{{ "No client was left out of a round." if rounds else "Not known: no rounds on record." }}</p>{% endif %}
<h2>Settings and versions</h2><div class="pair">
{% for title, entries in (("Setting", settings), ("Version", versions)) %}{% if entries %}
<table class="text"><tr><th>{{ title }}</th><th></th></tr>{% for key, value in entries.items() %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table>{% endif %}{% endfor %}</div>
<h2>Words</h2><dl>{% for word, meaning in glossary.items() %}<dt>{{ word }}</dt><dd>{{ meaning }}</dd>{% endfor %}</dl>
</main></body></html>
"""

GLOSSARY = {
    "exit": "A place in the network where it can answer and stop. Exit 1 comes first and costs least.",
    "head": "The linear classifier of an exit. It is personal: it stays with its client, while the backbone is shared.",
    "teacher, student": "The last exit of a network is the teacher; the exits before it are students and learn to answer like "
    "it. A client's teacher is a mixture of the last exits of similar clients.",
    "before / after local training": "Accuracy of a client's network as the server's averages left it, and after the client's "
    "own gradient steps of the round.",
    "MACs": "Multiply-adds of one input, the measure of cost. Leaving early saves those of the layers that are not run.",
    "threshold": "An input leaves at the first exit whose highest class probability reaches the threshold.",
    "ECE": "Expected calibration error: how far stated confidence and accuracy differ on average; 0 is best.",
    "worst 10 % of clients": "Mean accuracy of the tenth of the clients with the lowest accuracy.",
    "FedAvg": "Federated averaging, the plain method that sends the whole network back and forth in every round.",
}


def _tiles(run: Run) -> list[tuple[str, str]]:
    moved = run.number("bytes_up_per_client_round") + run.number("bytes_down_per_client_round")
    share = moved / (2 * run.number("bytes_fedavg_per_client_round"))
    tiles = [
        (run.number("accuracy"), fixed, "accuracy, mean over exits and clients"),
        (run.number("accuracy_last_exit"), fixed, "accuracy of the last exit"),
        (spread(run)[-1][2], fixed, "accuracy, worst 10 % of clients"),
        (run.number("dynamic", "macs_reduction"), percent, "fewer MACs when inputs leave early"),
        (share, percent, "of FedAvg's bytes, both ways"),
        (run.number("seconds"), duration, "in all"),
    ]
    return [(write(value), label) for value, write, label in tiles if np.isfinite(value)]


def _client_rows(run: Run) -> list[dict[str, str]]:
    recorded = run.get("clients") if isinstance(run.get("clients"), list) else []
    facts = {row["client"]: row for row in recorded if isinstance(row, dict) and "client" in row}
    known = [key for key in ("train", "calibration", "test", "classes") if any(key in row for row in facts.values())]
    ranked = run.accuracy.loc[run.accuracy.mean(axis=1).sort_values().index]
    return [
        {"client": str(client)}
        | {key: str(facts.get(client, {}).get(key, "–")) for key in known}
        | {f"exit {k}": fixed(value) for k, value in accuracies.items()}
        for client, accuracies in ranked.to_dict("index").items()
    ]


def render(run: Run) -> str:
    """The whole page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    sections: dict[str, list[dict[str, Any]]] = {}
    absent = []
    for section, drawings in SECTIONS.items():
        for title, draw in drawings.items():
            drawn = draw(run)
            if drawn is None:
                absent.append(title.lower())
                continue
            figure = Markup(svg(drawn[0], draw.__name__, title))  # drawn from numbers, no text of others
            sections.setdefault(section, []).append({"title": title, "caption": drawn[1], "svg": figure})
    notes = [*run.notes, *([f"Not recorded in this run, so not shown: {'; '.join(absent)}."] if absent else [])]
    versions = run.get("versions")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(PAGE).render(
        name=run.get("name"),
        css=Markup(CSS),
        colours=exit_colours(run.num_exits),
        summary=plain_words(run),
        notes=notes,
        tiles=_tiles(run),
        columns=COLUMNS,
        rows=table_rows(run),
        sections=sections,
        keyed=("Training", "Clients", "Leaving early"),
        clients=_client_rows(run),
        left_out=left_out(run),
        rounds=run.rounds,
        settings=run.settings,
        versions=versions if isinstance(versions, dict) else {},
        glossary=GLOSSARY,
    )
