"""The report page of a run: its text, layout and file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe_flwr.core.files import write_atomically
from cafe_flwr.results import inference
from cafe_flwr.results.figures import LEARNING, MARKS, SECTIONS, draw_ramp, svg
from cafe_flwr.results.run import Run, duration, fixed, percent, read_run
from cafe_flwr.results.tables import COLUMNS, bytes_line, dynamic_line, kind_rows, last_five_words, spread, table_rows

if TYPE_CHECKING:
    from cafe_flwr.results.figures import Drawn

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
h3 { font-size: 1rem; margin: 0 0 .3rem } h3.under { margin-top: 2rem }
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
{% if kinds %}<h2>Clients that are not alike</h2>
<div class="scroll"><table><tr>{% for column in kinds[0] %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in kinds %}<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="quiet">An exit's accuracy above is the mean over the clients that hold it. Values sent: of one client in a
round, at four bytes. Weight of the same kind: how much of what these clients
learn from comes from clients of their kind.</p>{% endif %}
{% for title, figures in sections.items() %}<section><h2>{{ title }}</h2>
{% if title in ("Training", "Clients", "Leaving early", evaluated.title) %}<p class="key">{% for mark in marks %}
<span><i style="color: var(--exit-{{ loop.index }})">{{ mark }}</i> exit {{ loop.index }}
{{- ", the teacher" if loop.last and teaches }}</span>{% endfor %}</p>{% endif %}
<div class="pair">{% for figure in figures %}
<figure><h3>{{ figure.title }}</h3>{{ figure.svg }}<figcaption>{{ figure.caption }}</figcaption></figure>{% endfor %}
{% if title == "Clients" and clients %}<figure><h3>Clients and their data</h3><div class="tall"><table>
<tr>{% for column in clients[0] %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in clients %}<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div><figcaption>Worst client first; examples of each split, classes it has seen, accuracy per
exit.</figcaption></figure>{% endif %}
</div>
{% if title == evaluated.title and evaluated.rows %}<h3 class="under">By corruption and severity</h3>
<div class="scroll"><table><tr>{% for column in evaluated.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for label, row in evaluated.rows %}{% if label and (loop.first or label != loop.previtem[0]) %}
<tr><th colspan="{{ row | length }}"><b>{{ label }}</b></th></tr>{% endif %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% for remark in evaluated.remarks %}<p class="quiet">{{ remark }}</p>{% endfor %}{% endif %}
</section>
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

TEACHING = ("cafedistill", "cafedistill-plus", "cafedistill-text", "local-kd")  # the last exit teaches the others

GLOSSARY = {
    "exit": "A place in the network where it can answer and stop. Exit 1 comes first and costs least.",
    "head": "The linear classifier of an exit. A personal head stays on its client; the backbone is shared.",
    "teacher, student": "A network's last exit teaches, the exits before it learn to answer like it. In CAFEDistill "
    "the last exits of clients whose training agrees are mixed, and a client goes on from its mixture.",
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
    """The run in a few sentences: what was trained, its accuracy and its cost."""
    m, clients, rounds = run.num_exits, run.get("num_clients"), run.get("num_rounds")
    done = run.rounds[-1]["round"] if run.rounds else rounds
    text = f"{count(clients, 'client')} trained networks with {count(m, 'exit')}"
    text += f" on {run.get('dataset')}" if run.get("dataset") else ""
    text += f" with the method {run.get('method')}" if run.get("method") else ""
    span = count(done, "round") if done == rounds else f"{done} of {rounds} rounds"
    text += f", for {span}." if done is not None else "."
    accuracy, last, worst = run.number("accuracy"), run.number("accuracy_last_exit"), spread(run)[-1][2]
    if np.isfinite(accuracy):
        text += f" A client's network labels {percent(accuracy)} of the client's test data correctly"
        text += f" on average over its exits ({percent(last)} at the last)" if m > 1 else ""
        text += f"; for the worst tenth of the clients it is {percent(worst)}." if np.isfinite(worst) else "."
    saved, dynamic, full = (run.number("dynamic", key) for key in ("macs_reduction", "accuracy", "accuracy_full"))
    if dynamic_line(run) and saved > 0:
        text += " When every input leaves at the first exit that is confident enough, its answer costs on average "
        text += f"{percent(saved)} fewer multiply-adds (MACs), at accuracy {fixed(dynamic)} instead of {fixed(full)}."
    return text + (f" What travelled: {bytes_line(run)}." if bytes_line(run) else "")


def left_out(run: Run) -> dict[tuple[str, str], str]:
    """Clients whose work was left out of rounds: client and reason → the rounds, ``5, 7–9``."""
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
    """Value and label of every tile."""
    up, down, fedavg = (run.number(f"bytes_{way}_per_client_round") for way in ("up", "down", "fedavg"))
    tiles = [
        (run.number("accuracy"), fixed, "accuracy, mean over exits and clients"),
        (run.number("last_five", "accuracy"), fixed, f"the same, {last_five_words(run)}"),
        (run.number("accuracy_last_exit"), fixed, "accuracy of the last exit"),
        (spread(run)[-1][2], fixed, "accuracy, worst 10 % of clients"),
        (run.number("macs_reduction_at_equal_accuracy"), percent, "fewer MACs at equal accuracy"),
        ((up + down) / (2 * fedavg), percent, "of the bytes of FedAvg"),
        (run.number("seconds"), duration, "wall clock"),
    ]
    return [(write(value), label) for value, write, label in tiles if np.isfinite(value)]


def client_rows(run: Run) -> list[dict[str, str]]:
    """Every client's data and accuracies, worst client first."""
    metadata = {row["client"]: row for row in run.get("clients")}
    known = [key for key in ("train", "calibration", "test", "classes") if any(key in row for row in metadata.values())]
    return [
        {"client": str(client)}
        | {key: str(metadata.get(client, {}).get(key, "–")) for key in known}
        | {f"exit {k}": fixed(value) for k, value in run.accuracy.loc[client].items()}
        for client in run.accuracy.mean(axis=1).sort_values().index
    ]


