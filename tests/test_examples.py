"""The apps in examples/ run with real Flower parts, and say what their documents say."""

import difflib
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apps import App, load_app
from federations import FaultyApp, WatchedGrid, asked, toy_app, toy_data
from flwr.app import ConfigRecord
from safetensors.numpy import load_file

from cafe_flwr import CafeDistill
from cafe_flwr.app.launch import run_app
from cafe_flwr.app.run import calibrate
from cafe_flwr.core.text import kebab
from cafe_flwr.methods import CafeDistillMethod, settings_of
from cafe_flwr.metrics import THRESHOLDS
from cafe_flwr.server.options import Aggregation
from cafe_flwr.settings import Settings
from cafe_flwr.training import LocalBudget
from cafe_flwr.wire.keys import PROTOCOL
from cafe_flwr.wire.options import Privacy

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
NUM_EXITS = 3


@pytest.fixture(scope="module")
def foreign() -> App:
    return load_app(EXAMPLES / "foreign-app" / "after")


@pytest.fixture(scope="module")
def by_hand() -> App:
    return load_app(EXAMPLES / "hand-written-client")


def metrics_of(app: App, folder: Path, rounds: int, nodes: int = 2) -> dict[str, Any]:
    """Metrics of every round, as the app saves them."""
    path = folder / "metrics.json"
    state = {"state-dir": str(folder / "state")}
    app.run(nodes, state, num_server_rounds=rounds, metrics_file=str(path))
    return json.loads(path.read_text())


# --- a foreign project -----------------------------------------------------------------------------------------------


def sources(folder: Path) -> dict[str, list[str]]:
    paths = (path for path in folder.rglob("*") if path.suffix in (".py", ".toml"))
    return {str(path.relative_to(folder)): path.read_text().splitlines() for path in paths}


def test_a_foreign_app_needs_ten_added_lines():
    """Changed lines count as added, manifest and imports included; blank lines do not."""
    before, after = (sources(EXAMPLES / "foreign-app" / name) for name in ("before", "after"))
    assert before.keys() == after.keys()
    added = [
        line[2:]
        for name, lines in after.items()
        for line in difflib.ndiff(before[name], lines)
        if line.startswith("+ ") and line[2:].strip()
    ]
    assert any("CafeDistill(" in line for line in added)
    assert any("make_client_app(" in line for line in added)
    assert len(added) <= 10, "\n".join(added)


@pytest.mark.slow
def test_a_foreign_app_runs_before_and_after(foreign, tmp_path):
    """FedAvg gives one network for clients that see different shapes; afterwards each has one of its own."""
    rounds = 6
    plain = metrics_of(load_app(EXAMPLES / "foreign-app" / "before"), tmp_path, rounds)[str(rounds)]
    personal = metrics_of(foreign, tmp_path, rounds)[str(rounds)]
    assert isinstance(plain["accuracy"], float)
    assert len(personal["accuracy"]) == NUM_EXITS
    assert personal["accuracy"][-1] > plain["accuracy"] + 0.1
    for client in range(2):
        network = load_file(tmp_path / "state" / f"client-{client}.safetensors")
        assert {name for name in network if name.startswith("stages.0.")}
        assert network["exits.2.head.weight"].shape == (6, 24)


