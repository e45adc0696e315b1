"""Deployment: credentials, units, Compose, and real processes that must not be let in."""

import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import yaml
from cryptography import x509
from flwr.common.config import parse_config_args
from rich.console import Console
from typer.testing import CliRunner

import deploy.certificates
import deploy.check
from deploy.__main__ import app
from deploy.certificates import make_authority, make_node_key, make_server_certificate
from deploy.check import Check, NotTried, run_check
from deploy.commands import SuperLinkOptions, SuperNodeOptions, connection, node_config, node_environment
from deploy.daemons import wait_for
from deploy.explain import explain
from deploy.loopback import Loopback

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "deploy" / "systemd"
COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Credentials of a SuperLink and a node."""
    make_authority(tmp_path / "credentials")
    make_server_certificate(tmp_path / "credentials", ["flower.example.org", "127.0.0.1", "fd00::7"])
    make_node_key(tmp_path / "credentials", "clinic-a")
    return tmp_path / "credentials"


def call(*arguments: object, ok: bool = True) -> str:
    """What `python -m deploy` prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code == 0) is ok, result.output
    return result.output


def openssl(*arguments: object) -> bool:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=False).returncode == 0


# --- credentials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "good"),
    [
        (("-verify_hostname", "flower.example.org"), True),
        (("-verify_ip", "127.0.0.1"), True),
        (("-verify_ip", "fd00::7"), True),
        (("-verify_hostname", "other.example.org"), False),
        (("-verify_ip", "127.0.0.2"), False),
    ],
)
def test_the_certificate_is_good_for_its_hosts_and_no_others(folder, host, good):
    """By OpenSSL's strict rules, as a server's."""
    rules = ("-x509_strict", "-purpose", "sslserver", "-CAfile", folder / "ca.crt")
    assert openssl("verify", *rules, *host, folder / "server.pem") is good


def test_another_authority_does_not_vouch_for_the_certificate(folder, tmp_path):
    other = make_authority(tmp_path / "other")
    assert not openssl("verify", "-CAfile", other, folder / "server.pem")


def test_the_server_certificate_cannot_sign_others(folder):
    """It is no authority, and the authority's own may sign no authorities."""
    authority, server = (
        x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.pem")
    )
    limits = [c.extensions.get_extension_for_class(x509.BasicConstraints).value for c in (authority, server)]
    assert [(limit.ca, limit.path_length) for limit in limits] == [(True, 0), (False, None)]
    assert server.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False


def test_private_keys_can_be_read_by_their_owner_alone(folder):
    """Whatever the umask."""
    before = os.umask(0)
    try:
        make_node_key(folder, "clinic-b")
    finally:
        os.umask(before)
    keys = sorted(folder.rglob("*.key"))
    assert [key.name for key in keys] == ["ca.key", "clinic-a.key", "clinic-b.key", "server.key"]
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


def test_nothing_is_overwritten_without_the_flag(folder):
    """Also where only the public half is there; with the flag both halves are new and fit each other."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for make in (
        lambda: make_authority(folder),
        lambda: make_server_certificate(folder, ["localhost"]),
        lambda: make_node_key(folder, "clinic-a"),
    ):
        with pytest.raises(ValueError, match="is there already; to replace it: --overwrite"):
            make()
    assert {path: path.read_bytes() for path in before} == before
    (folder / "nodes" / "clinic-a.key").unlink()
    with pytest.raises(ValueError, match=r"clinic-a\.pub is there already"):
        make_node_key(folder, "clinic-a")
    make_server_certificate(folder, ["localhost"], overwrite=True)
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(folder / "server.pem", folder / "server.key")
    assert openssl("verify", "-CAfile", folder / "ca.crt", "-verify_hostname", "localhost", folder / "server.pem")


def test_private_keys_are_not_written_into_a_project(tmp_path):
    """Flower bundles an app's folder, and people share it."""
    (tmp_path / "pyproject.toml").touch()
    for make in (make_authority, lambda folder: make_node_key(folder, "a")):
        with pytest.raises(ValueError, match=r"is inside the project .*: keep private keys out"):
            make(tmp_path / "deploy" / "keys")
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


@pytest.mark.parametrize("host", ["", "flower.example.org:8000", "https://flower", "a b", "300.1.2.3", "-a"])
def test_what_is_no_host_is_refused(folder, host):
    with pytest.raises(ValueError, match="neither a host name nor an IP address"):
        make_server_certificate(folder, [host], overwrite=True)


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "a b"])
def test_what_is_no_name_of_a_node_is_refused(folder, name):
    with pytest.raises(ValueError, match="a node's name is"):
        make_node_key(folder, name)


