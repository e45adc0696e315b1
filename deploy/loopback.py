"""A deployment on this machine's loopback: SuperLink and SuperNodes as real processes, which may be killed.

::

    with Loopback(folder) as deployment:                    # TLS and node authentication; secure=False for neither
        node = deployment.add_node("a", {"clients": "0", "state-dir": str(folder / "a")})  # key, registration, start
        deployment.wait_online(1)
        run = deployment.submit(app, {"num-server-rounds": 3, "name": "job", "results-dir": str(folder)})
        app_process = node.wait_for_app()                   # the ClientApp's psutil.Process, while it is at work
        app_process.kill()                                  # or node.kill(): the SuperNode itself, by SIGKILL
        node.start_again()                                  # as a supervisor does, until the SuperLink takes it back
        deployment.superlink.kill()                         # and deployment.superlink.start()
        deployment.wait_round(run, folder / "job", 2)       # round 2 is recorded
        deployment.wait(run)                                # "finished:completed", or whatever it was
        print(deployment.log(run))                          # of the ServerApp, also in deployment.superlink.log()

All processes, also those that others have started, are ended on leaving, even after an error; the folder with the logs
(``<name>.log``) stays. Every process has its own ports, and its own Flower home in the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from cafe_flwr.app.launch import flwr, free_port
from deploy.certificates import CA_CERTIFICATE, make_authority, make_node_key, make_server_certificate
from deploy.commands import SuperLinkOptions, SuperNodeOptions, connection
from deploy.daemons import MARK, Daemon, Gate, SuperLink, SuperNode, processes_of, wait_for

_CONNECTION = "loopback"


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
        Further environment variables for all processes.
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
        """End every process of the deployment, including orphans."""
        gate = [self.gate] if self.gate else []
        daemons = [*self.programs.values(), *self.nodes.values(), *gate, self.superlink]
        processes = [daemon.process for daemon in daemons if daemon.process is not None]
        for process in processes:
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(5)
        while left := processes_of(self.mark):
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, 5)
        for process in processes:
            process.wait()

    def processes(self) -> list[psutil.Process]:
        """All processes of the deployment."""
        return processes_of(self.mark)

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
            Whether to register its key, and to start it.
        authority
            Another authority's certificate for it to trust, in place of the deployment's.
        superlink
            Another address to call, e.g. that of a gate.
        environment
            Further environment variables for it and its ClientApps.
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
        """Wait until the SuperLink has taken ``count`` of the nodes."""
        nodes = list(self.nodes.values())
        wait_for(
            lambda: sum(node.online for node in nodes) >= count or None,
            seconds,
            f"{count} nodes online",
            lambda: "\n".join(node.log()[-1000:] for node in nodes if not node.online),
        )

    def submit(self, app: Path, run_config: Mapping[str, Any] | None = None) -> int:
        """Submit a run of the app in a folder, as ``flwr run <app> <connection>``; return its id.

        Raises RuntimeError if Flower refuses it, with Flower's message.
        """
        pairs = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in (run_config or {}).items()]
        options = [f"--run-config={' '.join(pairs)}"] if pairs else []  # of two, Flower loses keys of one table
        return int(self.flwr("run", str(app), _CONNECTION, *options)["run-id"])

    def status(self, run: int) -> str:
        """Flower's status of a run, e.g. ``running`` or ``finished:completed``."""
        return str(self.flwr("ls", _CONNECTION, "--run-id", str(run))["runs"][0]["status"])

    def wait(self, run: int, seconds: float = 300.0) -> str:
        """Wait until a run has ended, and return its status; TimeoutError with the end of the SuperLink's log."""

        def ended() -> str | None:
            status = self.status(run)
            return status if status.startswith("finished") else None

        deadline = time.monotonic() + seconds
        log = ["flwr", "log", str(run), _CONNECTION, "--stream"]  # ends with the run; polling would take a CPU
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(log, env=self.env, capture_output=True, check=False, timeout=seconds)
        left = deadline - time.monotonic()
        return wait_for(ended, left, f"the end of run {run}", lambda: self.superlink.log()[-3000:], pause=1.0)

    def wait_round(self, run: int, results: Path, number: int, seconds: float = 180.0) -> None:
        """Wait until ``number`` rounds of a run are in its results folder.

        Raises RuntimeError if the run ends before, and TimeoutError if it takes longer, with the end of its log.
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
        """The answer of a ``flwr`` command; RuntimeError with Flower's message if it fails."""
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
            MARK: f"{self.mark}/{name}/",
        }
