"""Rounds with too few good replies: repeated, with the numbers as if nothing had been, or ended with all reasons."""

import pytest
import torch
from federations import (
    DeviceGrid,
    FaultyApp,
    Recorded,
    WatchedGrid,
    asked,
    run_small,
    same_arrays,
    small_settings,
    strict_json,
    toy_app,
)
from flwr.app import ConfigRecord

from cafe_flwr import CafeDistill
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.server.directory import Directory

pytestmark = pytest.mark.usefixtures("no_report")

N = 4
TRAFFIC = {"bytes_up", "bytes_down", "bytes_up_per_client_round", "bytes_down_per_client_round", "name"}


def toy_settings(folder, **changes):
    return small_settings(folder, **{"num_clients": N, "num_server_rounds": 3, "batch_size": 8, **changes})


def is_train(message, server_round):
    return message.metadata.message_type == "train" and message.content["config"]["server-round"] == server_round


def lines_of(settings):
    return [strict_json(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]


class Failing:
    """A fault of clients in a round, for so many messages each."""

    def __init__(self, server_round, clients, times, after=False):
        self.server_round, self.clients, self.after = server_round, set(clients), after
        self.left = dict.fromkeys(clients, times)

    def __call__(self, answer, message, context):
        hit = [c for c in asked(message) if self.left.get(c)] if is_train(message, self.server_round) else []
        for client in hit:
            self.left[client] -= 1
        if hit and not self.after:
            raise OSError("power cut")
        reply = answer(message, context)
        if hit:
            raise OSError("power cut")
        return reply


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    settings = toy_settings(tmp_path_factory.mktemp("undisturbed"), min_train_nodes=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        arrays = run_small(settings, N, app=toy_app()).arrays
    return Recorded.read(settings.results), arrays


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before it trains", "when its new state is on disk"])
@pytest.mark.parametrize("clients", [(1, 2), (0, 1, 2, 3)], ids=["two of four", "all"])
def test_a_round_that_succeeds_the_second_time_has_the_numbers_of_the_first(
    tmp_path, undisturbed, flower_log, clients, after
):
    """Three of four are needed. Bit for bit the same parameters, personal states and tables; the record says that there
    was another try, and why it failed."""
    settings = toy_settings(tmp_path, min_train_nodes=3)
    fault = Failing(2, clients, times=1, after=after)
    arrays = run_small(settings, N, app=FaultyApp(toy_app(), fault)).arrays
    recorded, reference = Recorded.read(settings.results), undisturbed[0]
    assert same_arrays(arrays, undisturbed[1])
    tries = [line["failed_tries"] for line in recorded.rounds]
    reason = "its node failed: OSError: power cut"
    assert tries == [[], [{str(c): reason for c in clients}], []]
    assert all(line["left_out"] == {} for line in recorded.rounds)
    recorded.assert_same(reference, but={*TRAFFIC, "failed_tries"})
    assert recorded.rounds[1]["bytes_down"] == 2 * reference.rounds[1]["bytes_down"]
    needs = "failed for every client" if len(clients) == N else "has 2 of the 3 clients it needs (min-train-nodes)"
    assert f"round 2 {needs}:\n  client {clients[0]}: {reason}" in flower_log.text()
    assert "Round 2 is repeated (1 of 1)" in flower_log.text()


def test_enough_good_replies_are_a_round_without_the_others(tmp_path):
    """Three of four are needed, and three reply well: the fourth is left out, and nothing is repeated."""
    settings = toy_settings(tmp_path, min_train_nodes=3)
    grid = WatchedGrid(FaultyApp(toy_app(), Failing(2, [1], times=9)), N, settings.to_run_config())
    run_small(settings, grid=grid)
    assert [list(line["left_out"]) for line in lines_of(settings)] == [[], ["1"], []]
    assert [line["failed_tries"] for line in lines_of(settings)] == [[], [], []]
    assert len(grid.of_type("train")) == 3 * N


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 1, 2])
def test_after_the_last_try_the_run_stops_with_all_reasons_and_can_be_resumed(tmp_path, undisturbed, retries):
    """As many tries as are set, no more. The checkpoint of the round before is kept; resumed, the numbers are those of
    a run that was never disturbed."""
    settings = toy_settings(tmp_path, min_train_nodes=3, round_retries=retries)
    grid = WatchedGrid(FaultyApp(toy_app(), Failing(2, [0, 3], times=99)), N, settings.to_run_config())
    with pytest.raises(RuntimeError, match=r"round 2 has 2 of the 3 clients it needs \(min-train-nodes\)") as caught:
        run_small(settings, grid=grid)
    for client in (0, 3):
        assert f"client {client}: its node failed: OSError: power cut" in str(caught.value)
    assert sum(is_train(message, 2) for message, _ in grid.traffic) == (retries + 1) * N
    assert [line["round"] for line in lines_of(settings)] == [1]
    assert Checkpoints(settings.results / "checkpoint").load().round == 1

    again = type(settings).from_run_config({**settings.to_run_config(), "resume": True, "federation.round-retries": 5})
    assert same_arrays(run_small(again, N, app=toy_app()).arrays, undisturbed[1])
    Recorded.read(settings.results).assert_same(undisturbed[0], but=TRAFFIC)


