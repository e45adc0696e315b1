"""Exits under a stated risk: guarantees by simulation, exact tests against SciPy, thresholds against plain loops."""

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.risk import Population, against_mapie, bonferroni, population
from cafe_flwr.risk import ExitThresholds, calibrate, conformal_thresholds, folds, required_examples, risk_report
from cafe_flwr.risk.exact_tests import (
    binomial_p_values,
    controlled_position,
    fixed_sequence,
    likeliest_start,
    minimum_trials,
    safe_start,
    upper_bounds,
)
from cafe_flwr.risk.path import ThresholdPath, count_along, histogram, path_from, quantile_edges

DELTA = 0.1


def thresholds(*values, **changes):
    fields = {"certified": True, "coverage": 0.5, "guarantee": "selective", "risk": 0.05}
    return ExitThresholds(values, **{**fields, **changes})


def tolerance(splits, rate=DELTA):
    return rate + 3 * math.sqrt(rate * (1 - rate) / splits)


def flat(n, m, error, rng):
    """Exits that are wrong with the same probability however sure they are: every position has the same risk."""
    return rng.random((n, m)), rng.random((n, m)) >= error


# a coarse grid, so that ties with thresholds are common
shares = st.integers(0, 8).map(lambda i: i / 8)
tables = st.integers(2, 5).flatmap(
    lambda m: st.tuples(
        st.lists(st.lists(shares, min_size=m, max_size=m), max_size=12),
        st.lists(st.one_of(shares, st.just(math.inf)), min_size=m - 1, max_size=m - 1),
    )
)


@settings(deadline=None)
@given(tables)
def test_an_example_leaves_at_the_first_exit_that_is_sure_enough(table):
    rows, limits = table
    expected = []
    for row in rows:
        exit_taken = len(limits)
        for k, limit in enumerate(limits):
            if row[k] >= limit:
                exit_taken = k
                break
        expected.append(exit_taken)
    confidence = np.array(rows, dtype=np.float32).reshape(len(rows), len(limits) + 1)
    assert thresholds(*limits).leave(confidence).tolist() == expected


@settings(deadline=None)
@given(
    values=st.lists(st.one_of(st.floats(0, 1), st.just(math.inf)), min_size=1, max_size=6),
    guarantee=st.sampled_from(["selective", "joint", "gap", "mixture", "every-mixture"]),
    coverage=st.floats(0, 1),
)
def test_thresholds_survive_json_exactly(values, guarantee, coverage):
    temperatures = tuple(1.0 + k for k in range(len(values) + 1))
    made = thresholds(
        *values, guarantee=guarantee, coverage=coverage, temperatures=temperatures, fingerprint="a1", num_examples=7
    )
    text = json.dumps(made.to_dict(), allow_nan=False)
    assert ExitThresholds.from_dict(json.loads(text)) == made
    assert text.count("null") == values.count(math.inf)


def test_every_kind_of_thresholds_says_what_it_claims():
    assert "at most 0.05 of the examples that leave early are wrong" in thresholds(0.5).describe()
    assert "of all examples leave early and wrong" in thresholds(0.5, guarantee="joint").describe()
    assert "full network's share of errors" in thresholds(0.5, guarantee="gap").describe()
    assert "nothing is claimed of one client" in thresholds(0.5, guarantee="mixture").describe()
    assert "every mixture of them" in thresholds(0.5, guarantee="every-mixture").describe()
    never = thresholds(math.inf, certified=False).describe()
    assert "no example leaves early" in never
    baseline = thresholds(0.5, certified=False, guarantee="quantile").describe()
    assert "no guarantee" in baseline
    assert "confidence" not in baseline


