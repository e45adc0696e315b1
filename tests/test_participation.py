"""Random numbers, hosting and sampling are functions of the client, never of the node that hosts it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_flwr.client.node_config import hosted_clients
from cafe_flwr.core.random import rng_for
from cafe_flwr.server.sampling import sample_clients


def test_rng_is_reproducible_and_every_coordinate_gives_another_stream():
    # -1 is the server; it must not share numbers with client 0 or any other client.
    keys = list(itertools.product((0, 1, 99), (0, 1, 2), (-1, 0, 1, 2), ("batches", "split", "tilps")))
    first = [rng_for(*key).integers(2**63, size=2).tolist() for key in keys]
    again = [rng_for(*key).integers(2**63, size=2).tolist() for key in keys]
    assert first == again
    assert len({tuple(numbers) for numbers in first}) == len(keys)


def test_swapping_round_and_client_gives_another_stream():
    """A key made by adding or hashing the parts symmetrically would fail here: a client is stored plus one, so
    (round 2, client 4) and (round 5, client 1) have the same numbers, 2 and 5, in their keys."""
    a = rng_for(0, 2, 4, "batches").integers(2**63, size=4)
    b = rng_for(0, 5, 1, "batches").integers(2**63, size=4)
    assert not np.array_equal(a, b)


@settings(deadline=None)
@given(num_partitions=st.integers(1, 12), num_clients=st.integers(0, 40))
def test_nodes_host_every_client_exactly_once_and_evenly(num_partitions, num_clients):
    hosted = [hosted_clients(p, num_partitions, num_clients) for p in range(num_partitions)]
    assert sorted(itertools.chain(*hosted)) == list(range(num_clients))
    sizes = [len(clients) for clients in hosted]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("partition", "num_partitions"), [(-1, 3), (3, 3), (0, 0)])
def test_a_partition_that_does_not_exist_is_an_error(partition, num_partitions):
    with pytest.raises(ValueError, match=f"partition-id.*got {partition}"):
        hosted_clients(partition, num_partitions, 5)


@settings(deadline=None)
@given(
    available=st.sets(st.integers(0, 200), max_size=30),
    eighths=st.integers(0, 8),
    minimum=st.integers(0, 40),
    server_round=st.integers(1, 50),
    data=st.data(),
)
def test_sample_is_an_ascending_subset_of_the_asked_size_whatever_the_order(
    available, eighths, minimum, server_round, data
):
    shuffled = data.draw(st.permutations(sorted(available)))
    chosen = sample_clients(shuffled, eighths / 8, minimum, seed=3, server_round=server_round)

    assert chosen == sample_clients(sorted(available), eighths / 8, minimum, seed=3, server_round=server_round)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= available
    # Eighths are exact in binary: floor(share) clients, at least the minimum, at most all.
    expected = len(available) * eighths // 8
    if expected < minimum:
        expected = minimum
    assert len(chosen) == min(expected, len(available))


def test_every_client_is_sampled_equally_often_and_rounds_differ():
    """3 of 10 clients in 2000 rounds: a client is expected 600 times with standard deviation √(2000·0.3·0.7) = 20.5."""
    rounds = [sample_clients(range(10), 0.3, 1, seed=0, server_round=t) for t in range(1, 2001)]
    counts = np.bincount(np.concatenate(rounds), minlength=10)
    assert counts.sum() == 6000
    assert np.abs(counts - 600).max() < 4 * 20.5
    # All 120 = C(10, 3) samples occur, so clients are not tied to each other.
    assert len({tuple(chosen) for chosen in rounds}) == 120


def test_another_seed_gives_other_samples():
    def samples(seed):
        return [sample_clients(range(20), 0.25, 1, seed=seed, server_round=t) for t in range(1, 6)]

    assert samples(0) != samples(1)
