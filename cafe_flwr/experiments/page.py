"""The page of a comparison, and the CSV and Markdown files beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cafe_flwr.core.files import write_atomically
from cafe_flwr.experiments.comparison import Comparison, ConditionTable
from cafe_flwr.experiments.contents import settings_words, words
from cafe_flwr.experiments.figures import DARK, FIGURES, LIGHT
from cafe_flwr.experiments.tables import csv_text, markdown, markdown_rows, notes, run_lines, share, table_lines
from cafe_flwr.results.figures import svg
from cafe_flwr.results.page import CSS, GLOSSARY

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
    """The whole, self-contained page."""
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


def write_comparison(comparison: Comparison) -> Path:
    """Write ``runs.csv``, ``table.csv``, ``table.md`` and the page into the experiment's folder; return its path."""
    folder = comparison.folder
    write_atomically(folder / "runs.csv", csv_text(run_lines(comparison)))
    write_atomically(folder / "table.csv", csv_text(table_lines(comparison)))
    write_atomically(folder / "table.md", f"# {comparison.title}\n\n{markdown(comparison)}")
    write_atomically(folder / "comparison.html", render(comparison))
    return folder / "comparison.html"
