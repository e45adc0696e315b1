"""Experiments: what a YAML file may say, what runs follow from it, and that these run, fail, stop and go on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from cafe_flwr.cli import app
from cafe_flwr.data.hub import HUB_SETS
from cafe_flwr.data.stand_ins import write_stand_in
from cafe_flwr.experiments.contents import slug
from cafe_flwr.experiments.execution import execute, run_one
from cafe_flwr.experiments.file import Experiment, read_experiment, smoke_size, with_data_dir
from cafe_flwr.experiments.folders import check_folders, read_summary, state_of
from cafe_flwr.experiments.plan import PlannedRun, check_experiment, plan_runs, plan_trials
from cafe_flwr.methods import METHODS
from tests.federations import Recorded, run_until

TINY = {
    "dataset": "digits",
    "num-clients": 3,
    "num-server-rounds": 2,
    "data.examples-per-client": 40,
    "local-steps": 2,
    "dirichlet-alpha": 1.0,
    "learning-rate": 0.3,
    "train.momentum": 0.0,
}


def tiny(**changes: Any) -> dict[str, Any]:
    """Contents of an experiment with two rows and one seed, with changes."""
    return {"name": "tiny", "seeds": [0], "settings": TINY, "rows": ["cafedistill", "fedavg"], **changes}


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate(tiny(**changes))


def write(folder: Path, content: dict[str, Any] | str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def command(*arguments: object) -> Any:
    """Call ``cafe-flwr compare``."""
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


# --- what a file may say ---------------------------------------------------------------------------------------------


def test_rows_labels_and_defaults(tmp_path: Path) -> None:
    rows = [
        "cafedistill",
        "fedavg",
        {"method": "fedavg", "settings": {"train.prior": True}},
        {"label": "x", "method": "local"},
    ]
    read = read_experiment(write(tmp_path, tiny(rows=rows)))
    assert read.labels == ["cafedistill", "fedavg", "fedavg prior=True", "x"]
    assert read.reference_row == "cafedistill"
    assert read.baseline_rows == ["fedavg"]  # plain method names, without CAFEDistill itself
    assert read.budget == "equal"
    assert read.conditions == [()]


def test_conditions_are_combinations_or_a_list() -> None:
    lists = experiment(vary={"dirichlet-alpha": [0.1, 1.0], "num-clients": [3, 4]})
    assert lists.conditions == [(("dirichlet-alpha", a), ("num-clients", n)) for a in (0.1, 1.0) for n in (3, 4)]
    one_by_one = experiment(vary=[{"dirichlet-alpha": 0.1}, {"num-clients": 4}])
    assert one_by_one.conditions == [(("dirichlet-alpha", 0.1),), (("num-clients", 4),)]
    runs = plan_runs(one_by_one, Path("/nowhere"))
    assert [(r.settings.dirichlet_alpha, r.settings.num_clients) for r in runs[::2]] == [(0.1, 3), (1.0, 4)]
    assert len({run.folder for run in runs}) == 4


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    text = "name: tiny\nseeds: [0]\nrows: [fedavg]\nsettings: {learning-rate: 1e-3}\n"
    assert read_experiment(write(tmp_path, text)).settings == {"learning-rate": 0.001}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'?"),
        ({"rows": [{"method": "fedavg", "setings": {}}]}, "rows[0]: unknown key 'setings'; did you mean 'settings'?"),
        ({"sweep": {"seeds": [1], "trails": {}}}, "sweep: unknown key 'trails'; did you mean 'trials'?"),
        ({"rows": ["fedvag"]}, "unknown method 'fedvag'; did you mean 'fedavg'?"),
        ({"seeds": [0, 1, 0]}, "seeds has 0 more than once"),
        ({"seeds": ["a"]}, "seeds[0] should be a valid integer, got 'a'"),
        ({"seeds": []}, "seeds should have at least 1 item"),
        ({"budget": "equel"}, "budget should be 'equal' or 'published', got 'equel'"),
        ({"name": "../x"}, "name should match pattern"),
        ({"rows": ["fedavg", "fedavg"]}, "two rows have the label 'fedavg'"),
        ({"rows": ["fedavg", {"label": "FedAvg!", "method": "fedavg"}]}, "would share the folder 'fedavg'"),
        ({"reference": "cafedistil"}, "reference: no row is called 'cafedistil'; did you mean 'cafedistill'?"),
        ({"baselines": ["fedprox"]}, "baselines: no row is called 'fedprox'"),
        ({"settings": {"seed": 1}}, "settings: seed is set by the comparison itself"),
        ({"settings": {"train.equal-steps": False}}, "settings: train.equal-steps is set by the comparison itself"),
        ({"rows": [{"method": "fedavg", "settings": {"method": "local"}}]}, "method is set by the comparison itself"),
        ({"rows": [{"method": "fedavg", "settings": {"dirichlet-alpha": 9.0}}]}, "must be the same in all rows"),
        ({"rows": [{"method": "fedavg", "settings": {"local-steps": 9}}]}, "local-steps must be the same in all rows"),
        (
            {"vary": {"mu": [0.1, 0.5]}, "rows": [{"method": "cafedistill", "settings": {"mu": 1.0}}]},
            "mu must be the same in all rows",
        ),
        ({"vary": {"mu": [0.1, 0.1]}}, "vary: mu = 0.1 stands there twice"),
        ({"vary": {"mu": 0.1}}, "vary should"),
        ({"sweep": {"seeds": [1]}}, "sweep: no trials for 'cafedistill', 'fedavg'"),
        ({"sweep": {"seeds": [1, 1], "trials": {"learning-rate": [0.1]}}}, "sweep: seeds has 1 more than once"),
        (
            {
                "sweep": {
                    "seeds": [1],
                    "trials": {"learning-rate": [0.1, 0.3]},
                    "own": {"fedavg": {"train.momentum": [0.9]}},
                }
            },
            "all rows should have the same number of trials, got 'cafedistill' 2, 'fedavg' 1",
        ),
        (
            {
                "sweep": {
                    "seeds": [1],
                    "trials": {"learning-rate": [0.1]},
                    "own": {"fedavgg": {"train.momentum": [0.9]}},
                }
            },
            "sweep: own: no row is called 'fedavgg'; did you mean 'fedavg'?",
        ),
        ({"sweep": {"seeds": [1], "trials": {"num-clients": [5]}}}, "num-clients must be the same in all rows"),
        ({"rows": None}, "rows should be a valid list"),
        ({"smoke": {"setings": {}}}, "smoke: unknown key 'setings'; did you mean 'settings'?"),
        ({"smoke": {"rows": ["fedvag"]}}, "smoke: no row is called 'fedvag'; did you mean 'fedavg'?"),
        ({"smoke": {"seeds": [1, 1]}}, "smoke: seeds has 1 more than once"),
        ({"smoke": {"settings": {"seed": 1}}}, "smoke: settings: seed is set by the comparison itself"),
        ({"smoke": {"settings": {"mu": 1.0}}, "vary": {"mu": [0.1, 0.5]}}, "smoke: settings: mu is varied"),
        ({"smoke": {"vary": {"seed": [1]}}}, "smoke: vary: seed is set by the comparison itself"),
        ({"smoke": {}, "name": "a" * 55}, "name: at most 54 characters"),
    ],
)
def test_refused_in_a_file(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path, tiny(**changes))
    with pytest.raises(ValueError, match=r"experiment\.yaml") as refusal:
        read_experiment(path)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "the key 'name' stands there twice"),
        ("settings: {mu: 1.0, mu: 2.0}\n", "the key 'mu' stands there twice"),
        ("- a\n", "should be a mapping with the keys name, title, seeds"),
        ("name: [\n", "cannot be read"),
        ("name: x\n", "the key 'seeds' is missing"),
    ],
)
def test_refused_text(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"experiment\.yaml") as refusal:
        read_experiment(write(tmp_path, text))
    assert words in str(refusal.value)


def test_steps_may_differ_where_the_budget_is_as_published(tmp_path: Path) -> None:
    rows = ["cafedistill", {"method": "fedavg", "settings": {"local-steps": 9}}]
    runs = plan_runs(experiment(rows=rows, budget="published"), tmp_path)
    assert [(run.settings.local_steps, run.settings.train.equal_steps) for run in runs] == [(2, False), (9, False)]


# --- what runs follow ------------------------------------------------------------------------------------------------


def test_every_row_gets_the_same_but_its_own_settings(tmp_path: Path) -> None:
    rows = ["cafedistill", {"label": "Own (λ = 2)", "method": "cafedistill", "settings": {"distill-weight": 2}}]
    runs = plan_runs(experiment(seeds=[3, 4], rows=rows), tmp_path)
    assert [run.name for run in runs] == ["cafedistill-seed3", "own-2-seed3", "cafedistill-seed4", "own-2-seed4"]
    assert [run.folder for run in runs[:1]] == [tmp_path / "runs" / "cafedistill-seed3"]
    first, second = (run.settings.to_run_config() for run in runs[:2])
    assert {key for key in first if first[key] != second[key]} == {"name", "distill-weight"}
    assert first["train.equal-steps"] is True
    assert first["federation.evaluate-every"] == 10
    (run, _) = plan_runs(experiment(settings={**TINY, "federation.evaluate-every": 1}), tmp_path)
    assert run.settings.federation.evaluate_every == 1


def test_fine_tuning_is_paid_for_with_rounds(tmp_path: Path) -> None:
    """FedBABU fine-tunes for 5 rounds' worth of steps: 7 rounds become 2 + 5; as published it takes all 7 besides."""
    changes = {"settings": {**TINY, "num-server-rounds": 7}, "rows": ["fedavg", "fedbabu"]}
    equal = plan_runs(experiment(**changes), tmp_path)
    published = plan_runs(experiment(**changes, budget="published"), tmp_path)
    assert [run.settings.num_server_rounds for run in equal] == [7, 2]
    assert [run.settings.num_server_rounds for run in published] == [7, 7]
    with pytest.raises(ValueError, match=r"row 'fedbabu'.* leaves no rounds of num-server-rounds \(5\)"):
        plan_runs(experiment(rows=["fedbabu"], settings={**TINY, "num-server-rounds": 5}), tmp_path)


