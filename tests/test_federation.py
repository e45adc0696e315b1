"""A federation from settings to files: what a run leaves behind, and that it is the same run however it was run."""

import io
import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from federations import (
    Recorded,
    WatchedGrid,
    asked,
    digits_app,
    facts_and_tensors,
    personal_of_the_run,
    results_of,
    run_small,
    run_until,
    same_arrays,
    same_tensors,
    small_settings,
    strict_json,
    value_of,
)
from rich.console import Console
from safetensors.torch import load_file

from cafe_flwr import make_client_app
from cafe_flwr.app.page import write_page
from cafe_flwr.app.parts import build_network, federation
from cafe_flwr.app.run import build_strategy
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.data.options import Data
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.methods import METHODS
from cafe_flwr.results.recorder import Recorder
from cafe_flwr.results.tables import final_table
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.training.objectives import ERDE
from cafe_flwr.wire.options import Privacy

EXITS = 3
CLIENTS = 5


# --- what a run leaves behind ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 5 clients on 2 nodes with its report: the folder, its settings, Flower's result and the messages."""
    settings = small_settings(tmp_path_factory.mktemp("finished"))
    grid = WatchedGrid(digits_app(), 2, settings.to_run_config())
    result = run_small(settings, grid=grid)
    return settings.results, settings, result, grid


