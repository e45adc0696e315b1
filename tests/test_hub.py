"""Data sets by name, from local copies in the hub's schemas: what is read, what training varies, what is refused."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from federations import run_small, small_settings
from hub_copies import CLASSES, TOPICS, label_of, picture, text, write_copy, write_plain

from cafe_flwr import EarlyExitNetwork
from cafe_flwr.app.parts import build_network, federation
from cafe_flwr.data import Split, load_federation
from cafe_flwr.data.augmentation import Augmentation
from cafe_flwr.data.federation import deal_out
from cafe_flwr.data.hub import HUB_SETS
from cafe_flwr.data.tokenizer import Tokenizer
from cafe_flwr.personal import FinishedRun
from cafe_flwr.training import LocalBudget, LoopOptions, train

IMAGES = ("cifar10", "cifar100", "tiny-imagenet")


@pytest.fixture(autouse=True)
def _no_network_and_no_cache_outside(monkeypatch, tmp_path):
    """Nothing is downloaded, and what `datasets` caches goes to a folder of the test."""
    import datasets

    def refuse(*_):
        raise AssertionError("a data set reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    deal_out.cache_clear()
    yield
    if shown:
        datasets.enable_progress_bars()


def clients_of(data):
    return [data.load(client) for client in range(data.num_clients)]


def splits_of(client):
    return {"train": client.train, "calibration": client.calibration, "test": client.test}


# --- the whole path ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "settings"),
    [
        ("cifar10", 120, {"network": "conv", "norm": "batch", "statistics": "personal"}),
        ("cifar100", 200, {"network": "resnet18", "network_width": 4}),
        ("tiny-imagenet", 200, {"network": "resnet18", "network_width": 2, "stem_stride": 2, "norm": "batch"}),
        ("ag-news", 120, {"network": "transformer", "network_width": 16, "network_depth": 2, "max_tokens": 12}),
    ],
)
def test_a_set_goes_from_its_files_to_the_report(tmp_path, name, rows, settings):
    home = write_copy(tmp_path / "data", name, rows)
    settings = small_settings(
        tmp_path, dataset=name, data_dir=str(home), num_clients=2, num_server_rounds=2, local_steps=1, **settings
    )
    run_small(settings)
    folder = settings.results
    assert (folder / "report.html").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["accuracy_per_exit"]) == build_network(settings).num_exits
    assert all(0 <= accuracy <= 1 for accuracy in summary["accuracy_per_exit"])
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 2
    run = FinishedRun(folder)
    network, data = run.personal(1).network, run.data(1)
    assert network.num_classes == CLASSES[name] == len(run.class_names)
    with torch.no_grad():
        right = (network(data.test.x)[-1].argmax(dim=1) == data.test.y).float().mean().item()
    assert right == pytest.approx(run.personal(1).metadata["accuracy_per_exit"][-1])


# --- what is read ---


@pytest.mark.parametrize("saved", [False, True], ids=["parquet", "saved to disk"])
@pytest.mark.parametrize("name", IMAGES)
def test_every_row_is_in_one_split_of_one_client_with_its_own_picture_and_label(tmp_path, name, saved):
    home = write_copy(tmp_path, name, 80, saved=saved)
    data = load_federation(name, 2, alpha=1.0, data_dir=str(home))
    size = HUB_SETS[name].image_size
    assert data.input_shape == (3, size, size)
    assert data.class_names == tuple(f"class-{c}" for c in range(CLASSES[name]))
    seen = []
    for client in clients_of(data):
        for split in splits_of(client).values():
            assert split.x.dtype == torch.uint8
            for x, y, (row,) in zip(split.x, split.y, split.source, strict=True):
                pixels = np.asarray(picture(name, int(row))).transpose(2, 0, 1)
                assert np.array_equal(x.numpy(), pixels)
                assert y == label_of(name, int(row))
                seen.append(int(row))
    assert sorted(seen) == list(range(80))


def test_texts_become_tokens_and_keep_their_labels(tmp_path):
    data = load_federation(
        "ag-news", 2, alpha=1.0, max_tokens=6, vocabulary=500, data_dir=str(write_copy(tmp_path, "ag-news", 60))
    )
    assert (data.class_names, data.input_shape, data.vocabulary) == (tuple(TOPICS), (6,), 500)
    seen, tokenizer = [], Tokenizer(6, 500)
    for client in clients_of(data):
        for split in splits_of(client).values():
            rows = split.source[:, 0].tolist()
            assert torch.equal(split.x, tokenizer([text(row) for row in rows]))
            assert split.y.tolist() == [row % 4 for row in rows]
            seen += rows
    assert sorted(seen) == list(range(60))


def test_files_without_the_hubs_notes_are_read_too_and_grey_pictures_get_three_colours(tmp_path):
    pictures = [picture("tiny-imagenet", row, "L" if row % 2 else "RGB") for row in range(40)]
    write_plain(
        tmp_path / "tiny-imagenet" / "train.parquet", {"image": pictures, "label": [row % 10 for row in range(40)]}
    )
    data = load_federation("tiny-imagenet", 2, alpha=1.0, data_dir=str(tmp_path))
    assert data.class_names == tuple(map(str, range(200)))
    for split in splits_of(data.load(0)).values():
        for x, (row,) in zip(split.x, split.source, strict=True):
            assert torch.equal(x[0], x[2]) == bool(row % 2)


def test_pictures_are_decoded_for_the_client_that_is_asked_for_and_stay_pixels(tmp_path, monkeypatch):
    from PIL import Image

    decoded, load = [], Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda self, *a, **k: decoded.append(1) or load(self, *a, **k))
    home = write_copy(tmp_path, "cifar10", 120)
    data = load_federation("cifar10", 3, alpha=1.0, data_dir=str(home))
    decoded.clear()
    client = data.load(1)
    sizes = [len(split) for split in splits_of(client).values()]
    assert len(decoded) == sum(sizes) < 120
    assert sum(split.x.untyped_storage().nbytes() for split in splits_of(client).values()) == sum(sizes) * 3 * 32 * 32
    assert data.load(1) is client


def test_networks_normalise_pixels_by_the_sets_own_colours(tmp_path):
    settings = small_settings(
        tmp_path, dataset="cifar100", data_dir=str(write_copy(tmp_path, "cifar100", 120)), num_clients=2
    )
    network, x = build_network(settings).eval(), federation(settings).load(0).test.x
    mean, std = torch.tensor(HUB_SETS["cifar100"].pixels.mean), torch.tensor(HUB_SETS["cifar100"].pixels.std)
    normal = (x.float() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(network.inputs(x), normal)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(network(x)), torch.stack(network(normal)))


@pytest.mark.parametrize("turns", [2, 3])
def test_pixels_can_be_rotated_and_stay_pixels(tmp_path, turns):
    home = str(write_copy(tmp_path, "cifar10", 80))
    upright = load_federation("cifar10", 2, alpha=1.0, data_dir=home).load(1).test
    turned = load_federation("cifar10", 2, alpha=1.0, data_dir=home, rotations=turns).load(1).test
    assert turned.x.dtype == torch.uint8
    assert torch.equal(turned.y, upright.y)
    assert torch.equal(turned.x, upright.x.rot90(2, (-2, -1))) == (turns == 2)
    assert not torch.equal(turned.x, upright.x)


# --- what training varies ---


def test_sets_have_the_augmentation_that_is_usual_for_them(tmp_path):
    home = str(write_copy(tmp_path, "cifar10", 120))
    client = load_federation("cifar10", 2, alpha=1.0, data_dir=home, validation_share=0.3).load(0)
    assert client.augment == Augmentation(4)
    assert load_federation("cifar10", 2, alpha=1.0, data_dir=home, augmentation="none").load(0).augment is None
    assert {name: about.augmentation and about.augmentation.padding for name, about in HUB_SETS.items()} == {
        "cifar10": 4,
        "cifar100": 4,
        "tiny-imagenet": 8,
        "ag-news": None,
    }


def test_a_varied_image_is_a_window_of_the_image_with_its_border_or_of_its_mirror_image():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(1, 255, (300, 3, 6, 5)).astype(np.uint8))
    varied = Augmentation(2)(x, rng)
    assert (varied.dtype, varied.shape) == (x.dtype, x.shape)
    seen = set()
    for image, found in zip(x, varied, strict=True):
        padded = torch.nn.functional.pad(image, [2] * 4)
        places = {
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(
                padded[:, top : top + 6, left : left + 5].flip(2)
                if flip
                else padded[:, top : top + 6, left : left + 5],
                found,
            )
        }
        assert len(places) == 1
        seen |= places
    assert len(seen) == 50  # every window, and every mirror image of one


def batches_seen(split, seed, augment=None):
    seen, network = [], torch.nn.Linear(1, 1)

    def loss(x, y):
        seen.append(x.clone())
        return network(y[:, None].float()).mean()

    train(
        network,
        split,
        loss,
        LocalBudget(batch_size=4, steps=5),
        np.random.default_rng(seed),
        LoopOptions(augment=augment),
    )
    return torch.cat(seen)


def test_a_client_trains_on_varied_images_and_is_evaluated_on_the_images_as_they_are(tmp_path, no_report, monkeypatch):
    """In a real run: what the network sees in training is never, in evaluation always, a picture of the set."""
    home, seen = write_copy(tmp_path / "data", "cifar10", 80), {True: set(), False: set()}
    inputs = EarlyExitNetwork.inputs

    def watch(network, x):
        if torch.is_grad_enabled() or not network.training:
            seen[network.training] |= {image.numpy().tobytes() for image in x}
        return inputs(network, x)

    monkeypatch.setattr(EarlyExitNetwork, "inputs", watch)
    settings = {"dataset": "cifar10", "data_dir": str(home), "num_clients": 2, "num_server_rounds": 1}
    run_small(small_settings(tmp_path, **settings, local_steps=3))
    pictures = {np.asarray(picture("cifar10", row)).transpose(2, 0, 1).tobytes() for row in range(80)}
    assert len(seen[True]) > 50
    assert len(seen[True] & pictures) < len(seen[True]) / 20  # the middle of its border, not mirrored, is a picture
    assert len(seen[False]) > 20
    assert seen[False] <= pictures


def test_batches_depend_on_the_seed_only_and_the_order_of_examples_not_on_the_augmentation():
    x = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 1, 3, 3) + 1
    split, vary = Split(x, torch.arange(8)), Augmentation(1)
    first, again, other = (batches_seen(split, seed, vary) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, batches_seen(split, 0))
    assert torch.equal(first.amax((1, 2, 3)), batches_seen(split, 0).amax((1, 2, 3)))


# --- what is refused, before the first round ---


def test_without_a_network_the_error_says_how_to_place_a_local_copy():
    for name, about in HUB_SETS.items():
        with pytest.raises(ValueError, match=rf"{name}' cannot be had from the hub") as error:
            load_federation(name, 2)
        assert f"hf download {about.repository} --repo-type dataset --local-dir <data-dir>/{name}" in str(error.value)
        assert "set data.dir = '<data-dir>'" in str(error.value)


@pytest.mark.slow
def test_the_command_that_the_error_names_is_one_that_there_is():
    program = Path(sys.executable).with_name("hf")
    told = subprocess.run([program, "download", "--help"], capture_output=True, text=True, check=True).stdout
    assert {"--repo-type", "--local-dir"} <= set(told.replace(",", " ").split())


def broken(rows=40, labels=None, pictures=None, columns=("img", "label")):
    labels = [row % 10 for row in range(rows)] if labels is None else labels
    return {columns[0]: pictures or [picture("cifar10", row) for row in range(rows)], columns[1]: labels}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            broken(columns=("image", "label")),
            "no column 'img'; it has image, label. Expected are those of uoft-cs/cifar10",
        ),
        (broken(columns=("img", "fine_label")), "no column 'label'"),
        (broken(labels=[-1] * 40), r"are -1\.\.-1 \(-1: the label is withheld\), expected 0\.\.9"),
        (broken(labels=[row % 11 for row in range(40)]), r"are 0\.\.10, expected 0\.\.9 in column 'label'"),
        (broken(labels=[None, *range(9)] * 4), "4 rows without a label in column 'label'"),
        (broken(labels=["cat"] * 40), "must be numbers 0..9, got 'cat'"),
    ],
    ids=["no images", "no labels", "withheld", "too many classes", "missing", "names"],
)
def test_a_copy_with_other_columns_or_labels_is_refused(tmp_path, columns, message):
    write_plain(tmp_path / "cifar10" / "train.parquet", columns)
    with pytest.raises(ValueError, match=message):
        load_federation("cifar10", 2, data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"bytes": b"no picture", "path": None}, "row 7 of .*holds no image that can be read"),
        (picture("tiny-imagenet", 0), "row 7 of .*is 64×64 pixels, expected 32×32"),
    ],
    ids=["damaged", "size"],
)
def test_a_picture_that_cannot_be_used_is_named_by_its_row(tmp_path, bad, message):
    pictures = [bad if row == 7 else picture("cifar10", row) for row in range(40)]
    write_plain(tmp_path / "cifar10" / "train.parquet", broken(pictures=pictures))
    with pytest.raises(ValueError, match=message):
        clients_of(load_federation("cifar10", 2, data_dir=str(tmp_path)))


def test_a_folder_that_holds_no_copy_says_how_to_place_one(tmp_path):
    command = re.escape(f"--local-dir {tmp_path}/ag-news")
    with pytest.raises(ValueError, match=f"there is no folder .*{command}"):
        load_federation("ag-news", 2, data_dir=str(tmp_path))
    (tmp_path / "ag-news").mkdir()
    with pytest.raises(ValueError, match=f"holds no parquet files and no saved data set.*{command}"):
        load_federation("ag-news", 2, data_dir=str(tmp_path))
    (tmp_path / "ag-news" / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="cannot be read"):
        load_federation("ag-news", 2, data_dir=str(tmp_path))


def test_long_texts_are_cut_or_refused_as_asked(tmp_path):
    home = str(write_copy(tmp_path, "ag-news", 60))
    assert clients_of(load_federation("ag-news", 2, alpha=1.0, data_dir=home, max_tokens=3))[0].train.x.shape[1] == 3
    with pytest.raises(ValueError, match=r"has 9 words, more than the 3 .*raise data.max-tokens, or cut long texts"):
        clients_of(load_federation("ag-news", 2, alpha=1.0, data_dir=home, max_tokens=3, long_texts="refuse"))


def test_a_device_reads_its_own_copy_and_never_a_path_of_the_run(tmp_path, no_report):
    """A node with a node-config of its own takes `data-dir` from there, and the settings' path is not looked at."""
    home = write_copy(tmp_path / "own", "ag-news", 60)
    settings = small_settings(
        tmp_path,
        dataset="ag-news",
        data_dir=str(tmp_path / "of-the-server"),
        network="transformer",
        network_width=8,
        network_depth=1,
        num_clients=2,
        num_server_rounds=1,
        local_steps=1,
        method="fedper",
    )
    assert federation(settings, {"clients": "0", "data-dir": str(home)}).num_classes == 4
    with pytest.raises(ValueError, match="of-the-server"):
        federation(settings)
    with pytest.raises(ValueError, match="cannot be had from the hub"):
        federation(settings, {"clients": "0"})


