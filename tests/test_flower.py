"""The app in Flower's real Simulation Engine: SuperLink, Ray actors and all."""

import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from cafe_flwr.app.launch import private_superlink, run_app
from cafe_flwr.app.run import run
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.settings import Settings

pytestmark = pytest.mark.flower

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"num-server-rounds": 2, "num-clients": 6, "data.examples-per-client": 50, "dataset": "digits"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app as `flwr build` bundles it, unpacked."""
    folder = tmp_path_factory.mktemp("bundle")
    env = {**os.environ, "FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0"}
    flwr = Path(sys.executable).with_name("flwr")
    subprocess.run([flwr, "build", "--app", ROOT], cwd=folder, env=env, check=True, capture_output=True)
    (fab,) = folder.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        assert not [name for name in archive.namelist() if name.startswith(("tests", "benchmarks", "results"))]
        archive.extractall(folder / "app")
    return folder / "app"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job in one process."""
    sys.path.insert(0, str(ROOT))
    from client_app import app

    folder = tmp_path_factory.mktemp("reference")
    settings = Settings.from_run_config({**CONFIG, "results-dir": str(folder), "name": "job"})
    run(InProcessGrid(app, 3, settings.to_run_config()), settings)
    return folder / "job"


def pairs(folder: Path, **more: object) -> list[str]:
    config = {**CONFIG, "results-dir": str(folder), "name": "job", **more}
    return [f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in config.items()]


def assert_same_numbers(one: Path, other: Path) -> None:
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    for key in ("accuracy_per_exit", "ece_per_exit", "curve", "teacher_weights", "clients", "macs_per_exit"):
        assert first[key] == second[key], key
    for client in range(CONFIG["num-clients"]):
        a, b = (load_file(folder / "personal" / f"client-{client}.safetensors") for folder in (one, other))
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name] == b[name]).all(), (client, name)


def test_bundle_on_flowers_two_default_nodes_gives_the_numbers_of_one_process(superlink, bundle, reference, tmp_path):
    """Three clients on each of the two nodes; every weight of every personal network is the same bit for bit."""
    status = run_app(bundle, superlink, pairs(tmp_path))
    assert status.completed, status
    assert_same_numbers(tmp_path / "job", reference)
    assert (tmp_path / "job" / "report.html").exists()


def test_one_client_per_node_gives_the_same_numbers(superlink, reference, tmp_path):
    """Six nodes, one CPU each, on two actors: grouping and placement change nothing."""
    status = run_app(ROOT, superlink, pairs(tmp_path), ["num-supernodes=6 client-resources-num-cpus=1"])
    assert status.completed, status
    assert_same_numbers(tmp_path / "job", reference)


def test_impossible_value_fails_the_run_before_the_first_round(superlink, tmp_path):
    """Flower does not check types or ranges: the ServerApp does, and nothing is written."""
    assert not run_app(ROOT, superlink, pairs(tmp_path, mu=-1.0)).completed
    assert not (tmp_path / "job").exists()


def test_unknown_key_is_refused_by_flower(superlink, tmp_path):
    with pytest.raises(RuntimeError, match="Invalid run configuration"):
        run_app(ROOT, superlink, ["not-a-setting=1"])


FOREIGN_CLIENT = """
import os
from flwr.app import Context
from cafe_flwr import make_client_app
from cafe_flwr.data import load_federation
from cafe_flwr.networks import ConvNet

def count(context, what):
    with open(context.run_config["log"], "a") as file:
        file.write(f"{os.getpid()} {what}\\n")

def build_network(context):
    count(context, "network")
    return ConvNet((1, 16, 16), 10)

def load_data(client, context):
    count(context, f"data {client}")
    return load_federation("digits", num_clients=4, examples_per_client=50).load(client)

app = make_client_app(build_network, load_data)
"""

FOREIGN_SERVER = """
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from cafe_flwr import CafeDistill
from cafe_flwr.networks import ConvNet

app = ServerApp()

@app.main()
def main(grid, context):
    strategy = CafeDistill(fraction_train=0.5, min_available_nodes=4, num_rounds=5, mu=0.3)
    result = strategy.start(grid, initial_arrays=ArrayRecord(ConvNet((1, 16, 16), 10).state_dict()), num_rounds=5)
    with open(context.run_config["log"], "a") as file:
        file.write(f"rounds {len(result.train_metrics_clientapp)}\\n")
"""

FOREIGN_MANIFEST = """
[project]
name = "foreign"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "someone"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
log = ""
"""


def test_foreign_project_builds_network_and_data_once_per_process(superlink, tmp_path, monkeypatch):
    """A Flower project of one's own, one client per node: strategy and ClientApp from two functions.

    Whatever node lands on whatever actor in five rounds, a process builds its network once and a client's data once.
    """
    app = tmp_path / "app"
    app.mkdir()
    (app / "client_app.py").write_text(FOREIGN_CLIENT)
    (app / "server_app.py").write_text(FOREIGN_SERVER)
    (app / "pyproject.toml").write_text(FOREIGN_MANIFEST)
    log = tmp_path / "log"
    status = run_app(app, superlink, [f'log="{log}"'], ["num-supernodes=4 client-resources-num-cpus=1"])
    assert status.completed, status
    lines = log.read_text().splitlines()
    assert lines[-1] == "rounds 5"
    calls = Counter(lines[:-1])
    assert {line.split(maxsplit=1)[1] for line in calls} == {"network", *(f"data {c}" for c in range(4))}
    assert set(calls.values()) == {1}, calls


def test_superlink_and_all_it_started_are_gone_afterwards():
    """Leaving the context ends every process, by its id."""
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with private_superlink():
        started = {p.pid for p in psutil.Process().children(recursive=True)} - before
        assert started
    assert not [pid for pid in started if psutil.pid_exists(pid)]
