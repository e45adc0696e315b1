"""Comparisons: the arithmetic by hand, and every file of a real one."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cafe_flwr.cli import app
from cafe_flwr.experiments.comparison import (
    Comparison,
    ConditionTable,
    RowResult,
    budget_line,
    compare,
    fairness_lines,
    make_table,
)
from cafe_flwr.experiments.file import Experiment, read_experiment
from cafe_flwr.experiments.finished import Finished
from cafe_flwr.experiments.page import render, write_comparison
from cafe_flwr.experiments.statistics import paired_difference, statistic
from cafe_flwr.experiments.sweep import RowSweep, choose
from cafe_flwr.experiments.tables import (
    BEGIN,
    END,
    equal_macs,
    markdown,
    notes,
    points,
    terminal_table,
    update_markdown,
)
from cafe_flwr.metrics.curve import CostCurve

# --- by hand ---------------------------------------------------------------------------------------------------------


def finished(accuracy: float, *, curve: tuple[list[float], list[float]] | None = None, **changes: Any) -> Finished:
    """A run with two exits, 0.1 apart around ``accuracy``."""
    figures = {"accuracy": accuracy, "accuracy_exit_1": accuracy - 0.05, "accuracy_exit_2": accuracy + 0.05}
    figures |= {"accuracy_ensemble": accuracy, "local_steps_per_client": 600.0, "seconds": 12.0}
    figures |= {f"bytes_{way}_per_client_round": 1000.0 for way in ("up", "down")} | {"bytes_per_client_round": 2000.0}
    figures |= changes.pop("figures", {})
    same: dict[str, Any] = {"data": [[0, 10, 2, 8, 3]], "participants": [[0], [0]], "left_out": 0, **changes}
    return Finished(figures, cost_curve(*(curve or ([accuracy - 0.05, accuracy + 0.05], [0.25, 1.0]))), **same)


def cost_curve(accuracy: list[float], macs: list[float]) -> CostCurve:
    return CostCurve(np.arange(len(macs)) / len(macs), np.array(accuracy), np.array(macs))


def row(label: str, *runs: Finished, method: str = "fedavg") -> RowResult:
    return RowResult(label, method, dict(enumerate(runs)), {})


def table(rows: list[RowResult], **changes: Any) -> ConditionTable:
    """Rows as a table of an experiment."""
    listed = [{"label": r.label, "method": r.method} for r in rows]
    seeds = sorted({seed for r in rows for seed in (*r.runs, *r.missing)})
    experiment = Experiment.model_validate({"name": "x", "seeds": seeds, "rows": listed, **changes})
    return make_table(experiment, (), rows)


def comparison_of(table: ConditionTable, folder: Path, **changes: Any) -> Comparison:
    listed = [{"label": r.label, "method": r.method} for r in table.rows]
    seeds = sorted({seed for r in table.rows for seed in (*r.runs, *r.missing)})
    given = {"name": "x", "title": "By hand", "seeds": seeds, "rows": listed, "reference": table.reference, **changes}
    return Comparison(Experiment.model_validate(given), folder, [table], [])


def test_statistic_divides_by_one_seed_less() -> None:
    """Of 1, 2, 6: mean 3, squares of deviations 4 + 1 + 9 = 14, std √(14/2) = √7, standard error √7/√3."""
    value = statistic([1.0, 2.0, math.nan, 6.0])
    assert value.mean == 3.0
    assert value.std == pytest.approx(math.sqrt(7))
    assert value.error == pytest.approx(math.sqrt(7 / 3))
    assert value.seeds == 3
    assert math.isnan(statistic([2.0]).std)
    assert math.isnan(statistic([]).mean)


def test_differences_are_paired_by_seed() -> None:
    """Seeds 0, 1, 2 differ by +0.02, +0.04, +0.06: mean +0.04, std 0.02, although both rows vary by 0.2 and more.

    Seed 3 has no partner and does not count.
    """
    gap = paired_difference({0: 0.52, 1: 0.74, 2: 0.96, 3: 0.1}, {0: 0.5, 1: 0.7, 2: 0.9})
    assert gap == pytest.approx((0.04, 0.02, 3))
    assert points(gap) == "+4.0 ± 2.0"
    assert points(statistic([-0.013])) == "−1.3"


def test_macs_to_reach_takes_the_cheapest_point() -> None:
    """0.6 is reached at 0.9, 0.4 and 1.0 of the MACs: 0.4. An accuracy of 0.8 is never reached."""
    accuracy, macs = [0.65, 0.6, 0.5, 0.7], [0.9, 0.4, 0.2, 1.0]
    assert cost_curve(accuracy, macs).macs_to_reach(0.6) == 0.4
    assert math.isnan(cost_curve(accuracy, macs).macs_to_reach(0.8))


def test_macs_are_compared_with_the_best_baseline_of_the_same_seed() -> None:
    """Baselines a (mean 0.5) and b (0.6): b counts; its last exit has 0.55 with seed 0 and 0.75 with seed 1.

    c reaches 0.55 at 0.25 of the MACs with seed 0, and 0.75 never: 25 % with one of two seeds. b reaches its own last
    exit with everything: 100 %.
    """
    c = row("c", finished(0.62), finished(0.6), method="cafedistill")
    rows = [row("a", finished(0.5), finished(0.5)), row("b", finished(0.5), finished(0.7)), c]
    made = table(rows, baselines=["a", "b"])
    assert made.baseline == "b"
    assert [r.label for r in made.rows] == ["c", "b", "a"]  # best first
    assert c.by_seed("macs_at_equal_accuracy") == {0: 0.25, 1: pytest.approx(math.nan, nan_ok=True)}
    assert [equal_macs(r) for r in made.rows] == ["25.0 (1/2)", "100.0 ± 0.0", "100.0 (1/2)"]
    assert equal_macs(table([row("a", finished(0.5))], baselines=[]).rows[0]) == "–"


def test_budget_line_states_what_was_measured() -> None:
    rows = [row("a", finished(0.5), finished(0.6)), row("b", finished(0.4), finished(0.5))]
    assert budget_line("equal", rows) == "equal: 600 gradient steps per client in every row"
    twice = row("c", finished(0.5, figures={"local_steps_per_client": 1200.0}))
    words = "600 gradient steps per client, except c: 1200"
    assert budget_line("published", [*rows, twice]) == f"published: {words}"
    assert budget_line("equal", [*rows, twice]) == f"equal was asked for, but measured steps differ: {words}"


def test_what_was_not_the_same_is_said() -> None:
    """Participants are compared over the rounds that both rows have: fine-tuning is paid for with rounds."""
    first = row("a", finished(0.5, participants=[[0], [1], [0]]))
    assert fairness_lines([first, row("b", finished(0.5, participants=[[0], [1]]))]) == [
        "checked: the same clients' data, and the same participants of every round, in all rows"
    ]
    other = row("c", finished(0.5, participants=[[0], [0]], data=[[0, 11, 2, 8, 3]], left_out=2))
    assert fairness_lines([first, other]) == [
        "NOT COMPARABLE: the clients' data of 'c', seed 0, differ from those of other rows",
        "NOT COMPARABLE: the participants of a round of 'c', seed 0, differ from those of other rows",
        "'c': the work of 2 client rounds was left out (see the runs' reports)",
    ]


def test_the_trial_with_the_highest_mean_is_chosen() -> None:
    """Means 0.5, (0.4 + 0.8)/2 = 0.6 and, with a failed seed, none; a sweep that is not over chooses nothing."""
    trials = [{"mu": 0.1}, {"mu": 0.5}, {"mu": 2.0}]
    accuracy = [{0: 0.5, 1: 0.5}, {0: 0.4, 1: 0.8}, {0: 0.9, 1: math.nan}]
    over = RowSweep("a", (), trials, accuracy, ["…"], complete=True)
    assert choose([over]) == {("a", ()): {"mu": 0.5}}
    assert choose([RowSweep("a", (), trials, accuracy, [], complete=False)]) == {}
    assert choose([RowSweep("a", (), trials[:1], [{0: math.nan}], ["…"], complete=True)]) == {}


def many_rows() -> list[RowResult]:
    rng = np.random.default_rng(0)
    labels = ["cafedistill", "pFedGraph + prior + distillation", *(f"method number {k}" for k in range(16))]
    return [row(label, *(finished(a) for a in rng.uniform(0.3, 0.8, 3))) for label in labels]


def test_the_table_fits_a_terminal_of_120_columns(tmp_path: Path) -> None:
    made = table(many_rows(), baselines=["method number 15"])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal_table(comparison_of(made, tmp_path), made))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert "…" not in text
    for label in ("cafedistill", "method number 15", "reference", "100.0"):
        assert label in text
    assert [word for word in ("semble", "10 %", "training", "area", "equal acc.", "round") if word not in text] == []


def test_one_seed_has_no_spread_and_says_so(tmp_path: Path) -> None:
    made = table([row("a", finished(0.5)), row("b", finished(0.6))])
    comparison = comparison_of(made, tmp_path)
    text = markdown(comparison)
    assert "±" not in re.sub(r"difference to a ± std \(std. error\)", "", text)
    assert "one seed: no spread can be given" in text
    assert "| b | 60.0 | 55.0 | 65.0 |" in text


def test_markdown_shows_failures_and_partial_rows_in_place(tmp_path: Path) -> None:
    partial = RowResult("half | way", "fedavg", {0: finished(0.5)}, {1: "ValueError: no luck (log: /x.log)"})
    failed = RowResult("none", "local", {}, {0: "ValueError: boom (log: /y.log)", 1: "ValueError: boom (log: /y.log)"})
    made = table([row("all", finished(0.5), finished(0.6)), partial, failed])
    text = markdown(comparison_of(made, tmp_path))
    assert "| half \\| way (1 of 2 seeds) | 50.0 |" in text
    assert "| none | ValueError: boom |" in text
    assert "- none, seed 0, 1: failed: ValueError: boom (log: /y.log)" in text
    assert made.rows[-1] is failed


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    made = table([row("a", finished(0.5))])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        update_markdown(readme, comparison_of(made, tmp_path))
        text = readme.read_text()
        assert text.startswith(f"before\n{BEGIN}\n\n| method |")
        assert text.endswith(f"\n{END}\nafter\n")
        assert "old" not in text
    for wrong in ("", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}"):
        readme.write_text(wrong)
        with pytest.raises(ValueError, match="should have the lines"):
            update_markdown(readme, comparison_of(made, tmp_path))
        assert readme.read_text() == wrong


class Outside(HTMLParser):
    """Everything that a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note links, and tags that load something."""
        self.tags.append(tag)
        self.found += [tag] * (tag in ("script", "link", "img", "iframe"))
        self.found += [f"{key}={value}" for key, value in attrs if key.endswith(("src", "href")) and value[:1] != "#"]


def read_page(page: str) -> Outside:
    parser = Outside()
    parser.feed(page)
    assert parser.found == []
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    return parser


@pytest.mark.slow
def test_the_page_is_self_contained_and_has_every_figure(tmp_path: Path) -> None:
    """Three figures: 18 rows, 8 of them in colours; ids are unique, text is escaped, formulas are left as text."""
    rows = many_rows()
    rows[3] = row("<b>$x^2$ & $y$</b>", *rows[3].runs.values())
    made = table(rows)
    page = render(comparison_of(made, tmp_path))
    parser = read_page(page)
    assert parser.tags.count("svg") == 3
    assert "<b>$x" not in page
    assert "&lt;b&gt;$x^2$ &amp; $y$&lt;/b&gt;" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"--exit-\d", page)) == {f"--exit-{k}" for k in range(1, 9)}
    assert "#0a00" not in page
    assert "#0b00" not in page
    assert "prefers-color-scheme: dark" in page


def test_a_page_without_any_finished_run(tmp_path: Path) -> None:
    made = table([RowResult("a", "fedavg", {}, {0: "not run"})])
    assert "not run" in render(comparison_of(made, tmp_path))


# --- a real one ------------------------------------------------------------------------------------------------------

EXPERIMENT = {
    "name": "real",
    "title": "A real comparison",
    "seeds": [0, 1],
    "settings": {
        "dataset": "digits",
        "num-clients": 3,
        "num-server-rounds": 7,
        "data.examples-per-client": 40,
        "local-steps": 2,
        "dirichlet-alpha": 1.0,
    },
    "rows": [
        "cafedistill",
        "fedavg",
        "fedbabu",
        "fedrep",
        {"label": "FedAvg + prior", "method": "fedavg", "settings": {"train.prior": True}},
    ],
    "sweep": {
        "seeds": [1000],
        "settings": {"num-server-rounds": 6},
        "trials": {"learning-rate": [0.1, 0.3]},
        "own": {
            "FedAvg + prior": [{"learning-rate": 1e3, "train.weight-decay": 1e9}, {"learning-rate": 0.3}]
        },  # the first diverges
    },
}


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


class Real:
    """A comparison that the command has made, with a README."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "real.yaml"
        self.file.write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
        self.readme = folder / "README.md"
        self.readme.write_text(f"# Title\n{BEGIN}\n{END}\n")
        self.results = folder / "results"
        self.home = self.results / "real"
        self.done = self.again()

    def again(self, *options: str) -> Any:
        return call(self.file, "--results-dir", self.results, "--jobs", 2, "--update-markdown", self.readme, *options)

    def csv(self, name: str) -> list[dict[str, str]]:
        with open(self.home / name, newline="") as file:
            return list(csv.DictReader(file))

    def summary(self, run: str, parent: str = "runs") -> dict[str, Any]:
        return dict(json.loads((self.home / parent / run / "summary.json").read_text()))


