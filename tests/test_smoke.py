"""Experiments at their smoke size, and what is said of time and memory before runs start."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from federations import changed, key_of, value_of
from typer.testing import CliRunner

from cafe_flwr.app.parts import build_network, federation
from cafe_flwr.cli import app
from cafe_flwr.data.hub import HUB_SETS, open_set
from cafe_flwr.data.stand_ins import write_stand_in
from cafe_flwr.experiments.estimate import _PROCESS, _SIZES, estimate, measure
from cafe_flwr.experiments.file import Experiment, read_experiment, smoke_size, with_data_dir
from cafe_flwr.experiments.plan import check_experiment, plan_runs, plan_trials
from cafe_flwr.settings import OPTIONS

PAPER = [Path("experiments") / f"paper-{name}.yaml" for name in HUB_SETS]
SMALL = [Path("experiments") / f"paper-{name}-small.yaml" for name in (*HUB_SETS, "pacs")]
CONTENT = {
    "name": "whole",
    "title": "A title",
    "seeds": [1, 2, 3],
    "settings": {"dataset": "digits", "num-clients": 20, "num-server-rounds": 50, "learning-rate": 0.2},
    "vary": {"dirichlet-alpha": [0.5, 1.0]},
    "rows": ["cafedistill", "fedavg", "local"],
    "sweep": {"seeds": [9], "trials": {"learning-rate": [0.1, 0.2]}},
    "smoke": {"settings": {"num-clients": 3, "num-server-rounds": 2}, "rows": ["fedavg", "local"]},
}


def compare(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def write(folder, **changes):
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, **changes}))
    return path


def test_the_smoke_size_is_the_experiment_but_for_what_its_section_names():
    small = smoke_size(Experiment.model_validate(CONTENT))
    assert (small.name, small.seeds, small.labels) == ("whole-smoke", [0], ["fedavg", "local"])
    assert small.title.startswith("SMOKE RUN")
    assert small.settings == {**CONTENT["settings"], "num-clients": 3, "num-server-rounds": 2}
    assert plan_trials(small, Path("/x")) == []
    runs = plan_runs(small, Path("/x"))
    assert [(r.row, r.settings.dirichlet_alpha) for r in runs] == [
        (row, alpha) for alpha in (0.5, 1.0) for row in ("fedavg", "local")
    ]
    assert small.reference_row == "fedavg"  # cafedistill does not run
    one = {**CONTENT, "smoke": {"vary": {"dirichlet-alpha": [0.7]}}}
    runs = plan_runs(smoke_size(Experiment.model_validate(one)), Path("/x"))
    assert {run.settings.dirichlet_alpha for run in runs} == {0.7}


@pytest.mark.slow
@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_the_papers_experiments_at_a_size_for_two_cores_deal_real_data_out(path, real_data):
    """Everything that a run needs is built on the real rows: clients' data, networks and methods."""
    small = with_data_dir(read_experiment(path), real_data)
    check_experiment(small, Path("/x"))
    data = federation(plan_runs(small, Path("/x"))[0].settings)
    client = data.load(1)
    assert len(client.calibration) == 0
    assert len(client.test) / len(client.train) == pytest.approx(1 / 3, rel=0.05)


def test_without_a_smoke_size_the_option_is_refused(tmp_path):
    path = write(tmp_path)
    path.write_text(yaml.safe_dump({key: value for key, value in CONTENT.items() if key != "smoke"}))
    done = compare(path, "--smoke", "--results-dir", tmp_path / "results")
    assert done.exit_code == 1
    assert "'whole' has no smoke size" in done.output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_experiments_are_what_is_published(path):
    whole = read_experiment(path)
    runs = plan_runs(whole, Path("/x"))
    dataset = whole.settings["dataset"]
    texts = dataset == "ag-news"
    published = {
        "network": {"cifar10": "published-conv", "ag-news": "published-transformer"}.get(dataset, "published-resnet18"),
        "num_clients": 100,
        "fraction_train": 0.1,
        "local_epochs": 5,
        "batch_size": 64,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "learning_rate_schedule": "exponential",
        "learning_rate_decay": 0.99,
        "momentum": 0.9,
        "keep_momentum": True,
        "weight_decay": 1e-4,
        "max_grad_norm": 0.0,
        "mu": 0.15 if texts else 0.6,
        "distill_weight": 0.2 if texts else 1.0,
        "temperature": 2.0,
        "partition": "dirichlet",
        "dirichlet_alpha": 0.3,
        "dirichlet_cap": True,
        "calibration_share": 0.0,
        "test_share": 0.25,
        "evaluate_every": 1,
    }
    published |= {"text_part": "title", "vocabulary": 32000, "max_tokens": 200} if texts else {"augmentation": "none"}
    for run in runs:
        read = {key: value for key, value in published.items() if key_of(key) not in run.settings.not_read()}
        assert {key: value_of(run.settings, key) for key in read} == read
        rounds = run.settings.num_server_rounds + run.settings.build_method().extra_rounds()  # FedBABU's fine-tuning
        assert rounds == (100 if texts else 300)
    small = smoke_size(whole)
    assert plan_runs(small, Path("/x"))
    assert small.labels == whole.labels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "ag-news"])
