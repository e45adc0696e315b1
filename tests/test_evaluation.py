"""Evaluation of finished runs: against slow references, by hand, and on a real small run."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from federations import run_small, small_settings, strict_json, toy_data, toy_network
from rich.console import Console

from cafe_flwr.data import ClientData, Split
from cafe_flwr.data.corruptions import CORRUPTIONS
from cafe_flwr.metrics import THRESHOLDS, exit_metrics
from cafe_flwr.metrics.selective import (
    POOLED,
    VOID,
    Outcome,
    calibration_error,
    confidence_and_correct,
    leaving_curve,
    over_clients,
    reliability,
    risk_coverage,
    scale_logits,
)
from cafe_flwr.personal import FinishedRun
from cafe_flwr.personal.client_evaluation import CLEAN, certify, certify_together, evaluate_client
from cafe_flwr.personal.evaluation import evaluate_run
from cafe_flwr.personal.evaluation_tables import put_together
from cafe_flwr.results.inference import TITLE, evaluation_table
from cafe_flwr.results.page import write_report
from cafe_flwr.risk import folds


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_exits(n: int = 300, m: int = 3, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Confidences on a grid, so that many are equal, and outcomes that agree with them on average."""
    confidence = rng().uniform(0.2, 1.0, size=(n, m))
    confidence = confidence.round(1) if ties else confidence
    return confidence, rng(1).random((n, m)) < confidence


# --- risk and coverage -----------------------------------------------------------------------------------------------


def test_risk_coverage_is_that_of_every_threshold() -> None:
    """Reference: for each confidence c, answer where confidence ≥ c, and count."""
    confidence, correct = (part[:, 0] for part in some_exits())
    curve = risk_coverage(confidence, correct)
    expected = []
    for c in sorted(set(confidence), reverse=True):
        answered = [right for value, right in zip(confidence, correct, strict=True) if value >= c]
        expected.append((len(answered) / len(confidence), answered.count(False) / len(answered)))
    np.testing.assert_allclose(np.stack(curve, axis=1), expected)


def test_risk_coverage_by_hand() -> None:
    """Sorted: .9 right, .8 wrong, .6 right, .5 wrong → risks 0, 1/2, 1/3, 1/2; area is their mean, 1/3."""
    curve = risk_coverage([0.5, 0.9, 0.6, 0.8], [False, True, True, False])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3, 1 / 2])
    assert curve.area == pytest.approx(1 / 3)
    tied = risk_coverage([1.0] * 4, [False, True, True, False])  # the order of what is equal must not matter
    assert (tied.coverage.tolist(), tied.risk.tolist(), tied.area) == ([1.0], [0.5], 0.5)


def test_a_long_curve_is_thinned_but_keeps_its_ends() -> None:
    confidence, correct = (part[:, 0] for part in some_exits(n=3000, ties=False))
    curve = risk_coverage(confidence, correct)
    thin = curve.thinned()
    assert len(thin.risk) == 200
    assert (thin.coverage[0], thin.coverage[-1], thin.risk[-1]) == (curve.coverage[0], 1.0, curve.risk[-1])
    assert set(thin.risk) <= set(curve.risk)
    empty = risk_coverage([], []).thinned()
    assert len(empty.risk) == len(empty.coverage) == 0
    assert np.isnan(empty.area)


def test_leaving_curve_steps_through_the_exits_one_by_one() -> None:
    confidence, correct = some_exits()
    curve = leaving_curve(confidence, correct)
    expected: dict[float, float] = {}
    for threshold in reversed(THRESHOLDS):
        early = wrong = 0
        for row, right in zip(confidence, correct, strict=True):
            k = next((k for k in range(2) if row[k] >= threshold), None)
            if k is not None:
                early, wrong = early + 1, wrong + (not right[k])
        if early:
            expected.setdefault(early / len(confidence), wrong / early)
    assert dict(zip(curve.coverage.tolist(), curve.risk.tolist(), strict=True)) == pytest.approx(expected)
    assert (np.diff(curve.coverage) > 0).all()


