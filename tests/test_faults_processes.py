"""Faults in a real deployment: SuperLink, SuperNodes, ServerApp and ClientApps are processes, and are killed.

One run of three rounds is hit by everything but a client that stays away; it is resumed twice, and must end with the
numbers of a run in one process that nothing has disturbed, bit for bit. A second run has clients that come late and
leave for good.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from federations import FaultyApp, asked, facts_and_tensors, same_tensors, small_settings, strict_json
from sklearn.datasets import load_digits

from cafe_flwr.app.run import run as run_federation
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.server.strategy import FederatedStrategy
from deploy.daemons import wait_for
from deploy.loopback import Loopback

pytestmark = pytest.mark.flower

ROOT = Path(__file__).resolve().parent.parent
NODES = "abc"  # node i hosts client i, with data of its own
JOB = {
    "dataset": "local",
    "class_names": "0,1,2,3,4,5,6,7,8,9",
    "image_size": 8,
    "image_channels": 1,
    "local_steps": 2,
    "momentum": 0.5,
    "keep_momentum": True,  # as durable as the rest of a client's state
    "wait_seconds": 600.0,
}

# The app's own client, and a fault that a file asks for: <folder>/<round> holds what is to happen, once, when the
# client has trained and its new state is not yet on disk (or, after "saved ", when it is).
FAULTY_CLIENT = """
import os, resource, time
from pathlib import Path
from cafe_flwr.personal import store as state

FAULTS = Path(os.environ["FAULTS"])
save, write = state.PersonalStore.save, state.write_atomically

def happen(what, server_round):
    if what == "raise":
        raise ValueError("a sensor is broken")
    if what.startswith("sleep"):
        (FAULTS / f"{server_round}-sleeps").touch()
        time.sleep(float(what.split()[1]))
    if what == "wait":
        (FAULTS / f"{server_round}-sleeps").touch()
        while not (FAULTS / f"{server_round}-go").exists():
            time.sleep(0.1)

