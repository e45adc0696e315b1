"""Losses: direction of the divergences, factor τ², weights of exits, and where gradients go."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_flwr.training.losses import (
    consistency,
    cross_entropies,
    decoupled_distillation,
    distillation,
    erde,
    neighbour_distillation,
    orthogonal_distillation,
    self_distillation,
)


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def reference(student, teacher, tau):
    """τ² · mean over the batch of Σ_c t_c (ln t_c − ln s_c), written out."""
    log_t, log_s = log_softmax(np.asarray(teacher) / tau), log_softmax(np.asarray(student) / tau)
    rows = (np.exp(log_t) * (log_t - log_s)).sum(axis=1)
    return tau**2 * rows.mean()


def logits(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_hand_example_direction_and_factor():
    """Teacher (ln 3, 0) is (3/4, 1/4), student (0, 0) is (1/2, 1/2).

    KL(teacher ‖ student) = 3/4·ln(3/2) + 1/4·ln(1/2) = 0.304099 − 0.173287 = 0.130812
    KL(student ‖ teacher) = 1/2·ln(2/3) + 1/2·ln 2    = −0.202733 + 0.346574 = 0.143841: the wrong direction
    τ = 2 with the teacher at (2 ln 3, 0): the same two distributions, times 4 = 0.523248
    """
    student = logits([[0.0, 0.0]])
    assert distillation(student, logits([[math.log(3), 0.0]]), 1.0).item() == pytest.approx(0.130812, abs=1e-6)
    assert distillation(logits([[math.log(3), 0.0]]), student, 1.0).item() == pytest.approx(0.143841, abs=1e-6)
    assert distillation(student, logits([[2 * math.log(3), 0.0]]), 2.0).item() == pytest.approx(0.523248, abs=1e-6)


@settings(deadline=None)
@given(
    batch=st.integers(1, 6),
    classes=st.integers(2, 8),
    tau=st.floats(0.5, 20),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_the_written_out_sum(batch, classes, tau, scale, seed):
    student, teacher = scale * np.random.default_rng(seed).normal(size=(2, batch, classes))
    value = distillation(logits(student), logits(teacher), tau).item()
    assert value == pytest.approx(reference(student, teacher, tau), rel=1e-9, abs=1e-10)
    assert value >= -1e-12


def test_it_is_the_mean_over_the_batch_of_single_examples():
    student, teacher = np.random.default_rng(1).normal(size=(2, 5, 4))
    together = distillation(logits(student), logits(teacher), 3.0).item()
    alone = [distillation(logits(student[i : i + 1]), logits(teacher[i : i + 1]), 3.0).item() for i in range(5)]
    assert together == pytest.approx(sum(alone) / 5, rel=1e-12)


def test_only_the_distributions_count():
    """Logits shifted by a constant a row are the same distribution: no loss. Any other difference is a loss."""
    z = logits(np.random.default_rng(2).normal(size=(3, 4)))
    shift = torch.tensor([[5.0], [-2.0], [100.0]], dtype=torch.float64)
    assert distillation(z + shift, z, 3.0).item() == pytest.approx(0.0, abs=1e-12)
    assert distillation(z * 1.5, z, 3.0).item() > 1e-3


def test_no_gradient_flows_into_the_teacher():
    student = logits([[0.5, -0.2, 0.1]]).requires_grad_()
    teacher = logits([[1.0, 0.0, -1.0]]).requires_grad_()
    distillation(student, teacher, 3.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0.01


def test_no_gradient_through_a_teacher_that_depends_on_the_same_parameters():
    """The own last exit teaches with features of the same backbone: the result must be as if the teacher were data."""
    w = torch.tensor([[0.3, -0.7, 0.2]], dtype=torch.float64, requires_grad=True)
    distillation(w, 2.0 * w + 1.0, 2.0).backward()
    constant = w.detach().clone().requires_grad_()
    distillation(constant, (2.0 * w + 1.0).detach(), 2.0).backward()
    torch.testing.assert_close(w.grad, constant.grad, rtol=0, atol=0)


@settings(deadline=None)
@given(tau=st.floats(0.5, 50), seed=st.integers(0, 10**6))
def test_gradient_is_the_difference_of_the_softened_distributions(tau, seed):
    """∂/∂z_s of τ²·KL(t ‖ softmax(z_s/τ)) = τ·(softmax(z_s/τ) − t), divided by the batch size."""
    student, teacher = np.random.default_rng(seed).normal(size=(2, 3, 5))
    z = logits(student).requires_grad_()
    distillation(z, logits(teacher), tau).backward()
    softened = np.exp(log_softmax(student / tau)), np.exp(log_softmax(teacher / tau))
    np.testing.assert_allclose(z.grad.numpy(), tau * (softened[0] - softened[1]) / 3, atol=1e-12)


def test_size_of_the_gradient_does_not_depend_on_a_large_temperature():
    """For τ → ∞ softmax(z/τ) ≈ 1/C + (z − mean z)/(Cτ), so the gradient tends to ((z_s − z̄_s) − (z_t − z̄_t))/(CB)."""
    student, teacher = np.random.default_rng(3).normal(size=(2, 4, 10))
    limit = ((student - student.mean(axis=1, keepdims=True)) - (teacher - teacher.mean(axis=1, keepdims=True))) / 40

    def gradient(tau):
        z = logits(student).requires_grad_()
        distillation(z, logits(teacher), tau).backward()
        return z.grad.numpy()

    for tau, tolerance in ((20.0, 0.2), (200.0, 0.02), (2000.0, 0.002)):
        assert np.linalg.norm(gradient(tau) - limit) < tolerance * np.linalg.norm(limit)


def test_extreme_logits_stay_finite_in_float32():
    student = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    loss = distillation(student, torch.tensor([[0.0, 1e4], [0.0, 1e4]]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(5e3)  # the first row is 1e4 nats away, the second not at all
    assert torch.isfinite(student.grad).all()


# --- cross-entropies of all exits ------------------------------------------------------------------------------------


def test_cross_entropies_by_hand():
    """Exits (¾, ¼) and (½, ½), labels 0 and 1: (−ln ¾ − ln ¼)/2 = 0.836988 and ln 2; one value an exit, no sum."""
    z = [logits([[math.log(3), 0.0]] * 2), logits([[0.0, 0.0]] * 2)]
    values = cross_entropies(z, torch.tensor([0, 1]))
    assert values.tolist() == pytest.approx([0.836988, math.log(2)], abs=1e-6)


def test_an_exit_feels_its_own_cross_entropy_only():
    z = [logits([[1.0, 0.0]]).requires_grad_(), logits([[0.0, 2.0]]).requires_grad_()]
    cross_entropies(z, torch.tensor([0]))[1].backward()
    assert z[0].grad is None or not z[0].grad.any()
    assert z[1].grad.abs().max() > 0.1


# --- all exits teach each -------------------------------------------------------------------------------------------


def slow_self_distillation(z, tau, last_weight):
    """Exit by exit, row by row, class by class."""
    m, batch, classes = z.shape
    result = []
    for k in range(m):
        total = 0.0
        for row in range(batch):
            softened = [np.exp(log_softmax(z[j, row][None] / tau))[0] for j in range(m)]
            q = sum(softened) / m
            total += sum(q[c] * (math.log(q[c]) - math.log(softened[k][c])) for c in range(classes))
        result.append(tau**2 * total / batch * (last_weight if k == m - 1 else 1.0))
    return result


def test_self_distillation_by_hand():
    """Exits (¾, ¼) and (½, ½) at τ = 1: q = (⅝, ⅜).

    KL(q‖¾) = ⅝ ln ⅚ + ⅜ ln 1.5 = 0.038098;  KL(q‖½) = ⅝ ln 1.25 + ⅜ ln ¾ = 0.031584, times 0.3 = 0.009475
    At τ = 3 with logits three times as large: nine times as much.
    The last exit's weight is 0.3 unless told otherwise.
    """
    z = [logits([[math.log(3), 0.0]]), logits([[0.0, 0.0]])]
    assert self_distillation(z, temperature=1.0).tolist() == pytest.approx([0.038098, 0.009475], abs=1e-6)
    three = self_distillation([3 * exit_ for exit_ in z])
    assert three.tolist() == pytest.approx([9 * 0.038098, 9 * 0.009475], abs=1e-5)
    full = self_distillation(z, temperature=1.0, last_weight=1.0)
    assert full.tolist() == pytest.approx([0.038098, 0.031584], abs=1e-6)


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 5)),
    tau=st.floats(0.5, 10),
    last_weight=st.floats(0, 2),
    seed=st.integers(0, 10**6),
)
def test_self_distillation_agrees_with_slow_loops(shape, tau, last_weight, seed):
    z = 3 * np.random.default_rng(seed).normal(size=shape)
    value = self_distillation(list(logits(z)), temperature=tau, last_weight=last_weight)
    np.testing.assert_allclose(value, slow_self_distillation(z, tau, last_weight), rtol=1e-7, atol=1e-9)
    assert (value >= -1e-12).all()


def test_nobody_learns_by_teaching():
    """The gradient of exit k is τ(softmax(z_k/τ) − q) of its own term, as if q were data."""
    z = [logits(rows).requires_grad_() for rows in np.random.default_rng(4).normal(size=(3, 2, 4))]
    self_distillation(z, temperature=2.0, last_weight=0.3).sum().backward()
    soft = [exit_.detach().div(2.0).softmax(dim=1) for exit_ in z]
    q = sum(soft) / 3
    for exit_, p, weight in zip(z, soft, (1.0, 1.0, 0.3), strict=True):
        torch.testing.assert_close(exit_.grad, weight * 2.0 * (p - q) / 2)


def test_a_single_exit_has_nothing_to_learn_from_itself():
    assert self_distillation([logits([[1.0, -2.0]])], last_weight=1.0).abs().max() < 1e-12


def test_self_distillation_of_extreme_logits_stays_finite_in_float32():
    """A class at probability 0 for the teacher counts 0 · log 0 = 0."""
    z = torch.tensor([[[1e4, 0.0]], [[1e4, 0.0]]], requires_grad=True)
    loss = self_distillation(list(z), temperature=1.0).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(z.grad).all()


# --- decoupled distillation ------------------------------------------------------------------------------------------


def softmax(z):
    return np.exp(log_softmax(np.asarray(z, dtype=np.float64)))


def kl(p, q):
    """Σ p (ln p − ln q) of one distribution, where p is not 0."""
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def decoupled_slowly(student, teacher, y, tau, a=1.0, b=1.0):
    """Row by row: the two-way distributions and those of the other classes, as the paper defines them."""
    total = 0.0
    for s, t, label in zip(softmax(np.asarray(student) / tau), softmax(np.asarray(teacher) / tau), y, strict=True):
        others = [c for c in range(len(s)) if c != label]
        target = kl([t[label], 1 - t[label]], [s[label], 1 - s[label]])
        rest = kl([t[c] / (1 - t[label]) for c in others], [s[c] / (1 - s[label]) for c in others])
        total += tau**2 * (a * target + b * rest)
    return total / len(y)


drawn = given(
    batch=st.integers(1, 5),
    classes=st.integers(2, 7),
    tau=st.floats(0.7, 10),
    scale=st.floats(0.1, 5),
    seed=st.integers(0, 10**6),
)


def draw(batch, classes, scale, seed, networks=2):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(networks, batch, classes)), rng.integers(classes, size=batch)


@settings(deadline=None)
@drawn
def test_decoupled_distillation_agrees_with_its_definition(batch, classes, tau, scale, seed):
    (student, teacher), y = draw(batch, classes, scale, seed)
    for a, b in ((1.0, 1.0), (1.0, 8.0), (0.3, 0.0)):
        value = decoupled_distillation(
            logits(student), logits(teacher), torch.from_numpy(y), temperature=tau, target_weight=a, others_weight=b
        )
        assert value.item() == pytest.approx(decoupled_slowly(student, teacher, y, tau, a, b), rel=1e-6, abs=1e-9)


@settings(deadline=None)
@drawn
def test_plain_distillation_is_the_decoupled_one_with_the_teachers_doubt_as_weight(batch, classes, tau, scale, seed):
    """KL = KL(b) + (1 − p_y^T)·KL(p̂), Eq. 5 of the paper, example by example."""
    (student, teacher), y = draw(batch, classes, scale, seed)
    total = 0.0
    for i in range(batch):
        doubt = 1 - softmax(teacher[i : i + 1] / tau)[0, y[i]]
        row = (logits(student[i : i + 1]), logits(teacher[i : i + 1]), torch.from_numpy(y[i : i + 1]))
        total += decoupled_distillation(*row, temperature=tau, others_weight=float(doubt)).item()
    plain = distillation(logits(student), logits(teacher), tau).item()
    assert plain == pytest.approx(total / batch, rel=1e-6, abs=1e-9)


def test_with_two_classes_decoupled_distillation_is_plain():
    (student, teacher), y = draw(6, 2, 3.0, 0)
    value = decoupled_distillation(logits(student), logits(teacher), torch.from_numpy(y), others_weight=99.0)
    assert value.item() == pytest.approx(distillation(logits(student), logits(teacher), 4.0).item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("sure", "of"), [(90.0, "teacher"), (90.0, "student"), (90.0, "both"), (1000.0, "both")])
def test_decoupled_distillation_is_exact_where_the_label_is_all_but_certain(dtype, sure, of):
    """1 − p_y is about e^−90 or less, which 1 − softmax cannot hold: the other classes still teach, by hand.

    Others (0, 1) against (1, 0): p̂ = (1/(1+e), e/(1+e)), KL = (e−1)/(e+1) = tanh(½). The two-way term of a sure teacher
    and an unsure student is −ln p_y^S; of two that are sure alike 0; of an unsure teacher and a sure student that of
    the definition, with ln p_y^S = 0 and ln(1 − p_y^S) = ln(e^0 + e^1) − sure.
    """
    y, high = torch.tensor([0]), {"teacher": (0.0, sure), "student": (sure, 0.0), "both": (sure, sure)}[of]
    student = torch.tensor([[high[0], 1.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[high[1], 0.0, 1.0]], dtype=dtype)
    value = decoupled_distillation(student, teacher, y, temperature=1.0)
    unsure = 1 / (2 + math.e)  # p of a logit 0 beside 0 and 1
    rest = math.log(1 + math.e)  # log-sum of the others
    target = {
        "teacher": -math.log(unsure),
        "student": unsure * math.log(unsure) + (1 - unsure) * (math.log(1 - unsure) - (rest - sure)),
        "both": 0.0,
    }[of]
    assert value.item() == pytest.approx(target + math.tanh(0.5), rel=1e-5)
    value.backward()
    assert student.grad.isfinite().all()
    assert (student.grad[0, 1] - student.grad[0, 2]).item() > 0.5  # it has the others the wrong way round


def test_gradients_of_decoupled_distillation_are_those_of_the_definition():
    """By central differences of the slow reference; the teacher gets none."""
    (student, teacher), y = draw(3, 5, 1.5, 4)
    s, t = logits(student).requires_grad_(), logits(teacher).requires_grad_()
    decoupled_distillation(s, t, torch.from_numpy(y), temperature=2.0, others_weight=8.0).backward()
    assert t.grad is None
    h = 1e-6
    for i, c in np.ndindex(student.shape):
        up, down = student.copy(), student.copy()
        up[i, c] += h
        down[i, c] -= h
        slope = decoupled_slowly(up, teacher, y, 2.0, 1.0, 8.0) - decoupled_slowly(down, teacher, y, 2.0, 1.0, 8.0)
        assert s.grad[i, c].item() == pytest.approx(slope / (2 * h), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", [decoupled_distillation, erde])
def test_a_single_class_is_refused(loss):
    with pytest.raises(ValueError, match=r"at least 2 classes, got logits of shape \(3, 1\)"):
        loss(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


# --- from the last exit to the others --------------------------------------------------------------------------------


def test_consistency_is_what_every_exit_has_still_to_learn_from_the_last():
    (first, second, last), _ = draw(4, 5, 2.0, 5, networks=3)
    value = consistency([logits(z) for z in (first, second, last)], temperature=3.0)
    expected = [reference(first, last, 3.0), reference(second, last, 3.0), 0.0]
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9)


def test_consistency_does_not_train_the_last_exit():
    exits = [logits(z).requires_grad_() for z in draw(4, 5, 2.0, 5, networks=3)[0]]
    consistency(exits).sum().backward()
    assert exits[2].grad is None
    assert min(z.grad.abs().max() for z in exits[:2]) > 0.01
    assert consistency(exits[2:]).tolist() == [0.0]


# --- ERDE ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@drawn
def test_erde_agrees_with_its_definition(batch, classes, tau, scale, seed):
    (student, teacher), y = draw(batch, classes, scale, seed)
    total = 0.0
    for s, t, label in zip(student, teacher, y, strict=True):
        if t.argmax() == label:
            total += 0.7 * tau**2 * kl(softmax([t / tau])[0], softmax([s / tau])[0])
        else:
            total += 0.4 * sum(p * math.log(p) for p in softmax([s])[0] if p > 0) / math.log(classes)
    value = erde(logits(student), logits(teacher), torch.from_numpy(y), temperature=tau, right=0.7, wrong=0.4)
    assert value.item() == pytest.approx(total / batch, rel=1e-6, abs=1e-9)


def test_erde_follows_a_teacher_that_is_right_and_grows_unsure_where_it_is_wrong():
    """After a small step down the gradient: nearer to the right teacher, more entropy under the wrong one."""
    student, teacher = logits([[1.0, 0.5, -1.0]]).requires_grad_(), logits([[0.0, 3.0, 0.0]]).requires_grad_()

    def entropy(z):
        p = softmax(z.detach().numpy())
        return -(p * np.log(p)).sum()

    for label, measure in ((1, lambda z: -reference(z.detach().numpy(), teacher.detach().numpy(), 4.0)), (0, entropy)):
        (slope,) = torch.autograd.grad(erde(student, teacher, torch.tensor([label])), student)
        assert measure(student - 0.1 * slope) > measure(student)
    erde(student, teacher, torch.tensor([1])).backward()
    assert teacher.grad is None


# --- NEO-KD ----------------------------------------------------------------------------------------------------------


def test_neighbours_teach_by_the_mean_of_their_outputs():
    clean, _ = draw(3, 4, 2.0, 6, networks=4)
    bad, _ = draw(3, 4, 2.0, 7, networks=4)
    p, q = softmax_all(clean), softmax_all(bad)
    neighbours = [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    expected = [
        np.mean([kl(np.mean([p[j][i] for j in near], axis=0), q[k][i]) for i in range(3)])
        for k, near in enumerate(neighbours)
    ]
    value = neighbour_distillation([logits(z) for z in bad], [logits(z) for z in clean])
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9)


def softmax_all(networks):
    return [softmax(z) for z in networks]


@pytest.mark.parametrize("per_example", [False, True])
def test_every_exit_is_taught_the_label_and_its_own_classes(per_example):
    clean, y = draw(3, 5, 2.0, 8, networks=2)
    bad, _ = draw(3, 5, 2.0, 9, networks=2)
    owner = np.random.default_rng(0).integers(2, size=(3, 5) if per_example else 5)
    owner_of = np.broadcast_to(owner, (3, 5))
    p, q, expected = softmax_all(clean), softmax_all(bad), []
    for k in range(2):
        rows = []
        for i in range(3):
            kept = np.array([p[k][i][c] if c == y[i] or owner_of[i, c] == k else 0.0 for c in range(5)])
            rows.append(kl(kept / kept.sum(), q[k][i]))
        expected.append(np.mean(rows))
    value = orthogonal_distillation(
        [logits(z) for z in bad], [logits(z) for z in clean], torch.from_numpy(y), torch.from_numpy(owner)
    )
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9)


def test_clean_outputs_teach_and_are_not_trained_by_it():
    clean, y = draw(3, 5, 2.0, 8, networks=2)
    teachers, students = ([logits(z).requires_grad_() for z in clean] for _ in range(2))
    owner = torch.tensor([0, 1, 0, 1, 0])
    total = orthogonal_distillation(students, teachers, torch.from_numpy(y), owner).sum()
    (total + neighbour_distillation(students, teachers).sum()).backward()
    assert all(z.grad is None for z in teachers)
    assert all(z.grad.isfinite().all() and z.grad.abs().max() > 0.01 for z in students)
