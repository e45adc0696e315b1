"""Teacher matching: the closed form is the solution of the QP, checked by its optimality conditions and two solvers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from cafe_flwr.teaching import cosine_similarity, project_to_simplex, simplex_qp, teacher_weights


@st.composite
def problems(draw, max_clients=8):
    """(similarity, one prior a row, μ): any square matrix of cosines, priors with zeros, μ over twelve decades."""
    n = draw(st.integers(1, max_clients))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    s = rng.uniform(-1, 1, size=(n, n))
    if draw(st.booleans()):
        s = s.round(1)  # ties
    counts = rng.integers(0, 6, size=(n, n)).astype(float)
    counts[:, rng.integers(n)] += 1
    mu = 10 ** draw(st.floats(-6, 6))
    return s, counts / counts.sum(axis=1, keepdims=True), mu


def objective(w, s, p, mu):
    return -s @ w + mu * np.sum((w - p) ** 2)


@settings(deadline=None)
@given(problems())
def test_weights_satisfy_the_optimality_conditions(problem):
    """Karush–Kuhn–Tucker for min −sᵀw + μ‖w − p‖² on the simplex: with gradient g = −s + 2μ(w − p) there is one ν with

    g_j − ν = λ_j ≥ 0 (dual feasibility), λ_j w_j = 0 (complementary slackness), w ≥ 0, Σw = 1.
    The problem is strictly convex, so these conditions hold for its one solution only.
    """
    s, p, mu = problem
    w = teacher_weights(s, p, mu)
    assert w.shape == s.shape
    assert (w >= 0).all()
    np.testing.assert_allclose(w.sum(axis=1), 1.0, atol=1e-12)

    gradient = -s + 2 * mu * (w - p)
    # The weights of the support share one value of the gradient, ν; the average of it over w is that value.
    nu = (w * gradient).sum(axis=1, keepdims=True)
    slack = gradient - nu
    tolerance = 1e-12 * (1 + 2 * mu)
    assert slack.min() >= -tolerance
    assert np.abs(slack * w).max() <= tolerance


@settings(deadline=None)
@given(problems(max_clients=6), st.integers(0, 1000))
def test_no_point_of_the_simplex_is_better(problem, seed):
    s, p, mu = problem
    w = teacher_weights(s, p, mu)
    rng = np.random.default_rng(seed)
    n = len(s)
    # Random points, the corners, and small steps from the solution towards both.
    others = np.concatenate([rng.dirichlet(np.ones(n), size=20), np.eye(n)])
    for i in range(n):
        best = objective(w[i], s[i], p[i], mu)
        for other in np.concatenate([others, w[i] + 1e-3 * (others - w[i])]):
            assert objective(other, s[i], p[i], mu) >= best - 1e-12 * (1 + mu)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("mu", [0.1, 0.5, 3.0])
def test_agrees_with_sequential_quadratic_programming(n, mu):
    rng = np.random.default_rng(n)
    s, p = rng.uniform(-1, 1, size=(n, n)), rng.dirichlet(np.ones(n))
    w = teacher_weights(s, p, mu)
    for i in range(n):
        result = minimize(
            objective,
            np.full(n, 1 / n),
            args=(s[i], p, mu),
            jac=lambda w, s, p, mu: -s + 2 * mu * (w - p),
            method="SLSQP",
            bounds=[(0, 1)] * n,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert result.success
        np.testing.assert_allclose(w[i], result.x, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 20])
@pytest.mark.parametrize("mu", [0.05, 0.5, 5.0])
def test_agrees_with_osqp(n, mu):
    rng = np.random.default_rng(100 + n)
    s, p = cosine_similarity(rng.normal(size=(n, 6))), rng.dirichlet(np.ones(n), size=n)
    by_osqp = teacher_weights(s, p, mu, solver="osqp")
    assert (by_osqp >= 0).all()
    np.testing.assert_allclose(by_osqp.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(teacher_weights(s, p, mu), by_osqp, atol=1e-6)


def test_hand_example():
    """s_1 = (1, 0.2, −0.5), p = (0.5, 0.3, 0.2).

    μ = 1: p + s/2 = (1, 0.4, −0.05). Three in the support would need a shift of (1.35 − 1)/3 = 0.117 > −0.05, so the
    third is out; two need (1.4 − 1)/2 = 0.2: w = (0.8, 0.2, 0).
    μ = 1/4: p + 2s = (2.5, 0.7, −0.8). Two would need a shift of (3.2 − 1)/2 = 1.1 > 0.7, so one is left:
    w = (1, 0, 0).
    μ = 10: p + s/20 = (0.55, 0.31, 0.175), sum 1.035, shift 0.035/3 for all three.
    """
    s = np.array([[1.0, 0.2, -0.5]] * 3)
    p = [0.5, 0.3, 0.2]
    np.testing.assert_allclose(teacher_weights(s, p, 1.0)[0], [0.8, 0.2, 0.0], atol=1e-15)
    np.testing.assert_allclose(teacher_weights(s, p, 0.25)[0], [1.0, 0.0, 0.0], atol=1e-15)
    shift = 0.035 / 3
    np.testing.assert_allclose(teacher_weights(s, p, 10.0)[0], [0.55 - shift, 0.31 - shift, 0.175 - shift], atol=1e-15)


@pytest.mark.parametrize("mu", [0.0, 1e-300, 1e-12, 1e-3])
def test_without_pull_to_the_prior_everyone_learns_from_itself(mu):
    """Other heads are clearly different here (cosine below 0.9), so the limit is reached long before μ = 1e-3.

    Warnings are errors, so an overflow in s/(2μ) fails too.
    """
    s = cosine_similarity(np.random.default_rng(0).normal(size=(12, 10)))
    assert (s - 2 * np.eye(12)).max() < 0.9
    for prior in (np.full(12, 1 / 12), np.eye(12)[3]):
        np.testing.assert_array_equal(teacher_weights(s, prior, mu), np.eye(12))


def test_with_an_endless_pull_to_the_prior_the_weights_are_the_prior():
    """Projections do not move points apart, so ‖w − p‖ ≤ ‖s − mean‖/(2μ): exact at ∞, about 1/μ before."""
    rng = np.random.default_rng(0)
    s, p = cosine_similarity(rng.normal(size=(9, 4))), rng.dirichlet(np.ones(9))
    np.testing.assert_array_equal(teacher_weights(s, p, math.inf), np.tile(p, (9, 1)))
    for mu in (1e2, 1e4, 1e8, 1e200):
        distance = np.linalg.norm(teacher_weights(s, p, mu) - p, axis=1)
        assert distance.max() <= 3 / (2 * mu) + 1e-15  # ‖s‖ ≤ √9
    result = teacher_weights(s, p, math.inf)
    result[0, 0] = 7.0  # the caller's prior is not handed out
    assert p[0] != 7.0


def test_equally_similar_clients_share_by_prior_as_mu_goes_to_zero():
    """s_1 = (1, 1, 0): for small μ the third has no weight, the others (½, ½) plus half the difference of their priors:
    p = (0.5, 0.1, 0.4), v = p + (0, 0, −1/(2μ)), shift (0.6 − 1)/2 = −0.2, w = (0.7, 0.3, 0) whatever small μ is."""
    s = np.array([[1.0, 1.0, 0.0]] * 3)
    for mu in (1e-12, 1e-6, 1e-2):
        np.testing.assert_allclose(teacher_weights(s, [0.5, 0.1, 0.4], mu)[0], [0.7, 0.3, 0.0], atol=1e-12)


@settings(deadline=None)
@given(problems())
def test_one_prior_a_row_is_the_same_as_each_row_alone(problem):
    s, p, mu = problem
    w = teacher_weights(s, p, mu)
    for i in range(len(s)):
        np.testing.assert_array_equal(w[i], teacher_weights(s, p[i], mu)[i])


@pytest.mark.parametrize("solver", ["exact", "osqp"])
@pytest.mark.parametrize("mu", [0.0, 0.3, math.inf])
def test_rows_for_some_clients_only_are_rows_of_all(mu, solver):
    """Only those that take part are matched, with all known teachers: fewer rows than columns."""
    rng = np.random.default_rng(3)
    s, p = cosine_similarity(rng.normal(size=(7, 4))), rng.dirichlet(np.ones(7))
    chosen = [5, 0, 6]
    everyone = teacher_weights(s, p, mu)
    np.testing.assert_allclose(teacher_weights(s[chosen], p, mu, solver), everyone[chosen], atol=1e-6)


def test_a_solver_that_finds_nothing_is_replaced_with_a_warning(monkeypatch):
    import qpsolvers

    s, p = np.array([[1.0, 0.2]]), np.array([0.5, 0.5])
    monkeypatch.setattr(qpsolvers, "solve_qp", lambda *args, **kwargs: None)
    with pytest.warns(UserWarning, match="osqp found no teacher weights for row 0: the exact ones are used"):
        w = teacher_weights(s, p, 0.5, "osqp")
    np.testing.assert_array_equal(w, teacher_weights(s, p, 0.5))


@settings(deadline=None)
@given(problems(), st.integers(0, 1000))
def test_numbering_of_the_clients_does_not_matter(problem, seed):
    s, p, mu = problem
    order = np.random.default_rng(seed).permutation(len(s))
    shuffled = teacher_weights(s[np.ix_(order, order)], p[np.ix_(order, order)], mu)
    # Rounding of s − max(s) is magnified by 1/(2μ) in the weights, though not in the objective.
    np.testing.assert_allclose(shuffled, teacher_weights(s, p, mu)[np.ix_(order, order)], atol=1e-12 + 1e-15 / mu)


@pytest.mark.parametrize("mu", [0.0, 1e-300, 1e-12, 1e-6])
def test_at_mu_zero_ties_share_as_the_prior_projected_on_them(mu):
    """s_1 ties clients 1, 2 and 4 (up to rounding of a cosine), p on them is (0.1, 0.05, 0.2), 0.65 short of 1: a third
    of it, 0.21667, for each. The third client is less similar by 1e-3 and is out, whatever its prior.

    s_2 has one leader, s_3 a tie of all four: the prior itself."""
    s = np.array([[1.0, 1.0 - 4e-16, 0.999, 1.0], [0.2, 0.9, 0.1, 0.2], [0.3] * 4, [0.0, 0.0, 1.0, 1.0]])
    p = np.array([0.1, 0.05, 0.65, 0.2])
    w = teacher_weights(s, p, mu)
    third = 0.65 / 3
    expected = [[0.1 + third, 0.05 + third, 0, 0.2 + third], [0, 1, 0, 0], p, [0, 0, 0.65 + 0.075, 0.2 + 0.075]]
    # A rounding error of 4e-16 in s is 2e-10 in w at μ = 1e-6, but decides everything at μ = 1e-300: only μ = 0 ignores
    # it. The other rows have exact ties.
    rows = slice(0, 4) if mu in (0.0, 1e-6) else slice(1, 4)
    np.testing.assert_allclose(w[rows], expected[rows], atol=1e-9)


@pytest.mark.parametrize("solver", ["exact", "osqp"])
@pytest.mark.parametrize("mu", [0.0, math.inf])
def test_the_limits_do_not_depend_on_the_solver(mu, solver):
    rng = np.random.default_rng(1)
    s, p = cosine_similarity(rng.normal(size=(5, 3))), rng.dirichlet(np.ones(5))
    expected = np.eye(5) if mu == 0 else np.tile(p, (5, 1))
    np.testing.assert_allclose(teacher_weights(s, p, mu, solver), expected, atol=1e-12)


def test_a_head_that_is_not_finite_is_not_taken_for_a_dissimilar_one():
    """A diverged client must be noticed where its head enters, not diluted: its cosines are NaN, and no weights are
    made from them."""
    heads = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    for broken in (np.nan, np.inf):
        heads[2, 3] = broken
        with np.errstate(invalid="ignore"):
            s = cosine_similarity(heads)
        assert np.isnan(s[2]).all()
        with pytest.raises(ValueError, match="similarity and prior must be finite"):
            teacher_weights(s, np.full(4, 0.25), 0.5)


def test_the_more_similar_of_two_equal_clients_teaches_more():
    """All else equal (same prior), weights are ordered as the similarities are, for every μ."""
    rng = np.random.default_rng(5)
    s = rng.uniform(-1, 1, size=(8, 8))
    for mu in (0.01, 0.3, 4.0):
        w = teacher_weights(s, np.full(8, 1 / 8), mu)
        ordered = np.take_along_axis(w, np.argsort(s, axis=1), axis=1)
        assert (np.diff(ordered, axis=1) >= 0).all()


S2, P2 = np.eye(2), [0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)), P2, 1.0), r"prior must have shape \(3,\) or \(2, 3\), got \(2,\)"),
        ((np.zeros(4), P2, 1.0), r"similarity must have shape \(clients, teachers\), got \(4,\)"),
        ((S2, [1 / 3] * 3, 1.0), r"prior must have shape \(2,\) or \(2, 2\), got \(3,\)"),
        ((S2, [[0.5, 0.5]], 1.0), r"prior must have shape"),
        (([[1.0, np.nan], [0.0, 1.0]], P2, 1.0), "finite"),
        (([[1.0, np.inf], [0.0, 1.0]], P2, 1.0), "finite"),
        ((S2, [np.nan, 1.0], 1.0), "finite"),
        ((S2, [1.5, -0.5], 1.0), "non-negative and sum to 1"),
        ((S2, [0.5, 0.4], 1.0), "non-negative and sum to 1"),
        ((S2, [[0.5, 0.5], [0.5, 0.6]], 1.0), "non-negative and sum to 1"),
        ((S2, P2, -0.1), "mu must be 0 or more, got -0.1"),
        ((S2, P2, math.nan), "mu must be 0 or more, got nan"),
        ((S2, P2, 1.0, "osqpp"), "'exact' or one of: .*osqp.*got 'osqpp'"),
    ],
)
def test_bad_input_is_an_error_that_says_what_is_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        teacher_weights(*arguments)


def project_by_bisection(v):
    """The shift ν with Σ max(v − ν, 0) = 1, found by halving [max − 1, max]."""
    low, high = max(v) - 1.0, max(v)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(max(x - middle, 0.0) for x in v) > 1:
            low = middle
        else:
            high = middle
    return [max(x - high, 0.0) for x in v]


@settings(deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda d: st.lists(st.lists(st.floats(-100, 100), min_size=d, max_size=d), min_size=1, max_size=4)
    )
)
def test_projection_agrees_with_bisection(rows):
    projected = project_to_simplex(rows)
    np.testing.assert_allclose(projected, [project_by_bisection(row) for row in rows], atol=1e-12)
    # A point of the simplex is its own projection.
    np.testing.assert_allclose(project_to_simplex(projected), projected, atol=1e-12)


def test_projection_of_very_large_values_keeps_the_small_digits_of_the_leaders():
    """Adding one number to a whole row does not change its projection: (0.6, 0.8) → (0.4, 0.6), here 2³⁰ higher."""
    np.testing.assert_allclose(project_to_simplex([[2.0**30 + 0.5, 2.0**30 + 0.75]]), [[0.375, 0.625]], atol=1e-15)
    np.testing.assert_array_equal(project_to_simplex([[1e300, 0.0, -1e300]]), [[1.0, 0.0, 0.0]])


def test_projection_leaves_its_input_alone():
    rows = np.array([[0.6, 0.8]])
    project_to_simplex(rows)
    assert rows.tolist() == [[0.6, 0.8]]


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 10**6))
def test_cosine_is_what_its_definition_says(n, d, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * 10 ** rng.uniform(-6, 6, size=(n, 1))
    x[rng.random(n) < 0.3] = 0.0
    cosine = cosine_similarity(x)
    for i in range(n):
        for j in range(n):
            lengths = math.sqrt(math.fsum(x[i] ** 2)) * math.sqrt(math.fsum(x[j] ** 2))
            expected = math.fsum(x[i] * x[j]) / lengths if lengths else 0.0
            assert abs(cosine[i, j] - expected) < 1e-12
    assert np.abs(cosine).max() <= 1.0  # rounding included
    np.testing.assert_allclose(cosine, cosine.T, atol=1e-15)


@pytest.mark.parametrize(("kind", "tolerance"), [(np.float32, 2.0**-22), (np.float64, 1e-15), (int, 1e-15)])
def test_cosine_of_zero_rows_is_zero_and_float32_is_as_good_as_float32(kind, tolerance):
    """(1, 1) and (1, −1) are orthogonal, (1, 1) and (−2, −2) opposite; the row of zeros is similar to nothing."""
    rows = np.array([[1, 1], [1, -1], [-2, -2], [0, 0]], dtype=kind)
    expected = [[1, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(cosine_similarity(rows), expected, atol=tolerance)
    assert cosine_similarity(rows).dtype == np.float64


def test_very_small_and_very_large_heads_have_directions_too():
    """1e-30 squared is less than the smallest float32, 1e30 squared more than the largest."""
    rows = np.array([[3.0, 4.0], [4.0, 3.0]], dtype=np.float32)
    for scale in (1e-30, 1e30):
        np.testing.assert_allclose(cosine_similarity(rows * np.float32(scale)), [[1, 0.96], [0.96, 1]], atol=1e-6)


# --- any quadratic on the simplex ---


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 12), rank=st.integers(0, 12), seed=st.integers(0, 10**6), scale=st.floats(-2, 2))
def test_a_quadratic_on_the_simplex_is_solved_to_its_optimality_conditions(n, rank, seed, scale):
    """Karush–Kuhn–Tucker of min ½wᵀHw + qᵀw: all weights of the support share one value ν of the gradient Hw + q, and
    no other weight has a lower one. H is positive semidefinite, of any rank, so whatever meets them is optimal."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(n, min(rank, n)))
    h, q = 10**scale * factor @ factor.T, rng.normal(size=n)
    w = simplex_qp(h, q, "osqp")
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1.0, abs=1e-12)
    gradient = h @ w + q
    slack = gradient - w @ gradient
    tolerance = 1e-6 * (1 + np.abs(h).max())
    assert slack.min() >= -tolerance
    assert np.abs(slack * w).max() <= tolerance


def test_a_quadratic_on_the_simplex_by_hand():
    """½(w₁² + 3w₂²): w ∝ (1, ⅓). With q = (0, −4) the second is so cheap that it has all the weight: gradient (0, −1).
    Without a quadratic part the lowest q has it."""
    np.testing.assert_allclose(simplex_qp([[1.0, 0.0], [0.0, 3.0]], [0.0, 0.0]), [0.75, 0.25], atol=1e-7)
    np.testing.assert_allclose(simplex_qp([[1.0, 0.0], [0.0, 3.0]], [0.0, -4.0]), [0.0, 1.0], atol=1e-7)
    np.testing.assert_allclose(simplex_qp(np.zeros((3, 3)), [1.0, 0.5, 2.0]), [0.0, 1.0, 0.0], atol=1e-7)


def test_a_quadratic_that_the_solver_gives_up_on_has_no_weights(monkeypatch):
    import qpsolvers

    monkeypatch.setattr(qpsolvers, "solve_qp", lambda *args, **kwargs: None)
    assert simplex_qp(np.eye(2), [0.0, 0.0]) is None