def test_all_files_are_there_and_nothing_else(finished):
    """The results folder is what the README lists; nothing is left of temporary files."""
    folder, _, _, _ = finished
    assert {p.name for p in folder.iterdir()} == {
        "settings.json",
        "summary.json",
        "rounds.jsonl",
        "clients.parquet",
        "personal",
        "checkpoint",
        "report.html",
        ".lock",
    }
    personal = {p.name for p in (folder / "personal").iterdir()}
    expected = {f"client-{c}.{kind}" for c in range(CLIENTS) for kind in ("safetensors", "json")}
    assert personal == expected | {"versions", "locks"}
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp")]
    assert all(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def test_settings_on_disk_are_those_of_the_run(finished):
    folder, settings, _, _ = finished
    assert strict_json((folder / "settings.json").read_text()) == settings.to_run_config()


def test_summary_has_what_is_promised_and_it_agrees_with_the_long_table(finished):
    folder, settings, _, _ = finished
    summary = strict_json((folder / "summary.json").read_text())
    promised = (
        "method seed num_rounds num_clients accuracy_per_exit accuracy accuracy_last_exit macs_per_exit "
        "macs_reduction_at_equal_accuracy bytes_up_per_client_round bytes_down_per_client_round seconds "
        "accuracy_ensemble accuracy_after_training accuracy_adapted accuracy_macs_area local_steps_per_client"
    )
    assert set(promised.split()) <= set(summary)
    assert (summary["method"], summary["seed"]) == ("cafedistill", 0)
    assert (summary["num_rounds"], summary["num_clients"]) == (4, CLIENTS)

    final = pd.read_parquet(folder / "clients.parquet").query("phase == 'final'")
    per_exit = final.groupby("exit").accuracy.mean()
    assert summary["accuracy_per_exit"] == pytest.approx(per_exit.tolist(), abs=1e-12)
    assert summary["accuracy"] == pytest.approx(per_exit.mean(), abs=1e-12)
    assert summary["accuracy_last_exit"] == summary["accuracy_per_exit"][-1]
    assert summary["loss_per_exit"] == pytest.approx(final.groupby("exit").loss.mean().tolist(), abs=1e-12)
    assert summary["ece_per_exit"] == pytest.approx(final.groupby("exit").ece.mean().tolist(), abs=1e-12)
    of_clients = final.groupby("client").accuracy.mean()
    assert summary["accuracy_std_over_clients"] == pytest.approx(of_clients.std(ddof=0))
    assert summary["accuracy_worst_tenth"] == pytest.approx(of_clients.min())
    assert summary["seconds"] > 0

    trained = pd.read_parquet(folder / "clients.parquet").query("phase == 'after' and round == 4")
    after = trained.groupby("exit").accuracy.mean()
    assert summary["accuracy_per_exit_after_training"] == pytest.approx(after.tolist(), abs=1e-12)
    assert summary["accuracy_after_training"] == pytest.approx(after.mean(), abs=1e-12)
    assert summary["local_steps_per_client"] == 4 * 2

    # After rounds 1 to 3 as measured before rounds 2 to 4, and after round 4.
    before = pd.read_parquet(folder / "clients.parquet").query("phase == 'before' and round > 1")
    held = [*before.groupby(["round", "exit"]).accuracy.mean().groupby("round").mean(), summary["accuracy"]]
    assert (summary["last_five"]["rounds"], summary["last_five"]["count"]) == ([1, 2, 3, 4], 4)
    assert summary["last_five"]["accuracy"] == pytest.approx(sum(held) / 4, abs=1e-12)
    assert (summary["accuracy_adapted"], summary["accuracy_per_exit_adapted"]) == (None, [None] * EXITS)  # no prior

    network = build_network(settings)
    assert summary["macs_per_exit"] == macs_per_exit(network, torch.zeros(1, 1, 16, 16))
    assert summary["num_parameters"] == sum(t.numel() for t in network.state_dict().values())


def test_the_ensemble_in_the_summary_is_that_of_the_personal_networks(finished):
    """The mean over clients of the accuracy of the mean of all exits' probabilities."""
    folder, settings, _, _ = finished
    accuracies = []
    for client in range(CLIENTS):
        network = build_network(settings).eval()
        network.load_state_dict(load_file(folder / "personal" / f"client-{client}.safetensors"))
        test = federation(settings).load(client).test
        with torch.no_grad():
            p = torch.stack([z.double().softmax(1) for z in network(test.x)]).mean(0)
        accuracies.append((p.argmax(1) == test.y).double().mean().item())
    summary = strict_json((folder / "summary.json").read_text())
    assert summary["accuracy_ensemble"] == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_the_area_in_the_summary_is_that_of_its_curve(finished):
    """Mean over MACs, from those of the first exit to those of all, of the best accuracy for so many or fewer."""
    folder, _, _, _ = finished
    summary = strict_json((folder / "summary.json").read_text())
    points = sorted(zip(summary["curve"]["macs"], summary["curve"]["accuracy"], strict=True))
    assert (points[0][0], points[-1][0]) == (summary["macs_per_exit"][0], summary["macs_per_exit"][-1])
    area, best = 0.0, points[0][1]
    for (x, _), (next_x, accuracy) in itertools.pairwise(points):
        area += (next_x - x) * (best + max(best, accuracy)) / 2
        best = max(best, accuracy)
    assert summary["accuracy_macs_area"] == pytest.approx(area / (points[-1][0] - points[0][0]))


@pytest.mark.slow
def test_steps_of_fine_tuning_count(tmp_path, no_report):
    """Four rounds of two steps and fine-tuning worth three; with two phases each its own, twice as many."""
    for method, changes, steps in (
        ("fedbabu", {"fedbabu_finetune_rounds": 3}, 4 * 2 + 3 * 2),
        ("ditto", {}, 4 * 2),
        ("ditto", {"equal_steps": False}, 4 * 2 * 2),
    ):
        settings = small_settings(tmp_path, method=method, **changes)
        run_small(settings)
        summary = strict_json((settings.results / "summary.json").read_text())
        assert summary["local_steps_per_client"] == steps


def test_summary_counts_the_clients_own_data(finished):
    folder, settings, _, _ = finished
    rows = strict_json((folder / "summary.json").read_text())["clients"]
    assert [row["client"] for row in rows] == list(range(CLIENTS))
    for row in rows:
        data = federation(settings).load(row["client"])
        sizes = (len(data.train), len(data.calibration), len(data.test), len(data.train.y.unique()))
        assert (row["train"], row["calibration"], row["test"], row["classes"]) == sizes


def test_a_line_a_round_agrees_with_the_long_table(finished):
    """⌊R·m·n⌋ with R = ((t − 1)/2)·(2/3) for T = 4: 0, 5, 10 and 10 of 15 exits; exit 1 trains in any case.

    Conflict may hold exit 2 back in round 3; in round 4 the ramp is beyond its bound by 1/3, and conflict below that.
    """
    folder, _, _, _ = finished
    lines = [strict_json(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    table = pd.read_parquet(folder / "clients.parquet")
    for line in lines:
        assert line["participants"] == list(range(CLIENTS))
        assert line["left_out"] == {}
        assert line["active_exits"] in {1: [[5, 0]], 2: [[5, 0]], 4: [[5, 5]]}.get(
            line["round"], [[5, of_second] for of_second in range(6)]
        )
        for key, phase in (("accuracy_per_exit", "before"), ("accuracy_per_exit_after", "after")):
            rows = table[(table["round"] == line["round"]) & (table.phase == phase)]
            assert line[key] == pytest.approx(rows.groupby("exit").accuracy.mean().tolist(), abs=1e-12)
        seconds = line["seconds"]
        assert {"total", "train", "evaluate"} <= set(seconds)
        parts = sum(value for key, value in seconds.items() if key != "total")
        assert parts == pytest.approx(seconds["total"], rel=1e-6)
        assert min(seconds.values()) >= 0


def test_bytes_are_those_of_the_messages(finished):
    folder, _, _, grid = finished
    lines = [strict_json(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        exchanged = [(m, r) for m, r in grid.of_type("train") if m.content["config"]["server-round"] == line["round"]]
        assert len(exchanged) == 2
        arrays = [sum(len(a.data) for a in x.content["arrays"].values()) for m, r in exchanged for x in (m, r)]
        down, up = sum(arrays[::2]), sum(arrays[1::2])
        assert down <= line["bytes_down"] < down + 5000
        assert up <= line["bytes_up"] < up + 5000
    summary = strict_json((folder / "summary.json").read_text())
    for way in ("up", "down"):
        mean = sum(line[f"bytes_{way}"] for line in lines) / (4 * CLIENTS)
        assert summary[f"bytes_{way}_per_client_round"] == pytest.approx(mean, abs=0.5)


def test_the_long_table_has_every_client_exit_and_phase_of_every_round_once(finished):
    folder, settings, _, _ = finished
    table = pd.read_parquet(folder / "clients.parquet")
    assert list(table.columns) == ["round", "client", "phase", "exit", "accuracy", "loss", "ece", "examples"]
    key = ["round", "client", "phase", "exit"]
    got = sorted(table[key].itertuples(index=False, name=None))
    expected = [
        (t, c, phase, k)
        for t in (1, 2, 3, 4)
        for c in range(CLIENTS)
        for phase in ("before", "after")
        for k in range(1, EXITS + 1)
    ] + [(4, c, "final", k) for c in range(CLIENTS) for k in range(1, EXITS + 1)]
    assert got == sorted(expected)
    for client, rows in table.groupby("client"):
        assert set(rows.examples) == {len(federation(settings).load(client).test)}
    assert table.accuracy.between(0, 1).all()
    assert table.ece.between(0, 1).all()
    assert (table.loss > 0).all()


def test_the_long_table_keeps_every_digit(finished):
    """What a client measured comes back from the file bit for bit."""
    folder, _, _, _ = finished
    final = pd.read_parquet(folder / "clients.parquet").query("phase == 'final'")
    for client, rows in final.groupby("client"):
        metadata = strict_json((folder / "personal" / f"client-{client}.json").read_text())
        assert rows.accuracy.tolist() == metadata["accuracy_per_exit"]


@pytest.mark.parametrize("client", range(CLIENTS))
def test_a_personal_network_loads_and_reproduces_its_recorded_accuracy(finished, client):
    """The published network is the shared part of the last round and the client's own heads, whole and usable.

    The last one is the mixture that the server has made of it after the round.
    """
    folder, settings, result, _ = finished
    network = build_network(settings)
    tensors = load_file(folder / "personal" / f"client-{client}.safetensors")
    network.load_state_dict(tensors, strict=True)
    network.eval()
    test = federation(settings).load(client).test
    with torch.no_grad():
        logits = torch.stack(network(test.x)).numpy()
    accuracy = (logits.argmax(axis=2) == test.y.numpy()).mean(axis=1)

    metadata = strict_json((folder / "personal" / f"client-{client}.json").read_text())
    assert metadata["client"] == client
    assert (metadata["round"], metadata["method"]) == (4, "cafedistill")
    assert (metadata["num_exits"], metadata["num_classes"]) == (EXITS, 10)
    assert metadata["personal"] == network.personal_names()
    assert metadata["accuracy_per_exit"] == pytest.approx(accuracy, abs=1e-7)
    rows = pd.read_parquet(folder / "clients.parquet").query(f"phase == 'final' and client == {client}")
    assert rows.accuracy.tolist() == pytest.approx(accuracy, abs=1e-7)

    assert len(metadata["temperatures"]) == EXITS
    for name in network.shared_names():
        np.testing.assert_array_equal(tensors[name].numpy(), result.arrays[name].numpy())
    heads = [load_file(path) for path in (folder / "personal").rglob(f"client-{client}/round-000004.safetensors")]
    assert len(heads) == 1
    last = network.head_names(EXITS - 1)
    own = [name for name in heads[0] if name not in last]
    assert same_tensors({name: heads[0][name] for name in own}, {name: tensors[name] for name in own})
    mixture = Checkpoints(folder / "checkpoint").load().known[client].upload
    np.testing.assert_array_equal(np.concatenate([tensors[name].numpy().ravel() for name in last]), mixture)
    assert sorted(heads[0]) == sorted(network.personal_names())


def test_personal_networks_differ_in_the_heads_only(finished):
    folder, settings, _, _ = finished
    one, other = (load_file(folder / "personal" / f"client-{c}.safetensors") for c in (0, 1))
    personal = set(build_network(settings).personal_names())
    assert {name for name in one if not torch.equal(one[name], other[name])} == personal


def test_flowers_result_has_the_shared_part_and_the_metrics_of_every_round(finished):
    folder, settings, result, _ = finished
    assert list(result.arrays) == build_network(settings).shared_names()
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    table = pd.read_parquet(folder / "clients.parquet").query("phase == 'before'")
    for server_round, metrics in result.train_metrics_clientapp.items():
        rows = table[table["round"] == server_round]
        weights = [len(federation(settings).load(c).train) for c in rows.client]
        for k in range(EXITS):
            mine = (rows.exit == k + 1).to_numpy()
            mean = np.average(rows.accuracy[mine], weights=np.array(weights)[mine])
            assert metrics["accuracy-before"][k] == pytest.approx(mean)


def test_the_checkpoint_is_the_state_after_the_last_round(finished):
    folder, settings, result, _ = finished
    assert sorted(p.name for p in (folder / "checkpoint").glob("round-*")) == [
        "round-000003.safetensors",
        "round-000004.safetensors",
    ]
    state = Checkpoints(folder / "checkpoint").load()
    assert state.round == 4
    assert sorted(state.known) == list(range(CLIENTS))
    flat = np.concatenate([result.arrays[name].numpy().ravel() for name in result.arrays])
    assert state.shared.tobytes() == flat.tobytes()
    for client, record in state.known.items():
        assert record.seen == 4
        assert record.num_examples == len(federation(settings).load(client).train)
        heads = load_file(folder / "personal" / f"client-{client}.safetensors")
        last = torch.cat([heads[f"exits.{EXITS - 1}.head.{part}"].flatten() for part in ("weight", "bias")])
        assert record.upload.tobytes() == last.numpy().tobytes()


def leave_early(network, data, temperatures, threshold):
    """Exit and correctness of every example, one at a time: out at the first exit whose scaled max-prob reaches θ."""
    with torch.no_grad():
        logits = [z / t for z, t in zip(network(data.x), temperatures, strict=True)]
    outcome = []
    for i in range(len(data)):
        for k in range(EXITS):
            p = logits[k][i].softmax(0)
            if k == EXITS - 1 or p.max() >= threshold:
                right = (p.argmax() == data.y[i]).item()
                outcome.append((k, right, (logits[-1][i].argmax() == data.y[i]).item()))
                break
    return outcome


def test_dynamic_inference_in_the_summary_is_what_the_personal_networks_do(finished):
    """Loaded from their files, with the temperatures beside them, example by example, at several thresholds."""
    folder, settings, _, _ = finished
    summary = strict_json((folder / "summary.json").read_text())
    curve, macs = summary["curve"], np.array(summary["macs_per_exit"])
    personal = []
    for client in range(CLIENTS):
        network = build_network(settings).eval()
        network.load_state_dict(load_file(folder / "personal" / f"client-{client}.safetensors"))
        metadata = strict_json((folder / "personal" / f"client-{client}.json").read_text())
        personal.append((network, metadata["temperatures"], federation(settings).load(client)))
    assert any(t != 1.0 for _, temperatures, _ in personal for t in temperatures)

    def outcomes(split, threshold):
        return [
            outcome
            for network, temperatures, data in personal
            for outcome in leave_early(network, getattr(data, split), temperatures, threshold)
        ]

    assert curve["threshold"][0] == 0.0
    assert curve["threshold"][-1] is None
    for position in [*range(0, len(curve["threshold"]) - 1, 9), len(curve["threshold"]) - 1]:
        threshold = curve["threshold"][position]
        seen = outcomes("test", math.inf if threshold is None else threshold)
        shares = np.bincount([k for k, _, _ in seen], minlength=EXITS) / len(seen)
        assert curve["exit_shares"][position] == pytest.approx(shares.tolist())
        assert curve["accuracy"][position] == pytest.approx(np.mean([right for _, right, _ in seen]))
        assert curve["macs"][position] == pytest.approx(shares @ macs)

    dynamic = summary["dynamic"]
    assert summary["macs_reduction_at_equal_accuracy"] == dynamic["macs_reduction"]
    for point in (dynamic, dynamic["one_point_less"]):
        position = curve["threshold"].index(point["threshold"])
        assert point["accuracy"] == curve["accuracy"][position]
        assert point["accuracy_full"] == curve["accuracy"][-1]
        assert point["exit_shares"] == curve["exit_shares"][position]
        assert point["macs_reduction"] == pytest.approx(1 - curve["macs"][position] / macs[-1])

    # The rule, on the calibration splits: the cheapest threshold at which as many more are right as one standard error
    # of that difference. Where it is not met, nothing leaves early.
    def cost_and_gain(threshold):
        seen = outcomes("calibration", math.inf if threshold is None else threshold)
        gains = np.array([int(right) - int(at_last) for _, right, at_last in seen])
        error = math.sqrt(max(0.0, (gains**2).sum() - gains.sum() ** 2 / len(gains)))
        return macs[[k for k, _, _ in seen]].sum(), gains.sum() - error

    cost, margin = cost_and_gain(dynamic["threshold"])
    assert margin >= -1e-9
    cheaper = [t for t in curve["threshold"][::4] if cost_and_gain(t)[0] < cost]
    assert all(cost_and_gain(t)[1] < 1e-9 for t in cheaper)


def test_every_setting_reaches_the_strategy(tmp_path):
    """No setting is forgotten on its way, and none is mistaken for another: every one has a value of its own."""
    settings = small_settings(
        tmp_path,
        seed=11,
        num_server_rounds=13,
        num_clients=17,
        fraction_train=0.35,
        min_train_nodes=3,
        min_available_nodes=2,
        evaluate_every=4,
        wait_seconds=7.5,
        round_timeout=31.0,
        local_steps=4,
        local_epochs=2,
        batch_size=9,
        wire_dtype="float16",
        max_update_norm=7000.0,
        max_update_ratio=12.0,
        clip_norm=3.0,
        upload_clip_norm=4.0,
        noise_multiplier=0.01,
        privacy_delta=0.0001,
        report_metrics=False,
        learning_rate=0.07,
        learning_rate_schedule="exponential",
        learning_rate_decay=0.9,
        momentum=0.4,
        keep_momentum=True,
        weight_decay=0.001,
        max_grad_norm=2.5,
        objective="erde",
        erde_ema_decay=0.9,
        erde_temperature=2.0,
        erde_right=0.75,
        erde_wrong=0.2,
        prior=True,
        equal_steps=False,
        mu=0.9,
        distill_weight=0.6,
        temperature=2.5,
        conflict="exits",
        selection="none",
        match_by="parameters",
        write_back=False,
        solver="osqp",
        classifier_start="own",
    )
    strategy = build_strategy(settings)
    for name in [
        "seed",
        "num_clients",
        "fraction_train",
        "min_train_nodes",
        "min_available_nodes",
        "evaluate_every",
        "wait_seconds",
        "round_timeout",
        "learning_rate_schedule",
        "learning_rate_decay",
    ]:
        assert getattr(strategy, name) == value_of(settings, name), name
    assert strategy.num_rounds == settings.num_server_rounds
    assert (strategy.bounds.max_norm, strategy.bounds.max_ratio) == (7000.0, 12.0)
    assert strategy.wire == "float16"
    assert strategy.privacy == Privacy(3.0, 4.0, 0.01, 0.0001, report_metrics=False)
    for name in ["batch_size", "learning_rate", "momentum", "weight_decay", "max_grad_norm", "keep_momentum"]:
        assert getattr(strategy.local, name) == value_of(settings, name), name
    assert (strategy.local.steps, strategy.local.epochs) == (settings.local_steps, settings.local_epochs)
    assert strategy.method.name == settings.method
    assert strategy.method.objective == ERDE(ema_decay=0.9, temperature=2.0, right=0.75, wrong=0.2)
    own = {name: value for name, value in vars(strategy.method).items() if name != "objective"}
    for name, value in own.items():
        assert value == value_of(settings, name), name
    default = type(settings)()
    kept = [name for name, value in own.items() if value == value_of(default, name)]
    assert kept == ["distill"]  # which CAFEDistill has not: see below


def test_settings_of_every_method_reach_the_strategy(tmp_path):
    """Under their prefix, and those of all methods."""
    settings = small_settings(tmp_path, method="ditto", ditto_pull=0.7, distill=True, prior=True, equal_steps=False)
    method = build_strategy(settings).method
    assert method == METHODS["ditto"](pull=0.7, distill=True, prior=True, equal_steps=False)
    given = {
        "mu": 0.9,
        "distill_weight": 0.6,
        "temperature": 2.5,
        "selection": "random",
        "teachers": "uniform",
        "peers": "alike",
        "similarity_proxy": "gradients",
        "solver": "osqp",
        "max_staleness": 6,
        "objective_teacher": "matched",
    }
    settings = small_settings(tmp_path, method="cafedistill-text", **{f"text_{key}": given[key] for key in given})
    assert build_strategy(settings).method == METHODS["cafedistill-text"](**given)
    for name in METHODS:
        assert build_strategy(small_settings(tmp_path, method=name)).method == METHODS[name]()


def test_every_setting_of_the_data_and_network_reaches_them(tmp_path):
    settings = small_settings(
        tmp_path,
        num_clients=3,
        calibration_share=0.2,
        test_share=0.3,
        feature_width=7,
        partition="pathological",
        classes_per_client=2,
    )
    network, data = build_network(settings), federation(settings)
    assert network.exits[0].head.in_features == 7
    assert network.num_classes == data.num_classes == 10
    assert data.num_clients == 3
    for client in range(3):
        splits = [getattr(data.load(client), name) for name in ("train", "calibration", "test")]
        sizes = np.array([len(split) for split in splits])
        assert np.abs(sizes / sizes.sum() - (0.5, 0.2, 0.3)).max() < 0.05
        assert len(torch.cat([split.y for split in splits]).unique()) == 2
    other = federation(small_settings(tmp_path, seed=1))
    assert other is not federation(small_settings(tmp_path))


def test_every_setting_of_the_data_set_reaches_it(tmp_path, monkeypatch):
    """No two are mistaken for one another: every one has a value of its own."""
    seen = {}

    def watch(options, num_clients, seed):
        seen.update(vars(options), num_clients=num_clients, seed=seed)

    monkeypatch.setattr("cafe_flwr.app.parts.deal_out", watch)
    given = {
        "dataset": "local:/some/where",
        "num_clients": 7,
        "partition": "pathological",
        "dirichlet_alpha": 0.7,
        "classes_per_client": 3,
        "examples_per_client": 55,
        "image_size": 12,
        "image_column": "picture",
        "label_column": "class",
        "data_dir": "/some/copies",
        "augmentation": "none",
        "max_tokens": 33,
        "vocabulary": 444,
        "long_texts": "refuse",
        "label_groups": 5,
        "rotations": 4,
        "validation_share": 0.35,
        "test_shift": 0.65,
        "seed": 17,
    }
    settings = small_settings(tmp_path, calibration_share=0.2, test_share=0.3, **given)
    alone = {"dirichlet_cap": True, "partition_column": "style", "natural_split": "dirichlet", "text_part": "title"}
    unchecked = settings.data.model_copy(update=alone)  # not with each other, nor with the rest
    federation(settings.model_copy(update={"data": unchecked}))
    wanted = given | alone | {"calibration_share": 0.2, "test_share": 0.3, "dir": given["data_dir"]}
    del wanted["data_dir"]
    assert {key: value for key, value in seen.items() if value != getattr(Data(), key, None)} == wanted


@pytest.mark.slow
def test_an_undisturbed_run_warns_of_nothing(tmp_path, no_report, flower_log):
    """A warning must mean something: that a client is left out, state is damaged, a node is gone."""
    run_small(small_settings(tmp_path))
    ours = [line for line in flower_log.text().splitlines() if "fraction_evaluate is set to 0.0" not in line]
    assert ours == []


@pytest.mark.slow
@pytest.mark.parametrize(("method", "unlabelled"), [("cafedistill", 1), ("cafedistill-text", 0)])
def test_it_learns(tmp_path, no_report, method, unlabelled):
    """Twelve rounds bring all exits far above chance (0.1), and the second half of them is no waste.

    The loss is taken per cross-entropy: of the exits that train, the deepest student of cafedistill has none.
    """
    settings = small_settings(
        tmp_path, method=method, num_server_rounds=12, examples_per_client=80, local_steps=6, learning_rate=0.05
    )
    run_small(settings)
    recorded = Recorded.read(settings.results)
    assert min(recorded.summary["accuracy_per_exit"]) > 0.45
    losses = [line["train_loss"] / (1 + sum(line["active_exits"]) / CLIENTS - unlabelled) for line in recorded.rounds]
    assert losses[-1] < 0.6 * losses[0]


# --- the same numbers, however it is run ---


VARIED = {
    "cafedistill": {"conflict": "exits", "classifier_start": "own"},
    "cafedistill-plus": {},
    "cafedistill-text": {"text_selection": "random", "text_similarity_proxy": "gradients"},
}


@pytest.fixture(scope="module", params=VARIED)
def reference(tmp_path_factory, request):
    """One client a node, the plainest grouping, with everything on that depends on who is who."""
    varied = {"method": request.param, "fraction_train": 0.7, "num_server_rounds": 5, **VARIED[request.param]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        settings = small_settings(tmp_path_factory.mktemp("reference"), **varied)
        result = run_small(settings, num_nodes=CLIENTS)
    return Recorded.read(settings.results), result.arrays, varied


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [1, 3, 8])
def test_numbers_do_not_depend_on_how_clients_are_grouped_on_nodes(tmp_path, reference, no_report, num_nodes):
    """All on one, some on each, more nodes than clients: bit for bit the same parameters, personal files and tables.
    Only the bytes differ: a backbone travels once a node."""
    recorded, shared, varied = reference
    settings = small_settings(tmp_path, **varied)
    arrays = run_small(settings, num_nodes).arrays
    assert same_arrays(arrays, shared)
    per_grouping = {"bytes_up", "bytes_down", "bytes_up_per_client_round", "bytes_down_per_client_round"}
    Recorded.read(settings.results).assert_same(recorded, but=() if num_nodes >= CLIENTS else per_grouping)


@pytest.mark.slow
def test_fewer_nodes_need_fewer_bytes_and_one_client_a_node_fewer_than_fedavg(tmp_path, no_report):
    """`bytes_*_per_client_round` against 4 bytes a parameter, FedAvg of the whole network."""
    down = {}
    for num_nodes in (1, CLIENTS):
        settings = small_settings(
            tmp_path, name=f"nodes-{num_nodes}", dataset="digit-pairs", num_server_rounds=2, examples_per_client=200
        )
        run_small(settings, num_nodes)
        summary = Recorded.read(settings.results).summary
        fedavg = summary["bytes_fedavg_per_client_round"]
        assert fedavg == 4 * summary["num_parameters"]
        assert summary["bytes_up_per_client_round"] <= fedavg
        assert summary["bytes_down_per_client_round"] <= fedavg
        down[num_nodes] = summary["bytes_down_per_client_round"]
    assert down[1] < down[CLIENTS] / 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, no_report):
    """Byte for byte, apart from times and from where it was written."""
    runs = {}
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        settings = small_settings(tmp_path / folder, seed=seed)
        arrays = run_small(settings).arrays
        runs[folder] = Recorded.read(settings.results), arrays
    runs["a"][0].assert_same(runs["b"][0])
    assert same_arrays(runs["a"][1], runs["b"][1])
    assert runs["a"][0].run != runs["b"][0].run  # the token of a run is its own
    assert not same_arrays(runs["a"][1], runs["c"][1])
    assert runs["a"][0].summary["accuracy_per_exit"] != runs["c"][0].summary["accuracy_per_exit"]


class ShuffledGrid(InProcessGrid):
    """Node ids as Flower gives them: random, and in no order that says who hosts whom. Replies in any order too."""

    def __init__(self, shuffle, *args):
        super().__init__(*args)
        rng = np.random.default_rng(shuffle)
        ids = [int(i) for i in rng.integers(2**40, 2**60, size=len(self.contexts))]
        contexts = dict(zip(ids, self.contexts.values(), strict=True))
        for node_id, context in contexts.items():
            context.node_id = node_id
        self.contexts = {node: contexts[node] for node in rng.permutation(ids).tolist()}
        self.rng = rng

    def pull_messages(self, message_ids):
        """Pull, in any order."""
        replies = list(super().pull_messages(message_ids))
        return [replies[i] for i in self.rng.permutation(len(replies))]


@pytest.mark.slow
def test_partial_participation_is_seeded_by_client_not_by_node(tmp_path, no_report):
    """Half of 6 clients: the same seed takes the same ones although nodes have other ids and other orders."""
    runs = []
    for shuffle, seed in ((1, 0), (2, 0), (3, 1)):
        settings = small_settings(
            tmp_path / f"{shuffle}", seed=seed, num_clients=6, fraction_train=0.5, num_server_rounds=6
        )
        grid = ShuffledGrid(shuffle, digits_app(), 6, settings.to_run_config())
        run_small(settings, grid=grid)
        runs.append(Recorded.read(settings.results))
    first, second, other = ([line["participants"] for line in r.rounds] for r in runs)
    assert all(len(clients) == 3 for clients in first)
    assert len({tuple(clients) for clients in first}) > 1
    runs[0].assert_same(runs[1])
    assert first == second
    assert first != other


@pytest.mark.slow
def test_heads_on_disk_have_a_version_for_every_round_their_client_took_part_in_and_no_other(tmp_path, no_report):
    settings = small_settings(tmp_path, fraction_train=0.4, num_server_rounds=8)
    heads = {}

    class Watch(Recorder):
        def on_round(self, record, state):
            super().on_round(record, state)
            for path in (settings.results / "personal" / "versions" / state.run).glob("*/round-*"):
                heads[path.parent.name, int(path.stem.split("-")[1])] = load_file(path)

    grid = WatchedGrid(digits_app(), 2, settings.to_run_config())
    with results_of(settings) as results:
        build_strategy(settings, Watch(results.folder, settings.to_run_config())).start(grid)
    took_part = {}
    for message, reply in grid.of_type("train"):
        assert not reply.has_error()
        for client in asked(message):
            took_part.setdefault(client, []).append(message.content["config"]["server-round"])
    assert any(b - a > 1 for rounds in took_part.values() for a, b in itertools.pairwise(rounds))
    # A version for every round that the client took part in, and for no other.
    assert sorted(heads) == sorted((f"client-{c}", t) for c, rounds in took_part.items() for t in rounds)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cafedistill", "cafedistill-text"])
def test_heads_of_exits_that_do_not_train_stay_as_they_are_on_disk(tmp_path, no_report, method):
    """T = 10 and 5 clients: N_t = 2, 4, 6, 8, 10 of 10 student exits with cafedistill-text. With cafedistill exit 1 of
    all, and ⌊R·15⌋ in all, R = clip(0.2·(t − 1)·(2/3) + ΣC/25, 0, 2/3). In every round, exactly the heads of the active
    exits and of the last one change, client by client."""
    settings = small_settings(tmp_path, method=method, num_server_rounds=10)
    heads, active, conflicts = {}, {}, {1: 0.0}

    class Watch(Recorder):
        def on_round(self, record, state):
            super().on_round(record, state)
            active[record.server_round] = record.plan.active
            conflicts[record.server_round + 1] = np.minimum(state.pairs.among(range(CLIENTS)), 0.0).sum() / CLIENTS**2
            for client in range(CLIENTS):
                versions = settings.results / "personal" / "versions" / state.run / f"client-{client}"
                heads[client, record.server_round] = load_file(
                    versions / f"round-{record.server_round:06d}.safetensors"
                )

    grid = InProcessGrid(digits_app(), 2, settings.to_run_config())
    with results_of(settings) as results:
        build_strategy(settings, Watch(results.folder, settings.to_run_config())).start(grid, num_rounds=6)
    network = build_network(settings)
    torch.manual_seed(settings.seed)
    initial = build_network(settings).state_dict()
    expected = [2, 4, 6, 8, 10, 10]
    if method == "cafedistill":
        shares = [min(max(0.2 * (t - 1) * (2 / 3) + conflicts[t], 0.0), 2 / 3) for t in range(1, 7)]
        expected = [max(5, math.floor(15 * share + 1e-9)) for share in shares]
        initial |= {name: torch.zeros_like(initial[name]) for name in network.classifier_names()}
    assert [int(active[t].sum()) for t in range(1, 7)] == expected
    for client in range(CLIENTS):
        heads[client, 0] = initial
        for t in range(1, 7):
            trained = [*active[t][client], True]
            for k in range(EXITS):
                for name in network.head_names(k):
                    changed = not torch.equal(heads[client, t - 1][name], heads[client, t][name])
                    assert changed == trained[k], (client, t, name)


# --- evaluation in some rounds only ---


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cafedistill", "cafedistill-text", "ditto"])
def test_rounds_without_evaluation_change_no_other_number(tmp_path, no_report, method):
    """`evaluate-every = 3` and T = 4: rounds 3 and 4 are evaluated. Elsewhere accuracies are null and the long table
    has no rows; all the rest, down to the last bit of the personal networks, is as if every round were evaluated."""
    runs = {}
    for every in (1, 3):
        settings = small_settings(tmp_path / str(every), method=method, evaluate_every=every)
        run_small(settings)
        runs[every] = Recorded.read(settings.results)
    always, some = runs[1], runs[3]
    measured = ("accuracy_per_exit", "accuracy_per_exit_after")
    for line, full in zip(some.rounds, always.rounds, strict=True):
        for key in measured:
            assert line[key] == (full[key] if line["round"] in (3, 4) else [None] * EXITS)
            assert None not in full[key]
    rows = always.rows[always.rows["round"] >= 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(some.rows, rows, check_exact=True)
    assert always.summary.pop("last_five")["rounds"] == [1, 2, 3, 4]
    assert some.summary.pop("last_five")["rounds"] == [2, 3, 4]
    # The summary counts bytes and steps of all rounds, and its own accuracies under these names: they must agree.
    assert {key: some.summary[key] for key in always.summary} == always.summary
    replace(some, rows=always.rows).assert_same(always, but=measured)


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_rounds_are_not_evaluated(tmp_path, no_report):
    """2 + 2 = 4 also where the last round before the stop has no accuracies."""
    whole = small_settings(tmp_path / "whole", evaluate_every=3, **STOPPED)
    run_small(whole)
    settings = stopped_run(tmp_path / "parts", "asked to", evaluate_every=3)
    assert pd.read_parquet(settings.results / "clients.parquet").empty
    resume(settings)
    Recorded.read(settings.results).assert_same(Recorded.read(whole.results))


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [4, 2], ids=["finished", "stopped before the first evaluation"])
def test_the_report_of_a_run_with_rounds_without_evaluation(tmp_path, rounds):
    """Page and table are written, and have the numbers there are."""
    settings = small_settings(tmp_path, evaluate_every=3)
    run_until(settings, rounds)
    assert write_page(settings.results).is_file()
    console = Console(width=120, file=io.StringIO())
    console.print(final_table(settings.results))
    assert "exit 3" in console.file.getvalue()
    if rounds == 4:
        summary = strict_json((settings.results / "summary.json").read_text())
        assert f"{summary['accuracy']:.3f} ±" in console.file.getvalue()


# --- 2 + 2 = 4 ---

STOPPED = {"fraction_train": 0.6, "num_clients": 5, "mu": 0.2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Four rounds at a stretch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cafe_flwr.app.run.write_page", lambda folder: folder / "report.html")
        settings = small_settings(tmp_path_factory.mktemp("undisturbed"), **STOPPED)
        arrays = run_small(settings).arrays
    return Recorded.read(settings.results), arrays


class Stop(Exception):
    """What stops a run."""


def stopped_run(folder, how, last_round=2, **changes):
    """A run that ended after two of four rounds; its settings."""
    settings = small_settings(folder, **{**STOPPED, **changes})
    if how == "asked to":
        run_until(settings, last_round)
        return settings
    recorder = Recorder(settings.results, settings.to_run_config())

    class Bomb:
        def on_start(self, run):
            pass

        def on_round(self, record, state):
            if record.server_round == last_round + (how == "before it was recorded"):
                raise Stop

    strategy = build_strategy(settings, recorder)
    bomb = Bomb()
    strategy.callbacks = (bomb, recorder) if how == "before it was recorded" else (recorder, bomb)
    with results_of(settings), pytest.raises(Stop):
        strategy.start(InProcessGrid(digits_app(), 2, settings.to_run_config()))
    recorder.close()
    return settings


def resume(settings, **changes):
    """Go on in what might be another process, with caches of its own."""
    again = type(settings).from_run_config({**settings.to_run_config(), "resume": True, **changes})
    return run_small(again, app=digits_app()).arrays


@pytest.mark.slow
@pytest.mark.parametrize("how", ["asked to", "after it was recorded", "before it was recorded"])
def test_two_and_two_rounds_are_four(tmp_path, undisturbed, no_report, flower_log, how):
    """A run that stops after round 2, or dies in round 3 when clients have trained already, and is resumed, leaves the
    same parameters, personal files and tables behind as one that was never disturbed."""
    settings = stopped_run(tmp_path, how)
    assert len((settings.results / "rounds.jsonl").read_text().splitlines()) == 2
    assert not (settings.results / "summary.json").exists()
    arrays = resume(settings)
    recorded, shared = undisturbed
    assert same_arrays(arrays, shared)
    Recorded.read(settings.results).assert_same(recorded)
    assert "damaged" not in flower_log.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"write_back": False},
        {"match_by": "parameters", "selection": "none"},
        {"conflict": "exits", "classifier_start": "own"},
        {"method": "cafedistill-plus"},
        {"method": "cafedistill-text", "text_mu": 0.2},
        {"method": "cafedistill-text", "text_teachers": "own"},
        {"method": "cafedistill-text", "text_teachers": "uniform"},
    ],
    ids=str,
)
def test_two_and_two_rounds_are_four_for_the_ablations(tmp_path, no_report, changes, monkeypatch):
    """With `text-teachers = own` a client uploads nothing of its own, and a checkpoint holds none of it."""
    if changes.get("method") == "cafedistill-text":  # which has a μ of its own
        monkeypatch.delitem(STOPPED, "mu")
    whole = small_settings(tmp_path / "whole", **STOPPED, **changes)
    arrays = run_small(whole).arrays
    settings = stopped_run(tmp_path / "parts", "asked to", **changes)
    assert same_arrays(resume(settings), arrays)
    Recorded.read(settings.results).assert_same(Recorded.read(whole.results))


def truncate(path, to=0.6):
    """A file that was not written to its end."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * to)])


@pytest.mark.slow
@pytest.mark.parametrize("to", [0.0, 0.02, 0.6, 0.999])
def test_a_half_written_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path, undisturbed, no_report, flower_log, to
):
    """Round 2 is simply done again, from the personal state of round 1, with the same outcome."""
    settings = stopped_run(tmp_path, "asked to")
    truncate(settings.results / "checkpoint" / "round-000002.safetensors", to)
    arrays = resume(settings)
    assert "checkpoint of round 2 is damaged" in flower_log.text()
    recorded, shared = undisturbed
    assert same_arrays(arrays, shared)
    Recorded.read(settings.results).assert_same(recorded)


@pytest.mark.slow
def test_half_written_lines_are_dropped_on_resume(tmp_path, undisturbed, no_report):
    """A crash may leave a piece of a line at the end of both growing files."""
    settings = stopped_run(tmp_path, "asked to")
    with open(settings.results / "rounds.jsonl", "a") as file:
        file.write('{"round": 3, "num_rou')
    with open(settings.results / "checkpoint" / "clients.csv", "a") as file:
        file.write("3,1,before,1,0.25,2.0,0.1,16\n3,1,bef")
    arrays = resume(settings)
    recorded, shared = undisturbed
    assert same_arrays(arrays, shared)
    Recorded.read(settings.results).assert_same(recorded)


def personal_versions(settings, client):
    return sorted((settings.results / "personal" / "versions").glob(f"*/client-{client}/round-*.safetensors"))


@pytest.mark.slow
def test_a_damaged_personal_version_is_made_again_when_its_round_is(tmp_path, undisturbed, no_report, flower_log):
    """A crash that damaged the checkpoint of round 2 and personal files of round 2: nothing is lost but the round."""
    settings = stopped_run(tmp_path, "asked to")
    truncate(settings.results / "checkpoint" / "round-000002.safetensors")
    damaged = [personal_versions(settings, c)[-1] for c in range(CLIENTS) if personal_versions(settings, c)]
    damaged = [path for path in damaged if path.name == "round-000002.safetensors"]
    assert len(damaged) == 3
    for path in damaged:
        truncate(path)
    arrays = resume(settings)
    recorded, shared = undisturbed
    assert same_arrays(arrays, shared)
    Recorded.read(settings.results).assert_same(recorded)


@pytest.mark.slow
def test_a_damaged_personal_version_that_is_needed_is_reported_and_the_one_before_is_used(
    tmp_path, undisturbed, no_report, flower_log
):
    """Where it cannot be made again the run goes on with the client's older heads, and says whose."""
    settings = stopped_run(tmp_path, "asked to", fraction_train=1.0)
    assert [p.name[6:12] for p in personal_versions(settings, 3)] == ["000001", "000002"]
    truncate(personal_versions(settings, 3)[-1])
    resume(settings)
    assert "state of client 3, round 2, is damaged" in flower_log.text()
    lines = [strict_json(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]
    assert [line["left_out"] for line in lines] == [{}] * 4
    assert (settings.results / "summary.json").exists()


@pytest.mark.slow
def test_resume_of_a_finished_run_changes_nothing_but_times(tmp_path, no_report):
    settings = small_settings(tmp_path, **STOPPED)
    arrays = run_small(settings).arrays
    before = Recorded.read(settings.results)
    assert same_arrays(resume(settings), arrays)
    Recorded.read(settings.results).assert_same(before)


@pytest.mark.slow
def test_a_run_that_died_in_its_final_evaluation_is_finished_by_resume(tmp_path, undisturbed, no_report):
    settings = small_settings(tmp_path, **STOPPED)
    strategy = build_strategy(settings, Recorder(settings.results, settings.to_run_config()))

    def die(messages):
        if any(message.metadata.message_type == "evaluate" for message in messages):
            raise Stop
        return push(messages)

    grid = InProcessGrid(digits_app(), 2, settings.to_run_config())
    push, grid.push_messages = grid.push_messages, die
    with results_of(settings), pytest.raises(Stop):
        strategy.start(grid)
    assert same_arrays(resume(settings), undisturbed[1])
    Recorded.read(settings.results).assert_same(undisturbed[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": 0.3}, r"cannot resume .*small with other settings: mu was 0.2, now 0.3"),
        ({"num-server-rounds": 8}, "num-server-rounds was 4, now 8"),
        ({"seed": 1, "dataset": "digit-pairs"}, "seed was 0, now 1; dataset was 'digits', now 'digit-pairs'"),
    ],
)
def test_resume_with_other_settings_is_refused(tmp_path, no_report, changes, message):
    """What was there stays: the settings on disk too."""
    settings = stopped_run(tmp_path, "asked to")
    before = {p: p.read_bytes() for p in settings.results.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        resume(settings, **changes)
    assert {p: p.read_bytes() for p in settings.results.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_settings_that_change_no_number_may_change_on_resume(tmp_path, undisturbed, no_report):
    settings = stopped_run(tmp_path / "here", "asked to")
    moved = tmp_path / "moved"
    shutil.move(settings.results_dir, moved)
    arrays = resume(
        settings, **{"results-dir": str(moved), "federation.round-timeout": 5.0, "federation.wait-seconds": 1.0}
    )
    assert same_arrays(arrays, undisturbed[1])


@pytest.mark.slow
def test_a_run_of_a_version_that_knew_fewer_settings_is_resumed(tmp_path, undisturbed, no_report):
    settings = stopped_run(tmp_path, "asked to")
    path = settings.results / "settings.json"
    known = json.loads(path.read_text())
    del known["federation.wire-dtype"], known["compute.device"]
    path.write_text(json.dumps(known))
    assert same_arrays(resume(settings), undisturbed[1])


def test_resume_without_a_checkpoint_is_refused(tmp_path, no_report):
    """No run of this name, a run that has not finished a round, and one with both checkpoints damaged."""
    settings = small_settings(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"resume = true, but there is no checkpoint in .*small/checkpoint"):
        run_small(settings)
    assert not settings.results.exists()

    settings = stopped_run(tmp_path, "asked to")
    for path in (settings.results / "checkpoint").glob("round-*"):
        truncate(path)
    with pytest.raises(ValueError, match="no checkpoint"):
        resume(settings)


def test_resume_with_another_network_is_refused(tmp_path, no_report):
    """The clients' network is what counts, whatever the settings say."""
    settings = stopped_run(tmp_path, "asked to")
    path = settings.results / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model.feature-width": 12}))
    with pytest.raises(ValueError, match="the checkpoint was made with another network or method"):
        resume(settings, **{"model.feature-width": 12})


# --- harmless repetition ---


@pytest.mark.slow
def test_a_train_message_that_arrives_twice_is_harmless(tmp_path, no_report):
    """The same reply, the same files, and the same run afterwards: Flower may deliver a message again."""
    settings = small_settings(tmp_path, fraction_train=0.6)

    class Twice(InProcessGrid):
        repeated = 0

        def _handle(self, message):
            versions = settings.results / "personal" / "versions"
            first = super()._handle(message)
            before = {p: facts_and_tensors(p) for p in versions.rglob("*") if p.is_file()}
            again = super()._handle(message)
            after = {p: facts_and_tensors(p) for p in versions.rglob("*") if p.is_file()}
            assert list(after) == list(before)
            for path, (metadata, tensors) in after.items():
                assert metadata == before[path][0]
                assert same_tensors(tensors, before[path][1])
            if message.metadata.message_type == "train":
                for key, record in first.content.items():
                    if key == "metrics":
                        assert record.pop("seconds-train")
                        assert record.pop("seconds-evaluate")
                        values = dict(again.content[key])
                        assert dict(record) == {k: v for k, v in values.items() if not k.startswith("seconds")}
                    elif key == "arrays":
                        assert record["flat"].data == again.content[key]["flat"].data
                    else:
                        assert dict(record) == dict(again.content[key])
                self.repeated += 1
            return again

    grid = Twice(digits_app(), 2, settings.to_run_config())
    arrays = run_small(settings, grid=grid).arrays
    assert grid.repeated >= 4
    once = small_settings(tmp_path, name="once", fraction_train=0.6)
    assert same_arrays(arrays, run_small(once).arrays)


# --- the results folder ---


@pytest.mark.slow
def test_a_run_of_the_same_name_moves_the_old_one_aside(tmp_path, no_report):
    """Three runs: the first two are whole under other names, oldest first."""
    for mu in (0.1, 0.2, 0.3):
        run_small(small_settings(tmp_path, mu=mu, num_server_rounds=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "small.1", "small.2"]
    for name, mu in (("small.1", 0.1), ("small.2", 0.2), ("small", 0.3)):
        assert json.loads((tmp_path / name / "settings.json").read_text())["mu"] == mu
        recorded = Recorded.read(tmp_path / name)
        assert len(recorded.rounds) == 1
        assert sorted(recorded.networks) == list(range(CLIENTS))


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"small exists and is not a run of cafe-flwr: choose another name"):
        run_small(small_settings(tmp_path))
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["small", "small/thesis.tex"]


@pytest.mark.slow
def test_two_runs_do_not_write_to_one_folder(tmp_path, no_report):
    """While a run is under way its folder is neither moved aside nor resumed by another; afterwards it is free."""
    settings = stopped_run(tmp_path, "asked to")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = type(settings).from_run_config({**settings.to_run_config(), "resume": True})
    with results_of(again):
        for other in (settings, again):
            with pytest.raises(ValueError, match=r"another run is still writing to .*small: stop it .*another name"):
                run_small(other)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert set(after) == set(before)
    assert {p for p in before if after[p] != before[p]} <= {settings.results / "settings.json"}
    run_small(again)


def test_an_empty_folder_is_used(tmp_path, no_report):
    (tmp_path / "small").mkdir()
    run_small(small_settings(tmp_path, num_server_rounds=1))
    assert (tmp_path / "small" / "summary.json").exists()
    assert not (tmp_path / "small.1").exists()


@pytest.mark.parametrize("below", ["", "/deep/down"])
def test_an_unwritable_results_folder_is_an_error_before_the_first_round(tmp_path, below):
    """No message is sent. (A path below a regular file cannot be written even by root.)"""
    (tmp_path / "file").write_text("in the way")
    settings = small_settings(tmp_path / f"file{below}")
    grid = WatchedGrid(digits_app(), 2, settings.to_run_config())
    with pytest.raises(ValueError, match=r"cannot write results to .*/file.*Set results-dir"):
        run_small(settings, grid=grid)
    assert grid.traffic == []


def test_results_of_an_unusable_accuracy_are_null_in_json(tmp_path, no_report):
    """JSON has no NaN: whatever is unknown is null, in every file."""
    settings = small_settings(tmp_path, num_server_rounds=1)

    def load(client, context):
        data = federation(settings).load(client)
        nothing = type(data.test)(*(part[:0] for part in data.test))
        return type(data)(data.train, nothing, nothing)

    app = make_client_app(lambda context: build_network(settings), load, state_dir=personal_of_the_run)
    run_small(settings, app=app)
    summary = strict_json((settings.results / "summary.json").read_text())
    assert summary["accuracy"] is None
    assert summary["accuracy_per_exit"] == [None] * EXITS
    (line,) = (strict_json(text) for text in (settings.results / "rounds.jsonl").read_text().splitlines())
    assert line["accuracy_per_exit"] == [None] * EXITS
    assert math.isfinite(line["train_loss"])
    for client in range(CLIENTS):
        metadata = strict_json((settings.results / "personal" / f"client-{client}.json").read_text())
        assert metadata["accuracy_per_exit"] == [None] * EXITS
        assert metadata["temperatures"] == [1.0] * EXITS


@pytest.mark.slow
def test_a_run_that_ended_before_it_wrote_its_settings_is_not_in_the_way(tmp_path):
    settings = small_settings(tmp_path)
    settings.results.mkdir(parents=True)
    (settings.results / ".lock").touch()
    (settings.results / ".settings.json.7.tmp").write_text("{")
    run_small(settings)
    assert (settings.results / "summary.json").exists()
    assert not settings.results.with_name("small.1").exists()