def test_trials_see_validation_data_and_runs_do_not(tmp_path: Path) -> None:
    sweep = {
        "seeds": [7, 8],
        "settings": {"num-server-rounds": 1},
        "trials": {"learning-rate": [0.1, 0.3]},
        "own": {"fedavg": [{"train.momentum": 0.9}, {"learning-rate": 0.5}]},
    }
    swept = experiment(sweep=sweep)
    trials = plan_trials(swept, tmp_path)
    assert len({trial.folder for trial in trials}) == len(trials) == 8
    assert {trial.folder.parent for trial in trials} == {tmp_path / "trials"}
    assert {trial.settings.data.validation_share for trial in trials} == {0.25}
    assert {trial.settings.num_server_rounds for trial in trials} == {1}
    of_fedavg = [t for t in trials if t.row == "fedavg" and t.settings.seed == 7]
    assert [(t.settings.train.momentum, t.settings.learning_rate) for t in of_fedavg] == [(0.9, 0.3), (0.0, 0.5)]
    assert plan_runs(swept, tmp_path, {}) == []  # nothing is chosen yet
    (run,) = plan_runs(swept, tmp_path, {("fedavg", ()): {"learning-rate": 0.5}})
    assert (run.settings.learning_rate, run.settings.data.validation_share, run.settings.num_server_rounds) == (
        0.5,
        0,
        2,
    )