@pytest.mark.parametrize("risk", [0.01, 0.05, 0.1, 0.37])
def test_p_values_and_bounds_are_the_exact_binomial_ones(risk):
    trials = np.repeat(np.arange(0, 300, 7), 9)
    errors = np.minimum(np.tile([0, 1, 2, 3, 5, 8, 13, 21, 300], len(trials) // 9), trials)
    p_values = binomial_p_values(errors, trials, risk)
    np.testing.assert_allclose(p_values, stats.binom.cdf(errors, trials, risk), rtol=1e-9)
    for delta in (0.1, 0.005):
        bounds = upper_bounds(errors, trials, delta)
        inner = errors < trials
        expected = stats.beta.ppf(1 - delta, errors[inner] + 1, trials[inner] - errors[inner])
        np.testing.assert_allclose(bounds[inner], expected, rtol=1e-9)
        assert (bounds[~inner] == 1).all()
        np.testing.assert_array_equal(bounds <= risk, p_values <= delta)


def test_a_walk_ends_before_the_first_failure():
    p = np.array([0.5, 0.05, 0.1, 0.2, 0.0])
    assert fixed_sequence(p, 1, 0.1) == 2
    assert fixed_sequence(p, 0, 0.1) == -1
    assert fixed_sequence(p, 4, 0.1) == 4
    assert controlled_position(np.array([0, 3, 3, 4]), 39, 0.1) == 2  # (3 + 1)/40 = 0.1 still passes
    assert controlled_position(np.array([0, 3]), 38, 0.1) == 0
    assert controlled_position(np.array([0]), 8, 0.1) == -1
    assert controlled_position(np.array([0, 1, 2]), 26, 0.1, num_clients=2) == 0  # (1 + 2)/28 > 0.1


def test_the_likeliest_start_is_where_scipy_says_the_test_most_likely_passes():
    trials, harmed, among = np.array([10, 60, 90, 200]), np.array([0, 0, 4, 20]), np.array([5, 30, 45, 100])
    passes = []
    for n, h, a in zip(trials, harmed, among, strict=True):
        share = (h + 0.025) / (a + 0.5)
        allowed = [e for e in range(n + 1) if stats.binom.cdf(e, n, 0.05) <= DELTA]
        passes.append(stats.binom.cdf(max(allowed), n, share) if allowed else 0.0)
    assert likeliest_start(trials, harmed, among, 0.05, DELTA) == int(np.argmax(passes)) == 1
    assert likeliest_start(np.array([0, 3]), np.zeros(2), np.array([0, 1]), 0.05, DELTA) == 0
    assert safe_start(np.array([0, 5, 60, 80, 200]), 1000, 1000, 0.1) == 1  # 0.005 + 3·0.0134 + 0.001 ≤ 0.1 < 0.06 + …
    assert safe_start(np.array([0, 5]), 0, 1000, 0.1) == 0


@pytest.mark.parametrize("guarantee", ["selective", "joint", "gap"])
@pytest.mark.parametrize("risk", [0.01, 0.05, 0.1, 0.3])
def test_the_number_of_examples_that_is_asked_for_is_the_smallest_that_can_do(guarantee, risk):
    needed = required_examples(risk, guarantee=guarantee)
    sure, right = np.ones((needed, 2)), np.ones((needed, 2), dtype=bool)
    assert calibrate(sure, right, risk=risk, guarantee=guarantee).certified
    with pytest.raises(ValueError, match=rf"at least {needed} are needed"):
        calibrate(sure[:-1], right[:-1], risk=risk, guarantee=guarantee)
    size = needed - 1 - (needed - 1) // 3
    if guarantee == "joint":
        assert 1 / (size + 1) > risk
    else:
        n = minimum_trials(risk, DELTA)
        assert (1 - risk) ** n <= DELTA < (1 - risk) ** (n - 1)
        assert size < n


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(0, 30))
def test_counts_along_a_path_are_those_of_a_plain_loop(seed, m, n):
    rng = np.random.default_rng(seed)
    confidence, harm = rng.integers(0, 9, (n, m)) / 8, rng.random((n, m - 1)) < 0.4
    steps = np.sort(rng.integers(0, 10, (6, m - 1)), axis=0)[::-1] / 8
    path = ThresholdPath(np.where(steps > 1, np.inf, steps))
    counts = count_along(path, confidence, harm)
    ever = np.zeros(n, dtype=bool)
    for u, limits in enumerate(path.thresholds):
        exits = thresholds(*limits).leave(confidence)
        hit = np.array([e < m - 1 and harm[i, e] for i, e in enumerate(exits)], dtype=bool)
        ever |= hit
        assert counts.left[u] == (exits < m - 1).sum()
        assert counts.harmed[u] == hit.sum()
        assert counts.ever_harmed[u] == ever.sum()


def test_errors_can_become_fewer_along_a_path_and_their_bound_does_not():
    path = ThresholdPath(np.array([[0.9, 0.5], [0.5, 0.5]]))  # wrong by exit 2, then right by exit 1
    counts = count_along(path, np.array([[0.7, 0.7, 0.7]]), np.array([[False, True]]))
    assert counts.harmed.tolist() == [1, 0]
    assert counts.ever_harmed.tolist() == [1, 1]


def test_joint_risk_is_controlled_by_the_bound_that_grows():
    people = population("easy", 3000)
    proposal, certification = folds(3000, 0)
    seen, harm = people.confidence[proposal], ~people.correct[:, :-1]
    path = path_from(histogram(quantile_edges(seen), seen, harm[proposal]))
    start = safe_start(count_along(path, seen, harm[proposal]).harmed, 1000, 2000, 0.1)
    ever, expected, plain = np.zeros(2000, dtype=bool), None, None
    for limits in path.thresholds[start:]:
        exits = thresholds(*limits).leave(people.confidence[certification])
        hit = (exits < 3) & harm[certification, np.minimum(exits, 2)]
        ever |= hit
        expected = tuple(limits) if (ever.sum() + 1) / 2001 <= 0.1 else expected
        plain = tuple(limits) if (hit.sum() + 1) / 2001 <= 0.1 else plain
    assert calibrate(*people, risk=0.1, guarantee="joint").thresholds == expected != plain


def test_only_the_position_depends_on_the_labels_of_the_certification_fold():
    people = population("easy", 900)
    proposal, certification = folds(900, 0)
    assert sorted([*proposal, *certification]) == list(range(900))
    seen = people.confidence[proposal]
    path = path_from(histogram(quantile_edges(seen), seen, ~people.correct[proposal][:, :-1]))
    positions = set(map(tuple, path.thresholds))
    found = set()
    for seed in range(8):
        correct = people.correct.copy()
        worse = certification[np.random.default_rng(seed).random(len(certification)) < seed / 100]
        correct[worse] = False
        result = calibrate(people.confidence, correct, risk=0.1)
        found.add(result.thresholds)
        assert not result.certified or result.thresholds in positions
    assert len(found) > 2


@pytest.mark.slow
@pytest.mark.parametrize("guarantee", ["selective", "gap"])
def test_where_every_position_is_too_risky_a_certificate_is_as_rare_as_promised(guarantee):
    """The hardest case: risk a hair above α all along the path, so that every certificate is wrong."""
    rng, splits, wrong = np.random.default_rng(5), 600, 0
    for seed in range(splits):
        confidence, correct = flat(240, 3, 0.1005, rng)
        if guarantee == "gap":
            confidence[:, :2], correct[:, 2] = 1.0, True  # all leave at once, and only they err
        wrong += calibrate(confidence, correct, risk=0.1, guarantee=guarantee, seed=seed).certified
    assert wrong / splits <= tolerance(splits)
    assert wrong / splits >= 0.03  # the level is used, not given away


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["easy", "hard", "correlated"])
def test_risks_hold_on_the_population(kind):
    people, rng, splits, size = population(kind, 4000), np.random.default_rng(0), 120, 400
    seen = {"selective": [], "gap": [], "joint": []}
    for seed in range(splits):
        rows = rng.integers(0, 4000, size)
        for guarantee in seen:
            result = calibrate(people.confidence[rows], people.correct[rows], risk=0.1, guarantee=guarantee, seed=seed)
            report = risk_report(result, *people)
            seen[guarantee].append(
                {"selective": report.selective_risk, "gap": report.new_errors, "joint": report.joint_risk}[guarantee]
            )
            assert report.new_errors >= report.gap
    for guarantee in ("selective", "gap"):
        assert np.mean(np.array(seen[guarantee]) > 0.1) <= tolerance(splits)
    assert np.mean(seen["joint"]) <= 0.1 + 3 * np.std(seen["joint"]) / math.sqrt(splits)
    assert np.mean(seen["joint"]) >= 0.05  # and the risk that is allowed is used