def serial(runs: Any, jobs: int) -> Any:
    """In place of worker processes, which test_experiment.py and test_smoke.py have: one run after the other, here."""
    from cafe_flwr.experiments.execution import Event, run_one

    for run in runs:
        yield Event(run, ended=False)
        yield Event(run, ended=True, failure=run_one(run))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.experiments.execution.execute", serial)
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        return Real(tmp_path_factory.mktemp("comparison"))


@pytest.mark.slow
def test_everything_is_there_and_a_failed_trial_is_reported(real: Real) -> None:
    """Ten trials, of which one fails, and ten runs; the exit code says that something failed."""
    assert real.done.exit_code == 1, real.done.output
    assert len(list((real.home / "trials").glob("*/summary.json"))) == 9
    assert len(list((real.home / "runs").glob("*/summary.json"))) == 10
    for name in ("experiment.yaml", "sweep.json", "runs.csv", "table.csv", "table.md", "comparison.html"):
        assert (real.home / name).stat().st_size > 100, name
    assert (real.home / "experiment.yaml").read_bytes() == real.file.read_bytes()
    for text in (real.done.output, (real.home / "table.md").read_text(), (real.home / "comparison.html").read_text()):
        plain = " ".join(text.split())
        assert "FedAvg + prior, a trial failed: learning-rate=1000.0, weight-decay=1000000000.0, seed 1000" in plain
        assert "NaN or infinite" in plain


