"""Averages do not depend, in any bit, on how clients are grouped on nodes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_flwr.wire.averaging import weighted, weighted_mean


def test_hand_example():
    """(1·1 + 3·3)/4 = 2.5 and (1·4 + 3·0)/4 = 1."""
    sums = [weighted(np.float32([1.0, 4.0]), 1), weighted(np.float32([3.0, 0.0]), 3)]
    mean = weighted_mean(sums, total_weight=4)
    assert mean.tolist() == [2.5, 1.0]
    assert mean.dtype == np.float32


@st.composite
def clients(draw, exponent):
    """Weights and parameters of up to 9 clients; parameters are float32 of mixed size, at most 10**exponent."""
    n = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    parameters = rng.normal(size=(n, 17)) * 10.0 ** rng.uniform(-6, exponent, size=(n, 17)) / 5
    weights = rng.integers(1, 2000, size=n).tolist()
    return weights, parameters.astype(np.float32)


@st.composite
def groupings(draw, items):
    """The items in any order, cut into any non-empty groups: which node hosts whom, and which node answers first."""
    order = draw(st.permutations(items))
    cuts = draw(st.sets(st.integers(1, len(items) - 1))) if len(items) > 1 else set()
    edges = [0, *sorted(cuts), len(items)]
    return [order[a:b] for a, b in itertools.pairwise(edges)]


def partial_sums(groups, weights, parameters):
    """What every node sends: the sum over its clients, in its own order."""
    sums = []
    for group in groups:
        total = weighted(parameters[group[0]], weights[group[0]])
        for client in group[1:]:
            total = total + weighted(parameters[client], weights[client])
        sums.append(total)
    return sums


@settings(deadline=None)
@given(federation=clients(exponent=2), data=st.data())
def test_any_grouping_and_order_gives_the_same_bits(federation, data):
    weights, parameters = federation
    groups = data.draw(groupings(range(len(weights))))
    one_by_one = weighted_mean([weighted(x, n) for n, x in zip(weights, parameters, strict=True)], sum(weights))
    grouped = weighted_mean(partial_sums(groups, weights, parameters), sum(weights))
    assert grouped.tobytes() == one_by_one.tobytes()


def test_the_guarantee_is_not_that_of_plain_sums():
    """0.1 + 0.2 + 0.3 in float64 depends on the order. Averaged to float32 the difference would mostly round away,
    so the sums themselves are compared."""
    plain = [np.float64(x) for x in (0.1, 0.2, 0.3)]
    assert (plain[0] + plain[1]) + plain[2] != plain[0] + (plain[1] + plain[2])
    on_grid = [weighted(np.array([x]), 1) for x in plain]
    sums = {tuple((on_grid[i] + on_grid[j]) + on_grid[k]) for i, j, k in itertools.permutations(range(3))}
    assert len(sums) == 1


@settings(deadline=None)
@given(federation=clients(exponent=3))
def test_it_is_the_average(federation):
    weights, parameters = federation
    mean = weighted_mean([weighted(x, n) for n, x in zip(weights, parameters, strict=True)], sum(weights))
    expected = np.average(parameters.astype(np.float64), axis=0, weights=weights)
    # Half a unit in the last place of float32, and half a step of the 2⁻³² grid.
    np.testing.assert_allclose(mean, expected, rtol=2.0**-23, atol=2.0**-33)


def test_one_client_gets_its_own_parameters_back():
    """Weights θ of usual size come back bit for bit: rounding n·θ to 2⁻³² moves θ by at most 2⁻³³/n, less than half of
    float32's spacing for |θ| ≥ 2⁻⁸ (2⁻³¹)."""
    parameters = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    parameters = parameters[np.abs(parameters) >= 2.0**-8]
    for weight in (1, 7, 96):
        mean = weighted_mean([weighted(parameters, weight)], weight)
        assert mean.tobytes() == parameters.tobytes()


@settings(deadline=None)
@given(data=st.data(), exponent=st.integers(7, 34))
def test_large_values_are_averaged_as_well_as_float64_can(data, exponent):
    """Beyond 2²¹ the order may show in the last bits of float64; the float32 average must not care much."""
    weights, parameters = data.draw(clients(exponent=exponent))
    groups = data.draw(groupings(range(len(weights))))
    mean = weighted_mean(partial_sums(groups, weights, parameters), sum(weights))
    assert np.isfinite(mean).all()
    expected = np.average(parameters.astype(np.float64), axis=0, weights=weights)
    # Where large values cancel, the error is relative to what was added up.
    size = np.average(np.abs(parameters.astype(np.float64)), axis=0, weights=weights)
    assert (np.abs(mean - expected) <= 2.0**-23 * np.abs(expected) + 1e-14 * size + 2.0**-33).all()


def test_the_largest_float32_survives():
    largest = np.finfo(np.float32).max
    assert weighted_mean([weighted([largest], 10), weighted([largest], 30)], 40).tolist() == [largest]


def test_a_broken_update_is_not_hidden():
    mean = weighted_mean([weighted([1.0, np.nan], 1), weighted([1.0, 2.0], 1)], 2)
    assert mean[0] == 1.0
    assert np.isnan(mean[1])


def test_sums_are_left_alone_and_may_come_from_a_generator():
    sums = [weighted([1.0, 2.0], 2), weighted([5.0, 6.0], 1)]
    before = [s.tolist() for s in sums]
    first = weighted_mean(iter(sums), 3)
    assert [s.tolist() for s in sums] == before
    assert first.tobytes() == weighted_mean(sums, 3).tobytes()


def test_shapes_are_kept():
    for shape in ((3, 2, 4), (5,), (0, 3)):
        assert weighted_mean([weighted(np.ones(shape), 2)] * 2, 4).shape == shape


def test_a_single_number_is_averaged_too():
    """A parameter without dimensions, a learned temperature, say: (1·2 + 3·4)/4 = 3.5."""
    mean = weighted_mean([weighted(np.array(2.0), 1), weighted(np.array(4.0), 3)], 4)
    assert mean.shape == ()
    assert mean.dtype == np.float32
    assert mean == 3.5


@pytest.mark.parametrize(
    ("sums", "total"),
    [([], 0.0), ([], 1.0), ([np.zeros(2)], 0.0), ([np.zeros(2)], -1.0), ([np.zeros(2)], float("nan"))],
)
def test_nothing_to_average_is_an_error(sums, total):
    with pytest.raises(ValueError, match="no client sent an update"):
        weighted_mean(sums, total)