def test_the_mean_joint_risk_is_alpha_and_not_more_on_a_fine_path():
    rng, splits, n, risk = np.random.default_rng(0), 4000, 40, 0.1
    path = ThresholdPath(np.linspace(1, 0, 2001)[:, None])
    realised = []
    for _ in range(splits):
        confidence, correct = flat(n, 2, 0.5, rng)
        counts = count_along(path, confidence, ~correct[:, :1])
        realised.append(0.5 * (1 - path.thresholds[controlled_position(counts.ever_harmed, n, risk), 0]))
    assert 0.09 <= np.mean(realised) <= risk + 3 * np.std(realised) / math.sqrt(splits)


@pytest.mark.parametrize(
    ("kind", "risk", "size"), [("easy", 0.05, 300), ("hard", 0.1, 1000), ("correlated", 0.1, 3000)]
)
def test_coverage_is_at_least_that_of_bonferroni_on_the_same_path_and_folds(kind, risk, size):
    people, rng, pairs = population(kind), np.random.default_rng(1), []
    for seed in range(60):
        rows = rng.integers(0, len(people.correct), size)
        sample = Population(people.confidence[rows], people.correct[rows])
        ours = calibrate(*sample, risk=risk, seed=seed).coverage
        pairs.append((ours, bonferroni(sample, risk, seed), bonferroni(sample, risk, seed, 10)))
    ours, fine, coarse = np.mean(pairs, axis=0)
    assert ours >= max(fine, coarse)
    assert ours > 0.2


