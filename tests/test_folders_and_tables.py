"""What is read is what lies there: no class and no row is lost or made up unsaid, and every bad value is named."""

import json
import logging
import unicodedata

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cafe_flwr.client.description import check_data
from cafe_flwr.data import load_federation
from cafe_flwr.data.convert import split_from_datasets, split_from_torch
from cafe_flwr.data.federation import deal_out
from cafe_flwr.data.hub import open_set
from cafe_flwr.data.labels import classes_of, composed
from cafe_flwr.data.local import read_local
from cafe_flwr.data.options import Data
from cafe_flwr.data.own import load_own
from cafe_flwr.data.split import ClientData, Split


def shade(value):
    return Image.new("L", (4, 4), value)


def folder(root, classes=("cat", "dog"), each=3):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(each):
            shade(10 * c + k).save(root / name / f"{k}.png")
    return root


def table(path, labels, pictures=None, **more):
    pictures = pictures or [np.full((4, 4), 5 + k % 200).tolist() for k in range(len(labels))]
    pq.write_table(pa.table({"image": pictures, "label": labels, **more}), path)
    return path


def read(path, size=0):
    return read_local(path, size, "image", "label")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "flwr")
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


# --- folders ---


def test_linked_class_folders_are_classes_and_circles_end(tmp_path):
    root = folder(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    shade(99).save(tmp_path / "elsewhere" / "x.png")
    (root / "bird").symlink_to("cat")
    (root / "eel").symlink_to(tmp_path / "elsewhere")
    (root / "eel" / "self").symlink_to(tmp_path / "elsewhere")
    found = read(root)
    assert found.class_names == ("bird", "cat", "dog", "eel")
    assert np.bincount(found.labels).tolist() == [3, 3, 3, 1]
    assert found.images[:3].tolist() == found.images[3:6].tolist()


@pytest.mark.parametrize("name", ["folder [1]", "a*b", "what?", "[!x]", "{a,b}", "**", "a[", "[[]"])
def test_signs_of_patterns_in_paths_are_plain(tmp_path, name):
    folder(tmp_path / "decoy" / "set")
    root = folder(tmp_path / name / "set", ("a [1]", "b*"))
    assert read(root).class_names == ("a [1]", "b*")
    (root / "metadata.csv").write_text(
        "file_name,label,size\n" + "".join(f"{c}/{k}.png,{c},{k}\n" for c in ("a [1]", "b*") for k in range(3))
    )
    assert read(root).column("size") == [0, 1, 2] * 2
    file = table(tmp_path / name / "set?.parquet", [0, 1])
    assert len(read(file).images) == len(read(tmp_path / name).images) == 2
    copies = tmp_path / name / "ag-news"
    copies.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), copies / "train[0].parquet")
    assert open_set("ag-news", str(tmp_path / name)).texts(np.array([1])) == ["b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shade(1).save(root / "x.png"), r"1 of its 7 images do not lie in a subfolder .*such as x\.png"),
        (lambda root: folder(root / "eel", ("a",)), r"3 of its 9 images .*such as eel/a/0\.png: expected <class>/<im"),
        (lambda root: (root / "metadata.csv").write_text("file_name,label\ncat/0.png,5\n"), "names 1 of 6 images"),
    ],
    ids=["beside the classes", "one folder deeper", "not in the metadata"],
)
def test_classes_and_rows_that_would_be_lost_or_made_up_are_refused_with_counts(tmp_path, change, message):
    root = folder(tmp_path / "set")
    change(root)
    with pytest.raises(ValueError, match=message):
        read(root)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*range(6), 0], "7 lines for 6 images; .*0.png is named twice"),
        ([*range(6), 9], "7 lines for 6 images; .*9.png is not there"),
    ],
)
def test_metadata_names_every_image_once(tmp_path, lines, message):
    folder(tmp_path / "set", ("all",), each=6)
    rows = [{"file_name": f"{k}.png", "label": k % 2} for k in lines]
    (tmp_path / "set" / "all" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "set")


def test_empty_class_folders_and_files_that_are_left_out_are_said(tmp_path, said):
    root = folder(tmp_path / "set")
    (root / "bird").mkdir()
    (root / "notes.txt").write_text("x")
    (root / "cat" / "a.heic").write_bytes(b"x")
    (root / "cat" / "._0.png").write_bytes(b"x")
    (root / ".cache").mkdir()
    assert read(root).class_names == ("cat", "dog")
    assert "without an image are no classes: 'bird'" in said()
    assert "2 files in" in said()
    assert ".heic (1)" in said()


