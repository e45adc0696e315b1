"""Two processes on one state folder, a damaged file, a full disk: with real processes and a real ClientApp."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from federations import Recorded, run_small, small_settings, strict_json, toy_app
from safetensors.torch import load_file, save_file

from cafe_flwr.core.locks import InUse, locked
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.personal import store as state
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.server.checkpoints import Checkpoints, ServerState

pytestmark = pytest.mark.usefixtures("no_report")

RUN = "0123456789abcdef"

HOLDER = """
import sys, time
from pathlib import Path
from cafe_flwr.personal.store import PersonalStore
with PersonalStore(Path(sys.argv[1]), sys.argv[2]).locked(int(sys.argv[3])):
    print("held", flush=True)
    time.sleep(float(sys.argv[4]))
"""


@pytest.fixture
def hold():
    """A process that holds the state of a client, by killing it at the end."""
    started = []

    def start(folder, client=0, seconds=60.0, run=RUN):
        command = [sys.executable, "-c", HOLDER, folder, run, str(client), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_a_second_process_is_refused_with_the_folder_and_the_first_ones_number(tmp_path, monkeypatch, hold):
    monkeypatch.setattr("cafe_flwr.personal.store._LOCK_SECONDS", 0.3)
    process = hold(tmp_path)
    with pytest.raises(InUse) as caught, PersonalStore(tmp_path, RUN).locked(0):
        raise AssertionError("two processes are in")
    assert f"the state of client 0 in {tmp_path} is in use by another process (pid {process.pid})" in str(caught.value)


@pytest.mark.slow
def test_who_waits_gets_in_when_the_first_is_done(tmp_path, hold):
    process = hold(tmp_path, seconds=0.5)
    with PersonalStore(tmp_path, RUN).locked(0):
        process.wait(10)
    assert process.returncode == 0


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_lock_behind(tmp_path, monkeypatch, hold):
    monkeypatch.setattr("cafe_flwr.personal.store._LOCK_SECONDS", 5.0)
    process = hold(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with PersonalStore(tmp_path, RUN).locked(0):
        assert (tmp_path / "locks" / f"{RUN}-client-0.lock").read_text() == str(os.getpid())


@pytest.mark.slow
def test_other_clients_and_other_runs_in_the_same_folder_are_free(tmp_path, monkeypatch, hold):
    """Workers of a simulation share a folder; a device may serve two runs at once."""
    monkeypatch.setattr("cafe_flwr.personal.store._LOCK_SECONDS", 0.0)
    hold(tmp_path, client=0)
    with PersonalStore(tmp_path, RUN).locked(1), PersonalStore(tmp_path, "fedcba9876543210").locked(0):
        pass


def test_a_lock_ends_with_its_block_also_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path / "a.lock", "it"):
            raise KeyError


@pytest.mark.slow
def test_a_client_whose_state_is_in_use_is_left_out_of_its_round_and_its_state_stays(tmp_path, monkeypatch, hold):
    """Another process has client 1 in round 2: the reason in the record names the process."""
    monkeypatch.setattr("cafe_flwr.personal.store._LOCK_SECONDS", 0.2)
    settings = small_settings(tmp_path, num_clients=3, num_server_rounds=3)
    personal = settings.results / "personal"
    holders = []

    class Shared(InProcessGrid):
        def _handle(self, message):
            if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
                holders.append(holders or hold(personal, client=1, run=message.content["config"]["run"]))
            elif holders and holders[0].poll() is None:
                holders[0].kill()
                holders[0].wait()
            return super()._handle(message)

    run_small(settings, grid=Shared(toy_app(), 1, settings.to_run_config()))
    lines = [strict_json(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    assert [list(line["left_out"]) for line in lines] == [[], ["1"], []]
    reason = lines[1]["left_out"]["1"]
    assert f"InUse: the state of client 1 in <path> is in use by another process (pid {holders[0].pid})" in reason
    (versions,) = (personal / "versions").iterdir()
    assert sorted(p.name for p in (versions / "client-1").iterdir()) == [f"round-{t:06d}.safetensors" for t in (1, 3)]


# --- damaged files ---


def flip(path):
    """One bit of the last value, as a bad disk does: the file has its length and its header."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(bytes(content))


def saved(folder, *rounds):
    store = PersonalStore(folder, RUN)
    for t in rounds:
        store.save(0, t, {"head": torch.full((3,), float(t))}, base=t - 1, resumable_from=0)
    return store, [folder / "versions" / RUN / "client-0" / f"round-{t:06d}.safetensors" for t in rounds]


def test_a_flipped_bit_is_noticed_and_the_version_before_is_used(tmp_path, flower_log):
    """safetensors itself would load it: a weight of 3.0 would be 12884901888."""
    store, paths = saved(tmp_path, 1, 2, 3)
    flip(paths[-1])
    assert store.load(0, 3)["head"].tolist() == [2.0] * 3
    assert store.notes == {0: "its state of round 3 is damaged, that of round 2 was used"}
    assert "state of client 0, round 3, is damaged (its checksum differs)" in flower_log.text()


def test_a_first_version_that_is_damaged_is_where_the_client_started(tmp_path):
    store, paths = saved(tmp_path, 1)
    flip(paths[0])
    assert store.load(0, 1) is None
    assert store.notes == {0: "its state of round 1, the only one, is damaged: it started anew"}


def test_when_all_versions_are_damaged_the_client_does_not_start_anew_in_silence(tmp_path):
    store, paths = saved(tmp_path, 1, 2)
    for path in paths:
        flip(path)
    with pytest.raises(ValueError, match=r"state of round 2, and all before it, is damaged in .*client-0: bring the"):
        store.load(0, 2)