def test_a_weak_exit_stays_closed_and_does_not_close_the_others():
    people = population("correlated", 6000)
    result = calibrate(*people, risk=0.1)
    shares = risk_report(result, *people).exit_shares
    assert result.certified
    assert shares[0] < 0.05
    assert result.coverage > 0.5
    without = calibrate(people.confidence[:, 1:], people.correct[:, 1:], risk=0.1)
    assert result.coverage > without.coverage - 0.1


def test_the_quantile_baseline_breaks_its_nominal_risk_and_never_claims_it():
    people = population("correlated", 6000)
    result = calibrate(*people, risk=0.05, guarantee="quantile")
    assert not result.certified
    assert risk_report(result, *people).selective_risk > 0.3
    assert result.realised_risk > 0.3
    p_true = np.random.default_rng(0).random((99, 3))
    expected = [np.sort(1 - p_true[:, k])[math.ceil(100 * 0.95) - 1] for k in range(2)]
    np.testing.assert_allclose(conformal_thresholds(p_true, 0.05), 1 - np.array(expected))


def test_never_leave_early_is_a_normal_result():
    confidence, correct = flat(2000, 4, 0.5, np.random.default_rng(0))
    result = calibrate(confidence, correct, risk=0.05)
    assert result.thresholds == (math.inf,) * 3
    assert not result.certified
    assert result.coverage == result.realised_risk == 0
    assert (result.leave(confidence) == 3).all()
    report = risk_report(result, confidence, correct)
    assert (report.selective_risk, report.joint_risk, report.gap, report.coverage) == (0, 0, 0, 0)


def test_saturated_confidences_are_all_or_nothing():
    rng = np.random.default_rng(0)
    correct = rng.random((500, 3)) < [0.99, 0.995, 1.0]
    result = calibrate(np.ones((500, 3)), correct, risk=0.1)
    assert result.certified
    assert result.coverage == 1
    assert not calibrate(np.ones((500, 3)), rng.random((500, 3)) < 0.5, risk=0.1).certified


