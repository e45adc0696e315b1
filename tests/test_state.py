"""State on disk: whole or not there, of the right client and round, and no more of it than resuming needs."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cafe_flwr.core.files import write_atomically
from cafe_flwr.methods import ClientRecord
from cafe_flwr.methods.pairs import Pairs
from cafe_flwr.personal.store import PersonalStore, personal_folder
from cafe_flwr.server.checkpoints import Checkpoints, ServerState

RUN = "0123456789abcdef"


def names_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- writing ---


@pytest.mark.parametrize("content", [b"\x00\xffbytes", "Wörter\n", b"", ""])
def test_a_file_is_written_whole_in_a_folder_made_for_it(tmp_path, content):
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, "old and longer than the new content")
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert names_in(tmp_path) == ["a/b/file.bin"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    """The disk is full, say, or the machine stops: the old content is there, whole."""
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_the_new_file_is_on_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """Renaming first and flushing later could leave an empty file after a crash."""
    path, events = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def watch_replace(source, target):
        events.append(("replace", Path(source).read_text(), Path(target) == path, Path(source).parent == path.parent))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    write_atomically(path, "content")
    assert events[0] == ("fsync", 7)
    assert ("replace", "content", True, True) in events


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old content")
    with open(path) as reader:
        assert reader.read(3) == "old"
        write_atomically(path, "new content")
        assert reader.read() == " content"
    assert path.read_text() == "new content"


# --- personal state ---


def tensors(value, client=0):
    return {"head.weight": torch.full((2, 3), float(value)), "head.bias": torch.tensor([float(client), float(value)])}


def save(store, client, server_round, base=None, resumable_from=0, value=None):
    base = server_round - 1 if base is None else base
    content = tensors(server_round if value is None else value, client)
    store.save(client, server_round, content, base=base, resumable_from=resumable_from)


def rounds_of(store, client):
    folder = store.folder / "versions" / RUN / f"client-{client}"
    return sorted(int(p.stem.split("-")[1]) for p in folder.glob("round-*.safetensors"))


def test_what_is_saved_is_loaded_by_client_and_round(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    for client in (0, 1, 10):
        for server_round in (1, 2):
            save(store, client, server_round)
    for client in (0, 1, 10):
        for version in (1, 2):
            loaded = PersonalStore(tmp_path, RUN).load(client, version)
            expected = tensors(version, client)
            assert sorted(loaded) == sorted(expected)
            assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in expected.items())


def test_version_0_is_where_a_client_starts(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    assert store.load(3, 0) is None
    save(store, 3, 1)
    assert store.load(3, 0) is None


def test_a_version_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path):
    """Starting anew in silence would throw a client's heads away."""
    store = PersonalStore(tmp_path, RUN)
    save(store, 3, 1)
    for client, version in ((3, 2), (4, 1)):
        with pytest.raises(
            ValueError, match=rf"personal state of round {version} is not in .*client-{client}.*state-dir"
        ):
            store.load(client, version)


def test_newer_versions_than_asked_for_do_not_count(tmp_path):
    """A run that is resumed from round 1 finds version 1, though 2 and 3 are there."""
    store = PersonalStore(tmp_path, RUN)
    for server_round in (1, 2, 3):
        save(store, 0, server_round)
    assert torch.equal(store.load(0, 1)["head.weight"], tensors(1)["head.weight"])
    save(store, 0, 2, value=22)
    assert torch.equal(store.load(0, 2)["head.weight"], tensors(22)["head.weight"])


