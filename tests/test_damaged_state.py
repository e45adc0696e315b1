"""State that is swapped, foreign, half written or left over: refused or gone on from, in words, never in silence."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from federations import Recorded, changed, run_small, run_until, small_settings, strict_json, toy_app
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from cafe_flwr.core.files import append, checksum, sweep, write_atomically
from cafe_flwr.personal import store as state
from cafe_flwr.personal.published import read_metadata
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.server.checkpoints import Checkpoints, ServerState

pytestmark = pytest.mark.usefixtures("no_report")

RUN, OTHER = "ab" * 8, "cd" * 8
GONE = 2**31 - 1  # beyond the largest process number of any system


def tensors(value):
    return {"w": torch.full((2,), float(value))}


def save(store, client, server_round, base=None, resumable_from=None, value=None):
    base = server_round - 1 if base is None else base
    oldest = max(0, server_round - 2) if resumable_from is None else resumable_from
    store.save(
        client, server_round, tensors(server_round if value is None else value), base=base, resumable_from=oldest
    )


def folder_of(store, client=0):
    return store.folder / "versions" / store.run / f"client-{client}"


# --- whose state it is ---


@pytest.mark.parametrize(
    ("source", "place"), [((OTHER, 3, 2), (RUN, 3, 2)), ((RUN, 3, 1), (RUN, 3, 2)), ((RUN, 4, 2), (RUN, 3, 2))]
)
def test_a_file_of_another_run_round_or_client_is_refused(tmp_path, source, place):
    stores = {run: PersonalStore(tmp_path, run) for run in (RUN, OTHER)}
    for store in stores.values():
        for client in (3, 4):
            for server_round in (1, 2):
                save(store, client, server_round)
    paths = [folder_of(stores[run], client) / f"round-{t:06d}.safetensors" for run, client, t in (source, place)]
    shutil.copy(*paths)
    with pytest.raises(ValueError, match=r"holds the state of .*expected .*: "):
        stores[RUN].load(3, 2)


def test_a_file_of_an_earlier_release_without_its_run_is_read_and_that_is_said(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    save(store, 0, 1)
    path = folder_of(store) / "round-000001.safetensors"
    save_tensors(load_file(path), path, {"state-version": "1", "client": "0", "round": "1"})
    assert store.load(0, 1)["w"].tolist() == [1.0, 1.0]
    assert store.notes == {0: "its state of round 1 is an earlier version's, which does not name its run"}
    again = PersonalStore(tmp_path, RUN)
    save(again, 0, 2)
    again.load(0, 2)
    assert again.notes == {}


# --- what a client has learnt stays until the server goes on from something later ---


def test_an_old_base_and_a_far_round_do_not_erase_what_a_client_has_learnt(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    for t in range(1, 6):
        save(store, 0, t)
    save(store, 0, 2**40, base=3, resumable_from=2**40, value=-1)
    assert store.load(0, 5)["w"].tolist() == [5.0, 5.0]
    assert store.load(0, 4)["w"].tolist() == [4.0, 4.0]


@settings(deadline=None, max_examples=40)
@given(data=st.data(), count=st.integers(1, 25))
def test_no_request_erases_the_last_version_until_a_later_one_is_confirmed(tmp_path_factory, data, count):
    """A hostile server asks for any round from any version that is there, but never goes on from what it got: the
    honest versions stay, and the folder does not grow."""
    store = PersonalStore(tmp_path_factory.mktemp("state"), RUN)
    for t in range(1, 6):
        save(store, 0, t)
    for i in range(count):
        base = data.draw(st.integers(3, 4), label="base")
        server_round = data.draw(st.integers(base + 1, 2**40), label="round")
        oldest = data.draw(st.integers(0, 2**40), label="resumable from")
        store.save(0, server_round, tensors(-1 - i), base=base, resumable_from=oldest)
        assert len(list(folder_of(store).rglob("*.safetensors"))) <= 10
    kept = [load_file(path)["w"][0].item() for path in folder_of(store).rglob("*.safetensors")]
    assert 5.0 in kept


def test_a_server_that_never_forgets_a_round_does_not_fill_the_disk(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    for t in range(1, 60):
        save(store, 0, t, resumable_from=0)
    for t in range(200, 100, -1):
        save(store, 0, t, base=59, resumable_from=0)
    assert len(list(folder_of(store).rglob("*.safetensors"))) <= 30


def test_what_was_set_aside_goes_when_the_server_goes_on(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    for t in (1, 2, 3):
        save(store, 0, t)
    save(store, 0, 3, base=2, value=33)  # the round is repeated, with another outcome
    assert [load_file(p)["w"][0].item() for p in (folder_of(store) / "aside").iterdir()] == [3.0]
    assert store.load(0, 3)["w"].tolist() == [33.0, 33.0]
    assert not (folder_of(store) / "aside").exists()


# --- files that killed processes leave ---


def test_temporary_files_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    save(store, 0, 1)
    store.private_rng(0, "noise")
    secret = tmp_path / "secrets" / "client-0"
    for number in (GONE, os.getppid()):
        (folder_of(store) / f".round-000007.safetensors.{number}.tmp").write_bytes(b"x")
        (tmp_path / f".client-0.json.{number}.tmp").write_bytes(b"x")
        os.link(secret, secret.with_name(f".client-0.{number}"))
    save(store, 0, 2)
    store.private_rng(0, "noise")
    store.publish(0, tensors(1), {})
    left = sorted(path.name for path in tmp_path.rglob(".*") if path.is_file())
    alive = os.getppid()
    assert left == sorted(
        [f".round-000007.safetensors.{alive}.tmp", f".client-0.json.{alive}.tmp", f".client-0.{alive}"]
    )
    for path in tmp_path.rglob(".*"):
        os.utime(path, (0, 0))  # as old as can be: the number is another process's by now
    sweep(folder_of(store))
    assert not list(folder_of(store).glob(".*"))


@pytest.mark.parametrize("name", [".notes.txt", f".x.{GONE}", f"x.{GONE}.tmp", ".x.abc.tmp", f".folder.{GONE}.tmp"])
def test_a_sweep_leaves_everything_else(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if "folder" in name else path.write_text("mine")
    sweep(tmp_path)
    assert path.exists()


def test_a_run_that_is_resumed_sweeps_its_folder(tmp_path):
    options = small_settings(tmp_path, num_server_rounds=3, num_clients=2)
    run_until(options, 1, app=toy_app())
    left = [options.results / f".rounds.jsonl.{GONE}.tmp", options.results / "checkpoint" / f".round-9.x.{GONE}.tmp"]
    for path in left:
        path.write_bytes(b"x")
    run_small(changed(options, {"resume": True}), app=toy_app())
    assert not any(path.exists() for path in left)


# --- a published network and its facts ---


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_weights_and_facts_of_a_published_network_are_always_of_one_round(tmp_path, monkeypatch, killed_after):
    store = PersonalStore(tmp_path, RUN)
    for server_round in (1, 2):
        facts = {"run": RUN, "round": server_round, "fingerprint": f"of {server_round}"}
        if server_round == 2:
            done, write = [], state.write_atomically

            def dying(path, content, done=done, write=write):
                if len(done) == killed_after:
                    raise KeyboardInterrupt
                done.append(write(path, content))

            monkeypatch.setattr(state, "write_atomically", dying)
        with contextlib.suppress(KeyboardInterrupt):
            store.publish(7, tensors(server_round), facts)
    weights = load_file(tmp_path / "client-7.safetensors")["w"][0].item()
    assert read_metadata(tmp_path, 7)["round"] == weights == (1 if killed_after == 0 else 2)


# --- a damaged history, found before anything is trained ---


def rewrite(path, change):
    """A checkpoint with other facts, and a sound checksum."""
    with safe_open(path, framework="np") as file:
        facts, arrays = json.loads(file.metadata()["facts"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(facts, arrays)
    save_file(arrays, path, {"facts": json.dumps(facts), "checksum": checksum(arrays)})


FACTS = ("state-version", "run", "round", "digest", "clients", "num-examples", "seen")


def interrupted(folder):
    options = small_settings(folder, num_server_rounds=4, num_clients=3)
    run_until(options, 3, app=toy_app())
    return options


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after round 3."""
    return interrupted(tmp_path_factory.mktemp("stopped"))