@pytest.mark.slow
def test_the_sweep_chooses_on_validation_data(real: Real) -> None:
    sweep = json.loads((real.home / "sweep.json").read_text())
    assert sweep["validation_share"] == 0.25
    assert [len(r["trials"]) for r in sweep["rows"]] == [2] * 5
    for swept in sweep["rows"]:
        means = [np.mean([np.nan if a is None else a for a in t["accuracy"].values()]) for t in swept["trials"]]
        assert swept["chosen"] == swept["trials"][int(np.nanargmax(means))]["settings"]
    assert sweep["rows"][-1]["trials"][0]["accuracy"] == {"1000": None}
    trial = json.loads((real.home / "trials" / "fedavg--trial0-seed1000" / "settings.json").read_text())
    assert (trial["data.validation-share"], trial["num-server-rounds"]) == (0.25, 6)
    for label, folder in (("fedavg", "fedavg"), ("FedAvg + prior", "fedavg-prior")):
        (chosen,) = (r["chosen"] for r in sweep["rows"] if r["row"] == label)
        saved = json.loads((real.home / "runs" / f"{folder}-seed1" / "settings.json").read_text())
        assert saved["learning-rate"] == chosen["learning-rate"]
        assert saved["data.validation-share"] == 0
        assert saved["num-server-rounds"] == 7