def on_a_full_disk(path, content):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        write(path, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

def faulty_save(self, client, server_round, *args, **kwargs):
    path, what = FAULTS / str(server_round), ""
    if path.exists():
        what = path.read_text()
        path.unlink()
    if not what.startswith("saved "):
        happen(what, server_round)
    state.write_atomically = on_a_full_disk if what == "full" else write
    save(self, client, server_round, *args, **kwargs)
    if what.startswith("saved "):
        happen(what.removeprefix("saved "), server_round)

state.PersonalStore.save = faulty_save
"""


# Flower's SuperExec, which starts a process for every message. Here it starts the first as ever, then loads what such
# a process loads, and forks the others: each begins as empty as the first, without the seconds of CPU for its imports.
SUPEREXEC = f"""#!{sys.executable}
import os, subprocess, sys
from types import SimpleNamespace
from flwr.supercore.cli import flower_superexec
from flwr.supercore.exit.exit_handler import registered_exit_handlers
from flwr.supercore.superexec.executor import subprocess_executor

started = []

def start(command):
    if not started:
        started.append(subprocess.Popen(command))
        import cafe_flwr.app.parts, cafe_flwr.client.app, datasets, torch._dynamo
        return
    started[0].poll()
    for pid in started[1:]:
        if os.waitpid(pid, os.WNOHANG)[0]:
            started.remove(pid)
    if child := os.fork():
        started.append(child)
        return
    try:
        from flwr.supernode.cli import flwr_clientapp
        registered_exit_handlers.clear()
        sys.argv = command
        flwr_clientapp()
    finally:
        sys.stdout.flush()
        os._exit(0)

subprocess_executor.subprocess = SimpleNamespace(Popen=start)
sys.exit(flower_superexec())
"""


@dataclass
class Field:
    """A deployment, and what it is to run."""

    deployment: Loopback
    app: Path
    folder: Path
    slowest: float = 40.0  # seconds of an undisturbed round on this machine, as far as it is known

    def node_config(self, client, state):
        name = NODES[client]
        return {
            "clients": str(client),
            "data-dir": str(self.folder / "data" / name),
            "state-dir": str(state / name),
            "name": f"ward {name}",
        }

    def fault(self, node, server_round, what):
        (self.folder / "faults" / node / str(server_round)).write_text(what)

    def in_the_middle(self, node, server_round):
        """Wait until a fault of a node has begun to sleep."""
        mark = self.folder / "faults" / node / f"{server_round}-sleeps"
        self.until(mark.exists, f"{node} in the middle of round {server_round}")
        mark.unlink()

    def go_on(self, node, server_round):
        """End the waiting of a node."""
        (self.folder / "faults" / node / f"{server_round}-go").touch()

    def client_process(self, node):
        """The process of a node's ClientApp, which its SuperExec has started."""
        (superexec,) = psutil.Process(self.deployment.nodes[node].process.pid).children()
        return next(process for process in superexec.children() if process.status() != psutil.STATUS_ZOMBIE)

    def until(self, condition, what):
        wait_for(lambda: condition() or None, 900, what, self.deployment.superlink.log)

    def lines(self, settings):
        path = settings.results / "rounds.jsonl"
        return [strict_json(line) for line in path.read_text().splitlines()] if path.exists() else []

    def submit(self, settings, **changes):
        config = {**settings.to_run_config(), **{key.replace("_", "-"): value for key, value in changes.items()}}
        defaults = type(settings)().to_run_config()
        return self.deployment.submit(self.app, {k: v for k, v in config.items() if v != defaults[k]})

    def completed(self, run):
        assert self.deployment.wait(run, 900) == "finished:completed", self.deployment.log(run)


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    folder = tmp_path_factory.mktemp("field")
    app = folder / "app"
    app.mkdir()
    for name in ("server_app.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, app)
    shutil.copy(ROOT / "pyproject-flwr.toml", app / "pyproject.toml")
    (app / "client_app.py").write_text(FAULTY_CLIENT + (ROOT / "client_app.py").read_text())
    superexec = folder / "bin" / "flower-superexec"
    superexec.parent.mkdir()
    superexec.write_text(SUPEREXEC)
    superexec.chmod(0o755)
    path = os.pathsep.join(map(str, (superexec.parent, Path(sys.executable).parent, os.environ["PATH"])))
    images, labels = load_digits(return_X_y=True)
    with Loopback(folder / "deployment", environment={"OMP_NUM_THREADS": "1"}) as deployment:
        field = Field(deployment, app, folder)
        for client, name in enumerate(NODES):
            (folder / "faults" / name).mkdir(parents=True)
            (folder / "data" / name).mkdir(parents=True)
            rows = range(50 * client, 50 * client + 40 + 5 * client)
            table = {"image": [(images[r].reshape(8, 8) * 15).astype(np.uint8).tolist() for r in rows]}
            pd.DataFrame({**table, "label": labels[rows]}).to_parquet(folder / "data" / name / "set.parquet")
            config = field.node_config(client, folder / "state")
            environment = {"FAULTS": str(folder / "faults" / name), "PATH": path}
            deployment.add_node(name, config, environment=environment, start=name != "c")
        deployment.wait_online(2, 300)
        yield field


def in_one_process(field, settings, participants=None, left_out=()):
    """The same job in this process, with these participants of the rounds, and these (round, client) left out.

    Returns the folder of its nodes' states.
    """
    sys.path.insert(0, str(ROOT))
    from client_app import app

    def fault(answer, message, context):
        config = message.content["config"]
        if message.metadata.message_type == "train" and (config["server-round"], asked(message)[0]) in left_out:
            raise OSError("gone")
        return answer(message, context)

    grid = InProcessGrid(FaultyApp(app, fault), len(NODES), settings.to_run_config())
    for client, context in enumerate(grid.contexts.values()):
        context.node_config = field.node_config(client, settings.results.parent / "state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        if participants:
            chosen = dict(enumerate(participants, start=1))
            patch.setattr(FederatedStrategy, "sample", lambda self, server_round, *_: chosen[server_round])
        run_federation(grid, settings)
    return settings.results.parent / "state"


def newest_of(state, client):
    """Name and content of the newest version of a client's last run, and its published network."""
    run = json.loads((state / f"client-{client}.json").read_text())["run"]
    path = max((state / "versions" / run / f"client-{client}").iterdir())
    return path.name, facts_and_tensors(path), facts_and_tensors(state / f"client-{client}.safetensors")


def assert_same_personal(mine, theirs, clients):
    """The published networks, and the newest versions of these runs."""
    for client in clients:
        (name, version, network), (other_name, other_version, other_network) = (
            newest_of(state / NODES[client], client) for state in (mine, theirs)
        )
        assert name == other_name
        assert version[0] == other_version[0]
        assert same_tensors(version[1], other_version[1])
        assert same_tensors(network[1], other_network[1])
    assert not [path for path in mine.rglob("*") if path.name.endswith(".tmp")]


SAME = ("participants", "left_out", "active_exits", "accuracy_per_exit", "accuracy_per_exit_after", "train_loss")


def assert_same_rounds(lines, expected, keys=SAME):
    for line, other in zip(lines, expected, strict=True):
        for key in keys:
            assert line[key] == other[key], (line["round"], key)


def test_a_node_that_joins_late_and_one_that_leaves_for_good(field, tmp_path):
    """c is started in the second round, which waits for it, as does the third for its first answer; b is stopped when c
    has taken part. Each round has the numbers of a run in one process with the same participants, and the node that
    left keeps its state."""
    job = {**JOB, "name": "come-and-go", "num_clients": 3, "num_server_rounds": 8, "round_timeout": 400.0}
    job["wait_seconds"] = 60.0  # after which it starts without c
    settings, alike = small_settings(tmp_path, **job), small_settings(tmp_path / "alike", **job)
    for server_round in (2, 3):
        field.fault("a", server_round, "wait")
    run = field.submit(settings)
    field.in_the_middle("a", 2)
    field.deployment.nodes["c"].start()
    field.deployment.wait_online(3, 300)
    field.go_on("a", 2)
    field.in_the_middle("a", 3)
    field.until(lambda: "Sent successfully" in field.deployment.nodes["c"].log(), "c's answer who it is")
    field.go_on("a", 3)
    field.until(lambda: any(2 in line["participants"] for line in field.lines(settings)), "client 2")
    field.deployment.nodes["b"].stop()
    field.completed(run)
    field.deployment.nodes["b"].start()

    lines = field.lines(settings)
    field.slowest = max(line["seconds"]["total"] for line in (lines[0], lines[-1]))  # those that waited for nobody
    there = [line["participants"] for line in lines]
    assert there[0] == [0, 1]
    assert [0, 1, 2] in there
    assert there[-1] == [0, 2]
    assert lines[-1]["names"] == {"0": "ward a", "2": "ward c"}
    left_out = {(line["round"], int(client)) for line in lines for client in line["left_out"]}
    state = in_one_process(field, alike, there, left_out)
    assert_same_rounds(lines, field.lines(alike), ("accuracy_per_exit", "accuracy_per_exit_after", "train_loss"))
    assert_same_personal(field.folder / "state", state, clients=(0, 2))
    last = max(t for t, clients in enumerate(there, start=1) if 1 in clients and (t, 1) not in left_out)
    assert list((field.folder / "state" / "b").rglob(f"client-1/round-{last:06d}.safetensors"))


def test_everything_that_may_be_killed_is_and_the_numbers_are_those_of_an_undisturbed_run(field, tmp_path):
    """All three clients are needed in every round. What fails is repeated or resumed until it does not, and in the end
    parameters, personal states and tables are the same bit for bit. Faults of different nodes share a round."""
    nodes, superlink = field.deployment.nodes, field.deployment.superlink
    for node in nodes.values():
        if not node.alive:
            node.start()
    field.deployment.wait_online(3, 300)
    patience = 30.0 + 2 * field.slowest
    job = {**JOB, "name": "war", "num_clients": 3, "num_server_rounds": 3, "min_train_nodes": 3}
    settings = small_settings(tmp_path, **job, round_timeout=patience, round_retries=9)
    alike = small_settings(tmp_path / "alike", **job)
    state = in_one_process(field, alike)

    field.fault("a", 1, "raise")
    field.fault("b", 1, "full")
    field.fault("a", 2, "saved sleep 900")
    field.fault("b", 2, f"sleep {patience + 5:.0f}")  # beyond the timeout, with its state locked
    field.fault("c", 2, "sleep 900")
    field.fault("b", 3, "sleep 20")
    run = field.submit(settings)
    field.in_the_middle("c", 2)
    field.client_process("c").kill()
    field.in_the_middle("a", 2)  # when its new state is on the disk, and the server does not know
    nodes["a"].kill()
    nodes["a"].start_again(300)
    field.in_the_middle("b", 3)
    superlink.apps()[0].kill()  # b goes on, and is ahead of the checkpoint then
    assert field.deployment.wait(run, 300).startswith("finished:failed")

    field.fault("b", 3, "sleep 20")
    run = field.submit(settings, resume=True)
    field.in_the_middle("b", 3)
    superlink.kill()
    time.sleep(1)
    superlink.start()
    field.completed(field.submit(settings, resume=True))

    lines = field.lines(settings)
    tries = [[*reasons.values()] for line in lines for reasons in line["failed_tries"]]
    print(json.dumps([[line["round"], line["seconds"]["total"], line["failed_tries"]] for line in lines], indent=1))
    for expected in ("ValueError: a sensor is broken", "File too large: '", "no reply from its node in time"):
        assert any(expected in reason for reasons in tries for reason in reasons), expected
    failed = [{int(client) for reasons in line["failed_tries"] for client in reasons} for line in lines]
    assert failed[0] >= {0, 1}
    assert failed[1] >= {0, 1, 2}
    assert_same_rounds(lines, field.lines(alike))
    tables = [pd.read_parquet(s.results / "clients.parquet") for s in (settings, alike)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    one, other = (json.loads((s.results / "summary.json").read_text()) for s in (settings, alike))
    for key in ("accuracy_per_exit", "ece_per_exit", "curve", "teacher_weights", "clients"):
        assert one[key] == other[key], key
    assert_same_personal(field.folder / "state", state, clients=range(3))