def test_slugs_keep_letters_digits_and_dots() -> None:
    assert slug("FedAvg + prior + distillation") == "fedavg-prior-distillation"
    assert slug("μ = 0.1") == "0.1"


SHIPPED = [path for path in sorted(Path("experiments").glob("*.yaml")) if not path.match("paper-*-small.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_can_run(tmp_path: Path, path: Path) -> None:
    """Those on data sets of the hub: on made-up copies, at their smoke size; test_smoke.py has their small sizes.

    With one seed: others have the same settings, networks and methods.
    """
    published = set(METHODS) - {"cafedistill-text", "cafedistill-prior", "local-kd", "depthfl", "scalefl"}
    shipped = read_experiment(path)
    assert shipped.name == path.stem
    if (name := shipped.settings["dataset"]) in HUB_SETS:
        assert {run.settings.dataset for run in plan_runs(shipped, tmp_path) + plan_trials(shipped, tmp_path)} == {name}
        assert set(shipped.labels) == published
        shipped = with_data_dir(smoke_size(shipped), write_stand_in(tmp_path, name, 400))
    sweep = shipped.sweep and shipped.sweep.model_copy(update={"seeds": shipped.sweep.seeds[:1]})
    check_experiment(shipped.model_copy(update={"seeds": shipped.seeds[:1], "sweep": sweep}), tmp_path / shipped.name)


def test_every_method_is_in_a_shipped_experiment() -> None:
    assert SHIPPED
    assert set(METHODS) <= set(read_experiment(Path("experiments/digit-pairs.yaml")).labels)


# --- refused before anything runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rows": [{"method": "fedavg", "settings": {"learnig-rate": 0.1}}]},
            "row 'fedavg learnig-rate=0.1': unknown setting 'learnig-rate'; did you mean 'learning-rate'?",
        ),
        ({"rows": [{"method": "fedavg", "settings": {"learning-rate": [0.1]}}]}, "learning-rate should be"),
        (
            {"rows": [{"method": "fedavg", "settings": {"mu": 0.1}}]},
            "row 'fedavg mu=0.1': mu would change nothing: it is read with method = 'cafedistill'",
        ),
        ({"settings": {**TINY, "dataset": "cifar10", "data.dir": "/nowhere"}}, "there is no folder /nowhere/cifar10"),
        (
            {"sweep": {"seeds": [1], "trials": {"fedprox.mu": [0.1]}}},
            "row 'fedavg': fedprox.mu would change nothing: it is read with method = 'fedprox', and",
        ),
        (
            {"settings": {**TINY, "ditto.pull": 0.2}},
            "settings: ditto.pull would change nothing: it is read with method = 'ditto', and",
        ),
        ({"vary": {"data.max-tokens": [8, 9]}}, "vary: data.max-tokens would change nothing: it is read with dataset"),
        (
            {"settings": {**TINY, "data.partition": "pathological", "data.classes-per-client": 11}},
            "row 'cafedistill': the pathological partition",
        ),
    ],
)
def test_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    done = command(write(tmp_path, tiny(**changes)), "--results-dir", tmp_path / "results")
    assert done.exit_code == 1
    assert words in done.output
    assert not (tmp_path / "results").exists()