# --- what leaves a run: images as pixels, in graphs for devices ---


@pytest.mark.slow
def test_an_exported_network_takes_pixels_and_predicts_the_same(tmp_path, no_report):
    pytest.importorskip("onnxruntime")
    from cafe_flwr.inference.predict import predict_file
    from cafe_flwr.personal.export import export_client

    home = write_copy(tmp_path / "data", "cifar10", 80)
    settings = small_settings(
        tmp_path, dataset="cifar10", data_dir=str(home), num_clients=2, num_server_rounds=1, local_steps=1
    )
    run_small(settings)
    run = FinishedRun(settings.results)
    made = export_client(run, 0, tmp_path / "net")
    assert made.verified
    test = run.data(0).test
    with torch.no_grad():
        expected = run.personal(0).network(test.x)[-1].argmax(dim=1).tolist()
    np.save(tmp_path / "x.npy", test.x.numpy())
    assert [row.label for row in predict_file(tmp_path / "net", tmp_path / "x.npy")] == expected
    (tmp_path / "pictures").mkdir()
    for place, (row,) in enumerate(test.source.tolist()):
        picture("cifar10", row).save(tmp_path / "pictures" / f"{place:03d}.png")
    assert [row.label for row in predict_file(tmp_path / "net", tmp_path / "pictures")] == expected