@pytest.mark.slow
def test_steps_are_equal_and_said_to_be(real: Real) -> None:
    """Seven rounds of two steps; FedBABU trains for two rounds and fine-tunes for five: 14 for everyone."""
    assert "budget: equal: 14 gradient steps per client in every row" in real.done.output
    assert real.summary("fedbabu-seed0")["num_rounds"] == 2
    assert {float(line["local_steps_per_client"]) for line in real.csv("runs.csv")} == {14.0}
    assert "checked: the same clients' data, and the same participants" in real.done.output


@pytest.mark.slow
def test_csv_files_agree_with_the_runs(real: Real) -> None:
    """Every run's figures as its summary has them; means, standard deviations and differences worked out from these."""
    runs, rows = real.csv("runs.csv"), {line["row"]: line for line in real.csv("table.csv")}
    assert [line["row"] for line in rows.values()] == sorted(
        rows, key=lambda label: -float(rows[label]["accuracy_mean"])
    )
    for line in runs:
        name = "fedavg-prior" if line["row"] == "FedAvg + prior" else line["row"]
        summary = real.summary(f"{name}-seed{line['seed']}")
        assert line["state"] == "finished"
        for key in ("accuracy", "accuracy_ensemble", "accuracy_worst_tenth", "accuracy_after_training", "seconds"):
            assert float(line[key]) == summary[key]
        for k, accuracy in enumerate(summary["accuracy_per_exit"], start=1):
            assert float(line[f"accuracy_exit_{k}"]) == accuracy
        total = summary["bytes_up_per_client_round"] + summary["bytes_down_per_client_round"]
        assert float(line["bytes_per_client_round"]) == total
    a, b = ([float(line["accuracy"]) for line in runs if line["row"] == label] for label in ("fedrep", "cafedistill"))
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    line = rows["fedrep"]
    assert float(line["accuracy_mean"]) == pytest.approx(sum(a) / 2)
    assert float(line["accuracy_std"]) == pytest.approx(abs(a[0] - a[1]) / math.sqrt(2))
    assert float(line["accuracy_difference_mean"]) == pytest.approx(sum(gaps) / 2)
    assert float(line["accuracy_difference_std"]) == pytest.approx(abs(gaps[0] - gaps[1]) / math.sqrt(2))
    assert float(line["accuracy_difference_error"]) == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
    assert (line["reference"], line["trials"], line["seeds"]) == ("cafedistill", "2", "2")
    assert line["baseline"] in ("fedavg", "fedbabu", "fedrep")
    assert line["chosen"].startswith("learning-rate=")


