"""Student coordination against a deliberately naive reference: exact number and exact order of active exits."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_flwr.coordination import SELECTIONS, active_exits, conflict_ramp, student_budget, student_levels


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


@pytest.mark.slow
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


@pytest.mark.slow
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
        (lambda: conflict_ramp(0, 4, 3, 0.0), "count from 1, got round 0 of 4 with 3 exits"),
        (lambda: conflict_ramp(1, 0, 3, 0.0), "count from 1, got round 1 of 0 with 3 exits"),
        (lambda: conflict_ramp(1, 4, 0, 0.0), "count from 1, got round 1 of 4 with 0 exits"),
        (lambda: student_levels([0, 0], 0.5, [0.0, 0.0]), r"shape \(clients, exits - 1\), got \(2,\) for 2 clients"),
        (lambda: student_levels([0], 0.5, [[0.0], [0.0]]), r"shape \(clients, exits - 1\), got \(2, 1\) for 1 clients"),
        (lambda: student_levels([0, 2], 0.5, [[0.0, 0.0]] * 2), r"levels must lie in 0\.\.1 \(exits - 2\), got 0\.\.2"),
        (
            lambda: student_levels([-1, 0], 0.5, [[0.0, 0.0]] * 2),
            r"levels must lie in 0\.\.1 \(exits - 2\), got -1\.\.0",
        ),
    ],
)
def test_bad_input_is_an_error_that_says_what_is_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- as released: conflict slows the ramp down, and clients have levels ---


def reference_levels(levels, budget, column):
    """Exit 0 of all, then exit 1, …: one place at a time, to the client with the largest sum that has not got one."""
    found = list(levels)
    for k in range(len(column[0]) if column else 0):
        waiting = list(range(len(found)))
        while waiting and budget > 0:
            best = max(waiting, key=lambda client: (column[client][k], -client))
            waiting.remove(best)
            found[best], budget = k, budget - 1
    return found


@st.composite
def conflicting(draw, max_clients=7, max_exits=5):
    """Clients with levels of old, and how little their exits are in conflict: 0 or less, often alike."""
    clients, exits = draw(st.integers(1, max_clients)), draw(st.integers(2, max_exits))
    value = st.sampled_from([-2.0, -1.0, -0.25, 0.0]) | st.floats(-3, 0)
    column = [draw(st.lists(value, min_size=exits - 1, max_size=exits - 1)) for _ in range(clients)]
    levels = draw(st.lists(st.integers(0, exits - 2), min_size=clients, max_size=clients))
    return levels, column, exits


def test_the_ramp_by_hand():
    """m = 4, T = 8: without conflict 2t/8·¾ with t = round − 1: 0, 3/16, 6/16, 9/16, ¾ and then no more; a conflict of
    −0.1 takes 0.1 of it, but never below 0, and nothing of what is beyond ¾ anyway: 2·5/8·¾ − 0.1 = 0.8375."""
    ramps = [conflict_ramp(t, 8, 4, 0.0) for t in range(1, 9)]
    assert ramps == pytest.approx([0, 3 / 16, 6 / 16, 9 / 16, 0.75, 0.75, 0.75, 0.75])
    ramps = [conflict_ramp(t, 8, 4, -0.1) for t in range(1, 7)]
    assert ramps == pytest.approx([0, 0.0875, 0.275, 0.4625, 0.65, 0.75])
    assert conflict_ramp(8, 8, 4, -1.5) == 0
    assert [conflict_ramp(t, 8, 1, 0.0) for t in (1, 8)] == [0, 0]  # a single exit has no students


def test_levels_by_hand():
    """n = 3, m = 3, R = 5/9: five places. Exit 0 of all three; exit 1 of the two with the largest sums, 0 and −0.5;
    client 1, at −2, keeps its level, which exit 0 has just set to 0 although it was 1."""
    sums = [[-0.5, -0.5], [-2.0, -2.0], [0.0, 0.0]]
    assert student_levels([0, 1, 0], 5 / 9, sums).tolist() == [1, 0, 1]
    assert student_levels([0, 1, 0], 3 / 9, sums).tolist() == [0, 0, 0]
    assert student_levels([0, 1, 1], 2 / 9, sums).tolist() == [0, 1, 0]  # two places at exit 0: client 1 keeps its 1
    assert student_levels([0, 1, 1], 0.0, sums).tolist() == [0, 1, 1]  # no place: all keep theirs
    # Another order at every exit: exit 1 goes to client 1 alone.
    assert student_levels([0, 0, 0], 4 / 9, [[0.0, -1.0], [-2.0, 0.0], [0.0, -0.1]]).tolist() == [0, 1, 0]


def test_places_go_to_the_earlier_client_where_conflict_is_the_same():
    sums = np.full((40, 2), -0.3)
    for places in range(41):
        levels = student_levels(np.zeros(40, int), (40 + places) / 120, sums)
        assert levels.tolist() == [1] * places + [0] * (40 - places)


def test_the_number_of_places_is_not_rounded_down_in_binary():
    """R = 0.29 of 100 exits is 29; in floats 0.29·100 = 28.999999999999996 and its floor is 28."""
    assert math.floor(0.29 * 100) == 28
    assert student_levels(np.ones(25, int), 0.29, np.zeros((25, 3))).tolist() == [1] * 4 + [0] * 21


@settings(deadline=None)
@given(case=conflicting(), share=st.floats(0, 1))
def test_levels_are_those_of_a_loop_and_lie_between_0_and_the_exit_before_the_last(case, share):
    levels, column, exits = case
    share = min(share, 1 - 1 / exits)
    before = np.array(levels)
    found = student_levels(before, share, column)
    budget = math.floor(share * exits * len(levels) + 1e-9)
    assert found.tolist() == reference_levels(levels, budget, column)
    assert ((found >= 0) & (found <= exits - 2)).all()
    assert before.tolist() == levels  # the input is left alone


@settings(deadline=None)
@given(case=conflicting(), num_rounds=st.integers(1, 60), conflict=st.floats(-1, 0), data=st.data())
def test_the_budget_is_never_exceeded(case, num_rounds, conflict, data):
    """From level 0, students beyond the first of each client are places; the first is there in any case."""
    _, column, exits = case
    clients = len(column)
    t = data.draw(st.integers(1, num_rounds))
    share = conflict_ramp(t, num_rounds, exits, conflict)
    assert 0 <= share <= 1 - 1 / exits
    students = int((student_levels([0] * clients, share, column) + 1).sum())
    assert students <= max(clients, math.floor(share * exits * clients + 1e-9))


@settings(deadline=None)
@given(case=conflicting(), num_rounds=st.integers(1, 60))
def test_without_conflict_all_students_train_from_half_time_on(case, num_rounds):
    """2(t − 1)/T ≥ 1: whoever had which level, it is m − 2 then."""
    levels, column, exits = case
    for t in range(math.ceil(num_rounds / 2) + 1, num_rounds + 1):
        share = conflict_ramp(t, num_rounds, exits, 0.0)
        assert share == 1 - 1 / exits
        assert student_levels(levels, share, column).tolist() == [exits - 2] * len(levels)


@pytest.mark.slow
@settings(deadline=None)
@given(case=conflicting(), num_rounds=st.integers(1, 60), conflicts=st.tuples(st.floats(-1, 0), st.floats(-1, 0)))
def test_more_conflict_never_means_more_students(case, num_rounds, conflicts):
    """In every round, for the federation and for every client of it."""
    _, column, exits = case
    more, less = sorted(conflicts)
    for t in range(1, num_rounds + 1):
        shares = [conflict_ramp(t, num_rounds, exits, conflict) for conflict in (more, less)]
        assert shares[0] <= shares[1]
        few, many = (student_levels([0] * len(column), share, column) for share in shares)
        assert (few <= many).all()


@settings(deadline=None)
@given(case=conflicting(), num_rounds=st.integers(2, 60))
def test_from_round_to_round_students_only_join(case, num_rounds):
    levels, column, exits = [0] * len(case[1]), case[1], case[2]
    for t in range(1, num_rounds + 1):
        found = student_levels(levels, conflict_ramp(t, num_rounds, exits, -0.1), column)
        assert (found >= levels).all()
        levels = found.tolist()


def test_a_client_in_more_conflict_gets_no_deeper_than_one_in_less():
    """From the same level, in every round."""
    sums = np.repeat(np.linspace(-1, 0, 9)[:, None], 3, axis=1)
    for t in range(1, 21):
        levels = student_levels([0] * 9, conflict_ramp(t, 20, 4, -0.05), sums)
        assert (np.diff(levels) >= 0).all()


def test_a_network_with_one_exit_has_levels_of_0():
    assert student_levels([0, 0], 0.0, np.zeros((2, 0))).tolist() == [0, 0]
