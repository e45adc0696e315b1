"""Classifiers unlike any other are found, and their weight as teachers is bounded exactly; nothing else changes."""

import re

import numpy as np
import pytest
import qpsolvers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cafe_flwr.core.schema import Schema
from cafe_flwr.methods import METHODS, ClientRecord, RoundPlan, ServerRound
from cafe_flwr.methods.robust_teachers import (
    CAP,
    bounded_teacher_weights,
    guarded_weights,
    project_to_capped_simplex,
    suspicious_heads,
    teacher_caps,
)
from cafe_flwr.teaching import cosine_similarity, project_to_simplex, teacher_weights


def honest_heads(n=8, d=60, seed=0, spread=1.0):
    """One direction in common and as much of each client's own."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=d) + spread * rng.normal(size=(n, d))).astype(np.float32)


# --- the projection ---


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 12), scale=st.sampled_from([1e-3, 1.0, 50.0, 1e6]), seed=st.integers(0, 10**6))
def test_the_projection_meets_its_optimality_conditions(n, scale, seed):
    """KKT of ½‖w − v‖² on {0 ≤ w ≤ u, Σw = 1}: one τ with w = v − τ inside, v − τ ≤ 0 at 0, v − τ ≥ u at the cap."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=n) * scale
    u = rng.uniform(0, 2.5 / n, size=n) * rng.integers(0, 2, size=n)
    u[rng.integers(n)] += 1.0
    (w,) = project_to_capped_simplex([v], u)
    tolerance = 1e-9 * max(1.0, scale)
    assert abs(w.sum() - 1.0) <= tolerance
    assert (w >= 0).all()
    assert (w <= u).all()
    inside = (w > tolerance) & (w < u - tolerance)
    free = u > tolerance  # a weight whose cap is 0 says nothing about τ
    tau = (v - w)[inside]
    at_most = np.concatenate([tau, (v - u)[free & (w >= u - tolerance)]]).min(initial=np.inf)
    at_least = np.concatenate([tau, v[free & (w <= tolerance)]]).max(initial=-np.inf)
    assert at_least <= at_most + 2 * tolerance


@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_the_one_of_osqp(seed):
    rng = np.random.default_rng(seed)
    n = 9
    v, u = rng.normal(size=n), rng.uniform(0.05, 0.3, size=n)
    (w,) = project_to_capped_simplex([v], u)
    solved = qpsolvers.solve_qp(
        sparse.csc_matrix(np.eye(n)),
        -v,
        A=sparse.csc_matrix(np.ones((1, n))),
        b=np.ones(1),
        lb=np.zeros(n),
        ub=u,
        solver="osqp",
        eps_abs=1e-10,
        eps_rel=1e-10,
        max_iter=100_000,
        polishing=True,
        raise_error=True,
    )
    np.testing.assert_allclose(w, solved, atol=1e-7)
    assert (w > u - 1e-12).any()  # a cap binds


def test_without_caps_it_is_the_projection_onto_the_simplex():
    v = np.random.default_rng(3).normal(size=(6, 11))
    np.testing.assert_allclose(project_to_capped_simplex(v, np.ones(11)), project_to_simplex(v), atol=1e-15)


def test_caps_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match=r"caps must sum to at least 1, row 1 has 0\.9"):
        project_to_capped_simplex(np.zeros((2, 3)), [[0.3, 0.3, 0.4], [0.3, 0.3, 0.3]])
    with pytest.raises(ValueError, match="0 or more"):
        project_to_capped_simplex(np.zeros((1, 2)), [2.0, -1.0])
    (w,) = project_to_capped_simplex(np.zeros((1, 2)), [0.4, 0.6])  # just enough: everything at its cap
    np.testing.assert_allclose(w, [0.4, 0.6])


@pytest.mark.parametrize("mu", [0.0, 1e-7, 0.5, np.inf])
def test_weights_without_caps_are_those_of_teacher_weights(mu):
    """Minus the rounding, for any μ: the same QP."""
    heads = honest_heads()
    s, p = cosine_similarity(heads), np.full(8, 1 / 8)
    bounded = bounded_teacher_weights(s, p, mu, np.ones((8, 8)))
    np.testing.assert_allclose(bounded, teacher_weights(s, p, mu), atol=1e-9)


def test_bounded_weights_are_optimal_under_the_caps():
    """No feasible direction improves −s·w + μ‖w − p‖²: compared with random feasible points."""
    rng = np.random.default_rng(0)
    s, p, u, mu = rng.uniform(-1, 1, size=7), np.full(7, 1 / 7), np.array([0.02, 1, 1, 0.1, 1, 1, 1.0]), 0.3
    (w,) = bounded_teacher_weights([s], p, mu, u)

    def cost(x):
        return -s @ x + mu * ((x - p) ** 2).sum()

    others = project_to_capped_simplex(rng.normal(size=(500, 7)), u)
    assert cost(w) <= min(map(cost, others)) + 1e-12
    near = project_to_capped_simplex(w + 1e-3 * rng.normal(size=(500, 7)), u)
    assert cost(w) <= min(map(cost, near)) + 1e-12