@pytest.mark.slow
def test_readme_page_and_terminal_show_the_same_rows(real: Real) -> None:
    text = (real.home / "table.md").read_text()
    assert text.startswith("# A real comparison\n")
    assert text.removeprefix("# A real comparison\n") in real.readme.read_text()
    page = (real.home / "comparison.html").read_text()
    assert read_page(page).tags.count("svg") == 3
    for row in EXPERIMENT["rows"]:  # type: ignore[attr-defined]
        label = row if isinstance(row, str) else row["label"]
        assert all(label in shown for shown in (text, page.replace("&#43;", "+"), real.done.output))
    assert max(map(len, real.done.output.split("A real comparison")[-1].split("·")[0].splitlines())) <= 120
    assert "difference to cafedistill ± std (std. error)" in text


@pytest.mark.slow
def test_finished_runs_are_skipped_and_failed_ones_tried_again(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def refuse(runs: Any, jobs: int) -> Any:
        tried.extend(run.name for run in runs)
        yield from ()

    monkeypatch.setattr("cafe_flwr.experiments.execution.execute", refuse)
    done = real.again()
    assert tried == ["fedavg-prior--trial0-seed1000"]
    assert "9 of 10 trials are finished already" in done.output
    dry = real.again("--dry-run")
    assert "to do" in dry.output
    assert re.search(r"To do: \d+ rounds, about", dry.output)
    assert tried == ["fedavg-prior--trial0-seed1000"]


@pytest.mark.slow
def test_a_changed_experiment_is_refused_by_name(real: Real, tmp_path: Path) -> None:
    changed = {**EXPERIMENT, "settings": {**EXPERIMENT["settings"], "train.momentum": 0.5}}  # type: ignore[dict-item]
    file = tmp_path / "real.yaml"
    file.write_text(yaml.safe_dump(changed))
    before = (real.home / "experiment.yaml").read_bytes()
    done = call(file, "--results-dir", real.results)
    assert done.exit_code == 1
    assert "row 'cafedistill'" in done.output
    assert "momentum was 0.9, now 0.5" in done.output
    assert "choose another name" in done.output
    assert (real.home / "experiment.yaml").read_bytes() == before


@pytest.mark.slow
def test_more_rows_and_seeds_may_join(real: Real, tmp_path: Path) -> None:
    """A new seed and row leave what is finished alone; until they have run, the table says so."""
    more = {**EXPERIMENT, "seeds": [0, 1, 2], "rows": [*EXPERIMENT["rows"], "local"]}  # type: ignore[misc]
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump(more))
    made = compare(read_experiment(file), real.home)
    (table,) = made.tables
    assert table.row("fedrep").missing == {2: "not run"}
    assert set(table.row("local").missing.values()) == {"no settings were chosen for it"}
    assert "fedrep, seed 2: not run" in notes(made, table)