def test_a_method_that_cannot_run_with_the_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: object, network: torch.nn.Module) -> None:
        raise ValueError(f"it needs more than {len(network.stages)} exits")  # type: ignore[arg-type]

    monkeypatch.setattr(METHODS["fedavg"], "check", check)
    with pytest.raises(ValueError, match=r"^row 'fedavg': it needs more than 3 exits$"):
        check_experiment(experiment(), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "fedvag"], "--only: no row is called 'fedvag'; did you mean 'fedavg'?"),
        (["--update-markdown", "missing.md"], "missing.md cannot be updated"),
    ],
)
def test_refused_options(tmp_path: Path, options: list[str], words: str) -> None:
    done = command(write(tmp_path, tiny()), "--results-dir", tmp_path / "results", *options)
    assert done.exit_code == 1
    assert words in done.output
    assert not (tmp_path / "results").exists()


# --- runs, one by one ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_new_resumable_finished_and_foreign(tmp_path: Path, no_report: None) -> None:
    """A run goes through its states; with other settings its folder belongs to another experiment."""
    run, other = plan_runs(experiment(settings={**TINY, "num-server-rounds": 3}), tmp_path)
    assert state_of(run) == "new"
    run_until(run.settings, 1, num_nodes=1)
    assert state_of(run) == "resumable"
    assert run.rounds_done == 1
    assert run_one(run) is None
    assert state_of(run) == "finished"
    assert "Resuming after round 1" in run.log.read_text()

    changed = experiment(settings={**TINY, "num-server-rounds": 3, "learning-rate": 0.1})
    with pytest.raises(
        ValueError, match=r"row 'cafedistill': .* another experiment \(learning-rate was 0.3, now 0.1\)"
    ):
        check_folders(changed, tmp_path)
    assert state_of(plan_runs(changed, tmp_path)[0], undecided={"learning-rate"}) == "finished"
    unread = experiment(settings={**TINY, "num-server-rounds": 3, "fedprox.mu": 0.5})  # CAFEDistill does not read it
    assert state_of(plan_runs(unread, tmp_path)[0]) == "finished"
    other.folder.mkdir()
    (other.folder / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"in the way.*choose another name"):
        check_folders(experiment(settings={**TINY, "num-server-rounds": 3}), tmp_path)