# --- a client written by hand ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_hand_written_client_does_not_need_this_package():
    program = (
        "import sys; sys.modules['cafe_flwr'] = None; from shapes.client_app import app; print(type(app).__name__)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=EXAMPLES / "hand-written-client", capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ClientApp", done.stderr


def test_data_and_server_of_the_hand_written_client_are_those_of_the_foreign_app():
    other, mine = sources(EXAMPLES / "foreign-app" / "after"), sources(EXAMPLES / "hand-written-client")
    for name in ("shapes/data.py", "shapes/server_app.py"):
        assert mine[name] == other[name]


def federate(app: Any, folder: Path, rounds: int = 3, **options: Any) -> WatchedGrid:
    """A federation of three nodes with a client each, whose steps see all of a client's data: order does not matter."""
    grid = WatchedGrid(app, 3, node_config={"state-dir": str(folder)})
    local = LocalBudget(batch_size=1000, steps=3, learning_rate=0.2)
    CafeDistill(num_rounds=rounds, local=local, seed=5, **options).start(grid)
    return grid


def personal_heads(grid: WatchedGrid, folder: Path, client: int, rounds: int = 3) -> dict[str, np.ndarray]:
    """What a client has kept on its disk after the last round, whichever way it keeps it."""
    run = grid.of_type("train")[0][0].content["config"]["run"]
    written = folder / run / f"client-{client}" / f"{rounds:06d}.npz"
    if written.exists():
        with np.load(written) as file:
            return dict(file)
    return load_file(folder / "versions" / run / f"client-{client}" / f"round-{rounds:06d}.safetensors")


def assert_same_federation(grid: WatchedGrid, folder: Path, other: WatchedGrid, others: Path) -> None:
    """Equal heads, weights and metrics, but for the rounding of sums in another order."""
    for client in range(3):
        mine, theirs = personal_heads(grid, folder, client), personal_heads(other, others, client)
        assert list(mine) == list(theirs) or sorted(mine) == sorted(theirs)
        for name, values in mine.items():
            np.testing.assert_allclose(values, theirs[name], atol=1e-4, err_msg=f"client {client}: {name}")
    for kind in ("train", "evaluate"):
        for (_, reply), (_, expected) in zip(grid.of_type(kind), other.of_type(kind), strict=True):
            assert reply.content.keys() == expected.content.keys()
            for name, record in reply.content.metric_records.items():
                assert record.keys() == expected.content[name].keys()
                for key, values in record.items():
                    if not key.startswith("seconds"):
                        np.testing.assert_allclose(values, expected.content[name][key], atol=1e-4, err_msg=key)
            for name, record in reply.content.array_records.items():
                flat, expected_flat = record["flat"].numpy(), expected.content[name]["flat"].numpy()
                np.testing.assert_allclose(flat, expected_flat, atol=1e-4)


@pytest.fixture(scope="module")
def reference(foreign, tmp_path_factory) -> tuple[WatchedGrid, Path]:
    """The federation of clients that ``make_client_app`` made."""
    folder = tmp_path_factory.mktemp("reference")
    return federate(foreign.client, folder), folder


@pytest.mark.slow
def test_hand_written_clients_get_the_numbers_of_make_client_app(by_hand, reference, tmp_path):
    """The server cannot tell them apart: heads on disk, shared weights, every metric, dynamic inference."""
    assert_same_federation(federate(by_hand.client, tmp_path), tmp_path, *reference)


@pytest.mark.slow
def test_both_kinds_of_clients_in_one_federation(by_hand, foreign, reference, tmp_path):
    """They agree on what travels, and teach each other."""

    def either(message: Any, context: Any) -> Any:
        app = foreign if context.node_config["partition-id"] == 0 else by_hand
        return app.client(message, context)

    assert_same_federation(federate(either, tmp_path), tmp_path, *reference)


@pytest.mark.slow
def test_hand_written_clients_speak_float16(by_hand, reference, tmp_path):
    """Half of the bytes, nearly the same heads."""
    grid = federate(by_hand.client, tmp_path, wire="float16")
    for message, reply in grid.of_type("train"):
        assert {record.content["arrays"]["flat"].numpy().dtype for record in (message, reply)} == {np.dtype("float16")}
    for client in range(3):
        heads, others = personal_heads(grid, tmp_path, client), personal_heads(*reference, client)
        for name, values in heads.items():
            np.testing.assert_allclose(values, others[name], atol=0.01, err_msg=name)


def test_the_hand_written_client_sends_nothing_without_the_privacy_asked_for(by_hand, tmp_path):
    with pytest.raises(RuntimeError, match="this node neither clips nor adds noise"):
        federate(by_hand.client, tmp_path, privacy=Privacy(clip_norm=1.0))


@pytest.mark.slow
def test_a_message_that_arrives_twice_is_answered_alike_by_the_hand_written_client(by_hand, tmp_path):
    grid = federate(by_hand.client, tmp_path)
    before = [personal_heads(grid, tmp_path, client) for client in range(3)]
    last = [(message, reply) for message, reply in grid.of_type("train")][-3:]
    for message, reply in last:
        (again,) = grid.send_and_receive([message])
        assert (again.content["arrays"]["flat"].numpy() == reply.content["arrays"]["flat"].numpy()).all()
    for client, heads in enumerate(before):
        after = personal_heads(grid, tmp_path, client)
        assert all((heads[name] == after[name]).all() for name in heads)


def test_the_hand_written_client_says_what_it_cannot_do(by_hand, tmp_path):
    """A setting it does not follow stops it before the first round, and the server says why."""
    from cafe_flwr.server.strategy import FederatedStrategy

    grid = WatchedGrid(by_hand.client, 2, node_config={"state-dir": str(tmp_path)})
    strategy = FederatedStrategy(method=CafeDistillMethod(prior=True), num_rounds=1, wait_seconds=1.0)
    with pytest.raises(RuntimeError, match="this node cannot do prior = True"):
        strategy.start(grid)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["foreign", "by_hand"])