def test_saving_twice_is_saving_once(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    save(store, 0, 1)
    save(store, 0, 2)
    before = {p: load_file(p) for p in tmp_path.rglob("*.safetensors")}
    save(store, 0, 2)
    after = {p: load_file(p) for p in tmp_path.rglob("*.safetensors")}
    assert sorted(before) == sorted(after)
    assert all(torch.equal(t, after[p][name]) for p, content in before.items() for name, t in content.items())


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(data=st.data(), participation=st.lists(st.booleans(), min_size=1, max_size=14))
def test_whatever_round_a_run_is_resumed_from_its_personal_state_is_there(tmp_path_factory, data, participation):
    """The server keeps the checkpoints of the last two rounds. A client takes part in some rounds; its replies may get
    lost; and in any round the run may die, after clients have trained, and go on from either checkpoint. The version
    that the server asks for is always there, with the right content, and there are never more than a few."""
    store = PersonalStore(tmp_path_factory.mktemp("state"), RUN)
    seen = {0: 0}  # checkpoint of round t → version the server has seen
    content = {0: None}  # version → what was written last
    stamp = 0
    for t, takes_part in enumerate(participation, start=1):
        for attempt in range(data.draw(st.integers(1, 2), label=f"attempts at round {t}")):
            if attempt:  # the run has died in round t: from the last checkpoint, or from the one before it, if damaged
                back = data.draw(st.integers(1, min(2, t)), label="checkpoint back")
                if back == 2 and t - 2 in seen:
                    # Round t − 1 is done again, with the same outcome.
                    base = seen[t - 2]
                    if seen[t - 1] == t - 1:
                        store.save(0, t - 1, tensors(content[t - 1]), base=base, resumable_from=max(0, t - 3))
            base = seen[t - 1]
            loaded = store.load(0, base)
            assert (loaded is None) == (base == 0)
            if loaded is not None:
                assert torch.equal(loaded["head.weight"], tensors(content[base])["head.weight"])
            if takes_part:
                stamp += 1
                content[t] = stamp if attempt == 0 else content[t]
                store.save(0, t, tensors(content[t]), base=base, resumable_from=max(0, t - 2))
        lost = data.draw(st.booleans(), label=f"reply of round {t} lost")
        seen[t] = t if takes_part and not lost else seen[t - 1]
        for checkpoint in (t, max(0, t - 1)):  # either may be resumed from
            version = seen[checkpoint]
            loaded = store.load(0, version)
            if version:
                assert torch.equal(loaded["head.weight"], tensors(content[version])["head.weight"])
        assert len(rounds_of(store, 0)) <= 4


def test_old_versions_go(tmp_path):
    """Training on for twenty rounds leaves the last three: that of the round, and what two checkpoints need."""
    store = PersonalStore(tmp_path, RUN)
    for server_round in range(1, 21):
        save(store, 0, server_round, resumable_from=max(0, server_round - 2))
    assert rounds_of(store, 0) == [18, 19, 20]
    save(store, 1, 1)
    assert rounds_of(store, 1) == [1]


def test_the_last_version_of_a_client_that_was_away_for_long_stays(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    save(store, 0, 1)
    save(store, 0, 2)
    save(store, 0, 40, base=2, resumable_from=38)
    assert rounds_of(store, 0) == [2, 40]


def test_a_version_whose_reply_was_lost_goes(tmp_path):
    """Round 3 was trained but never counted; round 4 starts from 2 again."""
    store = PersonalStore(tmp_path, RUN)
    for server_round in (1, 2, 3):
        save(store, 0, server_round)
    save(store, 0, 4, base=2, resumable_from=2)
    assert rounds_of(store, 0) == [2, 4]


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_damaged_version_is_reported_and_the_one_before_is_used(tmp_path, flower_log, damage):
    store = PersonalStore(tmp_path, RUN)
    save(store, 5, 1)
    save(store, 5, 2)
    path = tmp_path / "versions" / RUN / "client-5" / "round-000002.safetensors"
    path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-3], "text": b"not at all a tensor"}[damage])
    assert torch.equal(store.load(5, 2)["head.weight"], tensors(1)["head.weight"])
    assert "state of client 5, round 2, is damaged" in flower_log.text()