def test_a_papers_experiment_runs_at_its_smoke_size_on_made_up_files(name, tmp_path, no_report, monkeypatch):
    """Two rows of it, in real worker processes; the page, tables and folder say what they are."""
    monkeypatch.setattr("cafe_flwr.cli.compare._SMOKE_ROWS", 120)
    content = yaml.safe_load((Path("experiments") / f"paper-{name}.yaml").read_text())
    content["smoke"]["rows"] = ["cafedistill", "fedavg"]
    content["smoke"]["settings"]["num-server-rounds"] = 2
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(content))
    done = compare(path, "--smoke", "--results-dir", tmp_path / "results", "--jobs", 1)
    assert done.exit_code == 0, done.output
    assert re.search(r"Estimate, from one step of \S+ s and one evaluation here: .* [MG]B of memory", done.output)
    home = tmp_path / "results" / f"paper-{name}-smoke"
    for text in (done.output, (home / "table.md").read_text(), (home / "comparison.html").read_text()):
        assert "SMOKE RUN" in text
    for row in ("cafedistill", "fedavg"):
        (run,) = (home / "runs").glob(f"{row}-seed0")
        settings = json.loads((run / "settings.json").read_text())
        assert settings["data.dir"] == str(home / "made-up-data")
        assert json.loads((run / "summary.json").read_text())["local_steps_per_client"] == 4


def test_a_copy_that_is_named_is_used_and_nothing_is_made_up(tmp_path):
    home = write_stand_in(tmp_path / "copies", "cifar10", 120)
    path = write(tmp_path, settings={"dataset": "cifar10", "num-clients": 2})
    done = compare(path, "--smoke", "--data-dir", home, "--results-dir", tmp_path / "results", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "made-up" not in done.output
    assert "Estimate, from one step" in done.output
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_a_made_up_set_has_the_hubs_columns_and_is_never_written_over_real_data(tmp_path):
    script = [sys.executable, "scripts/make_local_data.py", "cifar100", str(tmp_path), "--rows", "40"]
    assert subprocess.run(script, capture_output=True).returncode == 0
    made = open_set("cifar100", str(tmp_path))
    assert (len(made.labels), len(made.class_names)) == (40, 100)
    again = subprocess.run(script, capture_output=True, text=True)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    for name, rows, words in (("cifar", 40, "choose from cifar10"), ("cifar10", 3, "4 rows or more")):
        with pytest.raises(ValueError, match=words):
            write_stand_in(tmp_path, name, rows)


# --- time and memory ---


def planned(**changes):
    settings = {
        "dataset": "digits",
        "num-clients": 3,
        "num-server-rounds": 40,
        "local-steps": 10,
        "train.batch-size": 8,
    }
    content = {"name": "e", "seeds": [0, 1], "settings": {**settings, **changes}, "rows": ["fedavg"]}
    return plan_runs(Experiment.model_validate(content), Path("/nowhere"))


def test_time_is_rounds_times_clients_times_steps_and_evaluations(monkeypatch):
    monkeypatch.setattr("cafe_flwr.experiments.estimate.measure", lambda settings: replaced)
    replaced = measure(planned()[0].settings)
    object.__setattr__(replaced, "step", 2.0)
    object.__setattr__(replaced, "evaluation", 0.5)
    examples = replaced.examples
    assert examples == 600
    one = 3 + 40 * 3 * 10 * 2.0 + 4 * 2 * examples * 0.4 * 0.5
    assert estimate(planned(), 1).seconds == pytest.approx(2 * one)
    assert estimate(planned(), 2).seconds == pytest.approx(one)
    assert estimate(planned(), 9).jobs == 2
    half = 3 + 40 * 2 * 10 * 2.0 + 4 * 2 * (examples * 2 / 3) * 0.4 * 0.5
    assert estimate(planned(**{"federation.fraction-train": 0.6}), 2).seconds == pytest.approx(half)
    epochs = 3 + 40 * 3 * 2 * (600 * 0.48 / 3 / 8) * 2.0 + 4 * 2 * examples * 0.4 * 0.5
    assert estimate(planned(**{"local-epochs": 2}), 2).seconds == pytest.approx(epochs)


def test_memory_is_the_networks_the_data_and_what_a_step_keeps():
    settings = planned()[0].settings
    measured = measure(settings)
    network = build_network(settings)
    assert measured.network == 4 * sum(p.numel() for p in network.parameters())
    assert measured.example == 16 * 16 * 4
    wide = measure(changed(settings, {"train.batch-size": 16}))
    assert wide.activations == pytest.approx(2 * measured.activations, rel=0.1)
    biggest = 8 * 8 * 16 * 16 * 4  # the first convolution's output alone
    assert 2 * biggest < measured.activations < 8 * biggest
    one, two = (estimate(planned(), jobs).memory for jobs in (1, 2))
    worker = _PROCESS + 600 * measured.example + 7 * measured.network + measured.activations
    assert (one, two) == (_PROCESS + worker, _PROCESS + 2 * worker)


def test_what_is_measured_leaves_threads_and_the_clients_data_as_they_were():
    settings, threads = planned()[0].settings, torch.get_num_threads()
    torch.set_num_threads(2)
    before = federation(settings).load(0).train.x.clone()
    measure(settings)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(before, federation(settings).load(0).train.x)
    assert set(_SIZES) <= set(OPTIONS)