def test_a_certificate_without_an_authority_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no certificate authority in"):
        make_server_certificate(tmp_path / "empty", ["localhost"])


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_program_makes_what_its_commands_name(tmp_path):
    """Certificates, a key, the commands of SuperLink and SuperNode, and the connection: every file is there."""
    credentials = ("--folder", tmp_path / "c")
    call("certificates", "--host", "flower.example.org", *credentials)
    call("keys", "a", "b", *credentials)
    link = call("superlink", *credentials)
    node = call("supernode", "a", "--superlink", "flower.example.org:9443", "--clients", "0,3", *credentials)
    lines = tomllib.loads(call("connection", *credentials))["superlink"]["cafe"]
    paths = [word for word in shlex.split(link + node) if word.startswith(str(tmp_path / "c"))]
    assert len(paths) == 5
    assert all(Path(path).is_file() for path in [*paths, lines["root-certificates"]])
    assert lines["address"] == "127.0.0.1:8000"


def test_a_certificate_is_renewed_under_the_same_authority(tmp_path):
    options = ("--host", "flower.example.org", "--folder", tmp_path / "c")
    call("certificates", *options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert "is there already" in call("certificates", *options, ok=False)
    call("certificates", *options, "--overwrite")
    after = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"server.pem", "server.key"}


def test_security_is_left_out_by_the_flag_alone(tmp_path):
    """And there is none for units."""
    node = ("supernode", "a", "--superlink", "127.0.0.1:8000", "--clients", "0", "--folder", tmp_path)
    for command, wanted in ((("superlink",), "--enable-supernode-auth"), (node, "--auth-supernode-private-key")):
        assert "--insecure" not in (secure := call(*command))
        assert wanted in secure
        insecure = call(*command, "--insecure")
        assert "WARNING: no TLS, no authentication" in insecure
        assert "--insecure" in insecure
        assert wanted not in insecure
        assert "--insecure is for commands only" in call(*command, "--insecure", "--env-file", ok=False)


@pytest.mark.parametrize("value", ['a"b', "a'b", "a\nb", "a=b", "a\\b"])
def test_a_node_config_that_flower_would_misread_is_refused(value):
    with pytest.raises(ValueError, match="node-config name must not contain"):
        node_config({"name": value})


def test_flower_reads_the_node_config_as_it_was_meant():
    config = {"clients": "0,3", "name": "clinic a", "data-dir": "/srv/my data", "n": 3, "x": 0.5, "y": True}
    assert parse_config_args([node_config(config)]) == config