def test_single_and_double_precision_decide_alike():
    people = population("easy", 3000)
    single = calibrate(people.confidence, people.correct, risk=0.1)
    double = calibrate(people.confidence.astype(np.float64), people.correct, risk=0.1)
    assert single == double
    assert [float(np.float32(t)) for t in single.thresholds] == list(single.thresholds)


def test_what_is_reported_of_the_certification_fold_is_what_happens_on_it():
    people = population("hard", 2000)
    _, certification = folds(2000, 3)
    fold = people.confidence[certification], people.correct[certification]
    for guarantee in ("selective", "joint", "gap"):
        result = calibrate(*people, risk=0.1, guarantee=guarantee, seed=3)
        report = risk_report(result, *fold)
        assert result.coverage == pytest.approx(report.coverage)
        assert result.num_examples == 2000
        mine = {"selective": report.selective_risk, "joint": report.joint_risk, "gap": report.new_errors}[guarantee]
        assert result.realised_risk == pytest.approx(mine)
    assert calibrate(*people, risk=0.1, seed=3) == calibrate(*people, risk=0.1, seed=3)
    assert calibrate(*people, risk=0.1, seed=3) != calibrate(*people, risk=0.1, seed=4)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 20))
def test_a_report_is_that_of_a_plain_loop(seed, m, n):
    rng = np.random.default_rng(seed)
    confidence, correct = rng.random((n, m)), rng.random((n, m)) < 0.6
    t = thresholds(*rng.random(m - 1))
    left = wrong = new = right = 0
    for i, e in enumerate(t.leave(confidence)):
        left += e < m - 1
        wrong += e < m - 1 and not correct[i, e]
        new += (not correct[i, e]) and correct[i, m - 1]
        right += correct[i, e]
    report = risk_report(t, confidence, correct)
    assert report.selective_risk == pytest.approx(wrong / left if left else 0)
    assert report.joint_risk == pytest.approx(wrong / n)
    assert report.new_errors == pytest.approx(new / n)
    assert report.accuracy == pytest.approx(right / n)
    assert report.gap == pytest.approx(correct[:, m - 1].mean() - right / n)
    assert sum(report.exit_shares) == pytest.approx(1)
    assert 1 - report.exit_shares[-1] == pytest.approx(report.coverage)


def test_valid_positions_agree_with_mapie():
    assert against_mapie(1)


def test_a_hundred_thousand_examples_of_eight_exits_take_two_seconds():
    people = population("easy", 100_000)
    confidence, correct = (np.concatenate([a, a], axis=1) for a in people)
    start = time.process_time()
    assert calibrate(confidence, correct, risk=0.05).certified
    assert time.process_time() - start <= 2


GOOD = np.full((100, 3), 0.5), np.ones((100, 3), dtype=bool)