# --- who is suspicious ---


@pytest.mark.parametrize("seed", range(20))
def test_honest_clients_are_not_suspicious(seed):
    """Heads as different as those of label shift 0.1 after 100 rounds are (cosines 0.3..0.5, norms ± 20 %)."""
    heads = honest_heads(n=20, d=2500, seed=seed)
    heads *= np.random.default_rng(seed).uniform(0.8, 1.2, size=(20, 1)).astype(np.float32)
    assert suspicious_heads(heads) == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: -h, "largest cosine to any other is -"),
        (lambda h: 1000 * h, r"its norm .* is \S+ times the median$"),
        (lambda h: -1000 * h, r"its norm .* and its largest cosine"),
        (lambda h: h / 1000, r"its norm .* is 0\.00\d+ times the median$"),
        (lambda h: 0 * h, r"its norm 0 is 0 times the median and its largest cosine"),
        (lambda h: 5 * h, r"its norm .* times the median$"),
        (lambda h: np.random.default_rng(9).normal(size=h.shape) * h.std(), "largest cosine to any other is "),
    ],
    ids=["inverted", "huge", "inverted and huge", "tiny", "zero", "five times", "noise"],
)
@pytest.mark.parametrize("bad", [0, 5])
def test_a_head_unlike_any_other_is_named_with_the_reason(change, reason, bad):
    heads = honest_heads(n=8, d=2500)
    heads[bad] = change(heads[bad])
    found = suspicious_heads(heads)
    assert list(found) == [bad]
    assert re.search(reason, found[bad]), found[bad]


def test_nobody_is_suspicious_where_nobody_can_tell():
    """Two that differ; clients that all differ; heads of zeros; none."""
    assert suspicious_heads([[1.0, 0.0], [-900.0, 0.0]]) == {}
    assert suspicious_heads(np.eye(6)) == {}
    assert suspicious_heads(np.zeros((5, 3))) == {}
    assert suspicious_heads(np.zeros((0, 3))) == {}
    assert suspicious_heads(np.zeros((4, 0))) == {}


def test_equal_norms_up_to_rounding_are_no_reason():
    """In round 1 all norms are nearly equal, and their spread is no measure of anything."""
    heads = np.tile(honest_heads(n=1, d=40), (9, 1)) * (1 + 1e-6 * np.arange(9, dtype=np.float32))[:, None]
    assert suspicious_heads(heads) == {}


# --- what is done about it ---


def test_a_suspicious_teacher_is_bounded_by_weight_and_by_what_it_adds():
    """Pupils 0 and 1 of heads of norm 1; row 2 has norm 1000, row 3 is inverted; row 2's own weight is its own."""
    heads = np.array([[1.0, 0], [1, 0], [1000, 0], [-1, 0]])
    caps = teacher_caps(heads, [2, 3], [0, 1, 2])
    median = 1.0
    np.testing.assert_allclose(caps[0], [1, 1, CAP / 1000, CAP])
    np.testing.assert_allclose(caps[2], [1, 1, 1, CAP])
    assert (caps[:2, 2] * 1000 <= CAP * median + 1e-12).all()


def plan_of(heads, examples=None, **settings):
    clients = [3, 4, 7, 9, 12, 20][: len(heads)]
    known = {
        c: ClientRecord(10 if examples is None else examples[i], 1, heads[i], np.zeros(2))
        for i, c in enumerate(clients)
    }
    task = ServerRound(2, 9, clients, 3, known, Schema((("w", (heads.shape[1],)),)), np.random.default_rng(0))
    return METHODS["cafedistill-text"](**settings).plan(task)


@pytest.mark.parametrize("settings", [{}, {"mu": 0.0}, {"mu": 5.0}, {"teachers": "uniform"}, {"solver": "osqp"}])
def test_without_suspicion_no_bit_of_the_plan_changes(settings):
    """Against the published formulas, which know no bounds."""
    heads, examples = honest_heads(n=6), np.array([5, 10, 20, 40, 7, 9])
    plan = plan_of(heads, examples, **settings)
    prior = examples / examples.sum()
    if settings.get("teachers") == "uniform":
        weights = np.full((6, 6), 1 / 6)
    else:
        weights = teacher_weights(
            cosine_similarity(heads), prior, settings.get("mu", 0.5), settings.get("solver", "exact")
        )
    assert isinstance(plan, RoundPlan)
    assert plan.suspicious == {}
    assert plan.weights.tobytes() == weights.tobytes()
    mixed = weights.astype(np.float32) @ heads
    assert all(plan.downloads[c].tobytes() == mixed[i].tobytes() for i, c in enumerate(plan.weight_rows))


