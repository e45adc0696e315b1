"""Clipping is exact, noise has the spread it should, nothing shares noise but replays, and ε is the library's."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
from federations import (
    FaultyApp,
    WatchedGrid,
    run_small,
    same_tensors,
    small_settings,
    strict_json,
    toy_app,
    toy_network,
)

from cafe_flwr.app.run import build_strategy, open_results_of
from cafe_flwr.client.privacy import stricter
from cafe_flwr.core.text import kebab
from cafe_flwr.methods import CafeDistillMethod
from cafe_flwr.personal.store import PersonalStore
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.server.accounting import epsilon
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.wire.keys import Keys
from cafe_flwr.wire.options import Privacy
from cafe_flwr.wire.privacy import clipped, release
from cafe_flwr.wire.train import Expected, TrainReply, TrainRequest

N, T = 4, 3


def rng_of(secret=0):
    """A private generator as a client's store has it: by a secret and the purpose."""

    def make(purpose):
        return np.random.default_rng(np.random.SeedSequence([secret, *purpose.encode()]))

    return make


# --- one release ---


@pytest.mark.parametrize("length", [1e-6, 0.5, 1.0, 1.0001, 7.0, 1e30])
def test_clipping_is_exact(length):
    """Longer updates end at norm C, in the same direction; others are as they were."""
    u = np.random.default_rng(0).normal(size=1000)
    u *= length / np.linalg.norm(u)
    c = clipped(u, 1.0)
    assert np.linalg.norm(c) == pytest.approx(min(length, 1.0), rel=1e-12)
    assert np.linalg.norm(c) <= 1.0 + 1e-15
    np.testing.assert_allclose(c / np.linalg.norm(c), u / np.linalg.norm(u), atol=1e-12)
    if length <= 1:
        assert c.tobytes() == u.tobytes()


def test_without_noise_a_release_is_the_reference_plus_the_clipped_update():
    """(3, 4) from (1, 1) is (2, 3), of norm √13; clipped to 1: (1 + 2/√13, 1 + 3/√13)."""
    sent = release(np.float32([3, 4]), np.float32([1, 1]), 1.0, 0.0, rng_of())
    np.testing.assert_allclose(sent, [1 + 2 / math.sqrt(13), 1 + 3 / math.sqrt(13)], rtol=1e-6)
    same = np.float32([1.25, 0.5])
    assert release(same, np.float32([1, 1]), 1.0, 0.0, rng_of()).tobytes() == same.tobytes()


@pytest.mark.parametrize(("clip", "sigma"), [(1.0, 1.0), (0.5, 3.0), (20.0, 0.01)])
def test_noise_is_gaussian_with_standard_deviation_sigma_times_clip(clip, sigma):
    """Of 200,000 values: standard deviation within 1 % (its own is 0.16 %), mean within 5 standard errors, tails."""
    d = 200_000
    start = np.random.default_rng(1).normal(size=d).astype(np.float32)
    end = (start + np.random.default_rng(2).normal(size=d)).astype(np.float32)
    noise = release(end, start, clip, sigma, rng_of()).astype(np.float64) - start
    noise -= clipped(end.astype(np.float64) - start, clip)
    assert noise.std() == pytest.approx(sigma * clip, rel=0.01)
    assert abs(noise.mean()) < 5 * sigma * clip / math.sqrt(d)
    assert np.mean(np.abs(noise) < sigma * clip) == pytest.approx(0.6827, abs=0.01)
    assert np.mean(np.abs(noise) > 3 * sigma * clip) == pytest.approx(0.0027, abs=0.001)


def test_the_same_release_again_tells_nothing_more():
    start, end = np.zeros(50, dtype=np.float32), np.ones(50, dtype=np.float32)
    first = release(end, start, 1.0, 2.0, rng_of())
    assert release(end, start, 1.0, 2.0, rng_of()).tobytes() == first.tobytes()
    assert release(end, start, 1.0, 2.0, rng_of(secret=1)).tobytes() != first.tobytes()