def with_value(value):
    confidence = GOOD[0].copy()
    confidence[7, 1] = value
    return confidence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"confidence": with_value(1.01)}, r"must lie in \[0, 1\].*1.01 \(example 7, exit 2\)"),
        ({"confidence": with_value(-0.1)}, r"must lie in \[0, 1\]"),
        ({"confidence": with_value(math.nan)}, r"must lie in \[0, 1\].*nan"),
        ({"confidence": with_value(math.inf)}, r"must lie in \[0, 1\]"),
        ({"confidence": GOOD[0][:, :1], "correct": GOOD[1][:, :1]}, "two exits or more"),
        ({"confidence": GOOD[0][0], "correct": GOOD[1][0]}, "two exits or more"),
        ({"confidence": GOOD[0][:-1]}, r"\(100, 3\).*\(99, 3\).*agree"),
        ({"correct": GOOD[1][:, :2]}, "agree"),
        ({"correct": GOOD[1].astype(int)}, "must be booleans"),
        ({"confidence": GOOD[0].astype(str)}, "must be numbers"),
        ({"risk": 0.0}, "risk must lie strictly between 0 and 1"),
        ({"risk": 1}, "risk must lie strictly"),
        ({"risk": math.nan}, "risk must lie strictly"),
        ({"risk": "0.1"}, "risk must lie strictly"),
        ({"confidence_level": 1.0}, "confidence_level must lie strictly"),
        ({"confidence_level": 0.0}, "confidence_level must lie strictly"),
        ({"guarantee": "selectiv"}, "the nearest is 'selective'"),
        ({"guarantee": "mixture"}, "unknown guarantee"),
        ({"confidence": GOOD[0][:0], "correct": GOOD[1][:0], "guarantee": "quantile"}, "0 examples are too few"),
        ({"risk": 0.01}, "at least 344 are needed"),
    ],
)
def test_bad_input_is_refused_with_the_reason(changes, words):
    arguments = {"confidence": GOOD[0], "correct": GOOD[1], "risk": 0.1, **changes}
    confidence, correct = arguments.pop("confidence"), arguments.pop("correct")
    with pytest.raises(ValueError, match=words):
        calibrate(confidence, correct, **arguments)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: thresholds(math.nan), "numbers from 0 up"),
        (lambda: thresholds(-0.5), "numbers from 0 up"),
        (lambda: thresholds(), "one for each exit but the last"),
        (lambda: thresholds(0.5, guarantee="seletive"), "the nearest is 'selective'"),
        (lambda: thresholds(0.5, temperatures=(1.0,)), "2 positive numbers"),
        (lambda: thresholds(0.5, temperatures=(1.0, 0.0)), "2 positive numbers"),
        (lambda: thresholds(0.5, guarantee="quantile"), "guarantees nothing"),
        (lambda: thresholds(0.5, 0.5).leave(np.zeros((4, 2))), "2 exits were given for a network of 3"),
        (lambda: thresholds(0.5).leave([[0.5, 2.0]]), r"must lie in \[0, 1\]"),
        (lambda: risk_report(thresholds(0.5), np.zeros((0, 2)), np.zeros((0, 2), bool)), "no examples"),
        (lambda: risk_report(thresholds(0.5), [[0.5, 0.5]], [[True]]), "agree"),
        (lambda: ExitThresholds.from_dict({"thresholds": [0.5]}), "missing: certified"),
        (lambda: ExitThresholds.from_dict({**thresholds(0.5).to_dict(), "extra": 1}), "unknown: extra"),
        (lambda: ExitThresholds.from_dict({**thresholds(0.5).to_dict(), "thresholds": 3}), "none of its kind"),
        (lambda: ThresholdPath(np.array([[0.1], [0.2]])), "never rise"),
    ],
)
def test_bad_thresholds_are_refused_with_the_reason(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@given(st.floats(1e-4, 0.999), st.floats(0.01, 0.999))
@settings(deadline=None)
def test_the_number_of_trials_is_the_first_that_passes(risk, confidence):
    """The formula against its definition, counted up."""
    delta = 1 - confidence
    n = minimum_trials(risk, delta)
    assert n == 1 or (1 - risk) ** (n - 1) > delta * (1 - 1e-12)
    assert (1 - risk) ** n <= delta * (1 + 1e-12)


@given(st.integers(1, 300), st.integers(1, 300))
@settings(deadline=None)
def test_required_examples_are_the_first_of_which_two_thirds_can_do(a, b):
    """Counted up, for shares such as 1/49, whose inverse is rounded."""
    risk = a / (a + b)
    joint = next(n for n in range(1, 2000) if 1 / (n - n // 3 + 1) <= risk)
    assert required_examples(risk, guarantee="joint") == joint
    n_min = minimum_trials(risk, DELTA)
    assert required_examples(risk, 1 - DELTA) == next(n for n in range(1, 5000) if n - n // 3 >= n_min)


@pytest.mark.parametrize("guarantee", ["selective", "joint", "gap"])
def test_required_examples_are_a_formula(guarantee):
    start = time.perf_counter()
    assert required_examples(1e-12, guarantee=guarantee) > 10**12
    assert time.perf_counter() - start < 0.05
    for impossible in (0, 1, -0.1, math.nan, math.inf, True, "0.1", None, 1e-320):
        with pytest.raises(ValueError, match="risk"):
            required_examples(impossible, guarantee=guarantee)