def is_expected(run: Run, section: str, draw: Callable[[Run], Drawn]) -> bool:
    """Whether a figure that could not be drawn should have been there."""
    if draw is draw_ramp:
        return run.num_exits > 1  # with one exit there are no students
    nobody_learns = "teacher_weights" in run.summary and run.summary["teacher_weights"] is None
    return not (section == LEARNING and nobody_learns)


def drawings_of(run: Run) -> dict[str, dict[str, Callable[[Run], Drawn]]]:
    """Figures by section; those of an evaluation come after the section on leaving early."""
    found = {}
    for section, drawings in SECTIONS.items():
        found[section] = drawings
        if section == "Leaving early" and run.evaluation:
            found[inference.TITLE] = inference.FIGURES
    return found


def _figures(run: Run) -> tuple[dict[str, list[dict[str, str]]], list[str]]:
    """The figures by section, and the titles of those that are missing."""
    from markupsafe import Markup

    sections: dict[str, list[dict[str, str]]] = {}
    absent = []
    for section, drawings in drawings_of(run).items():
        for title, draw in drawings.items():
            drawn = draw(run)
            if drawn is None:
                absent += [title] if is_expected(run, section, draw) else []
                continue
            drawing = Markup(svg(drawn[0], draw.__name__, title))  # its text is ours and numbers, nothing to escape
            sections.setdefault(section, []).append({"title": title, "svg": drawing, "caption": drawn[1]})
    return sections, absent


def render(run: Run, settings: Mapping[str, Any]) -> str:
    """The whole page, which shows the given settings."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    sections, absent = _figures(run)
    notes = [*run.notes, *([f"Not recorded in this run, so not shown: {'; '.join(absent)}."] if absent else [])]
    m = run.num_exits
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    return page.render(
        name=run.get("name"),
        css=Markup(CSS),
        m=m,
        teaches=m > 1 and run.get("method") in TEACHING,
        blend=[100 * k // max(m - 2, 1) for k in range(m - 1)],
        marks=[[*MARKS.values()][k % 5] for k in range(m)],
        summary=plain_words(run).replace(" %", "\u00a0%"),
        notes=notes,
        tiles=key_figures(run),
        columns=COLUMNS,
        rows=table_rows(run),
        kinds=kind_rows(run),
        sections=sections,
        clients=client_rows(run),
        left_out=left_out(run),
        rounds=run.rounds,
        tables={"Setting": settings, "Version": run.get("versions") or {}},
        evaluated={
            "title": inference.TITLE,
            "columns": inference.columns(run.evaluation),
            "rows": list(zip(inference.labels(run.evaluation), inference.rows(run.evaluation), strict=True)),
            "remarks": inference.remarks(run.evaluation),
        },
        glossary=GLOSSARY | (inference.WORDS if run.evaluation else {}),
    )


def write_report(folder: Path, shown: Callable[[dict[str, Any]], Mapping[str, Any]] = dict) -> Path:
    """Write ``report.html``, a self-contained page, into the folder of a run, and return its path.

    The page says which of the run's files are missing; an earlier page is replaced. ``shown`` selects the settings to
    show. Raises FileNotFoundError if the folder holds none of a run's files.
    """
    run = read_run(Path(folder))
    path = Path(folder) / "report.html"
    write_atomically(path, render(run, shown(run.settings)))
    return path