@pytest.mark.parametrize("what", ["values", "reference", "sigma", "clip"])
def test_no_two_different_releases_share_their_noise(what):
    """Else their difference would be free of it. A server could ask for the same round from another start, or with
    another σ: from equal standard normal numbers, two σ would give them away."""
    d, sigma, clip = 20_000, 1.0, 1.0
    start, end = np.zeros(d, dtype=np.float32), np.full(d, 1e-3, dtype=np.float32)
    first = release(end, start, clip, sigma, rng_of()).astype(np.float64) - end
    other = {"values": end, "reference": start, "sigma": sigma, "clip": clip}
    other[what] = other[what] + np.float32(1e-6) if what in ("values", "reference") else 2.0
    second = release(other["values"], other["reference"], other["clip"], other["sigma"], rng_of()) - other["values"]
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(d)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": -1.0}, "clip_norm must be"),
        ({"clip_norm": math.nan}, "clip_norm must be"),
        ({"noise_multiplier": 1.0}, "need a clip_norm greater than 0"),
        ({"upload_clip_norm": 1.0}, "need a clip_norm greater than 0"),
        ({"clip_norm": 1.0, "noise_multiplier": math.inf}, "noise_multiplier must be"),
        ({"delta": 0.0}, "delta must be greater than 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Privacy(**settings)


def test_a_release_needs_a_clip_norm():
    with pytest.raises(ValueError, match="clip_norm must be greater than 0, got 0"):
        release(np.zeros(2, dtype=np.float32), np.zeros(2, dtype=np.float32), 0.0, 1.0, rng_of())


# --- what a node demands ---


@pytest.mark.parametrize(
    ("node_config", "asked_for", "message"),
    [
        ({"noise-multiplier": 1.5}, Privacy(1.0, noise_multiplier=1.0), "below 1.5, and the server asks for 1"),
        ({"clip-norm": "0.5"}, Privacy(), "beyond 0.5, and the server asks for no clipping"),
        ({"clip-norm": 0.5}, Privacy(0.4, upload_clip_norm=2.0), "beyond 0.5, and the server asks for 2"),
        ({"clip-norm": "much"}, Privacy(), "must be numbers"),
        ({"report-metrics": "maybe"}, Privacy(), "must be true or false, got 'maybe'"),
    ],
)
def test_a_node_sends_nothing_with_less_protection_than_it_demands(node_config, asked_for, message):
    with pytest.raises(ValueError, match=message):
        stricter(asked_for, node_config)


def test_a_node_that_demands_no_more_does_what_is_asked():
    asked_for = Privacy(1.0, 0.5, 2.0)
    demands = {"noise-multiplier": 2.0, "clip-norm": 1.0, "clients": "3"}
    assert stricter(asked_for, demands) == stricter(asked_for, {}) == asked_for
    withheld = stricter(asked_for, {"report-metrics": False})
    assert withheld == replace(asked_for, report_metrics=False)


# --- in a federation ---


def federate(folder, privacy=None, num_nodes=N, app=None, wire="float32", node_config=None, **changes):
    """A run of the toys with the strategy's privacy; the grid that watched it, and the lines of its rounds."""
    settings = small_settings(folder, **{"num_clients": N, "num_server_rounds": T, "batch_size": 8, **changes})
    grid = WatchedGrid(app or toy_app(), num_nodes, settings.to_run_config(), node_config)
    results = open_results_of(settings)
    recorder = Recorder(results.folder, settings.to_run_config())
    try:
        strategy = build_strategy(settings, recorder)
        strategy.privacy, strategy.wire = privacy or Privacy(), wire
        strategy.start(grid)
    finally:
        recorder.close()
        results.lock.close()
    lines = [strict_json(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    return grid, lines, strategy


def exchanged(grid, info, wire="float32"):
    """(request, reply) of every train message."""
    sizes = {"shared_size": info.shared.size}
    for message, reply in grid.of_type("train"):
        request = TrainRequest.from_message(message, Keys(), download_size=info.download.size, **sizes)
        expected = {"digest": info.digest, "upload_size": info.upload.size, "num_exits": 3, "wire": wire}
        yield request, TrainReply.from_message(reply, Keys(), Expected(base=request.shared, **sizes, **expected))


@pytest.mark.parametrize(
    "method",
    ["cafedistill", "cafedistill-plus", "cafedistill-text", "pfedgraph", "fedpac", "cafedistill-prior", "fedavg"],
)
def test_what_leaves_a_client_is_clipped_against_what_this_client_was_sent(tmp_path, no_report, method):
    """pFedGraph and FedPAC send every client its own start. What a client reports lies within C of that start: it is
    not clipped against anybody else's, or the average, which is farther away."""
    c = 1e-3
    grid, lines, strategy = federate(tmp_path, Privacy(c), method=method)
    info = strategy.directory.reference
    count, personal = 0, 0
    initial = {name: t.numpy().ravel() for name, t in toy_network_of_seed(0).items()}
    for request, reply in exchanged(grid, info):
        (report,) = reply.reports
        assert np.linalg.norm(reply.shared - request.shared) <= c * (1 + 1e-3)
        count += 1
        if method in ("pfedgraph", "fedpac") and request.downloads:
            personal += 1
            (download,) = request.downloads.values()
            received = info.download.unpack(download)
            kept = [name for name in info.upload.names if name in info.download.names and "prototypes" not in name]
            mine = info.upload.unpack(report.upload)
            change = np.concatenate([(mine[name] - received[name]).numpy().ravel() for name in kept])
            assert np.linalg.norm(change) <= c * (1 + 1e-2)
            if method == "pfedgraph":  # all that it sends; training would have gone farther
                assert np.linalg.norm(change) == pytest.approx(c, rel=1e-2)
        elif method in (
            "cafedistill",
            "cafedistill-plus",
        ):  # what it was sent; at first zeros
            (client,) = request.clients
            before = request.downloads.get(client, np.zeros(info.upload.size, dtype=np.float32))
            assert np.linalg.norm(report.upload - before) <= c * (1 + 1e-3)
        elif method == "cafedistill-text":
            head = np.concatenate([initial[name] for name in info.upload.names])
            assert np.linalg.norm(report.upload - head) <= c * (1 + 1e-3)
            assert np.linalg.norm(report.upload - head) == pytest.approx(c, rel=1e-2)  # it would have gone farther
    assert count == N * T
    if method in ("pfedgraph", "fedpac"):
        assert personal > 0
    assert all(line["left_out"] == {} for line in lines)


def toy_network_of_seed(seed):
    """The initial tensors, as every node builds them."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return toy_network().state_dict()


@pytest.mark.slow
def test_a_large_clip_norm_without_noise_changes_next_to_nothing(tmp_path, no_report):
    """Only the rounding of reference + (value − reference)."""
    _, plain, one = federate(tmp_path / "a")
    _, clipped_lines, two = federate(tmp_path / "b", Privacy(1e4))
    np.testing.assert_allclose(one.state.shared, two.state.shared, atol=1e-6)
    assert plain[-1]["train_loss"] == pytest.approx(clipped_lines[-1]["train_loss"], abs=1e-5)


@pytest.mark.slow
def test_noise_is_each_clients_own_before_the_sum_of_a_node(tmp_path, no_report):
    """Two nodes of two clients: the sum has the noise n_1·z_1 + n_2·z_2, of standard deviation σC·√(n_1² + n_2²).
    Two runs with the same seed have other secrets, so their difference is noise only, in round 1."""
    sigma, c = 3.0, 2.0
    sums = []
    for name in "ab":
        grid, _, strategy = federate(tmp_path / name, Privacy(c, noise_multiplier=sigma), num_nodes=2)
        pairs = list(exchanged(grid, strategy.directory.reference))[:2]
        sums.append([reply.shared for _, reply in pairs])
        sizes = [[r.num_examples for r in reply.reports] for _, reply in pairs]
    for first, second, examples in zip(*sums, sizes, strict=True):
        assert len(examples) == 2
        expected = sigma * c * math.sqrt(2 * sum(n * n for n in examples))
        assert (first - second).std() == pytest.approx(expected, rel=6 / math.sqrt(2 * len(first)))


@pytest.mark.slow
def test_a_message_that_arrives_twice_gets_the_same_noise_again(tmp_path, no_report):
    seen = []

    def twice(answer, message, context):
        reply = answer(message, context)
        if message.metadata.message_type == "train":
            again = answer(message, context)
            seen.append((reply.content["arrays"]["flat"].data, again.content["arrays"]["flat"].data))
        return reply

    federate(tmp_path, Privacy(1.0, noise_multiplier=1.0), app=FaultyApp(toy_app(), twice))
    assert len(seen) == N * T
    assert all(first == second for first, second in seen)
    assert len({first for first, _ in seen}) == N * T


def test_rounds_clients_and_parts_have_noise_of_their_own(tmp_path, no_report):
    """No number of a message is found in another: of the noise that dominates them."""
    sigma = 1e4
    grid, _, strategy = federate(tmp_path, Privacy(1.0, noise_multiplier=sigma), learning_rate=1e-6, mu=1e-6)
    info = strategy.directory.reference
    noises = []
    for request, reply in exchanged(grid, info):
        noises += [reply.shared - request.shared, reply.reports[0].upload]
    values = np.concatenate(noises) / sigma
    assert values.std() == pytest.approx(1.0, rel=0.1)
    shortest = min(map(len, noises))
    for i, a in enumerate(noises):
        for b in noises[:i]:
            assert abs(np.corrcoef(a[:shortest], b[:shortest])[0, 1]) < 0.99


def test_the_private_state_of_a_client_gets_no_noise(tmp_path, no_report):
    """What stays on the disk is the client's own, to the bit; what leaves is noised. After round 1, before the noise
    of others comes back."""
    uploads, states = [], []
    for name, privacy in (("a", None), ("b", Privacy(1.0, noise_multiplier=5.0))):
        _, _, strategy = federate(tmp_path / name, privacy, num_server_rounds=1)
        store = PersonalStore(tmp_path / name / "small" / "personal", strategy.state.run)
        uploads.append(strategy.state.known[0].upload)
        states.append([store.load(client, 1) for client in range(N)])
    assert np.linalg.norm(uploads[0] - uploads[1]) > 1
    assert all(same_tensors(mine, noised) for mine, noised in zip(*states, strict=True))


@pytest.mark.slow
def test_withheld_metrics_do_not_leave_the_client(tmp_path, no_report):
    """Neither in the rounds nor at the end; the run goes to its end, and the published networks are there."""
    grid, lines, strategy = federate(tmp_path, Privacy(report_metrics=False))
    for _, reply in exchanged(grid, strategy.directory.reference):
        for report in reply.reports:
            assert math.isnan(report.train_loss)
            assert report.test_examples == 0
            assert not any(report.similarity)
            assert np.isnan([*report.before.accuracy, *report.after.loss, *report.after.ece]).all()
    for _, reply in grid.of_type("evaluate"):
        for name, record in reply.content.metric_records.items():
            numbers = {k: v for k, v in record.items() if k not in ("client", "train-examples", "local-steps")}
            flat = np.concatenate([np.ravel(v) for v in numbers.values()]).astype(float)
            assert np.isnan(flat[flat != 0]).all(), name
    assert lines[-1]["accuracy_per_exit"] == [None] * 3
    folder = tmp_path / "small"
    assert strict_json((folder / "summary.json").read_text())["accuracy"] is None
    metadata = strict_json((folder / "personal" / "client-0.json").read_text())
    assert metadata["accuracy_per_exit"][0] is not None  # on the client's own disk


def test_a_node_that_demands_noise_is_left_out_of_a_run_without(tmp_path, no_report):
    grid_failed = "this node sends nothing with a noise-multiplier below 1"
    with pytest.raises(RuntimeError, match=grid_failed):
        federate(tmp_path, node_config={"noise-multiplier": 1.0})
    federate(tmp_path / "well", Privacy(1.0, noise_multiplier=1.0), node_config={"noise-multiplier": 1.0})


@pytest.mark.slow
def test_without_privacy_no_message_says_a_word_of_it(tmp_path, no_report):
    """Messages are as before; with it, every node is told."""
    grid, _, _ = federate(tmp_path)
    assert not [k for m, _ in grid.of_type("train") for k in m.content["config"] if k.startswith("privacy")]
    privacy = Privacy(0.5, 2.0, 1.5, 1e-6, report_metrics=False)
    grid, _, _ = federate(tmp_path / "told", privacy)
    for message, _ in grid.of_type("train"):
        told = {k.removeprefix("privacy."): v for k, v in message.content["config"].items() if k.startswith("privacy.")}
        assert told == {kebab(name): value for name, value in vars(privacy).items()}


# --- accounting ---


@pytest.mark.parametrize(("sigma", "rounds", "releases"), [(1.0, 1, 1), (5.0, 30, 2), (40.0, 100, 2)])
def test_epsilon_is_that_of_the_library(sigma, rounds, releases):
    """Its own call for one Gaussian of σ/√k; its accountant by privacy loss distributions, event by event, agrees to
    the width of its grid, and its Rényi accountant, a looser bound of the same, is never below."""
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting import pld, rdp

    accountants = [pld.PLDAccountant(), rdp.RdpAccountant()]
    for accountant in accountants:
        accountant.compose(dp.GaussianDpEvent(sigma), rounds * releases)
    tight, loose = (accountant.get_epsilon(1e-5) for accountant in accountants)
    mine = epsilon(sigma, rounds, delta=1e-5, releases=releases)
    assert mine == pytest.approx(dp.get_epsilon_gaussian(sigma / math.sqrt(rounds * releases), 1e-5), rel=1e-12)
    assert mine == pytest.approx(tight, rel=1e-2)
    assert mine <= loose


def test_epsilon_for_another_update_in_its_place_is_that_of_the_library():
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting import pld

    accountant = pld.PLDAccountant(dp.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp.GaussianDpEvent(10.0), 20)
    assert epsilon(10.0, 10, unit="replace") == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-2)


def test_epsilon_grows_with_rounds_and_releases_and_shrinks_with_noise_and_secret_sampling():
    pytest.importorskip("dp_accounting")
    base = epsilon(10.0, 20)
    assert epsilon(10.0, 21) > base > epsilon(10.5, 20)
    assert epsilon(10.0, 20, releases=1) == pytest.approx(epsilon(10.0, 10, releases=2))
    assert epsilon(10.0, 20, poisson_rate=0.2) < base
    assert epsilon(10.0, 20, poisson_rate=1.0) == pytest.approx(base, rel=1e-2)
    with pytest.raises(ValueError, match="not computed for so little noise"):
        epsilon(0.1, 20, poisson_rate=0.5)
    with pytest.raises(ValueError, match="only add-or-remove"):
        epsilon(10.0, 20, poisson_rate=0.5, unit="replace")


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1e6])
def test_epsilon_of_next_to_no_noise_or_of_very_much_is_a_number_at_once(sigma):
    """Privacy loss distributions would take terabytes for it."""
    pytest.importorskip("dp_accounting")
    assert epsilon(sigma, 100) == pytest.approx(0.0 if sigma > 1 else 100 / sigma**2, rel=0.2, abs=0.01)


def test_epsilon_without_noise_or_without_releases():
    assert epsilon(0.0, 3) == math.inf
    assert epsilon(1.0, 0) == epsilon(1.0, 5, releases=0) == 0.0


@pytest.mark.parametrize(
    "wrong", [{"delta": 0.0}, {"delta": 1.0}, {"unit": "example"}, {"poisson_rate": 0.0}, {"releases": -1}]
)
def test_impossible_questions_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("-")[0]):
        epsilon(1.0, 3, **wrong)


@pytest.mark.parametrize("releases", [1, 2])
def test_epsilon_is_printed_at_the_start(tmp_path, no_report, flower_log, releases):
    """With its δ and what it counts: two releases a round with CAFEDistill, one with FedPer."""
    pytest.importorskip("dp_accounting")
    method = {1: "fedper", 2: "cafedistill"}[releases]
    federate(tmp_path, Privacy(1.0, noise_multiplier=7.0, delta=1e-4), method=method)
    text = flower_log.text(logging.INFO)
    value = epsilon(7.0, T, delta=1e-4, releases=releases)
    assert f"ε = {value:.4g} at δ = 0.0001, for a client that takes part in all {T} rounds" in text
    assert f"{releases} release(s) of σ = 7" in text
    assert "report-metrics = false withholds them" in text


def test_clipping_alone_is_not_called_privacy(tmp_path, no_report, flower_log):
    federate(tmp_path, Privacy(1.0))
    assert "this is no differential privacy" in flower_log.text(logging.INFO)


def test_the_strategy_takes_privacy_and_wire():
    strategy = FederatedStrategy(method=CafeDistillMethod(), privacy=Privacy(2.0), wire="float16")
    assert (strategy.privacy, strategy.wire) == (Privacy(2.0), "float16")
    with pytest.raises(ValueError, match="wire must be one of float32, float16; got 'bfloat16'"):
        FederatedStrategy(method=CafeDistillMethod(), wire="bfloat16")


def test_runs_of_settings_have_no_privacy_unless_asked(tmp_path, no_report):
    settings = small_settings(tmp_path, num_clients=2, num_server_rounds=1)
    run_small(settings, 2, app=toy_app())
    assert build_strategy(settings).privacy == Privacy()
