"""A node works with its own network when the server and its results are gone, and a new client joins."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import Result
from federations import (
    CLASSES,
    INPUTS,
    DeviceGrid,
    changed,
    digits_app,
    run_small,
    small_settings,
    toy_app,
    toy_data,
    toy_network,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from cafe_flwr import EarlyExitNetwork, __version__
from cafe_flwr.app.joining import RunMetadata, mean_head, package, package_run
from cafe_flwr.app.parts import build_network, federation
from cafe_flwr.app.source import NodeNetwork, parts_of
from cafe_flwr.cli import app
from cafe_flwr.client.model import ClientModel
from cafe_flwr.client.newcomer import Newcomer, join, mean_heads
from cafe_flwr.core.random import seeded
from cafe_flwr.core.schema import Schema
from cafe_flwr.data import Split
from cafe_flwr.device import load
from cafe_flwr.inference import EarlyExitRunner
from cafe_flwr.methods import METHODS, CafeDistillMethod, LocalResult, LocalTask
from cafe_flwr.methods.server import ClientRecord
from cafe_flwr.metrics import evaluate
from cafe_flwr.networks import Exit
from cafe_flwr.personal import FinishedRun, fingerprint
from cafe_flwr.personal.calibration import read_thresholds
from cafe_flwr.personal.evaluation import evaluate_run
from cafe_flwr.personal.package import Package
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.settings import Settings
from cafe_flwr.training import LocalBudget, snapshot

MEMBERS, NEWCOMER = [0, 1, 2, 3], 4


class Ended(NamedTuple):
    """A federation that has ended: what its server had, kept for comparison, and the state folder of its nodes."""

    settings: Settings
    results: Path
    state: Path
    package: Path


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Four of five clients train; the results folder is moved away, so nothing can look into it."""
    folder = tmp_path_factory.mktemp("ended")
    settings = small_settings(
        folder,
        num_server_rounds=12,
        examples_per_client=160,
        calibration_share=0.3,
        dirichlet_alpha=0.3,
        mu=0.2,
        local_steps=12,
        learning_rate=0.3,
        momentum=0.0,
        wait_seconds=0.0,
        evaluate_every=12,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        grid = DeviceGrid(digits_app(), ["0,1", "2,3"], folder / "state")
        for context in grid.contexts.values():
            context.run_config = settings.to_run_config()
        run_small(settings, grid=grid)
    call("join-package", settings.results, "--to", folder / "joining.safetensors")
    kept = folder / "kept"
    settings.results.rename(kept)
    return Ended(settings, kept, folder / "state", folder / "joining.safetensors")


@pytest.fixture
def state(ended: Ended, tmp_path: Path) -> Path:
    """A copy of the state folder, to be spoiled."""
    return Path(shutil.copytree(ended.state, tmp_path / "state"))


def call(*args: object, fails: str = "") -> Result:
    """Run the command line; with ``fails`` it must end with 1 and say so."""
    result = CliRunner().invoke(app, list(map(str, args)))
    text = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == bool(fails), text
    assert fails in text, text
    return result


def on_node(command: str, state: Path, *args: object, client: int = 3, fails: str = "") -> Result:
    return call("node", command, "--state-dir", state, "--client", client, *args, fails=fails)


# --- a node and its own network ---


@pytest.mark.slow
def test_a_node_evaluates_as_the_server_would(ended: Ended, state: Path) -> None:
    """Not a figure differs from those of the results folder, for the one client."""
    on_node("evaluate", state, "--no-corruptions")
    found = json.loads((state / "client-3.evaluation.json").read_text())
    (state / "personal").mkdir()
    for path in [*ended.results.glob("settings.json"), *ended.state.glob("client-*.*")]:
        shutil.copy(path, state / "personal" if path.name.startswith("client") else state)
    evaluate_run(FinishedRun(state), clients=[3], corruptions=())
    server = json.loads((state / "evaluation.json").read_text())
    for key in ("clients", "conditions", "macs_per_exit"):
        assert found[key] == server[key]
    assert found["clients"][0]["accuracy"] == json.loads((state / "client-3.json").read_text())["accuracy_per_exit"]
    assert len(pd.read_parquet(state / "client-3.evaluation.parquet")) > 0


@pytest.mark.slow
def test_what_a_node_calibrates_and_exports_predicts_as_its_network(state: Path) -> None:
    on_node("calibrate", state, "--risk", "0.1")
    thresholds = read_thresholds(state, 3)
    own = NodeNetwork(state, 3)
    network, x = own.personal(3).network, own.data(3).test.x
    assert thresholds is not None
    assert thresholds.fingerprint == fingerprint(network)
    assert thresholds.coverage > 0  # otherwise the export never stops, and this shows little
    assert json.loads((state / "client-3.calibration.json").read_text())["risk"] == 0.1
    on_node("export", state)
    device, here = load(state / "exported" / "client-3").predict(x.numpy()), EarlyExitRunner(network, thresholds)
    expected = here.predict(x)
    np.testing.assert_array_equal(device.labels, expected.labels)
    np.testing.assert_array_equal(device.exits, expected.exits)
    assert len(set(device.exits.tolist())) > 1
    manifest = json.loads((state / "exported" / "client-3" / "manifest.json").read_text())
    assert manifest["class_names"] == list("0123456789")
    assert manifest["pixels"]["mean"] == 0.3
    on_node("export", state, "--to", state / "other", "--max-prob", "0.5")
    assert json.loads((state / "other" / "manifest.json").read_text())["thresholds"]["thresholds"] == [0.5, 0.5]


@pytest.mark.slow
def test_the_client_need_not_be_named_where_there_is_one(state: Path) -> None:
    call(
        "node", "evaluate", "--state-dir", state, "--no-corruptions", fails="networks of clients 0, 1, 2, 3: say which"
    )
    for client in (0, 1, 2):
        (state / f"client-{client}.safetensors").unlink()
    call("node", "evaluate", "--state-dir", state, "--no-corruptions")
    assert (state / "client-3.evaluation.json").is_file()


def test_a_run_that_has_not_finished_is_said_to_be_unfinished(state: Path) -> None:
    (state / "client-3.safetensors").unlink()
    on_node(
        "evaluate", state, fails="personal state of client 3 after round 12, but no published network: the run has not"
    )
    on_node("export", state, client=9, fails="holds no personal network of client 9; it has those of clients 0, 1, 2")
    on_node("export", state / "nowhere", fails="there is no such folder")
    for path in state.glob("client-*"):
        path.unlink()
    call("node", "export", "--state-dir", state, fails="the run has not finished")


def test_files_of_another_client_or_damaged_ones_are_refused(state: Path) -> None:
    shutil.copy(state / "client-2.json", state / "client-3.json")
    on_node("calibrate", state, fails="is of client 2 in format 1, expected client 3")
    shutil.copy(state / "client-0.safetensors", state / "client-1.safetensors")
    on_node("calibrate", state, client=1, fails="not the file that client 1 published")
    weights = state / "client-2.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)  # a flipped bit, which safetensors does not notice
    on_node("export", state, client=2, fails="client-2.safetensors is damaged, or not")
    weights.write_bytes(content[:500])
    on_node("export", state, client=2, fails="the personal network of client 2")
    for text in ("{", "[]"):
        (state / "client-2.json").write_text(text)
        on_node("export", state, client=2, fails="is damaged")


def test_facts_without_settings_are_said_to_be_of_an_earlier_version(state: Path) -> None:
    metadata = json.loads((state / "client-3.json").read_text())
    del metadata["context"]
    (state / "client-3.json").write_text(json.dumps(metadata))
    on_node("evaluate", state, fails="published by an earlier version. Use the commands on the results folder")


def test_thresholds_of_another_network_are_not_exported(state: Path) -> None:
    on_node("calibrate", state, "--risk", "0.3", client=2)
    shutil.copy(state / "client-2.thresholds.json", state / "client-3.thresholds.json")
    on_node("export", state, fails="calibrate this one")
    assert not (state / "exported").exists()


def images(folder: Path, names: str, size: int = 16, each: int = 12) -> Path:
    """A folder of noise with one subfolder per class."""
    rng = np.random.default_rng(0)
    for name in names.split():
        (folder / name).mkdir(parents=True)
        for k in range(each):
            Image.fromarray(rng.integers(0, 255, (size, size), dtype=np.uint8)).save(folder / name / f"{k}.png")
    return folder


@pytest.mark.slow
def test_a_node_may_bring_a_folder_of_its_own(state: Path, tmp_path: Path) -> None:
    own = NodeNetwork(state, 3, data_dir=images(tmp_path / "images", "3 7", size=20))
    data = own.data(3)
    assert data.test.x.shape[1:] == (1, 16, 16)  # made to fit
    assert set(data.train.y.tolist()) == {3, 7}
    assert own.pixels == (0.5, 0.5)
    on_node("evaluate", state, "--data", tmp_path / "images", "--no-corruptions")
    on_node(
        "evaluate", state, "--data", images(tmp_path / "animals", "cat 3"), fails="labels the federation does not know"
    )
    on_node("evaluate", state, "--data", tmp_path / "nothing", fails="there is no such file or folder")


@pytest.mark.slow
def test_data_in_a_node_s_own_folder_is_found_again_also_when_it_moved(tmp_path: Path, no_report: None) -> None:
    """Clients that brought their own data: nothing of the server is needed, and the splits are those of the run."""
    from client_app import app as client_app

    settings = small_settings(
        tmp_path,
        dataset="local",
        class_names="bright,dark,flat",
        image_size=16,
        image_channels=1,
        num_clients=2,
        num_server_rounds=1,
        wait_seconds=0.0,
    )
    state, home = tmp_path / "state", tmp_path / "data"
    for client in range(2):
        images(home / f"client-{client}", "dark flat")
    grid = DeviceGrid(client_app, ["0,1"], state)
    for context in grid.contexts.values():
        context.run_config = settings.to_run_config()
        context.node_config["data-dir"] = str(home)
    run_small(settings, grid=grid)
    shutil.rmtree(settings.results)
    published = json.loads((state / "client-1.json").read_text())["accuracy_per_exit"]

    def accuracy(*args: object) -> list[float]:
        on_node("evaluate", state, "--no-corruptions", *args, client=1)
        return json.loads((state / "client-1.evaluation.json").read_text())["clients"][0]["accuracy"]

    assert accuracy() == published
    home.rename(tmp_path / "moved")
    on_node("evaluate", state, client=1, fails="there is no such file or folder on this node")
    assert accuracy("--data", tmp_path / "moved") == published
    assert accuracy("--data", tmp_path / "moved" / "client-1") == published
    assert NodeNetwork(state, 1, data_dir=tmp_path / "moved").class_names == ("bright", "dark", "flat")


@pytest.mark.slow
def test_a_data_set_dealt_out_from_a_folder_is_dealt_out_alike_where_it_is_now(tmp_path: Path, no_report: None) -> None:
    """In a simulation all share one folder; no training example may become a test example. Newcomers bring theirs."""
    folder = images(tmp_path / "images", "0 1 2", each=20)
    settings = small_settings(tmp_path, dataset=f"local:{folder}", num_clients=2, num_server_rounds=1)
    run_small(settings)
    state = Path(shutil.copytree(settings.results / "personal", tmp_path / "state"))
    package_run(settings.results).save(tmp_path / "joining.safetensors")
    shutil.rmtree(settings.results)
    before = federation(settings).load(1)
    folder.rename(tmp_path / "moved")
    own = NodeNetwork(state, 1, data_dir=tmp_path / "moved")
    assert all(
        torch.equal(a.x, b.x)
        for a, b in zip(*((data.train, data.calibration, data.test) for data in (own.data(1), before)), strict=True)
    )
    on_node("evaluate", state, "--data", tmp_path / "moved", "--no-corruptions", client=1)

    new = ("join", tmp_path / "joining.safetensors", "--client", 9, "--state-dir", tmp_path / "new", "--epochs", 1)
    call(*new, fails="say where this client's is (--data)")  # no path of a package is read
    call(*new, "--data", images(tmp_path / "own", "1 2", size=20))
    call("node", "evaluate", "--state-dir", tmp_path / "new", "--no-corruptions")


OWN_APP = """
from federations import toy_app, toy_data, toy_network
from cafe_flwr import make_client_app

app = toy_app()
wide = make_client_app(lambda context: toy_network(width=7), lambda client, context: toy_data(client))
strange = make_client_app(lambda context: toy_network(), lambda client, context: shifted(client))
by_hand = object()

def shifted(client):
    data = toy_data(client)
    data.test.y[0] = 3
    return data
"""


@pytest.mark.slow
def test_a_project_of_one_s_own_names_its_client_app(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings(tmp_path, num_clients=3, num_server_rounds=2)
    (tmp_path / "own_project.py").write_text(OWN_APP)
    monkeypatch.chdir(tmp_path)
    run_small(settings, app=parts_app("own_project:app"))
    state = Path(shutil.copytree(settings.results / "personal", tmp_path / "state"))
    shutil.rmtree(settings.results)
    on_node("evaluate", state, "--app", "own_project:app", client=1)
    found = json.loads((state / "client-1.evaluation.json").read_text())
    assert found["clients"][0]["accuracy"] == json.loads((state / "client-1.json").read_text())["accuracy_per_exit"]
    on_node("export", state, "--app", "own_project:app", client=1)
    device = load(state / "exported" / "client-1")
    network = NodeNetwork(state, 1, parts_of("own_project:app")).personal(1).network
    x = toy_data(1).test.x
    np.testing.assert_array_equal(device.predict(x.numpy()).labels, network(x)[-1].argmax(1).numpy())
    assert device.manifest["class_names"] == ["0", "1", "2"]
    for name, reason in (
        ("own_project", "named 'module:attribute'"),
        ("own_project:nothing", "cannot be loaded"),
        ("no_such_project:app", "cannot be loaded"),
        ("own_project:by_hand", "was not made by cafe_flwr.make_client_app"),
        ("own_project:wide", "holds the weights of another network"),
        ("own_project:strange", "its test split has labels 0..3, expected 0..2"),
    ):
        on_node("evaluate", state, "--app", name, client=1, fails=reason)


def parts_app(name: str) -> Any:
    """The ClientApp of a module."""
    from importlib import import_module

    parts_of(name)
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


# --- a new client ---


def joined(ended: Ended, state: Path, *args: object, fails: str = "") -> Result:
    return call("join", ended.package, "--client", NEWCOMER, "--state-dir", state, *args, fails=fails)


def test_a_newcomer_gets_a_network_better_than_the_mean_and_than_its_own_effort(ended: Ended, tmp_path: Path) -> None:
    """By one command, with nothing of the server but the package; the backbone is the federation's."""
    from benchmarks.joining import train_alone

    said = joined(ended, tmp_path, "--epochs", 5)
    own = NodeNetwork(tmp_path, NEWCOMER)
    personal, data = own.personal(NEWCOMER), own.data(NEWCOMER)
    got = Package.load(ended.package)
    tensors = personal.network.state_dict()
    assert all(torch.equal(tensors[name], shared) for name, shared in got.shared.items())
    accuracy = evaluate(personal.network, data.test).accuracy
    assert accuracy == personal.metadata["accuracy_per_exit"]
    assert " ".join(f"{a:.3f}" for a in accuracy) in said.output
    assert personal.metadata["joined"]["local_steps"] >= 10

    with seeded(ended.settings.seed):
        network = build_network(ended.settings)
    work = ClientModel(network, ended.settings.build_method(), snapshot(network))
    names = network.head_names(2)
    network.load_state_dict({**work.weights, **got.shared})
    for k in range(3):
        network.load_state_dict(
            dict(zip(network.head_names(k), (got.teacher[n] for n in names), strict=True)), strict=False
        )
    start = np.mean(evaluate(network, data.test).accuracy)
    network.load_state_dict(work.weights)
    alone = np.mean(evaluate(train_alone(work, got.metadata, NEWCOMER, data, epochs=5), data.test).accuracy)
    assert np.mean(accuracy) > max(start, alone) + 0.05


def test_only_classifiers_move_while_a_newcomer_trains(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every epoch, not only at the end: otherwise they would learn for a backbone that is not there in use."""
    train, shared, seen = CafeDistillMethod.train, Package.load(ended.package).shared, []

    def watched(method: CafeDistillMethod, task: LocalTask) -> LocalResult:
        result = train(method, task)
        seen.append(all(torch.equal(task.network.state_dict()[name], tensor) for name, tensor in shared.items()))
        return result

    monkeypatch.setattr(CafeDistillMethod, "train", watched)
    joined(ended, tmp_path, "--epochs", 2)
    assert seen == [True, True]


@pytest.mark.slow
def test_the_commands_of_a_node_work_for_a_newcomer(ended: Ended, tmp_path: Path) -> None:
    joined(ended, tmp_path)
    for command in ("evaluate", "calibrate", "export"):
        call("node", command, "--state-dir", tmp_path)
    network = NodeNetwork(tmp_path, NEWCOMER).personal(NEWCOMER).network
    x = NodeNetwork(tmp_path, NEWCOMER).data(NEWCOMER).test.x
    thresholds = read_thresholds(tmp_path, NEWCOMER)
    assert thresholds is not None
    exported = load(tmp_path / "exported" / "client-4").predict(x.numpy())
    np.testing.assert_array_equal(exported.labels, EarlyExitRunner(network, thresholds).predict(x).labels)


def test_a_newcomer_with_a_folder_of_its_own_is_found_again(ended: Ended, tmp_path: Path) -> None:
    """It may have a number that the partition of the run does not know, and need not name its folder again."""
    folder, state = images(tmp_path / "images", "1 5 6"), tmp_path / "state"
    call(
        "join", ended.package, "--client", 40, "--state-dir", state, fails="dealt out to clients 0..4, and client 40 is"
    )
    call("join", ended.package, "--client", 40, "--state-dir", state, "--data", folder, "--epochs", 2)
    call("node", "evaluate", "--state-dir", state, "--no-corruptions")
    found = json.loads((state / "client-40.evaluation.json").read_text())["clients"][0]
    assert found["accuracy"] == json.loads((state / "client-40.json").read_text())["accuracy_per_exit"]
    call(
        "join",
        ended.package,
        "--client",
        41,
        "--state-dir",
        state,
        "--data",
        images(tmp_path / "b", "cat"),
        fails="'cat'",
    )
    assert not list(state.glob("client-41*"))


def test_joining_the_same_package_twice_gives_the_same_network(ended: Ended, tmp_path: Path) -> None:
    for name in ("a", "b"):
        joined(ended, tmp_path / name, "--epochs", 2)
    a, b = (load_file(tmp_path / name / "client-4.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_network_that_is_there_is_not_replaced_unless_one_says_so(ended: Ended, state: Path) -> None:
    joined(ended, state, "--epochs", 1)
    before = (state / "client-4.safetensors").read_bytes()
    joined(ended, state, "--epochs", 2, fails="joining again would replace the network. Say so (--force)")
    assert (state / "client-4.safetensors").read_bytes() == before
    joined(ended, state, "--epochs", 2, "--force")
    assert (state / "client-4.safetensors").read_bytes() != before
    call(
        "join",
        ended.package,
        "--client",
        3,
        "--state-dir",
        state,
        "--force",
        fails="client 3 took part in the federation",
    )


def test_state_of_an_unfinished_run_is_not_hidden_by_joining(ended: Ended, tmp_path: Path) -> None:
    (tmp_path / "versions" / "0123456789abcdef" / "client-4").mkdir(parents=True)
    joined(ended, tmp_path, fails="has a personal network or state already")


def test_the_package_holds_a_mean_and_nobody_s_head(ended: Ended) -> None:
    """n-weighted, of the last uploads; far from each of them."""
    got, known = Package.load(ended.package), Checkpoints(ended.results / "checkpoint").load().known
    total = sum(record.num_examples for record in known.values())
    mean = sum(record.upload * np.float64(record.num_examples / total) for record in known.values())
    flat = np.concatenate([got.teacher[f"exits.2.head.{name}"].numpy().ravel() for name in ("weight", "bias")])
    np.testing.assert_allclose(flat, mean, atol=1e-6)
    content = ended.package.read_bytes()
    for record in known.values():
        assert np.linalg.norm(flat - record.upload) > 0.1 * np.linalg.norm(record.upload)
        assert record.upload.tobytes()[:64] not in content
    assert got.metadata["clients"] == MEMBERS
    assert str(ended.settings.results_dir) not in content.decode("latin-1")


def test_a_package_may_do_without_heads(ended: Ended, tmp_path: Path) -> None:
    """Then nothing of anybody's classifier leaves the server, and newcomers start from the common initial one."""
    shutil.copytree(ended.results, tmp_path / "results")
    said = call("join-package", tmp_path / "results", "--no-head")
    assert "It holds the shared part, and no head" in said.output
    path = tmp_path / "results" / "joining.safetensors"
    got = Package.load(path)
    assert (got.teacher, got.metadata["teachers"]) == ({}, 0)
    call("join", path, "--client", 4, "--state-dir", tmp_path / "state")
    metadata = json.loads((tmp_path / "state" / "client-4.json").read_text())
    assert np.mean(metadata["accuracy_per_exit"]) > 0.5


def test_a_head_unlike_any_other_is_not_in_the_mean() -> None:
    heads = np.eye(4, 6, dtype=np.float32) * 0.1 + 1
    heads[3] *= 1000
    known = {c: ClientRecord(10 * (c + 1), 1, heads[c], np.zeros(2)) for c in range(4)}
    schema = Schema((("w", (2, 2)), ("b", (2,))))
    mean, teachers = mean_head(known, schema)
    assert teachers == 3
    flat = np.concatenate([mean["w"].numpy().ravel(), mean["b"].numpy()])
    np.testing.assert_allclose(flat, (heads[0] + 2 * heads[1] + 3 * heads[2]) / 6, rtol=1e-6)
    with pytest.raises(ValueError, match="the mean of one would be that client's own head"):
        mean_head({0: known[0]}, schema)


def test_a_package_that_is_damaged_or_of_another_version_is_refused(ended: Ended, tmp_path: Path) -> None:
    got, path = Package.load(ended.package), tmp_path / "p.safetensors"

    def refused(reason: str) -> None:
        call("join", path, "--client", 4, "--state-dir", tmp_path / "state", fails=reason)

    refused("there is no such file")
    content = bytearray(ended.package.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    refused("is damaged: its fingerprint")
    path.write_bytes(content[:400])
    refused("is damaged, or no joining package")
    save_file({"a": torch.zeros(1)}, path)
    refused("is no joining package")
    replace(got, metadata={**got.metadata, "version": "0.0.1"}).save(path)
    refused(f"was made by cafe-flwr 0.0.1 (format 1), this is {__version__}")
    name = next(iter(got.shared))
    replace(got, shared={**got.shared, name: torch.full_like(got.shared[name], float("nan"))}).save(path)
    refused("NaN or infinite")
    replace(
        got, metadata={**got.metadata, "run_config": {**got.metadata["run_config"], "model.feature-width": 12}}
    ).save(path)
    refused("network, number of classes and method must be the same")
    assert not (tmp_path / "state").exists()


def test_data_that_does_not_fit_is_refused_before_training(ended: Ended, tmp_path: Path) -> None:
    got, data = Package.load(ended.package), federation(ended.settings).load(NEWCOMER)
    network = build_network(ended.settings)
    small = replace(data, test=Split(data.test.x[..., :12], data.test.y))
    with pytest.raises(ValueError, match=r"inputs of the test split have shape \(1, 16, 12\), the network takes"):
        join(got, Newcomer(NEWCOMER, tmp_path), network, small)
    unknown = replace(data, train=Split(data.train.x, torch.arange(len(data.train)) % 10 + 5))
    with pytest.raises(ValueError, match=r"its train split has labels 5\.\.14, expected 0\.\.9"):
        join(got, Newcomer(NEWCOMER, tmp_path), network, unknown)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        join(got, Newcomer(NEWCOMER, tmp_path, epochs=0), network, data)
    assert not list(tmp_path.iterdir())


def test_only_a_finished_run_of_the_method_makes_a_package(ended: Ended, tmp_path: Path) -> None:
    results = Path(shutil.copytree(ended.results, tmp_path / "results"))
    state = Checkpoints(results / "checkpoint").load()
    assert state is not None
    metadata = RunMetadata(ended.settings.build_budget(), num_rounds=12)
    with pytest.raises(
        ValueError,
        match="only a federation of cafedistill, cafedistill-plus, cafedistill-text can be joined when it has ended, "
        "not of ditto",
    ):
        package(build_network(ended.settings), METHODS["ditto"](), state, metadata)
    wider = build_network(changed(ended.settings, {"model.feature-width": 12}))
    with pytest.raises(ValueError, match="made with another network or method"):
        package(wider, ended.settings.build_method(), state, metadata)
    (results / "checkpoint" / "round-000012.safetensors").unlink()
    with pytest.raises(ValueError, match="has finished 11 of 12 rounds: let the run end"):
        package_run(results)
    call("join-package", tmp_path, fails="is no results folder of a run")


def normed_network() -> EarlyExitNetwork:
    """With batch norms, whose running statistics are averaged over clients."""
    stages = [nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Tanh()) for width in (INPUTS, 8)]
    return EarlyExitNetwork(stages, [Exit(nn.Linear(8, 4), 4, CLASSES) for _ in range(2)])


JOINABLE = ("cafedistill", "cafedistill-plus", "cafedistill-text")


@pytest.mark.parametrize("method", JOINABLE)
def test_a_federation_of_one_s_own_can_be_joined_in_python(tmp_path: Path, method: str) -> None:
    """Strategy and network of a foreign project; the backbone stays as it was, running statistics too."""
    budget = LocalBudget(steps=3, batch_size=8, learning_rate=0.1)
    strategy = FederatedStrategy(
        method=METHODS[method](), num_rounds=3, local=budget, min_available_nodes=1, wait_seconds=0.0
    )
    strategy.start(DeviceGrid(toy_app(build=normed_network), ["0,1,2"], tmp_path / "state"))
    with seeded(0):
        network = normed_network()
    made = package(network, strategy.method, strategy.state, RunMetadata(budget, num_rounds=3))
    made.save(tmp_path / "p.safetensors")
    newcomer = Newcomer(7, tmp_path / "new", epochs=3)
    result = join(Package.load(tmp_path / "p.safetensors"), newcomer, network, toy_data(7))
    assert result.report.local_steps > 0
    published = load_file(tmp_path / "new" / "client-7.safetensors")
    assert "stages.0.1.running_mean" in made.shared
    assert all(torch.equal(published[name], tensor) for name, tensor in made.shared.items())
    assert not torch.equal(published["exits.0.head.weight"], made.teacher["exits.1.head.weight"])


@pytest.mark.parametrize("method", JOINABLE)
def test_newcomers_start_from_the_mean_of_what_clients_sent(tmp_path: Path, method: str) -> None:
    """Of the exit's own classifier where all are sent, of the last one's otherwise."""
    budget = LocalBudget(steps=3, batch_size=8, learning_rate=0.1)
    strategy = FederatedStrategy(
        method=METHODS[method](), num_rounds=2, local=budget, min_available_nodes=1, wait_seconds=0.0
    )
    strategy.start(DeviceGrid(toy_app(), ["0,1,2"], tmp_path))
    with seeded(0):
        network = toy_network()
    made = package(network, strategy.method, strategy.state, RunMetadata(budget, num_rounds=2))
    examples = np.array([12, 17, 22]) / 51
    sent = np.stack([strategy.state.known[client].upload for client in range(3)]).astype(np.float64)
    mean = torch.from_numpy(examples @ sent).float()
    size = 15  # three classes, four features: 12 weights, 3 biases
    assert len(mean) == (3 * size if method == "cafedistill-plus" else size)
    heads = mean_heads(made.teacher, network)
    for k in range(3):
        own = mean[size * k : size * (k + 1)] if method == "cafedistill-plus" else mean
        found = torch.cat([heads[f"exits.{k}.head.{name}"].flatten() for name in ("weight", "bias")])
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-7)
    assert mean_heads({}, network) == {}


def test_exits_of_another_width_than_the_last_one_start_from_their_own_start() -> None:
    network = toy_network(widths=(6, 4, 4))
    teacher = {"exits.2.head.weight": torch.ones(CLASSES, 4), "exits.2.head.bias": torch.ones(CLASSES)}
    heads = mean_heads(teacher, network)
    assert set(heads) == {*network.head_names(1), *network.head_names(2)}
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in heads.values())
