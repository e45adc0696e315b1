"""Runs a Flower app as `flwr run` does, but reports how it ended and leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import torch

if TYPE_CHECKING:
    from cafe_flwr.settings import Settings

_START_SECONDS = 60.0
_POLL_SECONDS = 1.0
_MAX_FAILURES = 10  # in a row
_CONNECTION = "private"


@dataclass(frozen=True)
class RunStatus:
    """How a run ended: Flower's run id and status, e.g. ``finished:completed``."""

    run_id: int
    status: str

    @property
    def completed(self) -> bool:
        """Whether the run finished without an error."""
        return self.status == "finished:completed"


@contextmanager
def private_superlink() -> Iterator[dict[str, str]]:
    """A private SuperLink in simulation mode, stopped on leaving.

    It has its own ports and its own Flower home in a temporary folder, so it does not disturb the user's SuperLink, and
    runs apps in this Python environment.

    Yields
    ------
    Environment in which ``flwr`` commands talk to it, as connection ``private``.
    """
    with tempfile.TemporaryDirectory(prefix="cafe-flwr-") as home:
        port, control_port = free_port(), free_port()
        folder = Path(sys.executable).parent  # of this environment's commands, on the PATH or not
        env = {
            **os.environ,
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        Path(home, "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
            f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        log = Path(home, "superlink.log")
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [
                    "flower-superlink",
                    "--insecure",
                    "--simulation",
                    "--disable-runtime-dependency-installation",
                    *("--host", "127.0.0.1", "--port", str(port)),
                    *("--control-api-address", f"127.0.0.1:{control_port}"),
                ],
                env=env,
                cwd=home,  # Ray's workers look for modules here first: not in whatever folder this was called from
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
            yield env
        finally:
            _stop(process)


def run_app(
    app: Path, env: dict[str, str], run_config: Sequence[str] = (), federation_config: Sequence[str] = ()
) -> RunStatus:
    """Submit an app, show its log until it ends, and say how it ended; Ctrl-C stops the run.

    ``flwr run --stream``, in contrast, exits 0 even if the run fails, and Ctrl-C leaves it running.

    Raises RuntimeError if Flower refuses the app or its settings, with Flower's message.
    """
    options = [  # one of each: of two with keys of one table, Flower loses the first
        f"--{name}={' '.join(pairs)}"
        for name, pairs in (("run-config", run_config), ("federation-config", federation_config))
        if pairs
    ]
    answer = flwr(env, "run", str(app), _CONNECTION, "--format", "json", *options)
    if not answer.get("success", False):
        raise RuntimeError(answer.get("error-message") or "Flower refused the run")
    run_id = int(answer["run-id"])
    log = subprocess.Popen(["flwr", "log", str(run_id), _CONNECTION, "--stream"], env=env)
    try:
        log.wait()  # it ends with the run
        status = _wait_until_finished(env, run_id)
    except KeyboardInterrupt:
        flwr(env, "stop", str(run_id), _CONNECTION, "--format", "json")
        raise
    finally:
        log.terminate()
        log.wait()
    return RunStatus(run_id, status)


def with_resources(settings: Settings, federation_config: Sequence[str]) -> list[str]:
    """The federation config, with each worker's share of a GPU added where there is one and none is given."""
    given = " ".join(federation_config)
    if given.endswith(".toml"):  # a file is all there is
        return list(federation_config)
    pairs = simulation_resources(settings.compute.device, settings.compute.clients_per_gpu)
    return [*(pair for pair in pairs if pair.partition("=")[0] not in given), *federation_config]


def _wait_until_finished(env: dict[str, str], run_id: int) -> str:
    failures = 0
    while failures < _MAX_FAILURES:
        answer = flwr(env, "ls", _CONNECTION, "--run-id", str(run_id), "--format", "json")
        runs = answer.get("runs", [])
        failures = 0 if runs else failures + 1
        if runs and str(runs[0]["status"]).startswith("finished"):
            return str(runs[0]["status"])
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"the SuperLink no longer answers: {answer.get('error-message')}")


def flwr(env: dict[str, str], *arguments: str) -> dict[str, Any]:
    """The answer of a ``flwr`` command, called with ``--format json``; Flower's message where it is no JSON."""
    done = subprocess.run(["flwr", *arguments], env=env, capture_output=True, text=True, check=False)
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        return {"success": False, "error-message": (done.stdout + done.stderr).strip()}


def wait_until_healthy(
    process: subprocess.Popen[bytes], url: str, log: Path, context: ssl.SSLContext | None = None
) -> None:
    """Wait until a SuperLink answers at its URL; ``context`` knows its authority.

    Raises RuntimeError if it ends before, with the end of its log, or takes too long.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the SuperLink did not start:\n{log.read_text(errors='replace')[-2000:]}")
        try:
            with urlopen(f"{url}/health", timeout=1, context=context):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the SuperLink was not ready within {_START_SECONDS:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and what it started: it leads a process group of its own."""
    for sign, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def free_port() -> int:
    """A free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def simulation_resources(device: str, clients_per_gpu: int) -> list[str]:
    """Pairs of Flower's federation config by which that many workers share a GPU; none where there is no GPU.

    Workers see no GPU unless they are given a share of one.

    Examples
    --------
    >>> simulation_resources("cpu", 4)
    []
    """
    if device in ("cpu", "mps") or not torch.cuda.is_available():
        return []
    share = 10_000 // clients_per_gpu / 10_000  # in Ray's units, rounded down: all shares must fit on the GPU
    return ["client-resources-num-cpus=1", f"client-resources-num-gpus={share}"]