@pytest.mark.slow
def test_partial_participation_repeats_the_same_participants(tmp_path):
    """Who takes part is drawn once per round, not once per try."""
    settings = toy_settings(tmp_path, num_clients=8, fraction_train=0.5, min_train_nodes=3)
    fault = Failing(2, range(8), times=1)
    grid = WatchedGrid(FaultyApp(toy_app(), fault), 8, settings.to_run_config())
    arrays = run_small(settings, grid=grid).arrays
    tries = [c for message, _ in grid.traffic if is_train(message, 2) for c in asked(message)]
    assert len(tries) == 8
    assert tries[:4] == tries[4:]
    plain = toy_settings(tmp_path, num_clients=8, fraction_train=0.5, min_train_nodes=3, name="plain")
    assert same_arrays(arrays, run_small(plain, 8, app=toy_app()).arrays)


class Leaving(DeviceGrid):
    """The node at a place goes in the middle of round 2; it is back after so many looks."""

    def __init__(self, *args, place, back_after):
        super().__init__(*args)
        self.place, self.back_after, self.looks, self.gone = place, back_after, 0, False

    def get_node_ids(self):
        self.looks += self.gone
        if self.gone and self.looks > self.back_after:
            self.gone = False
        nodes = super().get_node_ids()
        return [n for i, n in enumerate(nodes) if not (self.gone and i == self.place)]

    def push_messages(self, messages):
        messages = list(messages)
        first = self.back_after is not None and self.looks == 0 and any(is_train(m, 2) for m in messages)
        ids = super().push_messages(messages)
        if first:
            self.gone = True
            for message, message_id in zip(messages, ids, strict=True):
                if message.metadata.dst_node_id == list(self.contexts)[self.place]:
                    self._replies.pop(message_id)
        return ids


def test_a_repeated_round_waits_for_a_participant_that_comes_back(tmp_path, undisturbed, monkeypatch):
    """A node is killed in round 2 and started again: with all four needed nothing is lost but time."""
    monkeypatch.setattr(Directory, "poll_seconds", 0.01)
    monkeypatch.setattr(Directory, "retry_seconds", 0.0)
    settings = toy_settings(tmp_path, min_train_nodes=4, wait_seconds=30.0)
    grid = Leaving(toy_app(), ["0", "1", "2", "3"], tmp_path / "state", place=2, back_after=3)
    arrays = run_small(settings, grid=grid).arrays
    assert same_arrays(arrays, undisturbed[1])
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 2, 3]] * 3
    assert [list(t) for line in lines_of(settings) for t in line["failed_tries"]] == [["2"]]


