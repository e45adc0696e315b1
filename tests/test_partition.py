"""Who gets which examples: a cap on Dirichlet shares, clients by a column, titles; on made-up sets and on real rows."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from federations import run_small, small_settings
from hub_copies import write_copy, write_plain
from PIL import Image

from cafe_flwr.app.parts import federation
from cafe_flwr.data import load_federation
from cafe_flwr.data.federation import deal_out
from cafe_flwr.data.hub import open_set
from cafe_flwr.data.partition import Rule, partition_labels, partition_naturally
from cafe_flwr.data.tokenizer import Tokenizer, words
from cafe_flwr.personal import FinishedRun
from cafe_flwr.personal.calibration import calibrate_run
from cafe_flwr.risk.client_calibration import Request
from cafe_flwr.settings import Settings

STYLES = ("art", "photo", "sketch")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    deal_out.cache_clear()


def rows_of(client):
    return torch.cat([split.source[:, 0] for split in (client.train, client.calibration, client.test)]).tolist()


# --- the cap ---


@pytest.mark.slow
def test_a_client_at_its_fair_share_gets_no_more():
    """Classes are dealt out in order: who holds more than N/n of those before has nothing of the next."""
    labels = np.repeat(np.arange(10), 300)
    for seed in range(5):
        parts = partition_labels(labels, 12, Rule("dirichlet", 0.3, capped=True), seed)
        assert sorted(np.concatenate(parts).tolist()) == list(range(3000))
        counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
        before = np.cumsum(counts, axis=1) - counts
        assert not counts[before > 3000 / 12].any()
        assert (before > 3000 / 12).any()  # otherwise this shows nothing
        free = partition_labels(labels, 12, Rule("dirichlet", 0.3), seed)
        assert max(map(len, parts)) <= max(map(len, free))


# --- clients by a column ---


@pytest.mark.parametrize("split", ["even", "dirichlet"])
def test_every_example_goes_to_one_client_of_its_value(split):
    rng = np.random.default_rng(0)
    values, labels = rng.choice(STYLES, 900, p=(0.2, 0.3, 0.5)).tolist(), rng.integers(5, size=900)
    parts = partition_naturally("style", values, labels, 9, Rule(split, 0.3), seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(900))
    assert [{values[row] for row in part} for part in parts] == [{STYLES[i % 3]} for i in range(9)]
    shares = np.stack([np.bincount(labels[part], minlength=5) / len(part) for part in parts])
    differ = float(np.abs(shares - 0.2).max())
    if split == "even":
        assert all(abs(values.count(STYLES[i % 3]) / 3 - len(part)) < 1 for i, part in enumerate(parts))
        assert differ < 0.15
    else:
        assert differ > 0.3
    again = partition_naturally("style", values, labels, 9, Rule(split, 0.3), seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    other = partition_naturally("style", values, labels, 9, Rule(split, 0.3), seed=2)
    assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_one_client_a_value_holds_all_of_it():
    parts = partition_naturally("writer", [3, 1, 2] * 12, np.zeros(36, dtype=np.int64), 3)
    assert [part[0] for part in parts] == [1, 2, 0]  # sorted: 1, 2, 3
    assert [len(part) for part in parts] == [12, 12, 12]


@pytest.mark.parametrize(
    ("values", "clients", "message"),
    [
        (["a", "b"] * 30, 3, r"has 2 values \(a: 30, b: 30\), and num-clients = 3 .* set num-clients to 2 or 4"),
        (["a", "b", "c"] * 20, 2, r"num-clients = 2 is no multiple of 3: set num-clients to 3$"),
        (["a"] * 60, 2, r"has 1 value \(a: 60\): it must tell two clients apart"),
        (["a", None] * 30, 2, "has 30 of 60 rows without a value: fill them in"),
        ([1.0, float("nan")] * 30, 2, "has 30 of 60 rows without a value"),
        ([["a"], ["b"]] * 30, 2, "must hold names or numbers, got list"),
        (["a"] * 45 + ["b"] * 15, 4, "the 15 examples of 'b' cannot serve its 2 of num-clients = 4 clients"),
        ([f"row {i}" for i in range(60)], 60, r"has 60 values \(row 0: 1, .*, …\): the 1 examples"),
    ],
)
def test_a_column_that_does_not_fit_is_refused_with_what_would_do(values, clients, message):
    with pytest.raises(ValueError, match=f"partition-column = 'style' .*{message}"):
        partition_naturally("style", values, np.zeros(60, dtype=np.int64), clients)


def picture(value):
    return Image.new("RGB", (8, 8), (value, 0, 0))


def write_folder(root: Path, lines=60) -> Path:
    """Sixty pictures of two classes, the styles in a metadata file."""
    for i in range(60):
        (root / "cd"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture(i).save(root / "cd"[i % 2] / f"{i:02d}.png")
    text = "".join(f"{'cd'[i % 2]}/{i:02d}.png,{STYLES[i % 3]}\n" for i in range(lines))
    (root / "metadata.csv").write_text("file_name,style\n" + text)
    return root


def test_an_image_folder_has_its_column_in_a_metadata_file(tmp_path):
    """The class is the subfolder, as without the file; the red of a picture says which one it is."""
    root = write_folder(tmp_path / "pictures")
    data = load_federation(f"local:{root}", 3, partition="natural", partition_column="style")
    assert data.class_names == ("c", "d")
    seen = []
    for client in range(3):
        for split in (data.load(client).train, data.load(client).calibration, data.load(client).test):
            red = split.x[:, 0, 0, 0].tolist()
            assert {STYLES[i % 3] for i in red} == {STYLES[client]}
            assert split.y.tolist() == [i % 2 for i in red]
            seen += red
    assert sorted(seen) == list(range(60))


def test_pictures_that_the_metadata_does_not_name_are_an_error_not_left_out(tmp_path):
    root = write_folder(tmp_path / "pictures", lines=59)
    with pytest.raises(ValueError, match=r"names 59 of 60 images, and not d/59.png: add a line"):
        load_federation(f"local:{root}", 3, partition="natural", partition_column="style")


def test_a_parquet_file_without_the_column_says_which_it_has(tmp_path):
    columns = {"image": [picture(i) for i in range(60)], "label": [i % 2 for i in range(60)], "writer": [0, 1, 2] * 20}
    write_plain(tmp_path / "set.parquet", columns)
    path = f"local:{tmp_path / 'set.parquet'}"
    assert load_federation(path, 6, partition="natural", partition_column="writer").num_clients == 6
    with pytest.raises(ValueError, match=r"partition-column = 'style': .* no such column; it has label, writer"):
        load_federation(path, 3, partition="natural", partition_column="style")
    with pytest.raises(ValueError, match=r"label-groups = 2 is not for data.partition = 'natural'"):
        load_federation(path, 6, partition="natural", partition_column="writer", label_groups=2)


def test_sets_without_columns_are_refused():
    with pytest.raises(ValueError, match="deals out by a column, and 'digits' has none"):
        load_federation("digits", 4, partition="natural", partition_column="style")


def test_a_set_of_the_hub_is_dealt_out_by_any_of_its_columns(tmp_path):
    home = write_copy(tmp_path, "cifar100", 80)
    data = load_federation("cifar100", 2, partition="natural", partition_column="coarse_label", data_dir=str(home))
    for client in (0, 1):
        assert {int(y) // 5 for y in data.load(client).train.y} == {client}


def test_a_local_path_that_is_not_absolute_lies_in_data_dir(tmp_path):
    write_folder(tmp_path / "sets" / "pictures")
    settings = small_settings(tmp_path, dataset="local:pictures", data_dir=str(tmp_path / "sets"), num_clients=2)
    assert federation(settings).class_names == ("c", "d")


# --- titles ---


def test_a_title_is_its_column_or_else_the_first_seven_words(tmp_path):
    texts = [f"{k} Stocks fell 2.3% in Tokyo, the biggest drop" for k in range(40)]
    columns = {"text": texts, "label": [k % 4 for k in range(40)]}
    write_plain(tmp_path / "joined" / "ag-news" / "train.parquet", columns)
    titles = [f"Title {k}" for k in range(40)]
    write_plain(tmp_path / "apart" / "ag-news" / "train.parquet", {**columns, "title": titles})
    for home, expected in (("joined", [" ".join(words(text)[:7]) for text in texts]), ("apart", titles)):
        assert open_set("ag-news", str(tmp_path / home)).texts(np.arange(40), "title") == expected
        data = load_federation("ag-news", 2, alpha=1.0, data_dir=str(tmp_path / home), text_part="title", max_tokens=9)
        split = data.load(0).train
        assert torch.equal(split.x, Tokenizer(9)([expected[row] for row in split.source[:, 0]]))


# --- nothing kept for calibration ---


def test_without_calibration_examples_a_run_trains_and_calibration_says_how_many_are_missing(tmp_path, no_report):
    settings = small_settings(tmp_path, calibration_share=0.0, test_share=0.25, num_server_rounds=2)
    run_small(settings)
    summary = json.loads((settings.results / "summary.json").read_text())
    assert summary["accuracy"] > 0
    assert {(c["train"], c["calibration"], c["test"]) for c in summary["clients"]} == {
        (len(d.train), 0, len(d.test)) for d in map(federation(settings).load, range(settings.num_clients))
    }
    found = calibrate_run(FinishedRun(settings.results), Request(risk=0.1))
    assert "0 examples are too few" in json.dumps(found)


# --- real rows ---


def few(real_data: Path, home: Path, name: str, rows: int) -> Path:
    """The first rows of every split of a real set; they are a random sample."""
    for file in sorted((real_data / name).glob("*.parquet")):
        (home / name).mkdir(parents=True, exist_ok=True)
        part: pa.Table = next(pq.ParquetFile(file).iter_batches(batch_size=rows))
        pq.write_table(pa.Table.from_batches([part]), home / name / file.name)
    return home


@pytest.mark.parametrize("split", ["even", "dirichlet"])
def test_pacs_by_style(real_data, tmp_path, split):
    home = few(real_data, tmp_path, "pacs", 400)
    data = load_federation(
        f"local:{home / 'pacs'}",
        8,
        partition="natural",
        partition_column="style",
        natural_split=split,
        alpha=1.0,
        shares=(0.75, 0.0, 0.25),
    )
    style = pq.read_table(home / "pacs" / "train-00000-of-00001.parquet")["style"].to_pylist()
    assert (data.num_classes, data.input_shape) == (7, (3, 64, 64))
    held = [rows_of(data.load(client)) for client in range(8)]
    assert [{style[row] for row in rows} for rows in held] == [{sorted(set(style))[i % 4]} for i in range(8)]
    assert sorted(row for rows in held for row in rows) == list(range(400))
    assert data.load(0).train.x.dtype == torch.uint8


def test_cifar100_by_coarse_labels(real_data, tmp_path):
    home = few(real_data, tmp_path, "cifar100", 500)
    data = load_federation("cifar100", 20, partition="natural", partition_column="coarse_label", data_dir=str(home))
    for client in range(20):
        assert len(data.load(client).train.y.unique()) <= 5
    assert sum(len(rows_of(data.load(client))) for client in range(20)) == 1000


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet", "ag-news"])
def test_the_published_protocol_deals_real_sets_out(real_data, tmp_path, name):
    """Train and test rows together, 75/25 in each client, Dirichlet 0.3 with the cap."""
    home = few(real_data, tmp_path, name, 300)
    settings = Settings.from_run_config(
        {
            "dataset": name,
            "data-dir": str(home),
            "num-clients": 4,
            "dirichlet-alpha": 0.3,
            "data.dirichlet-cap": True,
            "data.test-share": 0.25,
            "data.calibration-share": 0.0,
            **(
                {"network": "transformer", "data.text-part": "title"}
                if name == "ag-news"
                else {"data.augmentation": "none"}
            ),
        }
    )
    clients = [federation(settings).load(client) for client in range(4)]
    assert sorted(row for client in clients for row in rows_of(client)) == list(range(600))
    for client in clients:
        assert len(client.calibration) == 0
        assert abs(len(client.test) - 0.25 * len(rows_of(client))) <= 1
        assert client.augment is None
        if name == "ag-news":
            assert int((client.train.x > 0).sum(dim=1).max()) == 7