def test_outcome_by_hand() -> None:
    """Five examples, three exits: left at 1 right, at 1 wrong (last right), at 2 wrong (last wrong), at 3 both ways.

    Coverage 3/5, of these 2 wrong: selective risk 2/3, joint 2/5. Accuracy 2/5, full 3/5: gap 1/5.
    MACs (10 + 10 + 20 + 40 + 40)/5 = 24, a reduction of 0.4.
    """
    right = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]], dtype=bool)
    outcome = Outcome.of(np.array([0, 0, 1, 2, 2]), right)
    assert outcome.measures([10, 20, 40]) == pytest.approx(
        {"coverage": 0.6, "selective_risk": 2 / 3, "joint_risk": 0.4, "gap": 0.2, "accuracy": 0.4}
        | {"accuracy_full": 0.6, "macs": 24.0, "macs_reduction": 0.4}
    )
    assert outcome.shares() == [0.4, 0.2, 0.4]
    halves = Outcome.of(np.array([0, 0]), right[:2]), Outcome.of(np.array([1, 2, 2]), right[2:])
    assert Outcome.total(halves) == outcome
    nobody = Outcome.of(np.zeros(0, dtype=int), np.zeros((0, 3), dtype=bool))
    assert np.isnan([*nobody.measures([1, 2, 3]).values(), *nobody.shares()]).all()


def test_reliability_bins_have_the_ece_of_the_metrics() -> None:
    logits = torch.from_numpy(rng().normal(scale=2.0, size=(2, 400, 4))).float()
    y = torch.from_numpy(rng(1).integers(4, size=400))
    confidence, correct = confidence_and_correct(logits, y)
    bins = [reliability(confidence[:, k], correct[:, k]) for k in range(2)]
    assert [calibration_error(b) for b in bins] == pytest.approx(exit_metrics(logits, y).ece, abs=1e-6)
    assert [sum(b["share"] for b in exit_bins) for exit_bins in bins] == pytest.approx([1.0, 1.0])
    assert reliability([1.0], [True]) == [{"confidence": 1.0, "accuracy": 1.0, "share": 1.0}]


def test_over_clients_knows_which_way_is_worse() -> None:
    values, weights = [*np.linspace(0, 1, 20), np.nan], [*range(1, 21), 1000]
    accuracy, risk = (over_clients(values, weights, name) for name in ("accuracy", "selective_risk"))
    assert accuracy["mean"] == pytest.approx(0.5)
    assert accuracy["weighted_mean"] == pytest.approx(np.average(values[:-1], weights=weights[:-1]))
    assert accuracy["std"] == pytest.approx(np.std(values[:-1]))
    assert accuracy["worst_tenth"] == pytest.approx((0 + 1 / 19) / 2)
    assert risk["worst_tenth"] == pytest.approx((1 + 18 / 19) / 2)
    assert accuracy["clients"] == 20
    assert np.isnan(over_clients([np.nan], [3], "ece")["mean"])


# --- one client ------------------------------------------------------------------------------------------------------