def test_a_message_of_another_protocol_is_not_answered(which, request, tmp_path):
    """Of both kinds of clients: the number of the server and the client's own are named."""
    newer = PROTOCOL + 1

    def of_a_newer_server(answer: Any, message: Any, context: Any) -> Any:
        message.content["config"]["protocol"] = newer
        return answer(message, context)

    app = FaultyApp(request.getfixturevalue(which).client, of_a_newer_server)
    grid = WatchedGrid(app, 2, node_config={"state-dir": str(tmp_path)})
    with pytest.raises(RuntimeError, match=rf"the server speaks message protocol {newer}, this node .*{PROTOCOL}"):
        CafeDistill(num_rounds=1, wait_seconds=1.0).start(grid)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stops"), [("query", True), ("train", True), ("evaluate", False)])
def test_an_answer_of_another_protocol_is_refused(kind, stops, by_hand, tmp_path, flower_log):
    newer = PROTOCOL + 1

    def newer_client(answer: Any, message: Any, context: Any) -> Any:
        reply = answer(message, context)
        if message.metadata.message_type == kind:
            reply.content["config"]["protocol"] = newer
        return reply

    grid = WatchedGrid(FaultyApp(by_hand.client, newer_client), 2, node_config={"state-dir": str(tmp_path)})
    strategy = CafeDistill(num_rounds=1, wait_seconds=1.0)
    if stops:
        with pytest.raises(RuntimeError, match=rf"speaks message protocol {newer}, this server .*{PROTOCOL}"):
            strategy.start(grid)
    else:
        strategy.start(grid)
        assert re.search(rf"speaks message protocol {newer}, this server .*{PROTOCOL}", flower_log.text())


@pytest.mark.flower
def test_hand_written_clients_in_flowers_simulation_engine(superlink, by_hand, tmp_path):
    """The same metrics as in one process, but for the last digits: processes differ in their threads."""
    expected = metrics_of(by_hand, tmp_path, rounds=2)
    saved = tmp_path / "engine.json"
    config = [f'metrics-file="{saved}"', "num-server-rounds=2"]
    status = run_app(EXAMPLES / "hand-written-client", superlink, config)
    assert status.completed, status
    found = json.loads(saved.read_text())
    assert found.keys() == expected.keys()
    for server_round, metrics in expected.items():
        assert found[server_round].keys() == metrics.keys()
        for name, values in metrics.items():
            assert found[server_round][name] == pytest.approx(values, rel=1e-4, abs=1e-5), (server_round, name)


# --- docs/messages.md ------------------------------------------------------------------------------------------------