def test_a_repeated_round_goes_on_with_the_participants_that_are_left(tmp_path, undisturbed):
    """Nodes of client 2 and 3 fail in round 2, and that of 2 leaves for good: three are enough."""
    settings = toy_settings(tmp_path, min_train_nodes=3, wait_seconds=0.0)
    fault = Failing(2, [3], times=1)
    grid = Leaving(FaultyApp(toy_app(), fault), ["0", "1", "2", "3"], tmp_path / "state", place=2, back_after=999)
    run_small(settings, grid=grid)
    assert [line["participants"] for line in lines_of(settings)] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 3]]
    assert [sorted(t) for line in lines_of(settings) for t in line["failed_tries"]] == [["2", "3"]]


def test_when_too_few_participants_are_left_the_run_stops_and_says_who_is_missing_and_why(tmp_path):
    settings = toy_settings(tmp_path, min_train_nodes=4, wait_seconds=0.0)
    grid = Leaving(toy_app(), ["0", "1", "2", "3"], tmp_path / "state", place=2, back_after=999)
    with pytest.raises(
        RuntimeError, match=r"round 2 needs at least 4 clients \(min-train-nodes\), but 3 of its 4"
    ) as e:
        run_small(settings, grid=grid)
    assert "client 2: no reply from its node" in str(e.value)
    assert "start more nodes and resume the run" in str(e.value)
    assert Checkpoints(settings.results / "checkpoint").load().round == 1


def test_a_round_does_not_begin_with_fewer_clients_than_it_needs(tmp_path):
    """A node leaves between rounds, for good: the clients that are left are not asked to work for nothing."""
    settings = toy_settings(tmp_path, min_train_nodes=4, wait_seconds=0.0)
    grid = DeviceGrid(toy_app(), ["0", "1", "2,3"], tmp_path / "state", {1: (0, 1)})
    with pytest.raises(RuntimeError, match=r"round 2 needs at least 4 clients .*but 3 are there"):
        run_small(settings, grid=grid)
    assert not [m for m, _ in grid.of_type("train") if is_train(m, 2)]


def test_late_replies_of_the_first_try_are_not_counted(tmp_path, undisturbed):
    """They come together with those of the second one, under the numbers of the first messages."""

    class Late(WatchedGrid):
        held = ()

        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            if replies and is_train(self.traffic[-1][0], 2) and not self.held:
                self.held = replies
                return []
            late, self.held = (self.held, self.held) if self.held else ((), ())
            return [*late, *replies]

    settings = toy_settings(tmp_path, min_train_nodes=3)
    grid = Late(toy_app(), N, settings.to_run_config())
    arrays = run_small(settings, grid=grid).arrays
    assert same_arrays(arrays, undisturbed[1])
    (tries,) = lines_of(settings)[1]["failed_tries"]
    assert set(tries.values()) == {"no reply from its node in time"}


# --- work that the server no longer waits for ---


def held_back(tmp_path, server_round):
    """A run whose node of client 2 gets the message of a round only after the run; and what it then says."""
    settings = toy_settings(tmp_path, num_server_rounds=4)
    grid = WatchedGrid(toy_app(), N, settings.to_run_config())
    late = []
    handle = grid._handle

    def slow(message):
        if is_train(message, server_round) and asked(message) == [2] and not late:
            late.append(message)
            raise AssertionError("not yet")
        return handle(message)

    grid._handle = lambda message: _nothing_or(slow, message, grid)
    grid.lose = lambda message: bool(late) and message is late[0]
    run_small(settings, grid=grid)
    return settings, grid, late[0]


def _nothing_or(answer, message, grid):
    try:
        return answer(message)
    except AssertionError:
        return None