def logits_of(n: int, seed: int = 0, m: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Exits that get better with depth."""
    y = torch.from_numpy(rng(seed).integers(5, size=n))
    noise = torch.from_numpy(rng(seed + 1).normal(size=(m, n, 5))).float()
    return noise + torch.arange(2.0, 2.0 + m)[:, None, None] * torch.nn.functional.one_hot(y, 5), y


def test_labels_that_certify_have_no_part_in_the_confidences() -> None:
    z, y = logits_of(300)
    temperatures, found = certify(z, y, [0.1], "selective", seed=3)
    _, certification = folds(300, 3)
    other = y.clone()
    other[torch.from_numpy(certification)] = (y[torch.from_numpy(certification)] + 1) % 5
    spoilt_temperatures, spoilt = certify(z, other, [0.1], "selective", seed=3)
    assert spoilt_temperatures == temperatures
    assert found[0.1].certified
    assert found[0.1].thresholds is not None
    assert found[0.1].thresholds.temperatures == tuple(temperatures)
    assert not spoilt[0.1].certified, "wrong labels in the certification fold must be noticed"
    assert "never leave early" in spoilt[0.1].reason


@pytest.mark.slow
def test_certificates_hold_on_new_examples() -> None:
    """Over 60 draws the true risk of certified thresholds exceeds α = 0.1 in at most δ = 0.1 of them (+ 3 s.e.)."""
    fresh, labels = logits_of(20_000, seed=999)
    above = certified = 0
    for seed in range(60):
        temperatures, found = certify(*logits_of(250, seed=10 * seed + 1), [0.1], "selective", seed)
        outcome = found[0.1].outcome(*confidence_and_correct(scale_logits(fresh, temperatures), labels))
        certified += found[0.1].certified
        above += outcome is not None and outcome.measures([1, 2, 3])["selective_risk"] > 0.1
    assert certified > 30
    assert above <= 60 * (0.1 + 3 * np.sqrt(0.1 * 0.9 / 60))


def spoilt_test(data: ClientData) -> ClientData:
    y = (data.test.y + 1) % 3
    return replace(data, test=Split(3 * data.test.x + 1, y, data.test.source))


def test_nothing_is_chosen_on_test_data() -> None:
    """Other test inputs and labels: the same temperatures, certificates and pooled thresholds."""
    large = ClientData(toy_data(0).train, *(logit_split(n, seed) for n, seed in ((200, 5), (50, 6))))
    torch.manual_seed(0)
    network = toy_network()
    options: dict[str, Any] = {"risks": [0.6], "guarantee": "selective", "seed": 0}
    a, b = (evaluate_client(0, network, data, [CLEAN], **options) for data in (large, spoilt_test(large)))
    assert a.measured[CLEAN].exits != b.measured[CLEAN].exits
    assert a.temperatures == b.temperatures
    assert a.certificates == b.certificates
    assert certify_together([a], **options) == certify_together([b], **options)


@pytest.mark.slow
def test_severity_is_measured_by_images_outside_the_test(finished: FinishedRun) -> None:
    data, network = finished.data(0), finished.personal(0).network
    brighter = replace(data, test=Split(10 * data.test.x, data.test.y, data.test.source))
    options: dict[str, Any] = {"risks": [0.1], "guarantee": "selective", "seed": 0}
    a, b = (evaluate_client(0, network, d, [CLEAN, ("noise", 1)], **options) for d in (data, brighter))
    assert a.values == b.values == pytest.approx((-0.75, 1.7), abs=0.1)


def logit_split(n: int, seed: int) -> Split:
    """Inputs of the toy network."""
    x = torch.from_numpy(rng(seed).normal(size=(n, 5))).float()
    return Split(x, torch.from_numpy(rng(seed + 1).integers(3, size=n)))


def test_one_exit_has_nothing_to_certify() -> None:
    found = evaluate_client(0, toy_network(exits=1), toy_data(0), [CLEAN], risks=[0.1], guarantee="selective", seed=0)
    assert found.certificates == certify_together([found], [0.1], "selective", 0) == {}
    together = put_together([found], {}, guarantee="selective")
    assert together["conditions"][0]["dynamic"] == []
    assert len(together["conditions"][0]["exits"]["accuracy"]["mean"]) == 1


# --- a real run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Five clients with digits and about seven calibration examples each."""
    folder = tmp_path_factory.mktemp("runs")
    settings = small_settings(folder, num_server_rounds=6, local_steps=6, examples_per_client=60)
    run_small(settings)
    return FinishedRun(settings.results)


@pytest.fixture(scope="module")
def evaluation(finished: FinishedRun) -> dict[str, Any]:
    return evaluate_run(finished, risks=(0.1, 0.6), severities=(1, 5))


@pytest.mark.slow
def test_clean_figures_are_those_of_the_summary(finished: FinishedRun, evaluation: dict[str, Any]) -> None:
    """Written by other code, from what the clients reported at the end of the run."""
    summary = json.loads((finished.folder / "summary.json").read_text())
    clean = evaluation["conditions"][0]
    assert (clean["corruption"], clean["severity"], clean["label"]) == ("none", 0, "")
    for measure, key in (("accuracy", "accuracy_per_exit"), ("ece", "ece_per_exit"), ("nll", "loss_per_exit")):
        assert clean["exits"][measure]["mean"] == pytest.approx(summary[key], abs=1e-6)
    for key in ("accuracy", "macs"):
        assert clean["curve"][key] == pytest.approx(summary["curve"][key])
    assert clean["curve"]["area"] == pytest.approx(summary["accuracy_macs_area"])
    assert evaluation["macs_per_exit"] == summary["macs_per_exit"]
    assert [c["test"] for c in evaluation["clients"]] == [c["test"] for c in summary["clients"]]


@pytest.mark.slow
def test_every_corruption_is_there_and_its_guarantee_void(evaluation: dict[str, Any]) -> None:
    conditions = [(c["corruption"], c["severity"]) for c in evaluation["conditions"]]
    assert conditions == [("none", 0), *((name, s) for name in CORRUPTIONS for s in (1, 5))]
    accuracy = [np.mean(c["exits"]["accuracy"]["mean"]) for c in evaluation["conditions"]]
    assert min(accuracy[1:]) < accuracy[0] - 0.05, "the worst corruption must do harm"
    for condition in evaluation["conditions"][1:]:
        assert condition["label"] == VOID
        assert {row["label"] for row in condition["dynamic"]} == {VOID}
    pooled = [row for row in evaluation["conditions"][0]["dynamic"] if row["thresholds"] == "pooled"]
    assert {row["label"] for row in pooled} == {POOLED}
    assert {entry["label"] for entry in evaluation["pooled"]} == {POOLED}


@pytest.mark.slow
def test_small_clients_are_not_certified_and_the_number_needed_is_said(evaluation: dict[str, Any]) -> None:
    for client in evaluation["clients"]:
        strict, lax = client["certificates"]
        assert not strict["certified"]
        assert (strict["thresholds"], strict["test"]) == (None, None)
        assert strict["reason"].startswith(f"{client['calibration']} examples are too few to certify risk 0.1")
        assert "at least 32 are needed" in strict["reason"]
        assert lax["certified"] == (not lax["reason"])
    of_own = {r["risk"]: r for r in evaluation["conditions"][0]["dynamic"] if r["thresholds"] == "own"}
    assert (of_own[0.1]["clients"], of_own[0.1]["all"]) == (0, None)
    assert of_own[0.6]["clients"] == sum(c["certificates"][1]["certified"] for c in evaluation["clients"])


@pytest.mark.slow
def test_files_hold_what_was_returned(finished: FinishedRun, evaluation: dict[str, Any]) -> None:
    written = strict_json((finished.folder / "evaluation.json").read_text())
    assert written.keys() == evaluation.keys()
    table = pd.read_parquet(finished.folder / "evaluation.parquet")
    rows = table[table["measure"] == "accuracy"]
    for condition in written["conditions"]:
        here = rows[(rows["corruption"] == condition["corruption"]) & (rows["severity"] == condition["severity"])]
        exits = here[here["exit"] > 0].groupby("exit")["value"].mean()
        assert exits.tolist() == pytest.approx(condition["exits"]["accuracy"]["mean"])
        for row in condition["dynamic"]:
            at = here[(here["thresholds"] == row["thresholds"]) & (here["risk"] == row["risk"]) & (here["exit"] == 0)]
            assert len(at) == row["clients"]
            if row["all"]:
                assert np.average(at["value"], weights=at["examples"]) == pytest.approx(row["all"]["accuracy"])
    per_client = rows[(rows["corruption"] == "none") & (rows["exit"] == 1)]["value"].tolist()
    assert per_client == pytest.approx([c["accuracy"][0] for c in written["clients"]])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(finished: FinishedRun) -> None:
    options: dict[str, Any] = {"clients": [1, 3], "corruptions": ["noise"], "severities": [3]}
    calls: list[tuple[int, int]] = []
    before = {name: (finished.folder / name).read_bytes() for name in ("settings.json", "summary.json")}
    first = evaluate_run(finished, **options, progress=lambda done, total: calls.append((done, total)))
    files = [(finished.folder / f"evaluation.{kind}").read_bytes() for kind in ("json", "parquet")]
    evaluate_run(finished, **options)
    assert files == [(finished.folder / f"evaluation.{kind}").read_bytes() for kind in ("json", "parquet")]
    assert evaluate_run(finished, **options, seed=1)["conditions"][1] != first["conditions"][1]
    assert [c["client"] for c in first["clients"]] == [1, 3]
    assert calls == [(0, 2), (1, 2), (2, 2)]
    assert before == {name: (finished.folder / name).read_bytes() for name in before}


@pytest.mark.slow
def test_a_shift_of_the_run_itself_voids_the_guarantee(tmp_path: Path, no_report: None) -> None:
    settings = small_settings(tmp_path, num_server_rounds=1, num_clients=2, test_shift=0.5)
    run_small(settings)
    found = evaluate_run(FinishedRun(settings.results), corruptions=[])
    (clean,) = found["conditions"]
    assert clean["label"] == VOID
    assert {row["label"] for row in clean["dynamic"]} == {VOID}
    assert VOID in found["notes"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": [1, 7]}, r"clients \[7\] have no personal network"),
        ({"clients": []}, "no personal network to evaluate"),
        ({"guarantee": "surely"}, "selective, joint, gap, got 'surely'"),
        ({"risks": [0.05, 5]}, r"between 0 and 1, e.g. 0.05 for 5 %, got \[5\]"),
        ({"corruptions": ["fog"]}, r"noise, blur, .*got \['fog'\]"),
        ({"severities": [0, 3]}, r"1 \(slight\) to 5, got \[0\]"),
    ],
)
def test_refused(finished: FinishedRun, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_run(finished, **change)


# --- for people ------------------------------------------------------------------------------------------------------

FIGURES = ("Reliability", "Risk against coverage", "Where inputs leave, by risk", "Accuracy against cost, corrupted")


def page_with(finished: FinishedRun, evaluation: Any) -> str:
    path = finished.folder / "evaluation.json"
    path.unlink(missing_ok=True)
    if evaluation is not None:
        path.write_text(json.dumps(evaluation))
    return write_report(finished.folder).read_text()


def plain(evaluation: dict[str, Any]) -> Any:
    """As read again from JSON, where NaN and infinity are null."""
    text = json.dumps(evaluation).replace("NaN", "null").replace("Infinity", "null")
    return json.loads(text)


@pytest.mark.slow
def test_page_with_and_without_evaluation(finished: FinishedRun, evaluation: dict[str, Any]) -> None:
    without, page = page_with(finished, None), page_with(finished, plain(evaluation))
    assert TITLE not in without
    assert VOID not in without
    for words in (f"<h2>{TITLE}</h2>", *FIGURES, VOID, POOLED, "pixelate 5", "at least 32 are needed"):
        assert words in page, words
    assert page.count("<svg") == without.count("<svg") + len(FIGURES)
    assert page.count("<figcaption>") == page.count("<figure>")
    assert "#0a00" not in page, "a stand-in colour is left"
    assert "nan" not in page.lower().split()


def without_keys(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {k: without_keys(v, key) for k, v in value.items() if k != key}
    return [without_keys(v, key) for v in value] if isinstance(value, list) else value


def nulled(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {k: None if k == key else nulled(v, key) for k, v in value.items()}
    return [nulled(v, key) for v in value] if isinstance(value, list) else value


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {*value} | {key for v in value.values() for key in keys_of(v)}
    return {key for v in value for key in keys_of(v)} if isinstance(value, list) else set()


@pytest.mark.slow
def test_missing_and_null_entries_do_not_break_table_or_figures(
    finished: FinishedRun, evaluation: dict[str, Any]
) -> None:
    from cafe_flwr.results.inference import FIGURES as DRAWINGS
    from cafe_flwr.results.run import read_run

    whole = plain(evaluation) | {"conditions": plain(evaluation)["conditions"][:3]}
    run = read_run(finished.folder)
    for key in sorted(keys_of(whole)):
        for broken in (without_keys(whole, key), nulled(whole, key)):
            evaluation_table(broken)
            for draw in DRAWINGS.values():
                draw(replace(run, evaluation=broken))


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"conditions": 3, "risks": null, "reliability": [[], 4]}'])
def test_a_damaged_evaluation_leaves_the_page_standing(finished: FinishedRun, content: str) -> None:
    (finished.folder / "evaluation.json").write_text(content)
    page = write_report(finished.folder).read_text()
    assert ("evaluation.json cannot be read" in page) == (content in ("{", "[1]"))
    assert "Accuracy over rounds" in page


@pytest.mark.slow
def test_table_in_the_terminal(evaluation: dict[str, Any]) -> None:
    console = Console(width=130, record=True, file=io.StringIO())
    console.print(evaluation_table(evaluation))
    text = console.export_text()
    clean = evaluation["conditions"][0]
    line = next(line for line in text.splitlines() if "as it is" in line)
    assert " ".join(f"{a:.3f}" for a in clean["exits"]["accuracy"]["mean"]) in line
    at = next(r["all"] for r in clean["dynamic"] if r["thresholds"] == "pooled" and r["risk"] == 0.6)
    if at["coverage"] > 0:
        assert f"{at['selective_risk']:.3f} at {100 * at['coverage']:.0f} %" in line
    assert "contrast 5" in text
    assert VOID in text
    assert "0 of 5 clients certified" in text