Row = tuple[str, str, bool]  # type, shape, whether it may be missing
TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def rows_of(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| ") and "`" in line.split("|", 3)[1] + line.split("|", 3)[2]:
            yield [cell.strip(" `") for cell in line.strip("| ").split("|")]


@pytest.fixture(scope="module")
def contract() -> dict[str, dict[tuple[str, str], Row]]:
    """Tables of docs/messages.md: of every message in each direction, and of the settings that go with a prefix."""
    sections = re.split(r"^## ", (ROOT / "docs" / "messages.md").read_text(), flags=re.MULTILINE)[1:]
    tables: dict[str, dict[tuple[str, str], Row]] = {}
    for section in sections:
        kind = section.split("`")[1] if section.startswith("`") else ""
        if kind.endswith(".…"):
            tables[kind] = {
                ("config", key.removesuffix("?")): (type_, "", key.endswith("?")) for key, type_, *_ in rows_of(section)
            }
            continue
        for direction in ("Down", "Up") if kind else ():
            table = section.split(f"**{direction}**", 1)[1].split("**Up**")[0]
            tables[f"{kind} {direction}"] = {
                (record, key.removesuffix("?")): (type_, shape, key.endswith("?"))
                for record, key, type_, shape, *_ in rows_of(table)
            }
    return tables


class Checked:
    """Holds messages against the tables, and remembers which rows it has met."""

    def __init__(self, contract: Mapping[str, Mapping[tuple[str, str], Row]]) -> None:
        self.contract = contract
        self.met: set[tuple[str, str, str]] = set()
        self.wire = np.dtype("float32")

    def check(self, table: str, content: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        rows = self.contract[table]
        found = set()
        for record_name, record in content.items():
            record_name = re.sub(r"client-\d+", "client", record_name)
            for key, value in record.items():
                if key == "mine":  # the user's own
                    continue
                row, where = rows.get((record_name, key)), table
                if row is None and "." in key:
                    group = f"{key.split('.')[0]}.…"
                    row = rows.get(("config", group))
                    found.add(("config", group))
                    self.met.add((table, "config", group))
                    if group in self.contract:
                        row, where = self.contract[group].get(("config", key)), group
                assert row is not None, f"{table}: {key!r} in {record_name!r} is not documented"
                self._check_value(f"{table}: {key}", value, row, sizes)
                found.add((record_name, key))
                self.met.add((where, record_name, key))
        missing = {name for name, (_, _, optional) in rows.items() if not optional} - found
        assert not missing, f"{table}: documented, but not there: {missing}"

    def _check_value(self, what: str, value: Any, row: Row, sizes: Mapping[str, int]) -> None:
        type_, shape, _ = row
        length = eval(shape.replace("·", "*").replace("−", "-"), {**sizes, "min": min}) if shape else None
        if type_ in ("float32", "wire"):
            array = value.numpy()
            assert (array.dtype, array.shape) == (self.wire if type_ == "wire" else np.float32, (length,)), what
        elif type_.startswith("["):
            assert [type(v) for v in value] == [TYPES[type_.strip("[]")]] * length, what
        else:
            assert type(value) is TYPES[type_], what


class CountedAlike(CafeDistillMethod):
    """Asks for the mean in which examples do not count."""

    def uniform_weights(self, unequal: bool) -> bool:
        return True


def traffic(folder: Path) -> Iterator[WatchedGrid]:
    """Federations that between them use every record and key of the contract, calibrated afterwards."""

    def load(client: int) -> Any:
        if client == 4:
            raise ValueError("no data")
        return toy_data(client)

    def lose_state_of_client_1(answer: Any, message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train" and int(message.content["config"]["server-round"]) == 2:
            for path in folder.rglob("client-1"):
                shutil.rmtree(path)
        return answer(message, context)

    def damage_state_of_client_1(answer: Any, message: Any, context: Any) -> Any:
        if int(message.content["config"].get("server-round", 0)) == 3:
            newest = max((folder / "named").rglob("client-1/round-*"))
            newest.write_bytes(newest.read_bytes()[:-3])
        return answer(message, context)

    def federation(app: Any, nodes: int, state: Path = folder, **options: Any) -> WatchedGrid:
        own = {"name": state.name} if state != folder else {}
        own |= {"max-exit": 2} if state.name == "short" else {}
        grid = WatchedGrid(app, nodes, node_config={"state-dir": str(state), **own})
        strategy = CafeDistill(num_rounds=3, fraction_evaluate=1.0, **options)
        if state.name == "short":
            strategy.method = CountedAlike()
        strategy.start(grid, train_config=ConfigRecord({"mine": 1}))
        return grid

    yield federation(toy_app(), 3, local=LocalBudget(momentum=0.9, keep_momentum=True))
    yield federation(toy_app(), 2, folder / "short")
    yield federation(FaultyApp(toy_app(), damage_state_of_client_1), 1, folder / "named", num_clients=2)
    yield federation(toy_app(), 2, num_clients=5, wire="float16", privacy=Privacy(clip_norm=1.0))
    yield federation(toy_app(), 2, folder / "apart", num_clients=5, aggregation=Aggregation("median"))
    grid = federation(FaultyApp(toy_app(load), lose_state_of_client_1), 2, num_clients=5)
    (folder / "client-2.safetensors").unlink()
    settings = {"name": "calibrated", "results-dir": str(folder), "num-clients": 5, "federation.wait-seconds": 1.0}
    calibrate(grid, Settings.from_run_config(settings))
    yield grid


@pytest.mark.slow
def test_every_record_key_type_and_shape_is_as_documented(contract, tmp_path):
    """In both directions, clients that fail included; and nothing is documented that does not exist."""
    checked = Checked(contract)
    for grid in traffic(tmp_path):
        answer = grid.traffic[0][1].content["config"]
        kinds = answer.get("kinds", [])
        assert len(set(kinds)) <= 1  # all that are not like others are alike
        held = json.loads(kinds[0]) if kinds else answer
        schemas = {"W": answer["shared"], "S": held["shared"], "U": held["upload"], "D": held["download"]}
        size = {s: sum(math.prod(shape) for _, shape in json.loads(schema)) for s, schema in schemas.items()}
        size |= {"M": NUM_EXITS, "m": held["num_exits"] if kinds else NUM_EXITS, "h": len(kinds)}
        for message, reply in grid.traffic:
            config = message.content["config"]
            up = reply.content.get("config", {})
            failed = [*up.get("failed-clients", []), *up.get("problems", [])]
            n_down, n_up = len(asked(message)), len(up.get("clients", []))
            noted = len(up.get("noted-clients", []))
            sizes = {**size, "q": noted, "K": len(THRESHOLDS), "d": len(config.get("downloads", []))}
            checked.wire = np.dtype(config.get("wire-dtype", "float32"))
            checked.check(f"{message.metadata.message_type} Down", message.content, {**sizes, "n": n_down})
            sizes |= {"n": n_up, "k": len(failed), "s": n_up if config.get("apart") else min(n_up, 2)}
            checked.check(f"{message.metadata.message_type} Up", reply.content, sizes)
    documented = {(table, *name) for table, rows in contract.items() for name in rows}
    assert documented - checked.met == set()


def test_settings_of_the_contract_are_those_of_the_method(contract):
    names = {key.removeprefix("method.") for _, key in contract["method.…"]}
    assert names == {kebab(name) for name in settings_of(CafeDistillMethod())}


# --- Flower's quickstart ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> list[Path]:
    """The quickstart before the first step of docs/plug-in.md and after each: taken back from the end, the example."""
    diffs = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "docs" / "plug-in.md").read_text(), re.MULTILINE | re.DOTALL)
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(EXAMPLES / "quickstart-moved", folder / "4", ignore=shutil.ignore_patterns("__pycache__"))
    for step in range(len(diffs), 0, -1):
        shutil.copytree(folder / str(step), folder / str(step - 1))
        command = ["git", "apply", "--reverse", "-"]
        subprocess.run(command, input=diffs[step - 1], text=True, cwd=folder / str(step - 1), check=True)
    return [folder / str(step) for step in range(len(diffs) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("step", range(5))
def test_the_quickstart_runs_after_every_step(step, steps, tmp_path, capsys):
    assert len(steps) == 5
    text = "".join(path.read_text() for path in sorted(steps[step].rglob("*.py")))
    assert ("CafeDistill(" in text, "FedAvg(" in text) == (step >= 3, step < 3)
    load_app(steps[step]).run(2, {"state-dir": str(tmp_path)}, num_server_rounds=2)
    (accuracy,) = re.findall(r"accuracy: (.*)", capsys.readouterr().out)
    values = json.loads(accuracy)
    assert len(values) == NUM_EXITS if step >= 3 else 0 <= values <= 1


@pytest.mark.slow
def test_the_quickstart_can_be_bundled(tmp_path, capsys):
    """What `flwr build` packs is enough to run."""
    flwr = Path(sys.executable).with_name("flwr")
    subprocess.run([flwr, "build", "--app", EXAMPLES / "quickstart-moved"], cwd=tmp_path, check=True)
    (fab,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        archive.extractall(tmp_path / "app")
    load_app(tmp_path / "app").run(2, {"state-dir": str(tmp_path / "state")}, num_server_rounds=2)
    assert "accuracy: [" in capsys.readouterr().out
