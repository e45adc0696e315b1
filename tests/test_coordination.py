"""Student coordination against a deliberately naive reference: exact number and exact order of active exits."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_flwr.coordination import SELECTIONS, active_exits, student_budget


def reference_budget(t, num_rounds, clients, exits):
    """ceil(R(t)(m−1)n), R(t) = min(2t/T, 1), in rational numbers."""
    ramp = min(Fraction(2 * t, num_rounds), Fraction(1))
    return math.ceil(ramp * (exits - 1) * clients)


def reference_order(similarity, clients, exits):
    """Students (client, depth) in the order in which they join, picked one at a time."""
    order = []
    for depth in range(exits - 1):
        waiting = list(range(clients))
        while waiting:
            best = waiting[0]
            for client in waiting[1:]:
                mine, best_so_far = similarity[client][depth], similarity[best][depth]
                if math.isnan(mine):
                    continue
                if math.isnan(best_so_far) or mine > best_so_far:
                    best = client
            waiting.remove(best)
            order.append((best, depth))
    return order


def reference_active(t, num_rounds, similarity, clients, exits):
    budget = reference_budget(t, num_rounds, clients, exits)
    active = [[False] * (exits - 1) for _ in range(clients)]
    for client, depth in reference_order(similarity, clients, exits)[:budget]:
        active[client][depth] = True
    return np.array(active, dtype=bool).reshape(clients, exits - 1)


def as_array(similarity, clients, exits):
    return np.array(similarity, dtype=np.float64).reshape(clients, exits - 1)


# Few distinct values, so that ties are common; NaN is an exit that has not reported yet.
values = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.25, 1.0, math.nan]) | st.floats(-1, 1)


@st.composite
def federations(draw, max_clients=7, max_exits=5):
    clients, exits = draw(st.integers(1, max_clients)), draw(st.integers(1, max_exits))
    row = st.lists(values, min_size=exits - 1, max_size=exits - 1)
    return draw(st.lists(row, min_size=clients, max_size=clients)), clients, exits


def test_small_federations_exhaustively():
    rng = np.random.default_rng(0)
    for clients, exits in itertools.product(range(1, 5), range(1, 5)):
        similarity = rng.choice([-0.5, 0.0, 0.5, np.nan], size=(clients, exits - 1))
        for num_rounds in range(1, 10):
            for t in range(1, num_rounds + 1):
                expected = reference_active(t, num_rounds, similarity.tolist(), clients, exits)
                np.testing.assert_array_equal(active_exits(t, num_rounds, similarity), expected)
                assert student_budget(t, num_rounds, similarity.size) == expected.sum()


def test_every_pattern_of_ties_and_missing_values_of_three_clients():
    for column in itertools.product([0.0, 0.5, math.nan], repeat=3):
        similarity = [[value] for value in column]
        for t in (1, 2, 3):  # of 6 rounds: budgets 1, 2, 3
            np.testing.assert_array_equal(
                active_exits(t, 6, similarity), reference_active(t, 6, similarity, 3, 2), err_msg=f"{column}, t={t}"
            )


@settings(deadline=None)
@given(federation=federations(), num_rounds=st.integers(1, 200), data=st.data())
def test_any_federation_in_any_round(federation, num_rounds, data):
    similarity, clients, exits = federation
    t = data.draw(st.integers(1, num_rounds))
    active = active_exits(t, num_rounds, as_array(similarity, clients, exits))
    assert active.dtype == np.bool_
    np.testing.assert_array_equal(active, reference_active(t, num_rounds, similarity, clients, exits))


@settings(deadline=None)
@given(federation=federations(max_clients=5, max_exits=4))
def test_exits_join_one_by_one_in_exactly_the_reference_order(federation):
    """With T = 2·students the budget of round t is ceil(2t/T·students) = t: one more exit joins every round."""
    similarity, clients, exits = federation
    students = clients * (exits - 1)
    joined, before = [], np.zeros((clients, exits - 1), dtype=bool)
    for t in range(1, students + 1):
        active = active_exits(t, 2 * students, as_array(similarity, clients, exits))
        assert not (before & ~active).any()
        ((client, depth),) = np.argwhere(active & ~before).tolist()
        joined.append((client, depth))
        before = active
    assert joined == reference_order(similarity, clients, exits)


def test_the_budget_is_not_rounded_in_binary():
    """R = 2·7/100 = 0.14 of 50 students is 7 exactly; in floats 0.14·50 = 7.000000000000001 and its ceiling is 8."""
    assert math.ceil(2 * 7 / 100 * 50) == 8
    assert student_budget(7, 100, 50) == 7
    assert active_exits(7, 100, np.zeros((25, 2))).sum() == 7


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 10**6))
def test_budget_is_the_rational_ceiling(t, num_rounds, students):
    assert student_budget(t, num_rounds, students) == reference_budget(t, num_rounds, students, 2)


def test_hand_example():
    """4 clients, 3 exits, T = 10, t = 3: R = 0.6, N = ceil(0.6·2·4) = ceil(4.8) = 5.

    Exit 1 of all four clients (4 of 5); the last place at exit 2 goes to the client with the highest similarity there,
    0.9: client 2 and client 3 tie, the earlier one joins. That client 0 has similarity 1.0 at exit 1 does not matter.
    """
    similarity = [[1.0, 0.1], [-1.0, math.nan], [0.0, 0.9], [0.5, 0.9]]
    expected = [[True, False], [True, False], [True, True], [True, False]]
    assert active_exits(3, 10, similarity).tolist() == expected


def test_ties_go_to_the_earlier_client():
    similarity = np.full((40, 1), 0.3)  # long enough for an unstable sort to show
    for t in range(1, 21):
        assert np.flatnonzero(active_exits(t, 40, similarity)[:, 0]).tolist() == list(range(2 * t))


def test_not_yet_known_similarity_comes_last_even_after_the_greatest_conflict():
    similarity = [[math.nan], [-1.0], [math.nan], [0.5]]
    order = [set(np.flatnonzero(active_exits(t, 8, similarity)).tolist()) for t in (1, 2, 3, 4)]
    assert order == [{3}, {3, 1}, {3, 1, 0}, {0, 1, 2, 3}]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_network_with_one_exit_has_no_students(selection):
    active = active_exits(1, 10, np.zeros((6, 0)), selection=selection, rng=np.random.default_rng(0))
    assert active.shape == (6, 0)
    assert active.dtype == np.bool_


@settings(deadline=None)
@given(federation=federations(), num_rounds=st.integers(1, 60), selection=st.sampled_from(SELECTIONS))
def test_all_are_active_from_half_time_on(federation, num_rounds, selection):
    similarity, clients, exits = federation
    for t in range(math.ceil(num_rounds / 2), num_rounds + 1):
        active = active_exits(
            max(t, 1),
            num_rounds,
            as_array(similarity, clients, exits),
            selection=selection,
            rng=np.random.default_rng(t),
        )
        assert active.all()


def test_not_all_are_active_before_half_time():
    """One round before T/2 the ramp is 1 − 2/T; with 100 students and T = 20 that leaves 10 students out."""
    for selection in ("shallow-first", "deep-first", "random"):
        active = active_exits(9, 20, np.zeros((50, 2)), selection=selection, rng=np.random.default_rng(0))
        assert active.sum() == 90


@settings(deadline=None)
@given(
    federation=federations(), num_rounds=st.integers(2, 60), selection=st.sampled_from(["shallow-first", "deep-first"])
)
def test_an_exit_that_joined_stays_for_fixed_similarity(federation, num_rounds, selection):
    similarity, clients, exits = federation
    before = np.zeros((clients, exits - 1), dtype=bool)
    for t in range(1, num_rounds + 1):
        active = active_exits(t, num_rounds, as_array(similarity, clients, exits), selection=selection)
        assert not (before & ~active).any()
        before = active


@settings(deadline=None)
@given(seed=st.integers(0, 1000), num_rounds=st.integers(1, 40), data=st.data())
def test_numbering_of_the_clients_does_not_matter_without_ties(seed, num_rounds, data):
    rng = np.random.default_rng(seed)
    similarity = rng.uniform(-1, 1, size=(6, 3))
    order = rng.permutation(6)
    t = data.draw(st.integers(1, num_rounds))
    np.testing.assert_array_equal(
        active_exits(t, num_rounds, similarity[order]), active_exits(t, num_rounds, similarity)[order]
    )


@settings(deadline=None)
@given(federation=federations(), num_rounds=st.integers(1, 60), data=st.data())
def test_ablations_spend_the_same_budget(federation, num_rounds, data):
    similarity, clients, exits = federation
    scores = as_array(similarity, clients, exits)
    t = data.draw(st.integers(1, num_rounds))
    budget = reference_budget(t, num_rounds, clients, exits)
    rng = np.random.default_rng(t)
    active = {name: active_exits(t, num_rounds, scores, selection=name, rng=rng) for name in SELECTIONS}
    for name in ("shallow-first", "deep-first", "random"):
        assert active[name].sum() == budget
    assert active["none"].all()
    assert all(a.shape == scores.shape for a in active.values())
    # Deep first is shallow first on the mirrored network.
    np.testing.assert_array_equal(active["deep-first"], active_exits(t, num_rounds, scores[:, ::-1])[:, ::-1])


def test_random_selection_is_reproducible_and_favours_nobody():
    """3 of 12 students (R = 1/4) in 2000 draws: each is expected 500 times with standard deviation √(2000·¼·¾) = 19.4,
    whatever its depth and similarity."""
    similarity = np.linspace(-1, 1, 12).reshape(4, 3)
    rng = np.random.default_rng(0)
    draws = [active_exits(1, 8, similarity, selection="random", rng=rng) for _ in range(2000)]
    counts = np.sum(draws, axis=0)
    assert np.abs(counts - 500).max() < 4 * 19.4
    again = np.random.default_rng(0)
    np.testing.assert_array_equal(draws[0], active_exits(1, 8, similarity, selection="random", rng=again))


def test_the_input_is_left_alone():
    similarity = np.array([[0.1, np.nan], [0.5, -0.2]])
    before = similarity.copy()
    for selection in SELECTIONS:
        active_exits(1, 4, similarity, selection=selection, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(similarity, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: active_exits(1, 4, [0.1, 0.2]), r"shape \(clients, exits - 1\), got \(2,\)"),
        (lambda: active_exits(1, 4, np.zeros((2, 2, 2))), r"shape \(clients, exits - 1\)"),
        (lambda: active_exits(1, 4, np.zeros((2, 2)), selection="deepest"), "shallow-first.*'deepest'"),
        (lambda: active_exits(1, 4, np.zeros((2, 2)), selection="random"), "pass rng="),
        (lambda: active_exits(0, 4, np.zeros((2, 2))), "counts from 1, got 0"),
        (lambda: active_exits(1, 0, np.zeros((2, 2))), "num_rounds must be at least 1, got 0"),
        (lambda: student_budget(-1, 4, 3), "counts from 1, got -1"),
        (lambda: student_budget(1, -2, 3), "num_rounds must be at least 1, got -2"),
    ],
)
def test_bad_input_is_an_error_that_says_what_is_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