def test_a_truncated_picture_is_named_by_row_and_file(tmp_path):
    root = folder(tmp_path / "set")
    file = root / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:45])
    with pytest.raises(ValueError, match=r"row 4 of 'local:.*' \(dog/1\.png\) holds no image that can be read: ."):
        read(root)
    bad = {"bytes": file.read_bytes(), "path": "there/1.png"}
    rows = table(tmp_path / "b.parquet", [0, 1], [{"bytes": (root / "cat/0.png").read_bytes(), "path": "0.png"}, bad])
    table(tmp_path / "a.parquet", [0], [{"bytes": (root / "cat/0.png").read_bytes(), "path": "0.png"}])
    with pytest.raises(ValueError, match=r"row 1 of 'local:.*b.parquet' \(1\.png\) holds no image"):
        read(rows)
    with pytest.raises(ValueError, match=r"row 2 of 'local:.*' \(b\.parquet, row 1\) \(1\.png\) holds no image"):
        read(tmp_path)


# --- class names ---


def test_names_of_classes_are_compared_in_composed_form(tmp_path):
    written = unicodedata.normalize("NFD", "café")
    root = folder(tmp_path / "set", (written, "dog"), each=6)
    data = load_own(root, 0, Data(), class_names=("café", "dog"), shape=(1, 4, 4))
    assert len(data.train.y.unique()) == 2
    with pytest.raises(ValueError, match=r"'café' \(written 'caf\\xe9'\)"):
        load_own(root, 0, Data(), class_names=("caf\N{CYRILLIC SMALL LETTER IE}", "dog"), shape=(1, 4, 4))
    with pytest.raises(ValueError, match=r"'cafe\\u0301' and 'caf\\xe9' .* look alike"):
        composed([written, "café"], "x")


# --- labels ---


@pytest.mark.parametrize("largest", [21, 2119789, 10**9, 2**62])
def test_numbers_far_beyond_the_rows_are_ids(tmp_path, largest):
    file = table(tmp_path / "set.parquet", [0, largest])
    with pytest.raises(ValueError, match=rf"up to {largest} for 2 rows \(first row 1 of .*these are ids"):
        read(file)
    with pytest.raises(ValueError, match=rf"does not know: '{largest}' \(1 of 2 examples\)"):
        load_own(file, 0, Data(), class_names=("0", "1"), shape=(1, 4, 4))


def test_numbers_without_an_example_are_said(tmp_path, said):
    assert read(table(tmp_path / "set.parquet", [1, 2, 6, 1, 2, 6])).class_names == tuple("0123456")
    assert "4 of 7 classes have no example: '0', '3'..'5'" in said()


BAD_LABELS = [
    ([[0], [1], [0]], r"got \[0\] in row 0"),
    ([[1, 0], [0, 1], [1, 0]], "in row 0"),
    ([0.0, float("nan"), 1.0], "rows without a label .*1 of 3, first row 1"),
    ([0.0, 1.0, 2.0], r"got 0\.0 in row 0"),
    ([True, False, True], "got True in row 0"),
    ([0, None, 1], "rows without a label .*first row 1"),
    (["a", None, "b"], "rows without a label .*first row 1"),
    (["a", " ", "b"], "rows without a label .*first row 1"),
    ([0, 1, -3], r"labels 0\.\.C−1 or names of classes, got -3 in row 2"),
    ([{"a": 1}] * 3, "in row 0"),
    ([b"a", b"b", b"c"], "in row 0"),
]


@pytest.mark.parametrize(("labels", "message"), BAD_LABELS, ids=str)
def test_a_bad_label_is_named_by_row_column_and_file(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        read(table(tmp_path / "set.parquet", labels))
    assert "'label'" in str(error.value)
    assert "set.parquet" in str(error.value)
    hub = tmp_path / "ag-news"
    hub.mkdir()
    pq.write_table(pa.table({"text": ["a"] * 3, "label": labels}), hub / "train.parquet")
    with pytest.raises(ValueError, match=r"label.* column 'label'.*row \d of .*ag-news"):
        open_set("ag-news", str(tmp_path))
    rows = Dataset.from_dict({"x": [[1.0]] * 3, "label": labels})
    with pytest.raises(ValueError, match=r"label.*row \d of column 'label'"):
        split_from_datasets(rows, "x")


labels_of_any_kind = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.lists(st.integers())
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(labels_of_any_kind, st.integers(0, 3)), min_size=1, max_size=6))
def test_labels_of_any_kind_are_classes_or_a_sentence(values):
    try:
        labels, names = classes_of(values, None, "label", lambda row: f"row {row}" if row >= 0 else "the set")
    except ValueError as error:
        assert "row" in str(error)  # noqa: PT017
        assert len(str(error)) < 400  # noqa: PT017
    else:
        assert (labels >= 0).all()
        assert [y if names is None else names[y] for y in labels.tolist()] == [
            min(y, 2**62) if names is None else y for y in values
        ]
    try:
        y = split_from_torch([(torch.zeros(2), value) for value in values]).y
    except ValueError as error:
        assert "item" in str(error)  # noqa: PT017
    else:
        assert y.tolist() == values