def resumed(stopped, tmp_path):
    """Settings with which a copy of the run is resumed."""
    shutil.copytree(stopped.results, tmp_path / stopped.results.name)
    return changed(stopped, {"results-dir": str(tmp_path), "resume": True})


@pytest.mark.parametrize("key", FACTS)
def test_a_checkpoint_that_lacks_something_is_damaged_and_the_one_before_is_used(stopped, tmp_path, key, flower_log):
    options = resumed(stopped, tmp_path)
    folder = options.results / "checkpoint"
    rewrite(folder / "round-000003.safetensors", lambda facts, arrays: facts.pop(key))
    assert Checkpoints(folder).load().round == 2
    assert "checkpoint of round 3 is damaged" in flower_log.text()


JUNK = st.recursive(
    st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@settings(deadline=None, max_examples=80)
@given(key=st.sampled_from([*FACTS[1:], "shared", "uploads", "similarity"]), junk=JUNK, length=st.integers(0, 3))
def test_whatever_a_checkpoint_holds_it_is_read_or_said_to_be_damaged(stopped, tmp_path_factory, key, junk, length):
    folder = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(stopped.results / "checkpoint", folder, dirs_exist_ok=True)

    def change(facts, arrays):
        if key in facts:
            facts[key] = junk
        else:
            arrays[key] = np.zeros((length,) * length, dtype=np.float32)

    rewrite(folder / "round-000003.safetensors", change)
    assert Checkpoints(folder).load().round in (2, 3)


DAMAGE = {
    "rounds.jsonl is missing": ("rounds.jsonl", lambda content: None),
    "rounds.jsonl is empty": ("rounds.jsonl", lambda content: b""),
    "rounds.jsonl is cut": ("rounds.jsonl", lambda content: content[: len(content) // 2]),
    "a round is gone": ("rounds.jsonl", lambda content: b"".join(content.splitlines(True)[::2])),
    "a round is there twice": ("rounds.jsonl", lambda content: content.splitlines(True)[0] + content),
    "a round is garbled": ("rounds.jsonl", lambda content: content.replace(b'"participants"', b'"particip\xff"', 1)),
    "a round lacks a key": ("rounds.jsonl", lambda content: content.replace(b'"bytes_up"', b'"bytes"', 1)),
    "clients.csv is missing": ("checkpoint/clients.csv", lambda content: None),
    "clients.csv is empty": ("checkpoint/clients.csv", lambda content: b""),
    "clients.csv is no text": ("checkpoint/clients.csv", lambda content: b"\xff\xfe" + content),
    "clients.csv is cut": ("checkpoint/clients.csv", lambda content: content[: len(content) // 2]),
    "a row is garbled": ("checkpoint/clients.csv", lambda content: content.replace(b"before", b"bef\xffore", 1)),
    "a row is short": ("checkpoint/clients.csv", lambda content: content.replace(b"1,0,before,1,", b"1,0,before,", 1)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_history_is_found_before_anything_is_trained(stopped, tmp_path, what):
    options = resumed(stopped, tmp_path)
    name, damage = DAMAGE[what]
    path = options.results / name
    content = damage(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    asked = []

    def app(message, context):
        asked.append(message)

    with pytest.raises(ValueError, match=f"{path.name} is damaged: .*Bring the file back from a copy") as caught:
        run_small(options, app=app)
    assert not asked
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["checkpoint/round-000003.safetensors", "rounds.jsonl", "checkpoint/clients.csv"])
def test_a_folder_in_the_place_of_a_file_is_said_to_be_one(stopped, tmp_path, name):
    options = resumed(stopped, tmp_path)
    (options.results / name).unlink()
    (options.results / name).mkdir()
    with pytest.raises(ValueError, match=f"{Path(name).name} is (a folder|damaged: .*directory)"):
        run_small(options, app=toy_app())


def test_what_a_killed_process_has_begun_to_write_is_no_damage(stopped, tmp_path):
    """Half a line, of a round that has no checkpoint: also half a letter of it."""
    options = resumed(stopped, tmp_path)
    for name, part in (
        ("rounds.jsonl", '{"round": 4, "notes": {"1": "ü'.encode()[:-1]),
        ("checkpoint/clients.csv", b"4,1,bef"),
    ):
        with open(options.results / name, "ab") as file:
            file.write(part)
    run_small(options, app=toy_app())
    assert [line["round"] for line in Recorded.read(options.results).rounds] == [1, 2, 3, 4]


def test_texts_with_other_ends_of_lines_do_not_cut_a_line(tmp_path):
    options = small_settings(tmp_path, num_server_rounds=2, num_clients=2)
    run_until(options, 1, app=toy_app())
    path = options.results / "rounds.jsonl"
    line = strict_json(path.read_text())
    path.write_text(json.dumps({**line, "notes": {"1": "a\u2028b\x85c"}}, ensure_ascii=False) + "\n")
    run_small(changed(options, {"resume": True}), app=toy_app())
    assert (options.results / "summary.json").exists()


# --- a full disk on the server ---


def test_a_full_disk_in_a_round_is_reported_as_that(tmp_path, monkeypatch):
    options = small_settings(tmp_path, num_server_rounds=3, num_clients=2)
    fsync = os.fsync

    def full(descriptor):
        if "round-000002" in os.readlink(f"/proc/self/fd/{descriptor}") and "checkpoint" in os.readlink(
            f"/proc/self/fd/{descriptor}"
        ):
            monkeypatch.setattr(
                "pandas.read_csv", lambda path: (_ for _ in ()).throw(ValueError("no columns to parse"))
            )
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*round-000002.safetensors'"):
        run_small(options, app=toy_app())


def test_a_line_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append(path, "one\n")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*lines'"):
        append(path, "two\n")
    assert path.read_text() == "one\n"


def test_a_folder_in_the_place_of_a_file_that_is_written_is_a_sentence(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match="a folder is in the place of a file, move it away"):
        write_atomically(tmp_path / "file", "x")
    assert not list(tmp_path.glob(".*"))


def test_a_state_of_another_run_in_a_checkpoints_place_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for t in (1, 2):
        checkpoints.save(ServerState(RUN, t, "digest", np.zeros(3, dtype=np.float32)))
    shutil.copy(tmp_path / "round-000001.safetensors", tmp_path / "round-000002.safetensors")
    assert checkpoints.load().round == 1
