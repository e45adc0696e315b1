"""Calibration over clients: claims by simulation, mixture shift included; sums of counts by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from cafe_flwr.risk import calibrate, risk_report
from cafe_flwr.risk.counts import ClientCounts, client_histogram, count, fixed_path, pooled_path
from cafe_flwr.risk.exact_tests import binomial_p_values, fixed_sequence
from cafe_flwr.risk.path import ThresholdPath
from cafe_flwr.risk.pooled import certify, every_mixture, pooled_crc

DELTA = 0.1
PATH = fixed_path(3)


def tolerance(splits, rate=DELTA):
    return rate + 3 * math.sqrt(rate * (1 - rate) / splits)


def client(n, error, rng, m=3):
    """Confidences over the whole range, errors ``error(confidence)`` or a constant share."""
    confidence = rng.random((n, m)) ** 0.1
    share = error(confidence) if callable(error) else error
    return confidence, rng.random((n, m)) >= share


def falling(scale):
    return lambda confidence: scale * (1 - confidence)


def rows(left, wrong, n=1000, ever=None):
    return ClientCounts(n, np.array(left), np.array(wrong), np.array(wrong if ever is None else ever))


def test_counts_of_clients_add_up_to_those_of_all_their_examples():
    rng = np.random.default_rng(0)
    data = [client(n, falling(3.0), rng) for n in (40, 0, 7)]
    pooled = count(*data[0], PATH) + count(*data[1], PATH) + count(*data[2], PATH)
    whole = count(*(np.concatenate(parts) for parts in zip(*data, strict=True)), PATH)
    assert (pooled.n, pooled.clients, whole.clients) == (47, 3, 1)
    for name in ("left", "wrong", "ever_wrong"):
        np.testing.assert_array_equal(getattr(pooled, name), getattr(whole, name))
    assert whole.left[-1] == 47  # at the laxest position all leave
    assert whole.left.dtype == np.int64


def test_a_pooled_path_is_that_of_all_examples_and_shuts_a_weak_exit():
    rng = np.random.default_rng(0)
    data = [client(300, 0.0, rng) for _ in range(3)]
    for confidence, correct in data:
        correct[:, 0] = rng.random(300) < 0.3
        correct[:, 1] = rng.random(300) < confidence[:, 1]
    path = pooled_path([client_histogram(*d) for d in data])
    whole = pooled_path([client_histogram(*(np.concatenate(parts) for parts in zip(*data, strict=True)))])
    np.testing.assert_array_equal(path.thresholds, whole.thresholds)
    use = count(*data[0], path)
    halfway = int(np.searchsorted(use.left, 150))
    assert path.thresholds[halfway, 0] == math.inf
    assert np.isfinite(path.thresholds[halfway, 1])


def test_pooled_control_by_hand():
    clients = [rows([5, 9, 20], [0, 1, 3], n=50), rows([2, 9, 20], [0, 2, 2], n=48, ever=[0, 2, 4])]
    assert pooled_crc(clients, 0.05) == 1  # (0 + 1 + 2 + 2)/(98 + 2) = 0.05, then (3 + 4 + 2)/100
    assert pooled_crc(clients, 0.08) == 1  # errors that became fewer again, (3 + 2 + 2)/100, do not count as fewer
    assert pooled_crc(clients, 0.0499) == 0
    assert pooled_crc(clients, 0.0199) == -1  # (0 + 2)/100
    assert pooled_crc([clients[0] + clients[1]], 0.05) == 1  # from sums alone


@pytest.mark.slow
def test_pooled_control_holds_on_average_over_clients_by_their_size():
    """Weights n_j + 1; clients differ, and the loss is not the same along the path for any two."""
    rng, splits, risk, sizes, scales = np.random.default_rng(0), 600, 0.1, [6, 15, 40, 80], [9.0, 5.0, 2.0, 1.0]
    population = [client(4000, falling(s), rng) for s in scales]
    true = np.array([count(*p, PATH).wrong / 4000 for p in population])
    weights = np.array(sizes) + 1
    mean_risk = weights @ true / weights.sum()
    realised = []
    for _ in range(splits):
        counts = []
        for n, (confidence, correct) in zip(sizes, population, strict=True):
            drawn = rng.integers(0, 4000, n)
            counts.append(count(confidence[drawn], correct[drawn], PATH))
        position = pooled_crc(counts, risk)
        realised.append(mean_risk[position] if position >= 0 else 0.0)
    assert 0.05 <= np.mean(realised) <= risk + 3 * np.std(realised) / math.sqrt(splits)


def test_every_mixture_bounds_are_clopper_pearson_at_its_share_of_delta():
    rng = np.random.default_rng(1)
    counts = [count(*client(2000, falling(s), rng), PATH) for s in (1.0, 1.2, 0.8)]
    result = every_mixture(counts, 0.05, 0.9)
    for c, position, bound in zip(counts, result.positions, result.bounds, strict=True):
        e, a = c.wrong[position], c.left[position]
        assert bound == pytest.approx(stats.beta.ppf(1 - DELTA / 3, e + 1, a - e))
        assert bound <= 0.05
        further = stats.beta.ppf(1 - DELTA / 3, c.wrong[position + 1] + 1, c.left[position + 1] - c.wrong[position + 1])
        assert further > 0.05
    assert result.common == min(result.positions)
    alone = every_mixture(counts[:1], 0.05, 0.9, proposals=[count(*client(500, falling(1.0), rng), PATH)])
    assert alone.positions[0] >= result.positions[0]


def test_a_common_position_is_one_that_every_client_walked_over():
    first, second = rows([100, 200, 300], [0, 50, 90]), rows([5, 6, 300], [0, 0, 0])
    result = every_mixture([first, second], 0.1, proposals=[first, second])
    assert result.positions == (0, 2)  # the second starts there: nothing was shown of it at the first's position
    assert result.common == -1
    assert every_mixture([first, first], 0.1, proposals=[first, first]).common == 0


@pytest.mark.slow
@pytest.mark.parametrize("proposals", [False, True])
def test_every_mixture_rarely_covers_any_client_that_is_too_risky(proposals):
    """All clients a hair above α wherever one looks: each certificate is wrong, and one in δ of the runs has any."""
    rng, splits, wrong, common = np.random.default_rng(3), 300, 0, 0
    for _ in range(splits):
        counts, other = ([count(*client(n, 0.1005, rng), PATH) for n in (150, 200, 200)] for _ in range(2))
        result = every_mixture(counts, 0.1, 0.9, proposals=other if proposals else None)
        wrong += max(result.positions) >= 0
        common += result.common >= 0
    assert 0.02 <= wrong / splits <= tolerance(splits)
    assert common == 0


def test_one_pooled_binomial_fails_when_the_mixture_shifts_and_every_mixture_does_not():
    rng, splits, risk = np.random.default_rng(2), 150, 0.1
    scales, sizes = [0.2, 3.0], [900, 300]
    population = [client(20_000, falling(s), rng) for s in scales]
    true = [c.wrong / np.maximum(c.left, 1) for c in (count(*p, PATH) for p in population)]
    pooled_wrong = mixture_wrong = covered = 0

    def draw():
        for n, (confidence, correct) in zip(sizes, population, strict=True):
            drawn = rng.integers(0, 20_000, n)
            yield count(confidence[drawn], correct[drawn], PATH)

    for _ in range(splits):
        counts = list(draw())
        pooled = counts[0] + counts[1]
        p_values = binomial_p_values(pooled.wrong, pooled.left, risk)
        position = fixed_sequence(p_values, int(np.argmax(pooled.left >= 60)), DELTA)
        pooled_wrong += position >= 0 and true[1][position] > risk  # all weight moves to the second client
        result = every_mixture(counts, risk, 0.9, proposals=list(draw()))
        risky = [end >= 0 and t[end] > risk for end, t in zip(result.positions, true, strict=True)]
        mixture_wrong += any(risky)
        covered += min(result.positions) >= 0
    assert pooled_wrong / splits > 0.9
    assert mixture_wrong / splits <= tolerance(splits)
    assert covered / splits > 0.5


def test_every_client_gets_what_it_can_show():
    rng = np.random.default_rng(0)
    sizes, scales = [600, 500, 25, 25, 25, 25, 25], [0.5, None, 0.5, 0.5, 0.5, 0.5, 0.5]
    counts = [
        count(*client(n, 0.5 if s is None else falling(s), rng), PATH) for n, s in zip(sizes, scales, strict=True)
    ]
    got = certify(counts, 0.1, path=PATH)
    assert [c.basis for c in got] == ["itself", "not certified", *["mixture"] * 5]
    assert [c.thresholds.guarantee for c in got] == ["selective", "selective", *["mixture"] * 5]
    assert got[1].thresholds.thresholds == (math.inf, math.inf)
    assert not got[1].thresholds.certified
    assert "500 examples do not show" in got[1].reason
    assert all(c.thresholds.certified and not c.reason for c in got if c.basis != "not certified")
    assert len({c.thresholds.thresholds for c in got[2:]}) == 1  # the pool leaves at one position
    position = pooled_crc(counts[2:], 0.1)
    assert got[2].thresholds.thresholds == tuple(PATH.thresholds[position])
    for certificate, c in zip(got, counts, strict=True):
        assert certificate.thresholds.num_examples == c.n

    together = certify(counts, 0.1, path=PATH, simultaneous=True)
    assert [c.basis for c in together] == ["every-mixture", "not certified", *["mixture"] * 5]
    assert together[0].thresholds.coverage <= got[0].thresholds.coverage

    strict = certify(counts, 0.01, path=PATH)
    assert [c.basis for c in strict[1:]] == ["not certified"] * 6
    assert "the pool of 5 such clients cannot be certified" in certify(counts[2:], 0.01, path=PATH)[0].reason


def test_a_client_certified_by_itself_keeps_its_risk():
    """Thresholds as they will be used, on the client's own population; the level is that of one client."""
    rng, splits, wrong = np.random.default_rng(4), 300, 0
    other = count(*client(400, 0.1005, rng), PATH)
    for _ in range(splits):
        own = count(*client(300, 0.1005, rng), PATH)
        wrong += certify([own, other], 0.1, path=PATH)[0].basis == "itself"
    assert 0.02 <= wrong / splits <= tolerance(splits)


