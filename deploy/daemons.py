"""The processes of a deployment on loopback (SuperLink, SuperNodes, gate), which can be killed and restarted."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import psutil  # type: ignore[import-untyped]

from cafe_flwr.app.launch import free_port, wait_until_healthy
from deploy.certificates import CA_CERTIFICATE
from deploy.commands import SuperLinkOptions

MARK = "CAFE_FLWR_LOOPBACK"
"""Environment variable that marks all processes of a deployment."""
_RESTART_SECONDS = 5.0  # between two starts, as in the systemd unit
T = TypeVar("T")


class Daemon:
    """A process of the deployment, with its log and the processes it has started.

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
        """Start it without waiting; its log is appended to."""
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
        """Kill the process itself with SIGKILL, but not the processes it has started."""
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
        """The running processes of its apps (ServerApp, ClientApp)."""
        return [process for process in processes_of(self._env[MARK]) if self.app_command in _command(process)]

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
    """nginx in front of the SuperLink, with the gate of ``deploy/nginx``, which lets only nodes through."""

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
        """Start it until the SuperLink takes it, as a supervisor does, and return how often it was started.

        A node with a key is refused for about a minute after it was killed, while Flower believes it is still there.
        TimeoutError if it is not taken within ``seconds``.
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


def wait_for(
    condition: Callable[[], T | None],
    seconds: float,
    what: str,
    log: Callable[[], str] = str,
    *,
    pause: float = 0.2,
) -> T:
    """Wait until a condition gives something other than None, and return that; TimeoutError with the end of the log."""
    deadline = time.monotonic() + seconds
    while (result := condition()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}:\n{log()[-3000:]}")
        time.sleep(pause)
    return result


def processes_of(mark: str) -> list[psutil.Process]:
    """Processes that have inherited this mark, without zombies."""
    return [process for process in psutil.process_iter() if _marked(process, mark)]


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK, "").startswith(mark) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:2])
    except psutil.Error:
        return ""