def test_a_damaged_state_is_said_in_the_servers_record(tmp_path, flower_log):
    settings = small_settings(tmp_path, num_clients=3, num_server_rounds=3)

    class BadDisk(InProcessGrid):
        done = False

        def _handle(self, message):
            if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 3:
                (folder,) = (settings.results / "personal" / "versions").iterdir()
                if not self.done:
                    flip(folder / "client-1" / "round-000002.safetensors")
                self.done = True
            return super()._handle(message)

    run_small(settings, grid=BadDisk(toy_app(), 1, settings.to_run_config()))
    note = "its state of round 2 is damaged, that of round 1 was used"
    recorded = Recorded.read(settings.results)
    assert [line["notes"] for line in recorded.rounds] == [{}, {}, {"1": note}]
    assert [line["left_out"] for line in recorded.rounds] == [{}] * 3
    assert f"Round 3: client 1: {note}" in flower_log.text()


def test_a_checkpoint_with_a_flipped_bit_is_reported_and_the_one_before_is_used(tmp_path, flower_log):
    checkpoints = Checkpoints(tmp_path)
    for t in (1, 2):
        shared = torch.full((4,), float(t)).numpy()
        checkpoints.save(ServerState(RUN, t, "digest", shared))
    flip(tmp_path / "round-000002.safetensors")
    assert checkpoints.load().round == 1
    assert "checkpoint of round 2 is damaged (its checksum differs)" in flower_log.text()


def test_files_of_an_earlier_release_without_a_checksum_are_read(tmp_path):
    store, paths = saved(tmp_path, 1)
    metadata = {"state-version": "1", "client": "0", "round": "1"}
    save_file(load_file(paths[0]), paths[0], metadata)
    assert store.load(0, 1)["head"].tolist() == [1.0] * 3
    store.save(0, 1, {"head": torch.ones(3)}, base=0, resumable_from=0)


# --- which version is there, and why not the right one ---


@pytest.mark.parametrize(
    ("kept", "asked", "why"),
    [
        ((1, 2, 3), 5, "which has rounds 1, 2, 3: the folder is an older copy; bring the newer one back"),
        ((7, 8), 5, "which has rounds 7, 8: the server was resumed from a checkpoint older than its last two"),
    ],
    ids=["the client is behind", "the client is ahead"],
)
def test_a_client_that_cannot_be_brought_to_the_servers_version_says_why(tmp_path, kept, asked, why):
    store, _ = saved(tmp_path, *kept)
    with pytest.raises(ValueError, match=f"personal state of round {asked} is not in .*{why}"):
        store.load(0, asked)


def test_a_folder_of_other_runs_only_is_said_to_be_that(tmp_path):
    saved(tmp_path, 1, 2)
    with pytest.raises(ValueError, match=r"is not in .*fedcba.*\(it has state of 1 other run\(s\)\): bring the folder"):
        PersonalStore(tmp_path, "fedcba9876543210").load(0, 2)


def test_a_new_run_after_a_lost_checkpoint_leaves_the_old_state_where_it_is(tmp_path):
    """Clients are far ahead of a server that knows nothing: they start anew, under another token."""
    folder = tmp_path / "state"
    for name in ("first", "second"):
        settings = small_settings(tmp_path, name=name, num_clients=2, num_server_rounds=2, state_dir=str(folder))
        run_small(settings, app=toy_app(state_dir=lambda context: str(folder)))
        if name == "first":
            (old,) = (folder / "versions").iterdir()
            before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    assert {p: p.read_bytes() for p in old.rglob("*") if p.is_file()} == before
    assert len(list((folder / "versions").iterdir())) == 2


# --- a full disk ---

CLIENT = """
import json, resource, sys
from pathlib import Path
import torch
from cafe_flwr.core.files import write_atomically
from cafe_flwr.personal.store import PersonalStore
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    PersonalStore(folder, "0123456789abcdef").save(
        0, 2, {"head": torch.full((5000,), 2.0)}, base=1, resumable_from=0
    )
except OSError as error:
    print(json.dumps([error.errno, str(error)]))
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_more_leaves_the_version_before_and_says_which_file(tmp_path):
    """In a real process whose files may not grow beyond 4 KiB, in the middle of writing 20."""
    store, (first,) = saved(tmp_path, 1)
    before = first.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, tmp_path, "4096"], capture_output=True, text=True, check=True, timeout=120
    )
    errno, text = json.loads(done.stdout)
    assert errno
    assert f"'{first.with_name('round-000002.safetensors')}'" in text
    assert first.read_bytes() == before
    assert [p.name for p in first.parent.iterdir()] == [first.name]
    assert store.load(0, 1)["head"].tolist() == [1.0] * 3


def test_a_full_disk_on_one_node_leaves_its_client_out_and_is_over_when_there_is_room(tmp_path, monkeypatch):
    """The round goes on without it; the next one starts from the version that is there."""
    settings = small_settings(tmp_path, num_clients=3, num_server_rounds=3)
    original, fsync = state.write_atomically, os.fsync
    full = []

    def no_room(descriptor):
        raise OSError(28, "No space left on device")

    def guarded(path, content):
        if "client-1" in str(path) and "round-000002" in path.name:
            full.append(path)
            monkeypatch.setattr(os, "fsync", no_room)
            try:
                return original(path, content)
            finally:
                monkeypatch.setattr(os, "fsync", fsync)
        return original(path, content)

    monkeypatch.setattr(state, "write_atomically", guarded)
    run_small(settings, 3, app=toy_app())
    lines = [strict_json(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    assert [list(line["left_out"]) for line in lines] == [[], ["1"], []]
    assert "OSError: [Errno 28] No space left on device: '<path>'" in lines[1]["left_out"]["1"]
    assert sorted(p.name[6:12] for p in full[0].parent.iterdir()) == ["000001", "000003"]
