"""The page and the table are written from whatever a run left behind."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from cafe_flwr.coordination import active_exits
from cafe_flwr.results.figures import draw_accuracy
from cafe_flwr.results.page import left_out, write_report
from cafe_flwr.results.run import duration, number, numbers, percent, read_run, scaled
from cafe_flwr.results.tables import dynamic_line, final_table
from cafe_flwr.teaching import teacher_weights


def make_run(folder: Path, *, clients: int = 20, exits: int = 3, rounds: int = 12, seed: int = 0) -> Path:
    """A folder as a run of CAFEDistill leaves it: accuracies rise, shallow exits are worse, clients differ."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    skill = rng.normal(0, 0.09, clients)
    depth = np.linspace(-0.1, 0.0, exits) if exits > 1 else np.zeros(1)
    settings = {"name": folder.name, "dataset": "digit-pairs", "method": "cafedistill", "num-server-rounds": rounds}
    settings |= {"num-clients": clients, "seed": seed, "learning-rate": 0.3, "mu": 0.5, "resume": False}
    (folder / "settings.json").write_text(json.dumps(settings))

    def accuracy(t: int, lift: float) -> np.ndarray:
        level = 0.72 * (1 - np.exp(-4 * t / rounds)) + lift
        noise = rng.normal(0, 0.02, (clients, exits))
        return np.round((level + skill[:, None] + depth + noise).clip(0, 1) * 80) / 80

    parts, lines = [], []
    for t in range(1, rounds + 1):
        phases = {"before": accuracy(t, 0.0), "after": accuracy(t, 0.05)}
        if t == rounds:
            phases["final"] = phases["before"]
        parts += [long_table(t, phase, values) for phase, values in phases.items()]
        similarity = 0.2 + 0.6 * t / rounds + rng.normal(0, 0.1, (clients, exits - 1))
        active = active_exits(t, rounds, similarity)
        line: dict[str, Any] = {"round": t, "num_rounds": rounds, "participants": list(range(clients)), "left_out": {}}
        line |= {"active_exits": active.sum(axis=0).tolist(), "train_loss": 4.6 / (1 + t), "learning_rate": 0.3}
        line |= {"accuracy_per_exit": phases["before"].mean(axis=0).tolist()}
        line |= {"accuracy_per_exit_after": phases["after"].mean(axis=0).tolist()}
        line |= {"similarity_per_exit": [*similarity.mean(axis=0)], "own_teacher_weight": 0.5 - 0.2 * t / rounds}
        line |= {"effective_teachers": 3 + 2 * t / rounds, "bytes_up": 38_200 * clients, "bytes_down": 40_100 * clients}
        line |= {"seconds": {"total": 2.0, "train": 1.2, "evaluate": 0.4, "server": 0.1, "other": 0.3}}
        lines.append(line)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pd.concat(parts).to_parquet(folder / "clients.parquet")

    final = phases["final"]
    macs = [int(214_000 * share) for share in np.linspace(0.3, 1.0, exits)] if exits > 1 else [214_000]
    means = final.mean(axis=0)
    thresholds = np.append(np.linspace(0, 1, 101), np.inf)
    leaving = np.zeros((len(thresholds), exits))
    for row, θ in enumerate(thresholds):
        stay, left = 1.0, []
        for k in range(exits - 1):
            leave = (1 - min(θ, 1.0) ** 2) * (0.75 + 0.25 * k / exits)
            left.append(stay * leave)
            stay *= 1 - leave
        leaving[row] = [*left, stay]
    easy = 0.12 * (leaving[:, :-1] * (1 - leaving[:, :-1])).sum(axis=1)
    head = (
        np.random.default_rng(1).normal(size=(clients, 12))
        + np.repeat(np.eye(4, 12) * 4, -(-clients // 4), 0)[:clients]
    )
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    weights = teacher_weights(head @ head.T, np.full(clients, 1 / clients), 0.5)
    summary = {
        "name": folder.name, "method": "cafedistill", "dataset": "digit-pairs", "seed": seed, "num_rounds": rounds,
        "num_clients": clients, "accuracy_per_exit": means.tolist(), "accuracy": means.mean(),
        "accuracy_last_exit": means[-1], "accuracy_std_over_clients": final.mean(axis=1).std(),
        "accuracy_worst_tenth": np.sort(final.mean(axis=1))[: max(1, clients // 10)].mean(),
        "ece_per_exit": np.linspace(0.11, 0.07, exits).tolist(), "macs_per_exit": macs,
        "macs_reduction_at_equal_accuracy": 0.41,
        "dynamic": {
            "threshold": 0.62, "accuracy": means[-1] - 0.004, "accuracy_full": means[-1],
            "macs_reduction": 1 - float(leaving[62] @ macs) / macs[-1], "exit_shares": leaving[62].tolist(),
        },
        "curve": {
            "threshold": thresholds.tolist(), "accuracy": (leaving @ means + easy).tolist(),
            "macs": (leaving @ macs).tolist(), "exit_shares": leaving.tolist(),
        },
        "bytes_up_per_client_round": 38_200, "bytes_down_per_client_round": 40_100,
        "bytes_fedavg_per_client_round": 92_300, "seconds": 2.0 * rounds,
        "teacher_weights": {"clients": list(range(clients)), "weights": weights.tolist()},
        "clients": [
            {"client": i, "train": 96, "calibration": 24, "test": 80, "classes": 20, "accuracy_per_exit": values}
            for i, values in enumerate(final.tolist())
        ],
        "versions": {"cafe-flwr": "0.1.0", "flwr": "1.41.0", "torch": "2.9.0"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def long_table(t: int, phase: str, values: np.ndarray) -> pd.DataFrame:
    client, k = np.divmod(np.arange(values.size), values.shape[1])
    columns = {"round": t, "client": client, "phase": phase, "exit": k + 1, "accuracy": values.ravel()}
    return pd.DataFrame(columns | {"loss": 1 - values.ravel(), "ece": 0.1, "examples": 80})


class Page(HTMLParser):
    """What a page shows and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.hidden = False
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden = tag in ("style", "script")
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")]
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def printed(folder: Path, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(final_table(folder))
    return console.file.getvalue()


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of summary.json; None takes them out."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in summary.items() if value is not None}))


def edit_round(folder: Path, index: int, **changes: Any) -> None:
    path = folder / "rounds.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[index] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "pairs-cafedistill", clients=5, rounds=6)


FIGURES = [
    "Accuracy over rounds", "Which student exits train", "Accuracy of every client", "Accuracy against cost",
    "Where inputs leave", "Weights of the clients", "Own weight over rounds", "Bytes", "Time",
]  # fmt: skip


@pytest.mark.slow
def test_page_holds_the_numbers_and_loads_nothing(run: Path) -> None:
    page = page_of(run)
    summary = json.loads((run / "summary.json").read_text())

    for key in ("accuracy", "accuracy_last_exit", "accuracy_worst_tenth", "accuracy_std_over_clients"):
        assert f"{summary[key]:.3f}" in page.text, key
    for accuracy, ece in zip(summary["accuracy_per_exit"], summary["ece_per_exit"], strict=True):
        assert f"{accuracy:.3f}" in page.text
        assert f"{ece:.3f}" in page.text
    for words in (
        "5 clients trained networks with 3 exits on digit-pairs",
        "for 6 rounds",
        "38.2 kB",
        "92.3 kB",
        "64.2 k",
    ):
        assert words in page.text
    assert f"{100 * summary['dynamic']['macs_reduction']:.0f} % fewer multiply-adds" in page.text
    for words in ("learning-rate", "flwr 1.41.0", "No client was left out", "Expected calibration error"):
        assert words in page.text
    assert [title for title in FIGURES if title not in page.text] == []
    assert page.tags.count("svg") == len(FIGURES)
    assert "Not recorded" not in page.text

    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    assert all(link.startswith(("#", "data:")) for link in page.links)
    html = (run / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(page.ids) == len({*page.ids})
    assert not re.search("#0[ab]00", html), "a stand-in colour is left"


@pytest.mark.slow
def test_every_figure_says_how_to_read_it(run: Path) -> None:
    html = write_report(run).read_text()
    assert html.count("<figcaption>") == html.count("<figure>") == len(FIGURES) + 1  # and the table of clients


def test_table_in_the_terminal(run: Path) -> None:
    text = printed(run)
    summary = json.loads((run / "summary.json").read_text())
    last = pd.read_parquet(run / "clients.parquet").query("phase == 'final' and exit == 3")["accuracy"]
    row = next(line for line in text.splitlines() if "exit 3" in line)
    for cell in (f"{last.mean():.3f} ± {last.std(ddof=0):.3f}", f"{last.min():.3f}", "214.0 k (100 %)", "0.070"):
        assert cell in row
    assert f"{summary['accuracy']:.3f} ± {summary['accuracy_std_over_clients']:.3f}" in text
    assert "leaving at confidence ≥ 0.62: " in text
    assert f"(all exits run: {summary['accuracy_last_exit']:.3f})" in text
    assert "38.2 kB up and 40.1 kB down per client and round (FedAvg of the whole network: 92.3 kB each way)" in text
    assert "12.0 s" in text


@pytest.mark.slow
def test_dynamic_line_without_a_threshold(run: Path) -> None:
    edit(run, dynamic={"threshold": None, "accuracy": 0.7, "accuracy_full": 0.7, "macs_reduction": 0.0})
    assert dynamic_line(read_run(run)) == (
        "no threshold keeps the accuracy of the full network: every input runs all exits (0.700)"
    )
    assert "every input runs all exits" in printed(run)
    assert "fewer multiply-adds" not in page_of(run).text


@pytest.mark.slow
def test_repeated_writing_replaces_the_page(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    first = path.read_text()
    assert write_report(run).read_text() == first, "same records, same page"
    edit(run, name="renamed")
    write_report(run)
    assert "<h1>renamed</h1>" in path.read_text()
    assert sorted(p.name for p in run.iterdir()) == sorted(
        ["clients.parquet", "report.html", "rounds.jsonl", "settings.json", "summary.json"]
    )


def test_stopped_run(run: Path) -> None:
    """No summary, 4 of 6 rounds, the last line cut off, no final evaluation."""
    (run / "summary.json").unlink()
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text("".join(lines[:4]) + lines[4][:40])
    table = pd.read_parquet(run / "clients.parquet").query("round <= 4")
    table.to_parquet(run / "clients.parquet")

    page, text = page_of(run), printed(run)
    assert "for 4 of 6 rounds" in page.text
    assert "summary.json is missing: the run is not over or was stopped" in page.text
    before = table.query("phase == 'before' and round == 4").groupby("exit")["accuracy"].mean()
    for value in before:
        assert f"{value:.3f}" in page.text
        assert f"{value:.3f}" in text
    assert "summary.json is missing" in " ".join(text.split())
    assert "38.2 kB up and 40.1 kB down" in page.text
    assert (
        "Not recorded in this run, so not shown: Accuracy against cost; Where inputs leave; Weights of the" in page.text
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["settings.json", "rounds.jsonl", "clients.parquet", "summary.json"])
@pytest.mark.parametrize("content", [None, b"", b"[1, 2", b"\xff\xfe"])
def test_a_file_missing_or_damaged(run: Path, name: str, content: bytes | None) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    read = read_run(run)
    told = any(note.startswith(name) for note in read.notes)
    assert told or (name == "rounds.jsonl" and content is not None and not read.rounds)
    assert "exit 3" in printed(run)
    if content is None:
        assert f"{name} is missing" in page_of(run).text


def test_one_file_is_enough(run: Path) -> None:
    for name in ("settings.json", "rounds.jsonl", "summary.json"):
        (run / name).unlink()
    assert "5 clients trained networks with 3 exits" in page_of(run).text
    (run / "clients.parquet").unlink()
    (run / "settings.json").write_text('{"method": "cafedistill"}')
    page = page_of(run)
    assert "Some clients trained networks with 1 exit with the method cafedistill." in page.text
    assert "–" in printed(run)


def test_optional_entries_missing_or_null(run: Path) -> None:
    keep = {"name": "old", "method": "fedper", "accuracy": 0.5, "accuracy_per_exit": [0.4, 0.5, 0.6], "num_rounds": 6}
    (run / "summary.json").write_text(json.dumps(keep | {"teacher_weights": None, "dynamic": None, "clients": None}))
    for index in range(6):
        edit_round(
            run, index, own_teacher_weight=None, effective_teachers=None, accuracy_per_exit_after=None, seconds=None
        )
        edit_round(run, index, similarity_per_exit=None, left_out=None, participants=None)
    page = page_of(run)
    assert (
        "Not in summary.json, taken from the other records: num_clients, accuracy_last_exit, ece_per_exit" in page.text
    )
    absent = page.text.split("Not recorded in this run, so not shown: ")[1].split(".")[0]
    assert all(title in absent for title in ("Accuracy against cost", "Time"))
    teaching = ("Weights of the clients", "Own weight over rounds")
    assert not any(title in page.text for title in teaching)  # null: nobody teaches in this method
    assert "0.400 ±" in printed(run)

    (run / "summary.json").write_text(json.dumps(keep))
    absent = page_of(run).text.split("Not recorded in this run, so not shown: ")[1].split(".")[0]
    assert all(title in absent for title in teaching)  # there is no word of it: it was not recorded


@pytest.mark.slow
def test_nan_and_null_accuracies(run: Path) -> None:
    """A client without test data: NaN in the table, null in JSON; the others still count."""
    table = pd.read_parquet(run / "clients.parquet")
    table.loc[table["client"] == 2, ["accuracy", "loss", "ece"]] = math.nan
    table.to_parquet(run / "clients.parquet")
    edit_round(run, 0, accuracy_per_exit=[None, None, None], train_loss=None)
    edit(run, accuracy_per_exit=[0.5, None, 0.7], accuracy_worst_tenth=math.nan)
    page = page_of(run)
    assert "– ±" in page.text
    others = table.query("phase == 'final' and client != 2").groupby("client")["accuracy"].mean()
    assert f"{others.min():.3f}" in page.text

    table[["accuracy", "loss", "ece"]] = math.nan
    table.to_parquet(run / "clients.parquet")
    (run / "summary.json").unlink()
    assert "Accuracy of every client" in page_of(run).text.split("Not recorded")[1].split(".")[0]


def evaluate_only(folder: Path, rounds: set[int]) -> None:
    """As a run with `evaluate-every` leaves it: null accuracies in the other rounds, and no rows."""
    lines = [json.loads(text) for text in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        if line["round"] not in rounds:
            line |= {"accuracy_per_exit": [None] * 3, "accuracy_per_exit_after": [None] * 3}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = pd.read_parquet(folder / "clients.parquet")
    table[table["round"].isin(rounds)].to_parquet(folder / "clients.parquet")


@pytest.mark.slow
def test_rounds_without_evaluation(tmp_path: Path) -> None:
    """The page has all figures and the table all numbers; the accuracies there are, in rounds 3, 6 and 7 of 7, can be
    seen: a line with a gap at both sides of each of its points is not drawn at all."""
    run = make_run(tmp_path / "run", clients=5, rounds=7)
    evaluate_only(run, {3, 6, 7})
    page = page_of(run)
    assert page.tags.count("svg") == len(FIGURES)
    assert "Not recorded" not in page.text
    assert "nan" not in page.text.lower().split()
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['accuracy']:.3f} ±" in printed(run)

    drawn = draw_accuracy(read_run(run))
    assert drawn is not None
    for line in drawn[0].axes[0].lines:
        x, y = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
        seen = {t for t, value in zip(x, y, strict=True) if np.isfinite(value)}
        joined = {t for i in range(1, len(x)) if np.isfinite(y[i - 1 : i + 1]).all() for t in x[i - 1 : i + 1]}
        assert seen == {3, 6, 7}
        assert joined == seen or line.get_marker() not in ("", "None", None)


def test_a_run_stopped_before_its_first_evaluation(run: Path) -> None:
    """No accuracy at all: dashes, and the figures that need one are named."""
    (run / "summary.json").unlink()
    evaluate_only(run, set())
    text = printed(run)
    assert "– ± –" in text
    assert "nan" not in text.lower().split()
    absent = page_of(run).text.split("Not recorded in this run, so not shown: ")[1].split(".")[0]
    for title in ("Accuracy over rounds", "Accuracy of every client", "Accuracy against cost"):
        assert title in absent


@pytest.mark.slow
def test_a_run_stopped_after_a_round_without_evaluation(run: Path) -> None:
    """The figures are those of the last round that was evaluated, round 3."""
    (run / "summary.json").unlink()
    table = pd.read_parquet(run / "clients.parquet")
    table[table["phase"] != "final"].to_parquet(run / "clients.parquet")
    evaluate_only(run, {3})
    last = pd.read_parquet(run / "clients.parquet").query("phase == 'before'").groupby("exit")["accuracy"].mean()
    text = printed(run)
    assert all(f"{value:.3f} ±" in text for value in last)
    assert page_of(run).tags.count("svg") >= 5


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "exits", "rounds"), [(5, 1, 3), (1, 3, 3), (1, 1, 1), (3, 2, 1), (40, 7, 4)])
def test_other_shapes(tmp_path: Path, clients: int, exits: int, rounds: int) -> None:
    folder = make_run(tmp_path / "run", clients=clients, exits=exits, rounds=rounds)
    page = page_of(folder)
    assert f"{clients} client{'s' * (clients > 1)} trained networks with {exits} exit{'s' * (exits > 1)}" in page.text
    assert page.tags.count("svg") == len(FIGURES) - (exits == 1)
    assert printed(folder).count("exit ") == exits


@pytest.mark.slow
def test_left_out_clients_are_named_and_their_reasons_escaped(run: Path) -> None:
    reason = "<script>alert('x')</script> & [bold]out of memory[/bold] {{ 7 * 7 }}"
    for index in (0, 2, 3, 4):
        edit_round(run, index, left_out={"3": reason})
    edit_round(run, 5, left_out={"1": "no reply within 600 s"})
    edit(run, name="<img src=x onerror=alert(1)>[red]")
    assert left_out(read_run(run)) == {("3", reason): "1, 3–5", ("1", "no reply within 600 s"): "6"}
    page = page_of(run)
    assert f"3 1, 3–5 {reason}" in page.text
    assert not {"script", "img"} & {*page.tags}
    assert "[red]" in printed(run)


@pytest.mark.slow
def test_weights_of_the_clients_that_took_part(run: Path) -> None:
    """With partial participation the matrix has a row per participant and a column per client it may learn from."""
    weights = {"rows": [1, 3], "clients": [0, 1, 2, 3, 4], "weights": [[0, 0.7, 0.3, 0, 0], [0.2, 0, 0, 0.8, 0]]}
    edit(run, teacher_weights=weights)
    assert "Weights of the clients" in page_of(run).text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "words", "teaches"),
    [
        ("cafedistill", "A row shows whose last classifiers are mixed into a client's own;", True),
        ("cafedistill-plus", "A row shows whose classifiers are mixed into a client's own;", True),
        ("cafedistill-text", "A row shows whose last classifiers teach a client;", True),
        ("cafedistill-prior", "A row shows whose classifiers are mixed for a client;", False),
        ("fedamp", "A row shows whose classifiers or models are mixed for a client;", False),
    ],
)
def test_the_page_says_what_clients_learn_from_one_another(run: Path, method: str, words: str, teaches: bool) -> None:
    edit(run, method=method)
    text = page_of(run).text
    assert words in text
    assert ("exit 3, the teacher" in text) == teaches
    assert ("conflicts between clients hold the others back" in text) == (method in ("cafedistill", "cafedistill-plus"))


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_no_run(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "nothing"
    if content:
        folder.mkdir()
        (folder / content).write_text("hello")
    for function in (write_report, final_table):
        with pytest.raises(FileNotFoundError, match=r"nothing is not the folder of a run: expected .*rounds\.jsonl"):
            function(folder)
    assert not (folder / "report.html").exists()


def test_numbers_for_people() -> None:
    assert [scaled(x, "B") for x in (512, 38_200, 1_250_000, math.nan)] == ["512 B", "38.2 kB", "1.2 MB", "–"]
    assert [duration(x) for x in (0.42, 12, 200, 3725)] == ["0.4 s", "12.0 s", "3 min 20 s", "1 h 2 min"]
    assert percent(0.414) == "41 %"
    assert math.isnan(number(None))
    assert math.isnan(number("many"))
    assert numbers([1, None], 3)[0] == 1.0
    assert np.isnan(numbers([1, None], 3)[1:]).all()
    assert numbers([1, 2, 3], 2) == [1.0, 2.0]