def test_a_message_that_was_long_on_its_way_changes_no_state(tmp_path):
    """It asks for round 2 when the client has done 3 and 4: the client refuses, and its files stay as they are."""
    settings, grid, message = held_back(tmp_path, 2)
    folder = settings.results / "personal" / "versions"
    before = {p.name: p.read_bytes() for p in folder.rglob("client-2/*")}
    assert sorted(before) == [f"round-{t:06d}.safetensors" for t in (1, 3, 4)]
    # As Flower delivers it, with the time at which the server made it.
    context = next(c for c in grid.contexts.values() if c.node_config["partition-id"] == 2)
    reply = toy_app()(message, context)
    (reason,) = reply.content["config"]["failures"]
    assert reason.startswith("Late: too late: the server has asked for round ")
    assert {p.name: p.read_bytes() for p in folder.rglob("client-2/*")} == before


RUN = "0123456789abcdef"


def saved(folder, server_round, value, asked_at, base=0, resumable_from=0):
    tensors = {"head": torch.full((2,), float(value))}
    PersonalStore(folder, RUN, asked_at).save(3, server_round, tensors, base=base, resumable_from=resumable_from)


def value_of(folder, server_round):
    return PersonalStore(folder, RUN).load(3, server_round)["head"][0].item()


def test_the_second_try_of_a_round_stands_whenever_the_first_one_ends(tmp_path):
    """The second may have had other participants, and so another outcome: it is what the server has."""
    saved(tmp_path, 1, value=10, asked_at=5.0)
    saved(tmp_path, 2, value=22, asked_at=7.0, base=1)
    with pytest.raises(RuntimeError, match=r"too late: the server has asked for round 2 since it asked for this"):
        saved(tmp_path, 2, value=21, asked_at=6.0, base=1)
    assert (value_of(tmp_path, 1), value_of(tmp_path, 2)) == (10, 22)


def test_a_late_version_never_makes_one_go_that_a_resumed_run_needs(tmp_path):
    """Client 3 was heard of in round 1, was too slow in round 2, and took part in round 3. If its work of round 2 came
    to the disk now, it would pass for what a run resumed from round 2 starts from, and version 1 would go."""
    saved(tmp_path, 1, value=1, asked_at=1.0)
    saved(tmp_path, 3, value=3, asked_at=3.0, base=1, resumable_from=1)
    with pytest.raises(RuntimeError, match="too late"):
        saved(tmp_path, 2, value=2, asked_at=2.0, base=1)
    saved(tmp_path, 4, value=4, asked_at=4.0, base=3, resumable_from=2)
    assert value_of(tmp_path, 1) == 1


def test_the_same_message_again_and_a_resumed_run_are_not_late(tmp_path):
    saved(tmp_path, 1, value=1, asked_at=1.0)
    saved(tmp_path, 2, value=2, asked_at=2.0, base=1)
    saved(tmp_path, 2, value=2, asked_at=2.0, base=1)
    saved(tmp_path, 3, value=3, asked_at=3.0, base=2)
    saved(tmp_path, 2, value=5, asked_at=9.0, base=1)  # resumed from round 1
    assert value_of(tmp_path, 2) == 5


# --- what Flower's own keyword means, too ---


def test_the_strategy_takes_the_minimum_of_flower_and_the_retries(tmp_path):
    assert CafeDistill(round_retries=3).round_retries == 3
    with pytest.raises(ValueError, match="round_retries must be at least 0"):
        CafeDistill(round_retries=-1)


def test_notes_of_nodes_reach_log_and_record(tmp_path, flower_log):
    """Also a hand-written client may say something for the record."""

    def fault(answer, message, context):
        reply = answer(message, context)
        if is_train(message, 2) and asked(message) == [1]:
            config = {**reply.content["config"], "noted-clients": [1, 3], "notes": ["ran on battery", "not my client"]}
            reply.content["config"] = ConfigRecord(config)
        return reply

    settings = toy_settings(tmp_path)
    run_small(settings, N, app=FaultyApp(toy_app(), fault))
    assert [line["notes"] for line in lines_of(settings)] == [{}, {"1": "ran on battery"}, {}]
    assert "Round 2: client 1: ran on battery" in flower_log.text()
