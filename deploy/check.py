"""The check of a deployment: real processes on loopback, faults, and a table of promises and what happened."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.certificates import make_authority
from deploy.daemons import SuperNode, wait_for
from deploy.explain import explain
from deploy.job import CLIENTS, ROUNDS, UNDISTURBED, load_module, node_config, run_config, write_data
from deploy.loopback import Loopback

ROOT = Path(__file__).resolve().parent.parent
_SAME = ("participants", "left_out", "accuracy_per_exit", "accuracy_per_exit_after", "train_loss", "active_exits")


class NotKept(Exception):
    """A promise was not kept; the message says what happened instead."""


class NotTried(Exception):
    """A promise could not be tried on this machine; the message says why."""


class Outcome(NamedTuple):
    """A promise, what happened, and whether it was kept; None: it was not tried."""

    promised: str
    happened: str
    kept: bool | None


class Check:
    """The steps of the check, in their order: each returns what happened, or raises NotKept or NotTried."""

    def __init__(self, folder: Path, deployment: Loopback) -> None:
        self.folder, self.deployment = folder, deployment
        self.results = folder / "results" / "job"
        self.run = 0

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """Every promise, with the function that tries it."""
        return [
            ("Private keys can be read by their owner alone; the bundle has none", self.keys),
            (f"{CLIENTS} SuperNodes with registered keys join over TLS", self.join),
            ("A SuperNode that trusts another authority does not connect", self.wrong_authority),
            ("A SuperNode whose key is not registered is refused", self.unregistered),
            ("The gate lets nodes through, and users not", self.gate),
            ("flwr run <bundle> <connection> trains on the nodes' own data", self.submit),
            ("ServerApp killed in round 2: the run resumes from its checkpoint", self.kill_server_app),
            ("SuperLink killed in round 3: nodes come back, the run resumes", self.kill_superlink),
            (f"Rounds 1 to {UNDISTURBED} have the numbers of an undisturbed run, to the last bit", self.same_numbers),
            ("So have the clients' personal networks", self.same_networks),
            ("SuperNode killed in training: its client is left out of the round, with the reason", self.kill_node),
            ("Restarted, it is taken again, and its client trains on", self.node_is_back),
            ("The run ends as completed, each round once", self.complete),
            ("Every client's state on its node is whole", self.states),
        ]

    def keys(self) -> str:
        """Modes of the private keys, names in the bundle."""
        for name in range(CLIENTS):
            self.deployment.add_node(f"node-{name}", node_config(self.folder, name), start=False)
        self.deployment.add_program("reference", [sys.executable, str(ROOT / "deploy" / "job.py"), str(self.folder)])
        assert self.deployment.credentials is not None
        keys = sorted(self.deployment.credentials.rglob("*.key"))
        if loose := [key.name for key in keys if key.stat().st_mode & 0o077]:
            raise NotKept(f"others may read {', '.join(loose)}")
        names = [path.name for path in (self.folder / "app").rglob("*")]
        if secrets := [name for name in names if name.endswith((".key", ".pem", ".pub", ".crt"))]:
            raise NotKept(f"the bundle has {', '.join(secrets)}")
        return f"{len(keys)} keys of mode 600"

    def join(self) -> str:
        """Start three nodes, by the gate where there is one, and two that must be refused."""
        deployment = self.deployment
        address = None
        if nginx := shutil.which("nginx", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"):
            address = f"127.0.0.1:{deployment.add_gate(nginx).port}"
        for node in deployment.nodes.values():
            if address:
                node.command[node.command.index("--superlink") + 1] = address
            node.start()
        deployment.wait_online(CLIENTS, 120)
        other = make_authority(self.folder / "other-authority")
        deployment.add_node("stranger", {"clients": "0"}, authority=other)
        deployment.add_node("unregistered", {"clients": "0"}, register=False)
        return f"{CLIENTS} online" + " by the gate" * bool(address)

    def wrong_authority(self) -> str:
        """The node ends, and says why."""
        return _refused(self.deployment.nodes["stranger"], "CERTIFICATE_VERIFY_FAILED")

    def unregistered(self) -> str:
        """The node ends, and says why."""
        return _refused(self.deployment.nodes["unregistered"], "code: 2004")

    def gate(self) -> str:
        """Call the gate as a user."""
        gate = self.deployment.gate
        if gate is None:
            raise NotTried("not tried: nginx is not installed here")
        config = Path(self.deployment.env["FLWR_HOME"], "config.toml")
        before = config.read_text()
        config.write_text(before.replace(self.deployment.address, f"127.0.0.1:{gate.port}"))
        try:
            self.deployment.flwr("supernode", "list", "loopback")
        except RuntimeError as error:
            if "403" in str(error):
                return "403 Forbidden"
            raise NotKept(str(error)) from error
        finally:
            config.write_text(before)
        raise NotKept("a user came through")

    def submit(self) -> str:
        """The first round."""
        self._submit()
        self.deployment.wait_round(self.run, self.results, 1, 600)
        record = _rounds(self.results)[0]
        if record["participants"] != list(range(CLIENTS)) or record["left_out"]:
            raise NotKept(f"round 1 had clients {record['participants']}, without {record['left_out']}")
        return f"round 1 with clients {', '.join(map(str, record['participants']))}"

    def kill_server_app(self) -> str:
        """Kill the ServerApp while clients train."""
        self.deployment.nodes["node-0"].wait_for_app()
        self.deployment.superlink.wait_for_app().kill()
        with contextlib.suppress(RuntimeError):  # it may have noticed by itself
            self.deployment.flwr("stop", str(self.run), "loopback")
        status = self.deployment.wait(self.run, 150)
        if status == "finished:completed":
            raise NotKept("the run went on")
        return f"{status}; {self._resume(2)}"

    def kill_superlink(self) -> str:
        """Kill the SuperLink while clients train."""
        deployment = self.deployment
        deployment.nodes["node-0"].wait_for_app()
        deployment.superlink.kill()
        wait_for(lambda: not deployment.superlink.apps() or None, 60, "the end of the ServerApp")
        deployment.superlink.start()
        happened = self._resume(3)
        if ended := [f"node-{k}" for k in range(CLIENTS) if not deployment.nodes[f"node-{k}"].alive]:
            raise NotKept(f"{', '.join(ended)} ended")
        return happened

    def same_numbers(self) -> str:
        """Compare with the reference."""
        program = self.deployment.programs["reference"]
        wait_for(lambda: not program.alive or None, 120, "the undisturbed run", program.log)
        reference = _rounds(self.folder / "results" / "reference")
        if len(reference) != UNDISTURBED:
            raise NotKept(f"the undisturbed run failed: {program.log()[-500:]}")
        for mine, other in zip(_rounds(self.results)[:UNDISTURBED], reference, strict=True):
            if apart := [key for key in _SAME if mine[key] != other[key]]:
                raise NotKept(f"round {mine['round']} differs in {', '.join(apart)}")
        return f"{len(_SAME)} facts of {UNDISTURBED} rounds are equal"

    def same_networks(self) -> str:
        """Compare the clients' files after the last of these rounds with the reference's."""
        from safetensors.numpy import load_file

        count = 0
        for client in range(CLIENTS):
            mine, other = (
                load_file(_state(folder, client, UNDISTURBED))
                for folder in (self.folder / "state" / f"node-{client}", self.folder / "state" / "reference")
            )
            if mine.keys() != other.keys() or any((mine[name] != other[name]).any() for name in other):
                raise NotKept(f"that of client {client} differs")
            count += sum(array.size for array in other.values())
        return f"{count} numbers of {CLIENTS} clients are equal"

    def kill_node(self) -> str:
        """Kill a node while its ClientApp is at work, and the ClientApp with it, as when the machine loses power."""
        app = (node := self.deployment.nodes["node-1"]).wait_for_app()
        started = len(_rounds(self.results))
        node.kill()
        with contextlib.suppress(Exception):
            app.kill()
        self.starts = node.start_again(180)
        self.deployment.wait_round(self.run, self.results, started + 1, 400)
        record = _rounds(self.results)[started]
        if "1" not in record["left_out"]:
            raise NotKept(f"round {record['round']} left out {record['left_out'] or 'nobody'}")
        reason = record["left_out"]["1"].partition(" — ")[0]
        return f"round {record['round']} went on with {len(record['participants']) - 1} clients: {reason}"

    def node_is_back(self) -> str:
        """Wait for a round with its client."""
        self.deployment.wait(self.run, 900)
        rounds = _rounds(self.results)
        lost = next(record["round"] for record in rounds if "1" in record["left_out"])
        again = [r["round"] for r in rounds if r["round"] > lost and 1 in r["participants"] and not r["left_out"]]
        if not again:
            raise NotKept(f"taken at start {self.starts}, but its client was in no round after {lost}")
        return f"taken at start {self.starts}; client 1 trains from round {again[0]} on"

    def complete(self) -> str:
        """Status and rounds."""
        status, rounds = self.deployment.status(self.run), [record["round"] for record in _rounds(self.results)]
        if status != "finished:completed" or rounds != list(range(1, ROUNDS + 1)):
            raise NotKept(f"{status}, rounds {rounds}")
        return f"{status}, {ROUNDS} rounds"

    def states(self) -> str:
        """Read all versions of all clients."""
        from safetensors.numpy import load_file

        newest = []
        for client in range(CLIENTS):
            files = sorted((self.folder / "state" / f"node-{client}").rglob("round-*.safetensors"))
            if not files:
                raise NotKept(f"client {client} has none")
            for file in files:
                if not all(np.isfinite(array).all() for array in load_file(file).values()):
                    raise NotKept(f"{file.name} of client {client} has numbers that are not finite")
            newest.append(int(files[-1].stem.removeprefix("round-")))
        if min(newest) != ROUNDS:
            raise NotKept(f"the newest versions are of rounds {newest}")
        return f"each up to round {ROUNDS}"

    def _submit(self, **more: Any) -> None:
        config = {**run_config(self.folder, "job"), **more}
        self.run = self.deployment.submit(self.folder / "app", config)

    def _resume(self, number: int) -> str:
        wait_for(lambda: not self.deployment.superlink.apps() or None, 60, "the end of the ServerApp")
        there = len(_rounds(self.results))
        self._submit(resume=True)
        self.deployment.wait_round(self.run, self.results, number, 600)
        return f"resumed after round {there}"


def run_check(keep: Path | None = None, console: Console | None = None) -> int:
    """Run the check and print its table; return 1 if a promise was not kept, 130 if it was interrupted, else 0.

    Logs, credentials and results go to ``keep``, an empty folder, or by default to a temporary one.
    """
    console = console or Console()
    if keep is not None and keep.exists() and any(keep.iterdir()):
        console.print(f"Error: {keep} is not empty", style="red")
        return 1
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cafe-flwr-check-")))
        stack.enter_context(_terminated_is_interrupted())
        try:
            outcomes = _outcomes(folder.resolve(), console)
        except KeyboardInterrupt:
            console.print("interrupted; every process that was started has been ended")
            return 130
    table = Table("promised", "what happened", "ok", box=box.SIMPLE_HEAD)
    marks = {True: "[green]yes[/]", False: "[red]NO[/]", None: "–"}
    for promised, happened, kept in outcomes:
        table.add_row(escape(promised), escape(happened), marks[kept])
    console.print(table)
    return 1 if any(outcome.kept is False for outcome in outcomes) else 0


def _outcomes(folder: Path, console: Console) -> list[Outcome]:
    _prepare(folder)
    deployment = Loopback(folder / "deployment", environment={"OMP_NUM_THREADS": "1"})
    outcomes: list[Outcome] = []
    with deployment:
        for promised, step in Check(folder, deployment).steps():
            if any(outcome.kept is False for outcome in outcomes):
                outcomes.append(Outcome(promised, "not tried", None))
                continue
            outcomes.append(_try(promised, step))
            console.print(f"{time.strftime('%H:%M:%S')} {promised}: {outcomes[-1].happened}", markup=False)
    left = deployment.processes()
    happened = f"{len(left)} are left: {left}" if left else "none is left"
    return [*outcomes, Outcome("Every process that was started is ended", happened, not left)]


def _try(promised: str, step: Callable[[], str]) -> Outcome:
    try:
        return Outcome(promised, step(), True)
    except NotTried as error:
        return Outcome(promised, str(error), None)
    except NotKept as error:
        return Outcome(promised, str(error), False)
    except Exception as error:
        return Outcome(promised, f"{type(error).__name__}: {error}", False)


def _prepare(folder: Path) -> None:
    """The bundle in ``app``, the clients' data in ``data``."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(load_module(ROOT / "scripts" / "bundle.py").bundle(ROOT, folder)) as archive:
        archive.extractall(folder / "app")
    write_data(folder / "data")


def _refused(node: SuperNode, words: str) -> str:
    """Wait until a node has ended with these words in its log, and return their meaning."""
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: not node.alive or node.online or None, 90, f"the end of {node.name}")
    log = node.log()
    if node.alive or node.online or words not in log:
        node.kill()
        raise NotKept(f"{'it is connected' if node.online else 'it says'}: {log[-500:]}")
    return str(explain(log)).partition(":")[0]


def _rounds(results: Path) -> list[dict[str, Any]]:
    path = results / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _state(folder: Path, client: int, server_round: int) -> Path:
    files = list(folder.rglob(f"client-{client}/round-{server_round:06d}.safetensors"))
    if len(files) != 1:
        raise NotKept(f"client {client} has {len(files)} files of round {server_round}")
    return files[0]


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, and ignore further signals while processes are being ended."""
    signs = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def interrupt(*_: object) -> None:
        for sign in signs:
            signal.signal(sign, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {sign: signal.signal(sign, interrupt) for sign in signs}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