@pytest.mark.parametrize("y", [torch.tensor([0, 1]), np.array([1, 0]), torch.tensor(float("nan")), torch.tensor(True)])
def test_labels_of_items_that_are_no_numbers_are_named(y):
    with pytest.raises(ValueError, match=r"label.*item 1"):
        split_from_torch([(torch.zeros(3), 0), (torch.zeros(3), y)])


# --- inputs ---


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_formats_of_a_dataset_are_undone(form):
    values = {"x": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1], "text": ["a b", "c"], "image": [shade(3), shade(9)]}
    rows = Dataset.from_dict(values)
    for column in ("x", "text", "image"):
        plain, formatted = (split_from_datasets(data, column) for data in (rows, rows.with_format(form)))
        assert torch.equal(plain.x, formatted.x)
        assert torch.equal(plain.y, formatted.y)


def test_a_transform_of_a_dataset_is_not_applied_and_that_is_said(said):
    rows = Dataset.from_dict({"image": [shade(3)], "label": [0]})
    turned = rows.with_transform(lambda batch: {"pixels": [torch.zeros(1)]})
    assert int(split_from_datasets(turned).x[0, 0, 0, 0]) == 3
    assert "transform of a data set is not applied" in said()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], "row 1 of column 'x' holds no text"),
        ([None, "a"], "row 0 of column 'x' holds no text"),
        ([[1.0, 2.0], [1.0, None]], r"row 1 of column 'x' must hold numbers.*got \[1\.0, None\]"),
        ([[1.0, 2.0], None], "row 1 of column 'x' must hold numbers"),
        ([[[1], [1, 2]], [[1], [2]]], "row 0 of column 'x' must hold numbers, in lists of one length"),
        ([[1.0, 2.0], [float("nan"), 1.0]], r"row 1 of column 'x' holds nan at \(0,\)"),
        ([[1.0, 2.0], [1.0, float("-inf")]], r"row 1 of column 'x' holds -inf at \(1,\)"),
        ([shade(1), None], "row 1 of column 'x' holds no image that can be read: there is none"),
    ],
)
def test_a_bad_input_is_named_by_row_and_column(values, message):
    with pytest.raises(ValueError, match=message):
        split_from_datasets(Dataset.from_dict({"x": values, "label": [0, 1]}), "x")


def test_nan_in_pixels_or_in_a_clients_data_is_found_before_training(tmp_path):
    pictures = [np.linspace(0, 1, 16).reshape(4, 4).tolist() for _ in range(3)]
    pictures[2][1][1] = float("nan")
    with pytest.raises(ValueError, match=r"row 2 of .*set\.parquet' holds no image .*NaN"):
        read(table(tmp_path / "set.parquet", [0, 1, 0], pictures))
    good, bad = Split(torch.zeros(4, 2), torch.zeros(4).long()), Split(torch.ones(4, 2), torch.zeros(4).long())
    bad.x[2, 1] = torch.inf
    for splits in ((bad, good, good), (good, bad, good), (good, good, bad)):
        with pytest.raises(ValueError, match="NaN or infinite inputs, first in example 2"):
            check_data(ClientData(*splits), 2)


def test_a_text_of_the_hub_that_is_missing_is_not_the_word_none(tmp_path):
    (tmp_path / "ag-news").mkdir()
    for name, texts in (("train", ["a", "b"]), ("test", ["c", None])):
        pq.write_table(pa.table({"text": texts, "label": [0, 1]}), tmp_path / "ag-news" / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"row 3 of .*\(test\.parquet, row 1\) has no text in column 'text'"):
        open_set("ag-news", str(tmp_path)).texts(np.arange(4))


def test_pictures_are_decoded_one_by_one(tmp_path, monkeypatch):
    """`datasets` keeps them encoded: nothing but the arrays that are kept is in memory."""
    decoded = []
    monkeypatch.setattr("datasets.Image.decode_example", lambda *a, **k: decoded.append(1))
    assert len(read(folder(tmp_path / "set")).images) == 6
    split_from_datasets(Dataset.from_dict({"image": [shade(1)] * 3, "label": [0, 1, 0]}))
    assert not decoded


def test_a_set_whose_range_cannot_be_told_is_read_with_the_setting(tmp_path):
    file = tmp_path / "set.parquet"
    tones = [np.full((4, 4), k / 30).tolist() for k in range(60)]
    pd.DataFrame({"image": tones, "label": [0, 1] * 30}).to_parquet(file)
    with pytest.raises(ValueError, match=r"set.parquet', column 'image': .*data\.image-range"):
        load_federation(f"local:{file}", 2, alpha=1.0)
    options = Data(dataset=f"local:{file}", image_range="0..2", dirichlet_alpha=1.0)
    x = deal_out(options, 2).load(0).train
    torch.testing.assert_close(x.x[:, 0, 0, 0], x.source[:, 0].float() / 30 - 1)
