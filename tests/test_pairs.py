"""What the server remembers of pairs of clients: symmetric, the newest, only those that met, as durable as the rest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_flwr.methods.pairs import Pairs
from cafe_flwr.server.checkpoints import Checkpoints, ServerState


def cosines(n, seed=0):
    """A symmetric (n, n) with ones on the diagonal, in float32 as it is stored."""
    values = np.random.default_rng(seed).uniform(-1, 1, size=(n, n)).astype(np.float32)
    matrix = np.triu(values, 1)
    return (matrix + matrix.T + np.eye(n)).astype(np.float64)


def remembered(meetings):
    """S as a dictionary, one pair at a time."""
    known = {}
    for clients, matrix in meetings:
        for i, a in enumerate(clients):
            for j, b in enumerate(clients):
                if a != b:
                    known[a, b] = matrix[i, j]
    return known


@settings(deadline=None, max_examples=60)
@given(
    rounds=st.lists(st.sets(st.integers(0, 12), min_size=1, max_size=7), max_size=6),
    asked=st.lists(st.integers(0, 14), unique=True, max_size=9),
    data=st.data(),
)
def test_it_is_the_dictionary_of_the_last_meetings(rounds, asked, data):
    """Any rounds, in any order of clients, asked for in any order: the newest value both ways, 0 for those that never
    met and on the diagonal; stored is each pair that met, once."""
    pairs, meetings = Pairs(), []
    for t, clients in enumerate(rounds):
        order = data.draw(st.permutations(sorted(clients)))
        meetings.append((order, cosines(len(order), seed=t)))
        pairs = pairs.updated(*meetings[-1])
    known = remembered(meetings)
    assert len(pairs) == len({frozenset(pair) for pair in known})
    matrix = pairs.among(asked)
    assert matrix.shape == (len(asked), len(asked))
    np.testing.assert_array_equal(matrix, matrix.T)
    for i, a in enumerate(asked):
        for j, b in enumerate(asked):
            assert matrix[i, j] == known.get((a, b), 0.0)


def test_the_newest_wins_and_the_others_stay():
    old = Pairs().updated([1, 2, 3], np.array([[1, 0.1, 0.2], [0.1, 1, 0.3], [0.2, 0.3, 1]]))
    new = old.updated([3, 1], np.array([[1, -0.5], [-0.5, 1]]))
    np.testing.assert_allclose(new.among([1, 2, 3]), [[0, 0.1, -0.5], [0.1, 0, 0.3], [-0.5, 0.3, 0]], atol=1e-7)
    np.testing.assert_allclose(old.among([1, 3]), [[0, 0.2], [0.2, 0]], atol=1e-7)  # as it was
    assert len(new) == len(old) == 3


def test_a_cosine_of_0_is_remembered_in_the_place_of_an_older_one():
    pairs = Pairs().updated([0, 1], cosines(2)).updated([0, 1], np.eye(2))
    assert len(pairs) == 1
    assert not pairs.among([0, 1]).any()


def test_pairs_that_never_met_are_not_stored():
    """A hundred rounds of two of 10,000 clients are a hundred pairs, whatever the number of clients."""
    pairs = Pairs()
    for t in range(100):
        pairs = pairs.updated([t, 9999 - t], cosines(2, seed=t))
    assert len(pairs) == len(pairs.keys) == len(pairs.values) == 100
    assert pairs.keys.nbytes + pairs.values.nbytes == 12 * 100
    assert not pairs.among([0, 1, 2]).any()


@pytest.mark.parametrize("clients", [[], [7]])
def test_nobody_and_one_alone_make_no_pair(clients):
    pairs = Pairs().updated(clients, np.eye(len(clients)))
    assert len(pairs) == 0
    assert pairs.among(clients).tolist() == np.zeros((len(clients), len(clients))).tolist()


def test_large_numbers_of_clients_do_not_run_into_one_another():
    """(1, 2) and (2, 1 + 2³¹ − 1), …: numbers up to 2³¹ − 1."""
    clients = [0, 1, 2, 2**16, 2**31 - 2, 2**31 - 1]
    matrix = cosines(len(clients))
    np.testing.assert_array_equal(Pairs().updated(clients, matrix).among(clients), matrix - np.eye(len(clients)))


def test_they_go_through_a_checkpoint_bit_for_bit(tmp_path):
    """Before anybody has met there is nothing of them in the file, and none are read."""
    folder = Checkpoints(tmp_path)
    state = ServerState("0" * 16, 1, "digest", np.zeros(3, np.float32))
    folder.save(state)
    assert len(folder.load().pairs) == 0
    state.round, state.pairs = 2, Pairs().updated([5, 0, 3], cosines(3)).updated([3, 9], cosines(2, seed=1))
    folder.save(state)
    loaded = folder.load()
    assert loaded.round == 2
    for a, b in ((loaded.pairs.keys, state.pairs.keys), (loaded.pairs.values, state.pairs.values)):
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())
    again = loaded.pairs.updated([0, 9], cosines(2, seed=2))  # and can be gone on with
    assert len(again) == 5


def test_a_thousand_clients_that_meet_are_six_megabytes(tmp_path):
    """n(n − 1)/2 pairs of twelve bytes; the bound on what a round adds to the checkpoint is 50 MB."""
    clients = list(range(1000))
    pairs = Pairs().updated(clients, cosines(1000))
    assert len(pairs) == 499_500
    state = ServerState("0" * 16, 1, "digest", np.zeros(1, np.float32), pairs=pairs)
    Checkpoints(tmp_path).save(state)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert path.stat().st_size < 12 * 499_500 + 10_000