def test_what_flower_says_is_explained_or_left_alone():
    assert "NTP" in str(explain("[SSL: CERTIFICATE_VERIFY_FAILED] certificate is not yet valid (_ssl.c:1)"))
    assert explain("all is well") is None


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_started_here_ends_with_its_status_and_an_explanation_unless_it_was_asked_to(asked):
    """A program in place of Flower's: it says what a SuperNode says, and ends by itself or on SIGTERM."""
    program = "import time; print('[code: 2004] Failed to activate SuperNode.', flush=True); "
    program += "time.sleep(60)" if asked else "raise SystemExit(49)"
    command = [
        sys.executable,
        "-c",
        f"import sys, deploy.__main__ as m; sys.exit(m._run([sys.executable, '-c', {program!r}]))",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert "2004" in started.stdout.readline()
        if asked:
            started.send_signal(signal.SIGTERM)
        _, explained = started.communicate()
    assert ("the SuperLink does not take this node's key" in explained) is not asked
    assert (started.returncode == 49) is not asked


# --- systemd and Compose ---------------------------------------------------------------------------------------------


def flags(command: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in command if word.startswith("--")}


def exec_start(unit: str) -> list[str]:
    text = (UNITS / unit).read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    return shlex.split(line.removeprefix("ExecStart="))


@pytest.mark.parametrize("damaged", [False, True])
def test_systemd_accepts_the_units(tmp_path, damaged):
    """And would not accept others."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit, instance in (
        ("cafe-superlink.service", "cafe-superlink.service"),
        ("cafe-supernode@.service", "cafe-supernode@a.service"),
    ):
        text = (UNITS / unit).read_text().replace("/opt/cafe-flwr/bin/", f"{Path(sys.executable).parent}/")
        text = text.replace("Restart=always", "Restart=allways") if damaged else text
        (tmp_path / instance).write_text(text)
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / instance)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0 and not done.stderr) is not damaged, done.stderr


def test_compose_has_the_shape_of_its_specification(tmp_path):
    """By the specification's own JSON schema; and with a word that it does not know it has not."""
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed")
    damaged = tmp_path / "compose.yaml"
    damaged.write_text(COMPOSE.read_text().replace("cap_drop", "cap_dropp"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    codes = [
        subprocess.run([*command, file], capture_output=True, check=False).returncode for file in (COMPOSE, damaged)
    ]
    assert codes == [0, 1]


def test_docker_reads_the_compose_file():
    docker = ["docker", "compose"]
    if (
        shutil.which("docker") is None
        or subprocess.run([*docker, "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("docker's compose plugin is not installed")
    for profile in ("superlink", "supernode"):
        subprocess.run([*docker, "-f", COMPOSE, "--profile", profile, "config", "--quiet"], check=True)


def test_units_and_compose_start_what_the_printed_commands_start(folder):
    """The same flags, so what is checked for one is checked for all; and none of them is insecure."""
    link = flags(SuperLinkOptions(folder, database=Path("db")).command())
    node = flags(SuperNodeOptions("host:9443", folder / "ca.crt", folder / "nodes" / "clinic-a.key", {}).command())
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert flags(exec_start("cafe-superlink.service")) == flags(services["superlink"]["command"]) == link
    assert flags(exec_start("cafe-supernode@.service")) == node
    assert flags(services["supernode"]["command"]) == node - {"--port"}  # a container has ports of its own
    assert "--insecure" not in link | node


def test_units_and_compose_find_all_they_need_in_the_file_of_settings(folder, monkeypatch):
    """Every variable is there, and Flower reads the node-config that comes out as it was meant."""
    config = {"clients": "0,3", "name": "clinic-a", "data-dir": "/srv/data"}
    options = SuperNodeOptions("flower.example.org:9443", folder / "ca.crt", folder / "nodes" / "clinic-a.key", config)
    lines = node_environment("clinic-a", options).splitlines()
    settings = dict(line.split("=", 1) for line in lines)
    compose = yaml.safe_load(COMPOSE.read_text())["services"]["supernode"]
    wanted = {name for name in re.findall(r"\$\{(\w+)", str(compose)) if name != "CAFE_CREDENTIALS"}
    unit = exec_start("cafe-supernode@.service")
    wanted |= set(re.findall(r"\$\{(\w+)", " ".join(unit)))
    assert wanted == settings.keys()

    def node_config_of(command: list[str]) -> dict[str, object]:
        text = command[command.index("--node-config") + 1]
        return parse_config_args([re.sub(r"\$\{(\w+)(:-)?\}", lambda match: settings[match[1]], text)])

    assert node_config_of(unit) == {**config, "state-dir": "/var/lib/cafe-flwr/%i/state"}
    assert node_config_of(compose["command"]) == {**config, "data-dir": "/data", "state-dir": "/app/state/personal"}


def test_a_file_of_settings_that_would_be_misread_is_refused(tmp_path):
    node = ("supernode", "a", "--superlink", "h:1", "--clients", "0", "--folder", tmp_path, "--env-file")
    assert "--data-dir" in call(*node, ok=False)
    assert "CAFE_DATA_DIR must not contain" in call(*node, "--data-dir", tmp_path / "my data", ok=False)


def test_the_gate_is_in_front_of_all_that_is_not_signed():
    """nginx accepts it, and the one way through is the nodes'."""
    text = (ROOT / "deploy" / "nginx" / "cafe-gate.conf").read_text()
    assert re.findall(r"location (\S+) \{\s*(?:return (\d+)|proxy_pass (\S+));", text) == [
        ("/v1/fleet/", "", "https://127.0.0.1:8000/v1/fleet/"),
        ("/", "403", ""),
    ]


def test_no_credentials_are_in_the_bundle_and_no_deployment_is_in_the_wheel():
    """The bundle names its files one by one, and the wheel its one package."""
    manifests = [tomllib.loads((ROOT / name).read_text()) for name in ("pyproject.toml", "pyproject-flwr.toml")]
    patterns = [pattern for manifest in manifests for pattern in manifest["tool"]["flwr"]["app"]["fab-include"]]
    assert {Path(pattern).suffix for pattern in patterns} == {".py", ".md", ""}
    assert not [pattern for pattern in patterns if pattern.startswith(("deploy", "*"))]
    assert manifests[0]["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["cafe_flwr"]


# --- real processes --------------------------------------------------------------------------------------------------


@contextmanager
def tls_server(certificate: Path) -> Iterator[int]:
    """A port of loopback that shakes hands with this certificate, and no more."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                with caller:
                    caller.settimeout(10)
                    try:
                        context.wrap_socket(caller, server_side=True).close()
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.flower
def test_who_must_not_come_in_is_refused_with_a_reason_and_who_may_is_not(tmp_path, monkeypatch):
    """Six real SuperNodes at once: one is taken, each of the others ends, and its words are explained.

    A node whose clock is ten minutes ahead cannot be had without changing the machine's clock; the hook changes the
    one function of Flower that reads it.
    """
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import datetime, flwr.supercore.date as date\n"
        "now = date.now\n"
        "date.now = lambda: now() + datetime.timedelta(minutes=10)\n"
    )
    ahead = {"PYTHONPATH": f"{tmp_path / 'hook'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    node = {"clients": "0"}
    with Loopback(tmp_path / "deployment") as deployment:
        credentials = deployment.credentials
        other = make_authority(tmp_path / "other")
        with monkeypatch.context() as patch:
            patch.setattr(deploy.certificates, "_BACKDATED", timedelta(hours=-2))
            make_server_certificate(credentials, ["127.0.0.1"], overwrite=True)  # the SuperLink has read the old one
        for name in ("server.pem", "server.key"):
            shutil.copy(credentials / name, tmp_path / name.replace("server", "later"))
        make_server_certificate(credentials, ["elsewhere.example.org"], overwrite=True)
        with tls_server(tmp_path / "later.pem") as later, tls_server(credentials / "server.pem") as elsewhere:
            good = deployment.add_node("good", node)
            expected = {
                deployment.add_node(
                    "other-authority", node, authority=other, register=False
                ): "not signed by the authority",
                deployment.add_node("unregistered", node, register=False): "not registered",
                deployment.add_node("clock", node, environment=ahead): "clock may be at most 5 s ahead",
                deployment.add_node(
                    "later", node, superlink=f"127.0.0.1:{later}", register=False
                ): "this machine's clock is behind",
                deployment.add_node(
                    "elsewhere", node, superlink=f"127.0.0.1:{elsewhere}", register=False
                ): "does not have the host",
            }
            for refused, words in expected.items():
                wait_for(lambda r=refused: not r.alive or None, 180, f"the end of {refused.name}", refused.log)
                assert not refused.online
                assert words in str(explain(refused.log())), refused.log()
            wait_for(lambda: good.online or None, 180, "the good node", good.log)


@pytest.mark.flower
def test_a_check_that_fails_says_so_and_leaves_no_process(tmp_path, monkeypatch):
    """A SuperLink and a node run when a step fails: the table says so, nothing else is tried, both are ended."""
    started: list[psutil.Process] = []

    def broken(self: Check) -> str:
        self.deployment.add_node("a", {"clients": "0"})
        wait_for(lambda: len(self.deployment.processes()) >= 2 or None, 60, "two processes")
        started.extend(self.deployment.processes())
        raise RuntimeError("out of order")

    def impossible() -> str:
        raise NotTried("no nginx")

    def steps(self: Check) -> list:
        return [("a gate", impossible), ("it works", lambda: broken(self)), ("so does that", lambda: "yes")]

    monkeypatch.setattr(Check, "steps", steps)
    monkeypatch.setattr(deploy.check, "_prepare", lambda folder: None)
    console = Console(record=True, width=120, file=io.StringIO())
    assert run_check(tmp_path / "check", console) == 1
    rows = [re.split(r"\s{2,}", line.strip()) for line in console.export_text().splitlines()]
    assert ["a gate", "no nginx", "–"] in rows
    assert ["it works", "RuntimeError: out of order", "NO"] in rows
    assert ["so does that", "not tried", "–"] in rows
    assert ["Every process that was started is ended", "none is left", "yes"] in rows
    assert len(started) >= 2
    assert not [process for process in started if process.is_running()]


INTERRUPTED = """
import sys, time
from pathlib import Path
import deploy.check
from deploy.check import Check, run_check

def endless(self):
    print("pids", *[p.pid for p in self.deployment.processes()], flush=True)
    time.sleep(600)

Check.steps = lambda self: [("it ends", lambda: endless(self))]
deploy.check._prepare = lambda folder: None
sys.exit(run_check(Path(sys.argv[1])))
"""


@pytest.mark.flower
def test_a_check_that_is_terminated_leaves_no_process(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "check")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as check:
        assert check.stdout is not None
        line = next(line for line in check.stdout if line.startswith("pids"))
        pids = [int(pid) for pid in line.split()[1:]]
        check.send_signal(signal.SIGTERM)
        said = check.stdout.read()
    assert check.returncode == 130
    assert "interrupted" in said
    assert pids
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.flower
def test_what_was_killed_leaves_no_orphans(tmp_path):
    """The SuperLink is killed by -9, and its SuperExec, which leads a session of its own, is found nonetheless."""
    with Loopback(tmp_path, secure=False, database=False) as deployment:
        wait_for(lambda: len(deployment.processes()) >= 2 or None, 60, "the SuperExec", deployment.superlink.log)
        deployment.superlink.kill()
        assert not deployment.superlink.alive
    assert not deployment.processes()


def test_a_connection_without_tls_says_so():
    assert tomllib.loads(connection("x", "127.0.0.1:8000", None))["superlink"]["x"]["insecure"] is True