def test_state_of_another_client_or_format_is_refused(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    save(store, 0, 1)
    save(store, 1, 1)
    folder = tmp_path / "versions" / RUN
    one = "round-000001.safetensors"
    (folder / "client-1" / one).write_bytes((folder / "client-0" / one).read_bytes())
    with pytest.raises(
        ValueError, match=r"holds the state of client 0 in format 1, expected client 1.*own state folder"
    ):
        store.load(1, 1)


def test_runs_do_not_meet(tmp_path):
    store, other = PersonalStore(tmp_path, RUN), PersonalStore(tmp_path, "fedcba9876543210")
    save(store, 0, 1)
    save(other, 0, 1, value=77)
    assert torch.equal(store.load(0, 1)["head.weight"], tensors(1)["head.weight"])
    assert torch.equal(other.load(0, 1)["head.weight"], tensors(77)["head.weight"])


@pytest.mark.parametrize("run", ["", "..", "../../etc", "abc", "ABCDEF0123", "g" * 16, "0" * 65, "01234567\n"])
def test_a_token_that_is_none_leads_nowhere(tmp_path, run):
    """The token is the one part of a path that comes from the server."""
    with pytest.raises(ValueError, match="run must be a hexadecimal token"):
        PersonalStore(tmp_path, run)


def test_files_that_are_no_versions_are_left_alone(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    save(store, 0, 1)
    folder = tmp_path / "versions" / RUN / "client-0"
    for name in ("notes.txt", "round-1.safetensors.bak", "round-x.safetensors", ".round-000009.safetensors.5.tmp"):
        (folder / name).write_text("mine")
    for server_round in (2, 3, 4, 5):
        save(store, 0, server_round, resumable_from=server_round - 2)
    assert torch.equal(store.load(0, 5)["head.weight"], tensors(5)["head.weight"])
    assert {"notes.txt", "round-1.safetensors.bak", "round-x.safetensors"} <= {p.name for p in folder.iterdir()}


def test_a_published_network_is_whole_with_its_facts_beside(tmp_path):
    store = PersonalStore(tmp_path, RUN)
    network = {**tensors(3), "stages.0.weight": torch.randn(3, 2).T}  # not contiguous
    store.publish(7, network, {"round": 9, "accuracy_per_exit": [0.25, 0.5]})
    assert names_in(tmp_path) == ["client-7.json", "client-7.safetensors"]
    loaded = load_file(tmp_path / "client-7.safetensors")
    assert sorted(loaded) == sorted(network)
    assert all(torch.equal(loaded[name], t) for name, t in network.items())
    metadata = json.loads((tmp_path / "client-7.json").read_text())
    assert metadata == {"state-version": 1, "client": 7, "round": 9, "accuracy_per_exit": [0.25, 0.5]}


# --- the client's secret ---


def drawn(folder, client=0, purpose="noise", run=RUN):
    """What a store that was just opened draws."""
    return PersonalStore(folder, run).private_rng(client, purpose).integers(2**63, size=4).tolist()


def test_a_private_generator_is_the_same_whenever_it_is_asked_for(tmp_path):
    """Another store, another run, or the same store again; whatever else was drawn in between, or saved and lost."""
    store = PersonalStore(tmp_path, RUN)
    first = store.private_rng(0, "noise").integers(2**63, size=4).tolist()
    assert drawn(tmp_path, purpose="other") != first
    save(store, 0, 1)
    save(store, 0, 3, base=0)
    assert store.private_rng(0, "noise").integers(2**63, size=4).tolist() == first
    assert drawn(tmp_path) == drawn(tmp_path, run="f" * 16) == first


def test_private_generators_differ_by_purpose_client_and_folder(tmp_path):
    combinations = [(tmp_path / f, client, purpose) for f in "ab" for client in (0, 1, 10) for purpose in ("a", "b")]
    assert len({tuple(drawn(*combination)) for combination in combinations}) == len(combinations)


def test_a_secret_is_for_its_owner_alone_and_is_written_once(tmp_path):
    """32 bytes of the operating system's, readable for nobody else whatever the process's umask; never replaced."""
    before = os.umask(0)
    try:
        drawn(tmp_path, client=4)
    finally:
        os.umask(before)
    assert names_in(tmp_path) == ["secrets/client-4"]
    path = tmp_path / "secrets" / "client-4"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret, written = path.read_bytes(), path.stat().st_mtime_ns
    assert len(secret) == 32
    drawn(tmp_path, client=4, purpose="another")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (secret, written)


def test_a_private_generator_comes_from_the_secret_alone(tmp_path):
    """Not from numbers that the server knows: another secret is another generator; the secret brought back, the
    same."""
    first = drawn(tmp_path)
    path = tmp_path / "secrets" / "client-0"
    secret = path.read_bytes()
    path.unlink()
    assert drawn(tmp_path) != first
    path.write_bytes(secret)
    assert drawn(tmp_path) == first


# --- where ---


def context(node=None, run=None):
    return Context(run_id=1, node_id=2, node_config=node or {}, state=RecordDict(), run_config=run or {})


def test_a_nodes_own_folder_comes_first_then_the_choice_then_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/someone/.state")
    assert personal_folder(context({"state-dir": "/mine"}), "/chosen") == Path("/mine")
    assert personal_folder(context({"state-dir": "~/mine"})) == Path("/home/someone/mine")
    assert personal_folder(context(), "/chosen") == Path("/chosen")
    assert personal_folder(context({"state-dir": ""}), "~/chosen") == Path("/home/someone/chosen")
    assert personal_folder(context()) == Path("/home/someone/.state/cafe-flwr")


@pytest.mark.parametrize("folder", ["here", "./here", "../here"])
def test_a_folder_that_depends_on_where_a_process_runs_is_refused(folder):
    for arguments in ((context({"state-dir": folder}),), (context(), folder)):
        with pytest.raises(ValueError, match=r"state-dir must be an absolute path or start with '~', got '.*here'"):
            personal_folder(*arguments)


# --- checkpoints ---


def server_state(server_round, clients=(0, 3, 11), upload=4, students=2):
    rng = np.random.default_rng(server_round)
    return ServerState(
        run=RUN,
        round=server_round,
        digest="abc",
        shared=rng.normal(size=9).astype(np.float32),
        known={
            c: ClientRecord(
                num_examples=10 + c,
                seen=max(1, server_round - c % 3),
                upload=rng.normal(size=upload).astype(np.float32),
                similarity=rng.uniform(-1, 1, size=students),
                level=c % max(students, 1),
            )
            for c in clients
        },
        pairs=Pairs().updated(clients, np.full((len(clients), len(clients)), rng.uniform(-1, 1))),
    )


def assert_same_state(a, b):
    assert (a.run, a.round, a.digest) == (b.run, b.round, b.digest)
    assert a.shared.dtype == b.shared.dtype == np.float32
    assert a.shared.tobytes() == b.shared.tobytes()
    for x, y in ((a.pairs.keys, b.pairs.keys), (a.pairs.values, b.pairs.values)):
        assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes())
    assert sorted(a.known) == sorted(b.known)
    for client, record in a.known.items():
        other = b.known[client]
        assert (record.num_examples, record.seen, record.level) == (other.num_examples, other.seen, other.level)
        for x, y in ((record.upload, other.upload), (record.similarity, other.similarity)):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize(
    ("clients", "upload", "students"),
    [((0, 3, 11), 4, 2), ((), 4, 2), ((5,), 0, 2), ((5, 6), 4, 0), ((2,), 0, 0)],
    ids=["usual", "nobody yet", "no uploads", "one exit", "neither"],
)
def test_a_checkpoint_holds_all_of_the_state_to_the_bit(tmp_path, clients, upload, students):
    state = server_state(3, clients, upload, students)
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    checkpoints.save(state)
    assert_same_state(Checkpoints(tmp_path / "checkpoint").load(), state)


def test_similarities_that_are_not_known_survive(tmp_path):
    state = server_state(3)
    state.known[3].similarity[1] = np.nan
    Checkpoints(tmp_path).save(state)
    assert_same_state(Checkpoints(tmp_path).load(), state)


def test_the_last_two_checkpoints_stay_and_the_newest_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    for server_round in (1, 2, 9, 10, 11):
        checkpoints.save(server_state(server_round))
        assert_same_state(checkpoints.load(), server_state(server_round))
    assert names_in(tmp_path) == ["round-000010.safetensors", "round-000011.safetensors"]


def test_rounds_are_in_the_order_of_numbers_not_of_letters(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for server_round in (999_999, 1_000_000):
        checkpoints.save(server_state(server_round))
    assert checkpoints.load().round == 1_000_000


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "without facts", "facts of nobody"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, flower_log, damage):
    from safetensors.numpy import save as save_arrays

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(server_state(4))
    checkpoints.save(server_state(5))
    path = tmp_path / "round-000005.safetensors"
    path.write_bytes(
        {
            "empty": b"",
            "cut": path.read_bytes()[:-1],
            "text": b"nothing of the kind",
            "without facts": save_arrays({"shared": np.zeros(3, dtype=np.float32)}),
            "facts of nobody": save_arrays({"shared": np.zeros(3, dtype=np.float32)}, {"facts": "{"}),
        }[damage]
    )
    assert_same_state(checkpoints.load(), server_state(4))
    assert "checkpoint of round 5 is damaged" in flower_log.text()
    (tmp_path / "round-000004.safetensors").write_bytes(b"")
    assert checkpoints.load() is None


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cafe_flwr.server.checkpoints.STATE_VERSION", 99)
    Checkpoints(tmp_path).save(server_state(1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        Checkpoints(tmp_path).load()


def test_files_can_be_read_by_the_owners_group_as_others_are(tmp_path):
    """No surprise about permissions: those of any file the process makes."""
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_atomically(tmp_path / "ours", "x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