@pytest.mark.slow
def test_a_resumed_run_ends_like_one_that_was_never_stopped(tmp_path: Path, no_report: None) -> None:
    (whole, _) = plan_runs(experiment(settings={**TINY, "num-server-rounds": 3}), tmp_path / "whole")
    (stopped, _) = plan_runs(experiment(settings={**TINY, "num-server-rounds": 3}), tmp_path / "stopped")
    run_until(stopped.settings, 2, num_nodes=1)
    assert run_one(whole) is run_one(stopped) is None
    Recorded.read(whole.folder).assert_same(Recorded.read(stopped.folder))


def test_a_failed_run_gives_the_last_line_of_its_reason_and_a_log(tmp_path: Path, no_report: None) -> None:
    (run,) = plan_runs(
        experiment(rows=["fedavg"], settings={**TINY, "learning-rate": 1e3, "train.weight-decay": 1e9}), tmp_path
    )
    reason = run_one(run)
    assert reason is not None
    assert "NaN or infinite" in reason
    assert "\n" not in reason
    assert reason in run.log.read_text()
    assert "Traceback" in run.log.read_text()
    assert state_of(run) == "new"


def test_a_run_says_nothing_aloud_and_leaves_the_log_as_it_was(
    tmp_path: Path, no_report: None, capfd: pytest.CaptureFixture[str]
) -> None:
    from cafe_flwr.core.log import logger

    before = logger.handlers[:], logger.level, logger.propagate
    assert run_one(plan_runs(experiment(), tmp_path)[0]) is None
    assert capfd.readouterr() == ("", "")
    assert (logger.handlers, logger.level, logger.propagate) == before


@pytest.mark.slow
def test_rows_start_from_the_same_weights_data_and_participants(tmp_path: Path, no_report: None) -> None:
    """At a learning rate of 1e-30 no weight moves in float32: what a run ends with is what it started from.

    Personal classifiers start at zero. Shared ones start as they were built, and so do those of cafedistill-text.
    """
    settings = {**TINY, "learning-rate": 1e-30, "federation.fraction-train": 0.5, "num-clients": 4}
    built, zero = ["fedavg", "cafedistill-text"], ["cafedistill", "cafedistill-plus", "fedper", "local", "fedrep"]
    rows = [*built, *zero]
    runs = plan_runs(experiment(rows=rows, settings=settings), tmp_path)
    assert [run_one(run) for run in runs] == [None] * len(rows)
    summaries = [read_summary(run) or {} for run in runs]
    for run, summary in zip(runs, summaries, strict=True):
        for client in range(4):
            reference = load_file(runs[0].folder / "personal" / f"client-{client}.safetensors")
            tensors = load_file(run.folder / "personal" / f"client-{client}.safetensors")
            assert tensors.keys() == reference.keys()
            for name, tensor in tensors.items():
                start = torch.zeros_like(tensor) if ".head." in name and run.row in zero else reference[name]
                torch.testing.assert_close(tensor, start, rtol=0, atol=1e-7)
        sizes = [[c[key] for key in ("train", "calibration", "test", "classes")] for c in summary["clients"]]
        first = [[c[key] for key in ("train", "calibration", "test", "classes")] for c in summaries[0]["clients"]]
        assert sizes == first
        lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
        of_first = [json.loads(line) for line in (runs[0].folder / "rounds.jsonl").read_text().splitlines()]
        assert [line["participants"] for line in lines] == [line["participants"] for line in of_first]


# --- processes -------------------------------------------------------------------------------------------------------


class Deadly(PlannedRun):
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


