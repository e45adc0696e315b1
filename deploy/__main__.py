"""``python -m deploy``: credentials, commands and a check of a deployment on real machines. See docs/deployment.md."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from deploy.certificates import CA_CERTIFICATE, CA_KEY, make_authority, make_node_key, make_server_certificate
from deploy.commands import SuperLinkOptions, SuperNodeOptions, connection, node_environment, superlink_environment
from deploy.explain import explain

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Deploy cafe-flwr on real machines.")

Folder = Annotated[Path, typer.Option("--folder", help="Folder of credentials.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what is there.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS and no authentication: anyone may listen or join.")]
Start = Annotated[bool, typer.Option("--start", help="Start it here, rather than print the command.")]
EnvFile = Annotated[bool, typer.Option("--env-file", help="Print the file of settings for systemd and Compose.")]
CREDENTIALS = Path("/etc/cafe-flwr")
_MAX_LOG = 100_000  # characters from the start of the log, where failures to start are reported


@app.command()
def certificates(
    host: Annotated[list[str], typer.Option(help="Name or address of the SuperLink, as nodes call it; repeatable.")],
    folder: Folder = CREDENTIALS,
    days: Annotated[int, typer.Option(help="How long the SuperLink's certificate is valid.")] = 365,
    overwrite: Overwrite = False,
    new_authority: Annotated[bool, typer.Option(help="Replace the authority too: all machines need it anew.")] = False,
) -> None:
    """Make a certificate authority, unless there is one, and the SuperLink's certificate."""
    try:
        if new_authority or not (folder / CA_CERTIFICATE).exists():
            print(f"authority:   {make_authority(folder, overwrite=new_authority)}")
        hosts = list(dict.fromkeys([*host, "localhost", "127.0.0.1"]))
        print(f"certificate: {make_server_certificate(folder, hosts, days=days, overwrite=overwrite)}")
    except (ValueError, OSError) as error:
        _fail(error)
    print(
        f"for {', '.join(hosts)}; {days} days. Keep {folder / CA_KEY} off the network: the SuperLink does not need it"
    )


@app.command()
def keys(
    nodes: Annotated[list[str], typer.Argument(help="Names of SuperNodes.")],
    folder: Folder = CREDENTIALS,
    overwrite: Overwrite = False,
) -> None:
    """Make a key pair for each SuperNode."""
    try:
        for node in nodes:
            key = make_node_key(folder, node, overwrite=overwrite)
            print(f"{key}: for the node's machine; {key.with_suffix('.pub').name}: to be registered")
    except (ValueError, OSError) as error:
        _fail(error)


@app.command("connection")
def show_connection(
    superlink: Annotated[str, typer.Option(help="Address of the SuperLink's control part, host:port.")] = (
        "127.0.0.1:8000"
    ),
    name: Annotated[str, typer.Option(help="What the connection is called in `flwr run APP NAME`.")] = "cafe",
    folder: Folder = CREDENTIALS,
    insecure: Insecure = False,
) -> None:
    """Print the lines for ~/.flwr/config.toml that `flwr run APP NAME` needs."""
    print(connection(name, superlink, None if insecure else folder.resolve() / CA_CERTIFICATE), end="")


@app.command()
def register(
    nodes: Annotated[list[str], typer.Argument(help="Names of SuperNodes, or paths of their public keys.")],
    folder: Folder = CREDENTIALS,
    name: Annotated[str, typer.Option(help="The connection.")] = "cafe",
) -> None:
    """Register the keys of SuperNodes at the running SuperLink, once in the life of its database."""
    failed = 0
    for node in nodes:
        public = Path(node) if node.endswith(".pub") else folder / "nodes" / f"{node}.pub"
        if not public.exists():
            _fail(f"there is no key {public}: python -m deploy keys {node}")
        failed += subprocess.run([_flower("flwr"), "supernode", "register", public, name], check=False).returncode != 0
    if failed:
        _fail(f"{failed} of {len(nodes)} keys were not registered")


@app.command()
def superlink(
    folder: Folder = CREDENTIALS,
    host: Annotated[str, typer.Option(help="Where it listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.")] = 8000,
    database: Annotated[Path, typer.Option(help="File of its state.")] = Path("superlink.sqlite"),
    insecure: Insecure = False,
    start: Start = False,
    env_file: EnvFile = False,
) -> None:
    """Print the command that starts the SuperLink, or start it."""
    options = SuperLinkOptions(None if insecure else folder.resolve(), host, port, database.resolve())
    if env_file:
        _no_env_file_without_security(insecure)
        print(superlink_environment(options), end="")
    else:
        _show_or_start(options.command(), start, insecure)


@app.command()
def supernode(  # noqa: PLR0913 (the options of the command)
    node: Annotated[str, typer.Argument(help="Its name.")],
    superlink: Annotated[str, typer.Option(help="Address of the SuperLink or its gate, host:port.")],
    clients: Annotated[str, typer.Option(help="Numbers of the clients it hosts: '3' or '3,7'.")],
    data_dir: Annotated[Path | None, typer.Option(help="Folder of their data.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Folder of their personal state.")] = None,
    folder: Folder = CREDENTIALS,
    port: Annotated[int, typer.Option(help="Of loopback; another for each SuperNode of a machine.")] = 9094,
    insecure: Insecure = False,
    start: Start = False,
    env_file: EnvFile = False,
) -> None:
    """Print the command that starts a SuperNode, or start it."""
    config = {"clients": clients, "name": node}
    config |= {key: str(path.resolve()) for key, path in (("data-dir", data_dir), ("state-dir", state_dir)) if path}
    key = folder.resolve() / "nodes" / f"{node}.key"
    authority = folder.resolve() / CA_CERTIFICATE
    options = SuperNodeOptions(superlink, None if insecure else authority, None if insecure else key, config, port)
    try:
        if env_file:
            _no_env_file_without_security(insecure)
            print(node_environment(node, options), end="")
        else:
            _show_or_start(options.command(), start, insecure)
    except ValueError as error:
        _fail(error)


@app.command()
def check(
    keep: Annotated[Path | None, typer.Option(help="An empty folder for logs and results, which stays.")] = None,
) -> None:
    """Deploy on this machine's loopback, cause faults, and say what was promised and what happened (some minutes)."""
    from deploy.check import run_check

    sys.exit(run_check(keep))


def _no_env_file_without_security(insecure: bool) -> None:
    if insecure:
        _fail(
            "the units of systemd and Compose always have TLS and node authentication: --insecure is for commands only"
        )


def _show_or_start(command: Sequence[str], start: bool, insecure: bool) -> None:
    if insecure:
        print("WARNING: no TLS, no authentication: for tests on one machine only", file=sys.stderr)
    if not start:
        print(shlex.join(command))
        return
    sys.exit(_run([_flower(command[0]), *command[1:]]))


def _run(command: Sequence[str]) -> int:
    """Run a program, show its output, and explain it if the program ends by itself."""
    log, asked = "", False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:

        def ask(number: int, _: object) -> None:
            nonlocal asked
            asked = True
            process.send_signal(number)

        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, ask)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log = log if len(log) > _MAX_LOG else log + line
    if not asked and (cause := explain(log)):
        print(f"\nThis means: {cause}.", file=sys.stderr)
    return process.returncode


def _flower(name: str) -> str:
    """One of Flower's commands, from this Python environment or else from the PATH."""
    own = Path(sys.executable).with_name(name)
    return str(own) if os.access(own, os.X_OK) else name


def _fail(error: object) -> NoReturn:
    print(f"Error: {error}", file=sys.stderr)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