def test_where_a_client_starts_and_who_is_pooled_does_not_depend_on_its_own_errors():
    from cafe_flwr.risk.pooled import _walk

    rng = np.random.default_rng(0)
    data = [client(400, falling(1.0), rng) for _ in range(3)] + [client(20, falling(1.0), rng) for _ in range(3)]
    counts = [count(*d, PATH) for d in data]
    wrong = [count(c, np.zeros_like(y), PATH) for c, y in data]
    for j in range(3):
        changed = [*counts[:j], wrong[j], *counts[j + 1 :]]
        assert _walk(changed, j, 0.1, DELTA, None)[0] == _walk(counts, j, 0.1, DELTA, None)[0]
        assert _walk(changed, j, 0.1, DELTA, counts)[0] == _walk(counts, j, 0.1, DELTA, counts)[0]
    mixed = certify([wrong[0], *counts[1:]], 0.1, path=PATH)
    assert mixed[0].basis == "not certified"
    assert [c.thresholds for c in mixed[3:]] == [c.thresholds for c in certify(counts, 0.1, path=PATH)[3:]]


def test_thresholds_of_clients_are_used_like_any_others():
    rng = np.random.default_rng(0)
    confidence, correct = client(2500, falling(1.0), rng)
    proposal = count(confidence[:500], correct[:500], PATH)
    confidence, correct = confidence[500:], correct[500:]
    [certificate] = certify([count(confidence, correct, PATH)], 0.1, path=PATH, proposals=[proposal])
    report = risk_report(certificate.thresholds, confidence, correct)
    assert report.coverage == pytest.approx(certificate.thresholds.coverage)
    assert report.selective_risk == pytest.approx(certificate.thresholds.realised_risk)
    assert report.coverage > 0.9 * calibrate(confidence, correct, risk=0.1).coverage


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rows([1, 2], [1, 3]), "wrong ≤ left"),
        (lambda: rows([1, 2], [-1, 0]), "0 ≤ wrong"),
        (lambda: rows([1, 20], [0, 0], n=10), "left ≤ n = 10"),
        (lambda: rows([2, 1], [0, 0]), "must grow along the path"),
        (lambda: rows([2, 3], [1, 0], ever=[1, 0]), "must grow along the path"),
        (lambda: rows([2, 3], [1, 1], ever=[0, 1]), "between wrong and left"),
        (lambda: rows([1.0, 2.0], [0, 0]), "integer counts"),
        (lambda: rows([1, 2], [0, 0, 0]), "integer counts"),
        (lambda: rows([1, 2], [0, 0]) + rows([1], [0]), "cannot be added"),
        (lambda: pooled_crc([], 0.1), "no clients"),
        (lambda: pooled_crc([rows([1], [0])], 0.0), "risk must lie strictly"),
        (lambda: pooled_crc([rows([1], [0]), rows([1, 2], [0, 0])], 0.1), "different lengths"),
        (lambda: every_mixture([rows([1], [0])], 0.1, 1.0), "confidence_level must lie strictly"),
        (lambda: certify([rows([1, 2], [0, 0])], 0.1, path=PATH), "path of 64 positions"),
        (lambda: certify([count(*client(5, 0.1, np.random.default_rng(0)), PATH)] * 0, 0.1, path=PATH), "no clients"),
        (lambda: count(np.full((3, 2), 0.5), np.ones((3, 2), bool), PATH), "2 exits were given for a network of 3"),
        (lambda: count(np.full((3, 3), 1.5), np.ones((3, 3), bool), PATH), r"must lie in \[0, 1\]"),
        (lambda: every_mixture([rows([1, 2], [0, 0])], 0.1), "needs proposals"),
        (lambda: pooled_path([]), "one client or more"),
        (
            lambda: pooled_path([client_histogram([[0.5] * m], [[True] * m]) for m in (2, 3)]),
            "different numbers of exits",
        ),
        (lambda: ThresholdPath(np.zeros((0, 2))), "a path needs"),
    ],
)
def test_bad_counts_are_refused_with_the_reason(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_proposals_of_other_clients_or_paths_are_refused():
    one = count(*client(50, 0.1, np.random.default_rng(0)), PATH)
    for proposals in ([one, one], [rows([1], [0])]):
        with pytest.raises(ValueError, match="one for each client, along the same path"):
            certify([one], 0.1, path=PATH, proposals=proposals)
        with pytest.raises(ValueError, match="one for each client, along the same path"):
            every_mixture([one], 0.1, proposals=proposals)


def test_a_sum_of_clients_is_no_client():
    one = count(*client(50, 0.1, np.random.default_rng(0)), PATH)
    with pytest.raises(ValueError, match="each client alone"):
        certify([one + one], 0.1, path=PATH)
