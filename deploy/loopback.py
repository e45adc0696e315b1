"""A deployment on this machine's loopback: real SuperLink, real SuperNodes, a process each, that may be killed.

::

    with Loopback(folder) as deployment:                    # TLS and node authentication; secure=False for neither
        node = deployment.add_node("a", {"clients": "0", "state-dir": str(folder / "a")})  # key, registration, start
        deployment.wait_online(1)
        run = deployment.submit(app, {"num-server-rounds": 3, "name": "job", "results-dir": str(folder)})
        app_process = node.wait_for_app()                   # the ClientApp's psutil.Process, while it is at work
        app_process.kill()                                  # or node.kill(): the SuperNode itself, by -9
        node.start_again()                                  # as a supervisor does, until the SuperLink takes it back
        deployment.superlink.kill()                         # and deployment.superlink.start()
        deployment.wait_round(run, folder / "job", 2)       # round 2 is recorded
        deployment.wait(run)                                # "finished:completed", or whatever it was
        print(deployment.log(run))                          # of the ServerApp, also in deployment.superlink.log()

Everything that was started, by whomever of it, is ended on leaving, also after an error; the folder with the logs
(``<name>.log``) stays. Every process has its own Flower home in the folder, and ports of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]

from cafe_flwr.app.launch import flwr, free_port, wait_until_healthy
from deploy.certificates import CA_CERTIFICATE, make_authority, make_node_key, make_server_certificate
from deploy.commands import SuperLinkOptions, SuperNodeOptions, connection

_MARK = "CAFE_FLWR_LOOPBACK"  # in the environment of all processes of a deployment
_CONNECTION = "loopback"
_RESTART_SECONDS = 5.0  # between two starts, as in the systemd unit
T = TypeVar("T")


class Daemon:
    """A process of the deployment, its log, and what it has started.

    Attributes
    ----------
    name
        Of the log file, ``<folder>/<name>.log``.
    command
        Command line; may be changed between two starts.
    process
        The process that runs, or ran last.
    """

    app_command = ""

    def __init__(self, name: str, command: list[str], folder: Path, env: Mapping[str, str]) -> None:
        self.name, self.command = name, command
        self.path = folder / f"{name}.log"
        self._env, self._folder = dict(env), folder
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self) -> None:
        """Start it, and go on at once; its log is appended to."""
        self._log_start = self.path.stat().st_size if self.path.exists() else 0
        with open(self.path, "ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env=self._env,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """Kill the process itself, by signal 9; what it had started is left to notice."""
        self._send(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        self._send(signal.SIGTERM)

    def log(self, *, all_starts: bool = False) -> str:
        """What it has printed since its last start, or since its first."""
        if not self.path.exists():
            return ""
        return self.path.read_bytes()[0 if all_starts else self._log_start :].decode(errors="replace")

    def apps(self) -> list[psutil.Process]:
        """The processes of apps (ServerApp, ClientApp) that it runs now."""
        return [process for process in _processes(self._env[_MARK]) if self.app_command in _command(process)]

    def wait_for_app(self, seconds: float = 120.0) -> psutil.Process:
        """The process of an app, as soon as there is one."""
        return wait_for(lambda: next(iter(self.apps()), None), seconds, f"an app's process of {self.name}", self.log)

    def _send(self, sign: signal.Signals) -> None:
        if self.process is None:
            return
        self.process.send_signal(sign)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class SuperLink(Daemon):
    """The SuperLink."""

    app_command = "flwr-serverapp"

    def __init__(self, options: SuperLinkOptions, folder: Path, env: Mapping[str, str]) -> None:
        super().__init__("superlink", options.command(), folder, env)
        self.options = options

    def start(self) -> None:
        """Start it, and wait until it answers."""
        super().start()
        context, scheme = None, "http"
        if self.options.credentials is not None:
            context, scheme = ssl.create_default_context(cafile=self.options.credentials / CA_CERTIFICATE), "https"
        assert self.process is not None
        wait_until_healthy(self.process, f"{scheme}://127.0.0.1:{self.options.port}", self.path, context)


class Gate(Daemon):
    """nginx before the SuperLink, with the gate of ``deploy/nginx``: nodes come through, nobody else does."""

    def __init__(self, nginx: str, link: SuperLink, folder: Path, env: Mapping[str, str]) -> None:
        credentials, self.port = link.options.credentials, free_port()
        assert credentials is not None
        server = (Path(__file__).parent / "nginx" / "cafe-gate.conf").read_text()
        for old, new in (
            ("listen 9443", f"listen 127.0.0.1:{self.port}"),
            ("127.0.0.1:8000", f"127.0.0.1:{link.options.port}"),
            ("/etc/cafe-flwr/", f"{credentials}/"),
        ):
            assert old in server
            server = server.replace(old, new)
        temporary = "".join(
            f"{part}_temp_path {folder}/{part};\n" for part in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        self.configuration = folder / "nginx.conf"
        self.configuration.write_text(
            f"daemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{temporary}{server}}}\n"
        )
        command = [nginx, "-p", str(folder), "-e", "stderr", "-c", str(self.configuration)]
        super().__init__("gate", command, folder, env)

    def start(self) -> None:
        """Start it, and wait until it listens."""
        super().start()
        wait_for(self._listens, 30.0, "the gate", self.log)

    def _listens(self) -> bool | None:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0 or None


class SuperNode(Daemon):
    """A SuperNode."""

    app_command = "flwr-clientapp"

    @property
    def online(self) -> bool:
        """Whether the SuperLink has taken it, since its last start."""
        return self.alive and "SuperNode ID:" in self.log()

    def start_again(self, seconds: float = 150.0) -> int:
        """Start it until the SuperLink takes it, as a supervisor does; how often that was.

        A node with a key is refused for about a minute after it was killed: Flower believes that it is still there.

        Raises
        ------
        TimeoutError
            If it is not taken for so many seconds.
        """
        deadline, starts = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            self.start()
            starts += 1
            while self.alive and not self.online and time.monotonic() < deadline:
                time.sleep(0.2)
            if self.online:
                return starts
            time.sleep(_RESTART_SECONDS)
        raise TimeoutError(f"the SuperLink did not take {self.name} within {seconds:.0f} s:\n{self.log()[-2000:]}")


class Loopback:
    """A SuperLink and SuperNodes on this machine. See the head of this module.

    Parameters
    ----------
    folder
        Where credentials, logs and Flower homes go.
    secure
        With TLS and node authentication.
    database
        Whether the SuperLink keeps its state in a file.
    environment
        More environment variables of all processes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        secure: bool = True,
        database: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.secure = secure
        self.nodes: dict[str, SuperNode] = {}
        self.gate: Gate | None = None
        self.programs: dict[str, Daemon] = {}
        self.mark = secrets.token_hex(8)
        self._more = dict(environment or {})
        self.folder.mkdir(parents=True, exist_ok=True)
        self.credentials = self.folder / "credentials" if secure else None
        if self.credentials is not None:
            make_authority(self.credentials)
            make_server_certificate(self.credentials, ["127.0.0.1", "localhost"])
        options = SuperLinkOptions(
            self.credentials, port=free_port(), database=self.folder / "superlink.sqlite" if database else None
        )
        self.address = f"127.0.0.1:{options.port}"
        self.superlink = SuperLink(options, self.folder, self._environment("superlink"))
        self.env = self._environment("user")
        config = Path(self.env["FLWR_HOME"], "config.toml")
        config.write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n' + connection(_CONNECTION, self.address, self.authority)
        )

    @property
    def authority(self) -> Path | None:
        """The certificate of the deployment's authority."""
        return self.credentials / CA_CERTIFICATE if self.credentials else None

    def __enter__(self) -> Loopback:
        try:
            self.superlink.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the deployment, also those whose parents are gone."""
        gate = [self.gate] if self.gate else []
        daemons = [*self.programs.values(), *self.nodes.values(), *gate, self.superlink]
        processes = [daemon.process for daemon in daemons if daemon.process is not None]
        for process in processes:
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(5)
        while left := _processes(self.mark):
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, 5)
        for process in processes:
            process.wait()

    def processes(self) -> list[psutil.Process]:
        """All processes of the deployment."""
        return _processes(self.mark)

    def add_node(
        self,
        name: str,
        config: Mapping[str, str | int | float | bool],
        *,
        register: bool = True,
        start: bool = True,
        authority: Path | None = None,
        superlink: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> SuperNode:
        """Add a SuperNode: make its key, register it, start it.

        Parameters
        ----------
        name
            Its name, of key and log file.
        config
            Its node-config.
        register, start
            Whether to.
        authority
            Another authority's certificate for it to trust, in place of the deployment's.
        superlink
            Another address to call, e.g. that of a gate.
        environment
            More environment variables of it and its ClientApps.
        """
        key = make_node_key(self.credentials, name) if self.credentials else None
        if key and register:
            self.flwr("supernode", "register", str(key.with_suffix(".pub")), _CONNECTION)
        address = superlink or self.address
        options = SuperNodeOptions(address, authority or self.authority, key, config, free_port())
        env = {**self._environment(name), **(environment or {})}
        node = self.nodes[name] = SuperNode(name, options.command(), self.folder, env)
        if start:
            node.start()
        return node

    def add_program(self, name: str, command: list[str]) -> Daemon:
        """Start any other program beside the deployment, to be ended with it."""
        program = self.programs[name] = Daemon(name, command, self.folder, self._environment(name))
        program.start()
        return program

    def add_gate(self, nginx: str) -> Gate:
        """Start the gate before the SuperLink, with this nginx."""
        self.gate = Gate(nginx, self.superlink, self.folder, self._environment("gate"))
        self.gate.start()
        return self.gate

    def wait_online(self, count: int, seconds: float = 60.0) -> None:
        """Wait until the SuperLink has taken so many of the nodes."""
        nodes = list(self.nodes.values())
        wait_for(
            lambda: sum(node.online for node in nodes) >= count or None,
            seconds,
            f"{count} nodes online",
            lambda: "\n".join(node.log()[-1000:] for node in nodes if not node.online),
        )

    def submit(self, app: Path, run_config: Mapping[str, Any] | None = None) -> int:
        """Submit a run of the app in a folder, as ``flwr run <app> <connection>``; its id.

        Raises
        ------
        RuntimeError
            If Flower refuses it, with Flower's words.
        """
        pairs = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in (run_config or {}).items()]
        options = [f"--run-config={pair}" for pair in pairs]
        return int(self.flwr("run", str(app), _CONNECTION, *options)["run-id"])

    def status(self, run: int) -> str:
        """Flower's status of a run, e.g. ``running`` or ``finished:completed``."""
        return str(self.flwr("ls", _CONNECTION, "--run-id", str(run))["runs"][0]["status"])

    def wait(self, run: int, seconds: float = 300.0) -> str:
        """Wait until a run has ended; its status then.

        Raises
        ------
        TimeoutError
            If it has not ended after so many seconds, with the end of the SuperLink's log.
        """

        def ended() -> str | None:
            status = self.status(run)
            return status if status.startswith("finished") else None

        return wait_for(ended, seconds, f"the end of run {run}", lambda: self.superlink.log()[-3000:], pause=1.0)

    def wait_round(self, run: int, results: Path, number: int, seconds: float = 180.0) -> None:
        """Wait until so many rounds of a run are in its results folder.

        Raises
        ------
        RuntimeError
            If the run ends before that, with the end of its log.
        TimeoutError
            If it takes longer, with the same.
        """
        records, looks = results / "rounds.jsonl", 0

        def there() -> bool | None:
            nonlocal looks
            if records.exists() and len(records.read_text().splitlines()) >= number:
                return True
            looks += 1
            if looks % 25 == 0 and (status := self.status(run)).startswith("finished"):
                raise RuntimeError(f"the run ended before round {number} as {status}:\n{self.log(run)[-3000:]}")
            return None

        wait_for(there, seconds, f"round {number}", lambda: self.log(run))

    def log(self, run: int) -> str:
        """What the ServerApp of a run has logged."""
        done = subprocess.run(
            ["flwr", "log", str(run), _CONNECTION, "--show"], env=self.env, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """The answer of a ``flwr`` command.

        Raises
        ------
        RuntimeError
            If it has no success, with Flower's words.
        """
        answer = flwr(self.env, *arguments, "--format", "json")
        if not answer.get("success"):
            raise RuntimeError(answer.get("error-message") or f"flwr {arguments[0]} failed: {answer}")
        return answer

    def _environment(self, name: str) -> dict[str, str]:
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "XDG_STATE_HOME": str(home / "state"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            **self._more,
            _MARK: f"{self.mark}/{name}/",
        }


def wait_for(
    condition: Callable[[], T | None],
    seconds: float,
    what: str,
    log: Callable[[], str] = str,
    *,
    pause: float = 0.2,
) -> T:
    """Wait until a condition gives something other than None, and return that.

    Raises
    ------
    TimeoutError
        If it does not within so many seconds, with the end of the log.
    """
    deadline = time.monotonic() + seconds
    while (result := condition()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}:\n{log()[-3000:]}")
        time.sleep(pause)
    return result


def _processes(mark: str) -> list[psutil.Process]:
    """Processes that have inherited this mark, without those that have ended and wait for their parents."""
    return [process for process in psutil.process_iter() if _marked(process, mark)]


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(_MARK, "").startswith(mark) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:2])
    except psutil.Error:
        return ""
