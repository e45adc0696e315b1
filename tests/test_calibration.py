"""Thresholds for the clients of a run: from its folder, and through Flower messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federations import changed, digits_app, run_federation, small_settings
from typer.testing import CliRunner

from cafe_flwr.app.run import calibrate
from cafe_flwr.data import Split
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.inference import EarlyExitRunner
from cafe_flwr.personal import FinishedRun, fingerprint
from cafe_flwr.personal.calibration import calibrate_run, read_thresholds
from cafe_flwr.risk.client_calibration import ClientCalibration, Request, decide
from cafe_flwr.risk.counts import pooled_path
from cafe_flwr.settings import Settings
from cafe_flwr.wire.calibration import (
    certificate_from_json,
    certificate_to_json,
    counts_from_json,
    counts_to_json,
    histogram_from_json,
    histogram_to_json,
    path_from_json,
    path_to_json,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A finished run with enough calibration examples for pooled claims."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        settings = small_settings(
            tmp_path_factory.mktemp("runs"),
            num_server_rounds=12,
            examples_per_client=300,
            calibration_share=0.4,
            local_steps=8,
        )
        run_federation(InProcessGrid(digits_app(), 2, settings.to_run_config()), settings)
    return settings


@pytest.mark.slow
def test_every_client_gets_thresholds_that_its_network_takes(settings: Settings) -> None:
    run = FinishedRun(settings.results)
    found = calibrate_run(run, Request(risk=0.2))
    assert [line["client"] for line in found["clients"]] == run.clients
    assert any(line["coverage"] > 0 for line in found["clients"])  # otherwise this shows nothing
    for line in found["clients"]:
        personal = run.personal(line["client"])
        thresholds = read_thresholds(run.folder / "personal", line["client"])
        assert thresholds is not None
        assert thresholds.fingerprint == fingerprint(personal.network)
        assert thresholds.certified == (line["basis"] != "not certified")
        left = EarlyExitRunner(personal.network, thresholds).predict(run.data(line["client"]).test.x).exits
        assert thresholds.certified or (left == personal.network.num_exits - 1).all()


@pytest.mark.slow
def test_thresholds_of_one_network_are_refused_by_another(settings: Settings) -> None:
    run = FinishedRun(settings.results)
    calibrate_run(run, Request(risk=0.2))
    thresholds = read_thresholds(run.folder / "personal", 0)
    assert thresholds is not None
    with pytest.raises(ValueError, match=thresholds.fingerprint):
        EarlyExitRunner(run.personal(1).network, thresholds)


@pytest.mark.slow
def test_flower_gives_what_the_folder_gives(settings: Settings) -> None:
    """Nodes are asked by three messages; the certificates and the files are those of the local command."""
    run = FinishedRun(settings.results)
    asked = changed(settings, {"mode": "calibrate", "calibration.risk": 0.2})
    local = calibrate_run(run, Request(risk=0.2, seed=settings.seed))
    files = {c: read_thresholds(run.folder / "personal", c) for c in run.clients}
    for c in run.clients:
        (run.folder / "personal" / f"client-{c}.thresholds.json").unlink()
    for nodes in (2, 5):
        grid = InProcessGrid(digits_app(), nodes, asked.to_run_config())
        assert calibrate(grid, asked) == local
        assert {c: read_thresholds(run.folder / "personal", c) for c in run.clients} == files


@pytest.mark.slow
def test_the_server_app_calibrates_when_the_mode_says_so(settings: Settings) -> None:
    from flwr.app import Context, RecordDict

    import server_app

    asked = changed(settings, {"mode": "calibrate", "calibration.risk": 0.25})
    config = asked.to_run_config()
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    before = (settings.results / "summary.json").read_bytes()
    server_app.app(InProcessGrid(digits_app(), 2, config), context)
    assert json.loads((settings.results / "calibration.json").read_text())["risk"] == 0.25
    assert (settings.results / "summary.json").read_bytes() == before  # nothing of the run is touched


@pytest.mark.slow
def test_a_client_without_network_is_named_and_the_others_go_on(settings: Settings, flower_log: Any) -> None:
    personal = settings.results / "personal"
    hidden = {path: path.read_bytes() for path in personal.glob("client-3.*")}
    for path in hidden:
        path.unlink()
    try:
        asked = changed(settings, {"mode": "calibrate", "calibration.risk": 0.2})
        found = calibrate(InProcessGrid(digits_app(), 2, asked.to_run_config()), asked)
    finally:
        for path, content in hidden.items():
            path.write_bytes(content)
    assert [line["client"] for line in found["clients"]] == [0, 1, 2, 4]
    assert "client 3" in flower_log.text()


def test_what_travels_survives_the_way() -> None:
    rng = np.random.default_rng(0)
    sides = [_side(c, rng) for c in range(3)]
    histograms = [side.histogram() for side in sides]
    path = pooled_path(histograms)
    counts = {c: side.counts(path) for c, side in enumerate(sides)}
    certificates = decide(counts, path, Request(risk=0.3))
    for h in histograms:
        again = histogram_from_json(histogram_to_json(h))
        assert all((a == b).all() for a, b in zip(h, again, strict=True))
    assert (path_from_json(path_to_json(path)).thresholds == path.thresholds).all()
    for c, value in counts.items():
        for fold, again_fold in zip(value, counts_from_json(counts_to_json(value)), strict=True):
            assert again_fold.n == fold.n
            assert (again_fold.left == fold.left).all()
            assert (again_fold.ever_wrong == fold.ever_wrong).all()
        assert certificate_from_json(certificate_to_json(certificates[c])) == certificates[c]


def test_the_two_folds_never_meet() -> None:
    """A third shapes the path, the rest is counted; together they are all examples, once each."""
    side = _side(0, np.random.default_rng(1))
    both = np.concatenate([side.proposal, side.certification])
    assert sorted(both.tolist()) == list(range(len(side.confidence)))
    assert len(side.proposal) == len(side.confidence) // 3
    assert side.histogram().examples.sum(axis=1).tolist() == [len(side.proposal)] * 2


def test_labels_that_the_network_does_not_know_are_refused() -> None:
    from federations import toy_network, toy_split

    network = toy_network()
    x, y, _ = toy_split(0, 12, 0)
    with pytest.raises(ValueError, match=r"client 7 has calibration labels 0\.\.9, its network knows 0\.\.2"):
        ClientCalibration(7, network, Split(x, torch.cat([y[:-1], torch.tensor([9])])), seed=0)


@pytest.mark.slow
def test_the_command_shows_claims_and_refuses_bad_risks(settings: Settings) -> None:
    from cafe_flwr.cli import app

    result = CliRunner().invoke(app, ["calibrate", str(settings.results), "--risk", "0.2"])
    assert result.exit_code == 0, result.output
    assert "certified by" in result.output
    assert json.loads((settings.results / "calibration.json").read_text())["risk"] == 0.2
    refused = CliRunner().invoke(app, ["calibrate", str(settings.results), "--risk", "1.5"])
    assert refused.exit_code == 1
    assert "risk must lie strictly between 0 and 1" in refused.output


def _side(client: int, rng: np.random.Generator) -> ClientCalibration:
    from federations import toy_network

    torch.manual_seed(0)
    network = toy_network()
    x = torch.from_numpy(rng.normal(size=(90, 5))).float()
    with torch.no_grad():
        y = network(x)[-1].argmax(1)
    return ClientCalibration(client, network, Split(x, y), seed=0)


def test_a_damaged_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    assert read_thresholds(tmp_path, 0) is None
    (tmp_path / "client-0.thresholds.json").write_text('{"thresholds": [1]}')
    with pytest.raises(ValueError, match=r"client-0\.thresholds\.json is damaged"):
        read_thresholds(tmp_path, 0)