@pytest.mark.slow
def test_a_failed_run_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> None:
    monkeypatch.setattr("cafe_flwr.experiments.execution.execute", serial)
    settings = {**EXPERIMENT["settings"], "num-server-rounds": 1}  # type: ignore[dict-item]
    bad = {"label": "diverges", "method": "fedavg", "settings": {"learning-rate": 1e3, "train.weight-decay": 1e9}}
    vary = {"dirichlet-alpha": [1.0, 10.0]}
    del settings["dirichlet-alpha"]
    content = {"name": "bad", "seeds": [0], "settings": settings, "rows": [bad, "fedavg"], "vary": vary}
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump({**content, "reference": "fedavg"}))
    done = call(file, "--results-dir", tmp_path, "--only", "fedavg")
    assert done.exit_code == 0, done.output
    assert "diverges, seed 0: not run" in " ".join(done.output.split())
    done = call(file, "--results-dir", tmp_path)
    assert done.exit_code == 1
    assert "2 of 4 runs are finished already" in done.output
    assert "2 failed" in done.output
    text = (tmp_path / "bad" / "table.md").read_text()
    assert text.count("| diverges | client") == 2
    assert [f"**dirichlet-alpha = {alpha}**" in text for alpha in (1.0, 10.0)] == [True, True]
    lines = list(csv.DictReader((tmp_path / "bad" / "runs.csv").read_text().splitlines()))
    assert [(line["dirichlet-alpha"], line["row"]) for line in lines] == [
        (alpha, label) for alpha in ("1.0", "10.0") for label in ("fedavg", "diverges")
    ]
    assert "NaN or infinite" in lines[1]["state"]
    assert write_comparison(compare(read_experiment(file), tmp_path / "bad")).exists()