@pytest.mark.slow
def test_processes_run_side_by_side_and_one_that_dies_or_fails_stops_no_other(tmp_path: Path) -> None:
    """Four runs on two processes: one dies with its process, one fails, two finish, with one thread each."""
    good = plan_runs(experiment(seeds=[0, 1], rows=["fedavg"]), tmp_path)
    (bad,) = plan_runs(
        experiment(rows=["local"], settings={**TINY, "learning-rate": 1e3, "train.weight-decay": 1e9}), tmp_path
    )
    (deadly,) = plan_runs(experiment(rows=["fedper"]), tmp_path)
    runs = [Deadly(deadly.row, deadly.condition, deadly.settings), bad, *good]
    before = dict(os.environ)
    events = [event for event in execute(runs, jobs=2) if event]
    started = [event.run.name for event in events if not event.ended]
    ended = {event.run.name: event.failure for event in events if event.ended}
    assert started == [run.name for run in runs]
    assert ended.keys() == {run.name for run in runs}
    assert ended["fedper-seed0"] == "its process died: killed, perhaps for lack of memory"
    assert "NaN or infinite" in str(ended["local-seed0"])
    assert [state_of(run) for run in good] == ["finished", "finished"]
    assert multiprocessing.active_children() == []
    assert dict(os.environ) == before


@pytest.mark.slow
def test_who_stops_listening_stops_the_workers(tmp_path: Path) -> None:
    (run,) = plan_runs(experiment(rows=["fedavg"], settings={**TINY, "num-server-rounds": 5000}), tmp_path)
    with contextlib.closing(execute([run], jobs=2)) as events:
        while run.rounds_done < 2:  # the first round has its checkpoint when the second is on record
            next(events)
    assert multiprocessing.active_children() == []
    assert state_of(run) == "resumable"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    """The second row takes 5,000 rounds; when the first has finished, the command is interrupted, then given again."""
    rows = ["fedavg", {"label": "long", "method": "fedavg", "settings": {"num-server-rounds": 5000}}]
    file = write(tmp_path, tiny(rows=rows, budget="published"))
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # CI may have it ignored
    program = f"{listen}; from cafe_flwr.cli import app; app()"
    call = [sys.executable, "-u", "-c", program, "compare", str(file), "--results-dir", str(tmp_path)]
    lines = []
    with subprocess.Popen([*call, "--jobs", "1"], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("finished fedavg-seed0"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, lines
    # the progress bar's own thread may draw once more after it
    assert any("give the same command again" in line for line in lines[-2:]), lines
    done = command(file, "--results-dir", tmp_path, "--only", "fedavg")
    assert done.exit_code == 0, done.output
    assert "1 of 1 runs are finished already" in done.output


def test_common_settings_are_left_out_of_rows_that_do_not_read_them(tmp_path: Path) -> None:
    """One row reads each of them; a setting of a row is never left out."""
    settings = {**TINY, "mu": 0.9, "fedprox.mu": 0.5}
    ours, theirs = plan_runs(experiment(rows=["cafedistill", "fedprox"], settings=settings), tmp_path)
    assert (ours.settings.mu, theirs.settings.fedprox.mu) == (0.9, 0.5)
    assert (theirs.settings.mu, ours.settings.fedprox.mu) == (0.6, 0.01)
    for run in (ours, theirs):
        run.settings.check_read()


def test_settings_are_in_tables_or_have_a_dot_or_their_name_of_before(tmp_path: Path, caplog: Any) -> None:
    """The same experiment: all places take all three; labels and folders are called as ever."""
    tables = {"settings": {"train": {"momentum": 0.5}}, "vary": {"data": {"rotations": [1, 4]}}}
    tables["rows"] = [{"method": "ditto", "settings": {"ditto": {"pull": 0.2}}}]
    dots = {"settings": {"train.momentum": 0.5}, "vary": {"data.rotations": [1, 4]}}
    dots["rows"] = [{"method": "ditto", "settings": {"ditto.pull": 0.2}}]
    before = {"settings": {"momentum": 0.5}, "vary": {"rotations": [1, 4]}}
    before["rows"] = [{"method": "ditto", "settings": {"ditto-pull": 0.2}}]
    contents = ({"name": "same", "seeds": [0], **content} for content in (tables, dots, before))
    one, other, old = (plan_runs(read_experiment(write(tmp_path, content)), tmp_path) for content in contents)
    assert one == other == old
    assert [run.name for run in one] == ["ditto-pull-0.2--rotations-1-seed0", "ditto-pull-0.2--rotations-4-seed0"]
    with pytest.raises(ValueError, match=r"'momentum' and 'train.momentum' are the same setting"):
        read_experiment(
            write(tmp_path, {**before, "name": "x", "seeds": [0], "settings": {"momentum": 0, "train.momentum": 0}})
        )