@pytest.mark.parametrize("settings", [{}, {"mu": 0.0}, {"mu": 50.0}, {"teachers": "uniform"}, {"solver": "osqp"}])
@pytest.mark.parametrize("factor", [-1.0, -1000.0, 1000.0])
def test_a_hostile_head_hardly_moves_what_others_are_taught(settings, factor):
    """Without bounds, ×1000 drowns every teacher at μ > 0. With them, an honest client's teacher is within 5 % of one
    made without the hostile client, and the plan names it."""
    heads = honest_heads(n=6, d=400)
    honest = plan_of(heads[:5], **settings)
    heads[5] *= np.float32(factor)
    plan = plan_of(heads, **settings)
    assert list(plan.suspicious) == [20]
    assert (plan.weights[:5, 5] <= CAP).all()
    np.testing.assert_allclose(plan.weights.sum(axis=1), 1.0)
    for client in plan.weight_rows[:5]:
        change = np.linalg.norm(plan.downloads[client] - honest.downloads[client])
        assert change <= 0.05 * np.linalg.norm(honest.downloads[client])


def concluded(moves, method="cafedistill", **settings):
    """The server's half of the released form, after a first round: what came back is what clients made of zeros."""
    clients = [3, 4, 7, 9, 12, 20][: len(moves)]
    upload = Schema((("w", (moves.shape[1] - 1,)), ("b", (1,))))
    task = ServerRound(1, 9, clients, 3, {}, upload, np.random.default_rng(0))
    records = {c: ClientRecord(10 + c, 1, moves[i], np.zeros(2)) for i, c in enumerate(clients)}
    return METHODS[method](**settings).conclude(task, RoundPlan(task.all_exits), records)


@pytest.mark.parametrize("settings", [{}, {"mu": 5.0}, {"solver": "osqp"}, {"match_by": "parameters"}])
def test_without_suspicion_no_bit_of_the_mixtures_changes(settings):
    """Against the published formulas, which know no bounds and do not count examples."""
    heads = honest_heads(n=6)
    done = concluded(heads, **settings)
    weights = teacher_weights(
        cosine_similarity(heads), np.full(6, 1 / 6), settings.get("mu", 0.6), settings.get("solver", "exact")
    )
    assert done.plan.suspicious == {}
    assert done.plan.weights.tobytes() == weights.tobytes()
    mixed = weights.astype(np.float32) @ heads
    assert all(done.records[c].upload.tobytes() == mixed[i].tobytes() for i, c in enumerate(done.plan.weight_rows))


@pytest.mark.parametrize("method", ["cafedistill", "cafedistill-plus"])
@pytest.mark.parametrize("settings", [{}, {"mu": 50.0}, {"solver": "osqp"}])
@pytest.mark.parametrize("factor", [-1000.0, 1000.0])
def test_a_hostile_head_hardly_moves_what_others_go_on_with(settings, factor, method):
    """What is written back would carry it on. An honest client's mixture is within 5 % of one made without the hostile
    client, and the records name it; its own weight for itself is as it was."""
    heads = honest_heads(n=6, d=400)
    honest = concluded(heads[:5], method, **settings)
    heads[5] *= np.float32(factor)
    done = concluded(heads, method, **settings)
    assert list(done.plan.suspicious) == [20]
    assert (done.plan.weights[:5, 5] <= CAP).all()
    np.testing.assert_allclose(done.plan.weights.sum(axis=1), 1.0)
    for client in done.plan.weight_rows[:5]:
        one, other = honest.records[client].upload, done.records[client].upload
        assert np.linalg.norm(other - one) <= 0.05 * np.linalg.norm(one)


@pytest.mark.parametrize("method", ["cafedistill", "cafedistill-plus"])
@pytest.mark.parametrize("settings", [{}, {"solver": "osqp"}])
def test_an_update_that_points_elsewhere_gets_no_weight_and_no_name(settings, method):
    """Of usual length it is no more than a client unlike the others, as many are in the first rounds from zero."""
    heads = honest_heads(n=6, d=400)
    heads[5] *= np.float32(-1.0)
    done = concluded(heads, method, **settings)
    assert done.plan.suspicious == {}
    np.testing.assert_allclose(done.plan.weights[:5, 5], 0.0, atol=1e-9)
    np.testing.assert_allclose(done.plan.weights[5], np.eye(6)[5], atol=1e-9)


def test_weights_are_returned_as_they_are_without_suspicion():
    weights = np.full((2, 4), 0.25)
    same, found = guarded_weights(weights, np.zeros((2, 4)), np.full(4, 0.25), 0.5, np.ones((4, 3)), [0, 1])
    assert same is weights
    assert found == {}
