"""Data dealt out to clients: nothing leaks between splits, nothing depends on who asks first, errors say what to do."""

import hashlib
import io
import itertools
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits

from cafe_flwr.data import digits, load_federation, rotate, shift_labels
from cafe_flwr.data.digits import SPLITS, digit_pools
from cafe_flwr.data.federation import deal_out
from cafe_flwr.data.local import LocalSet
from cafe_flwr.data.partition import Rule, partition_labels, stratified_split
from cafe_flwr.networks.preprocessing import SYMMETRIC

# Small federations of both embedded sets: (name, clients, settings).
EMBEDDED = [
    ("digits", 8, {"alpha": 0.5, "examples_per_client": 100}),
    ("digit-pairs", 8, {"alpha": 0.1, "examples_per_client": 100}),
]


@pytest.fixture(autouse=True)
def _no_network_and_no_cache_outside(monkeypatch, tmp_path):
    """Everything happens on this machine, and what `datasets` caches goes to a folder of the test."""
    import datasets

    def refuse(*_):
        raise AssertionError("a data set reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    yield
    if shown:
        datasets.enable_progress_bars()


@pytest.fixture(params=EMBEDDED, ids=lambda p: p[0])
def embedded(request):
    name, clients, options = request.param
    return name, load_federation(name, clients, **options)


def splits(client):
    return {"train": client.train, "calibration": client.calibration, "test": client.test}


def clients_of(federation):
    return [federation.load(i) for i in range(federation.num_clients)]


# --- the embedded sets ---


def test_no_image_is_made_from_a_digit_of_another_split_over_all_clients(embedded):
    _, federation = embedded
    used = {name: set() for name in SPLITS}
    for client in clients_of(federation):
        for name, split in splits(client).items():
            used[name] |= set(split.source.flatten().tolist())
    for name in SPLITS:
        assert len(used[name]) > 50
    for a, b in itertools.combinations(SPLITS, 2):
        assert not used[a] & used[b]


@pytest.mark.parametrize("split", SPLITS)
def test_no_pixel_comes_from_a_digit_of_another_split(monkeypatch, split):
    """`source` names the digits that make the class; clutter is digits too. So all digits outside the split's pool are
    poisoned with NaN: not one pixel of the split may be affected."""
    images, target = digits._base_digits()
    poisoned = torch.full_like(images, torch.nan)
    own = np.concatenate(digit_pools(0)[split])
    poisoned[own] = images[own]
    monkeypatch.setattr(digits, "_base_digits", lambda: (poisoned, target))
    deal_out.cache_clear()
    federation = load_federation("digit-pairs", 6, alpha=0.3, examples_per_client=80)
    x = {name: torch.cat([splits(c)[name].x for c in clients_of(federation)]) for name in SPLITS}
    deal_out.cache_clear()
    assert torch.isfinite(x[split]).all()
    for other in set(SPLITS) - {split}:
        assert torch.isnan(x[other]).flatten(1).any(1).all()  # the poison works


def test_pools_deal_out_every_base_digit_once():
    target = load_digits().target
    for seed in (0, 1):
        pools = digit_pools(seed)
        rows = np.concatenate([np.concatenate(pools[name]) for name in SPLITS])
        assert sorted(rows.tolist()) == list(range(len(target)))
        for name, digit in itertools.product(SPLITS, range(10)):
            assert (target[pools[name][digit]] == digit).all()
            assert len(pools[name][digit]) > 20
    assert digit_pools(0)["test"][3].tolist() != digit_pools(1)["test"][3].tolist()


def test_class_of_an_image_is_the_digits_it_is_made_from(embedded):
    name, federation = embedded
    target = load_digits().target
    for client in clients_of(federation):
        for split in splits(client).values():
            digits = target[split.source.numpy()]
            label = digits[:, 0] * 10 + digits[:, 1] if name == "digit-pairs" else digits[:, 0]
            assert split.source.shape == (len(split), 2 if name == "digit-pairs" else 1)
            np.testing.assert_array_equal(split.y.numpy(), label)
            assert [federation.class_names[y] for y in split.y] == ["".join(map(str, row)) for row in digits.tolist()]


def correlation(a, b):
    a, b = a.flatten(1) - a.flatten(1).mean(1, keepdim=True), b.flatten(1) - b.flatten(1).mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def test_the_image_shows_its_source_the_first_digit_on_the_left(embedded):
    """Where a digit stands the image looks like its own base digit, more than like one of another class: for a pair,
    than like the digit of the other half."""
    name, federation = embedded
    digits = load_digits()
    base = torch.from_numpy(digits.images).float().unsqueeze(1)
    x = torch.cat([client.test.x for client in clients_of(federation)])
    source = torch.cat([client.test.source for client in clients_of(federation)])
    if name == "digit-pairs":
        shown, own, other = (
            torch.cat([x[..., 4:12, :8], x[..., 4:12, 8:]]),
            source.T.flatten(),
            source.flip(1).T.flatten(),
        )
    else:
        shown, own, other = torch.nn.functional.avg_pool2d(x, 2), source[:, 0], source[:, 0].roll(len(x) // 2)
    different = torch.from_numpy(digits.target[own] != digits.target[other])
    assert different.sum() > 100
    similar, dissimilar = correlation(shown, base[own]), correlation(shown, base[other])
    assert similar.median() > 0.6
    assert (similar > dissimilar)[different].float().mean() > 0.9


def test_every_client_has_three_splits_of_about_the_given_shares(embedded):
    _, federation = embedded
    total = 0
    for client in clients_of(federation):
        sizes = np.array([len(client.train), len(client.calibration), len(client.test)])
        total += sizes.sum()
        assert (sizes > 0).all()
        assert np.abs(sizes - np.array([0.48, 0.12, 0.40]) * sizes.sum()).max() <= 1
    # examples_per_client is a mean; it is rounded up so that all classes have the same number of examples.
    assert 100 * federation.num_clients <= total < 100 * federation.num_clients + federation.num_classes


def test_train_and_test_of_a_client_have_like_labels_and_clients_differ(embedded):
    """Total variation ½ Σ_c |p_c − q_c|: the test labels of a client are closer to its own training labels than to
    those of any other client."""
    _, federation = embedded

    def shares(split):
        return np.bincount(split.y, minlength=federation.num_classes) / len(split)

    clients = clients_of(federation)
    distance = np.array([[np.abs(shares(a.train) - shares(b.test)).sum() / 2 for b in clients] for a in clients])
    others = distance + 2 * np.eye(len(clients))
    assert (np.diag(distance) < others.min(axis=0)).all()
    assert np.diag(distance).mean() < others.min(axis=0).mean() / 2


def test_shapes_and_types(embedded):
    name, federation = embedded
    assert federation.num_classes == (100 if name == "digit-pairs" else 10)
    for client in clients_of(federation):
        for split in splits(client).values():
            assert split.x.shape == (len(split), *federation.input_shape) == (len(split), 1, 16, 16)
            assert (split.x.dtype, split.y.dtype, split.source.dtype) == (torch.float32, torch.int64, torch.int64)
            assert -2 < split.x.mean() < 2
            assert 0.3 < split.x.std() < 3


def same(a, b):
    pairs = zip(splits(a).values(), splits(b).values(), strict=True)
    return all(torch.equal(x, y) for one, two in pairs for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize(("name", "clients", "options"), EMBEDDED)
def test_the_same_seed_gives_the_same_bits_whoever_is_asked_first(name, clients, options):
    deal_out.cache_clear()
    first = load_federation(name, clients, **options)
    forwards = [first.load(i) for i in range(clients)]
    deal_out.cache_clear()
    digit_pools.cache_clear()
    second = load_federation(name, clients, **options)
    assert second is not first
    assert same(second.load(clients - 1), forwards[-1])  # alone, on another node, say
    assert all(same(second.load(i), forwards[i]) for i in reversed(range(clients)))


@pytest.mark.parametrize(("name", "clients", "options"), EMBEDDED)
def test_another_seed_gives_other_data(name, clients, options):
    a, b = (load_federation(name, clients, seed=seed, **options) for seed in (0, 1))
    # The partition differs, in how many examples of a class a client has in all, and so do the pictures.
    first, second = (
        [torch.bincount(torch.cat([s.y for s in splits(c).values()]), minlength=100).tolist() for c in clients_of(f)]
        for f in (a, b)
    )
    assert all(one != two for one, two in zip(first, second, strict=True))
    n = min(len(a.load(0).test), len(b.load(0).test))
    assert not torch.equal(a.load(0).test.x[:n], b.load(0).test.x[:n])


def test_clients_do_not_get_the_same_pictures():
    federation = load_federation("digits", 8, alpha=0.5, examples_per_client=100)
    x = torch.cat([split.x.flatten(1) for c in clients_of(federation) for split in splits(c).values()])
    assert len(torch.unique(x, dim=0)) == len(x)


@pytest.mark.parametrize("classes", [1, 2, 5, 10])
def test_pathological_partition_gives_exactly_so_many_classes(classes):
    federation = load_federation(
        "digits", 10, partition="pathological", classes_per_client=classes, examples_per_client=60
    )
    for client in clients_of(federation):
        y = torch.cat([split.y for split in splits(client).values()])
        assert len(torch.unique(y)) == classes
    everyone = torch.cat([client.train.y for client in clients_of(federation)])
    assert len(torch.unique(everyone)) == 10


def test_a_client_that_does_not_exist_is_an_error():
    federation = load_federation("digits", 8, alpha=0.5, examples_per_client=100)
    for client in (-1, 8):
        with pytest.raises(ValueError, match=rf"0\.\.7, got {client}"):
            federation.load(client)


@pytest.mark.parametrize(
    ("dataset", "clients", "options", "message"),
    [
        ("mnist", 10, {}, "'digits', 'digit-pairs', 'docstrings', .*'ag-news' or 'local:<path>', got 'mnist'"),
        ("", 10, {}, "local:<path>"),
        ("digits", 10, {"partition": "iid"}, "'dirichlet' or 'pathological', got 'iid'"),
        ("digits", 10, {"shares": (0.5, 0.1, 0.5)}, "sum to 1"),
        ("digits", 10, {"shares": (1.2, -0.1, -0.1)}, "0 or more"),
        ("digits", 10, {"shares": (0.5, 0.5)}, "train, calibration and test"),
        ("digits", 10, {"examples_per_client": 9}, "90 examples cannot serve 10 clients.*lower num-clients"),
        # 60 clients with one or two classes each, and only 13 examples a client on average.
        ("digits", 60, {"alpha": 0.01, "examples_per_client": 13}, "raise dirichlet-alpha"),
        ("digits", 10, {"alpha": 0.0}, "[Aa]lpha"),
        (
            "digits",
            10,
            {"partition": "pathological", "classes_per_client": 11},
            "11.*greater.*10.*change classes-per-client",
        ),
        # One class each: clients 0 and 10 share the 17 examples of class 0, so one of them has 8.
        (
            "digits",
            17,
            {"partition": "pathological", "classes_per_client": 1, "examples_per_client": 10},
            "the smallest client would have 8 of at least 10 examples.*change classes-per-client, lower num-clients",
        ),
        ("digits", 0, {}, "num-clients, examples-per-client and classes-per-client must be at least 1"),
        ("digits", 10, {"examples_per_client": 0}, "must be at least 1"),
        ("digits", 10, {"partition": "pathological", "classes_per_client": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_served_is_an_error_that_says_why(dataset, clients, options, message):
    with pytest.raises(ValueError, match=message):
        load_federation(dataset, clients, **options)


@pytest.mark.parametrize("partition", ["dirichlet", "pathological"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_partition_deals_out_every_example_once(partition, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(7), 60))
    parts = partition_labels(labels, 9, Rule(partition, 0.3, 3), seed)
    assert len(parts) == 9
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    if partition == "dirichlet":
        assert min(map(len, parts)) >= 10


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 12), min_size=1, max_size=120),
    weights=st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(1, 20)),
    seed=st.integers(0, 10**6),
)
def test_split_is_a_partition_with_the_shares_of_every_class(labels, weights, seed):
    """A split may be off by rounding only: about one example in size, and one at either end of a class's run."""
    labels, shares = np.array(labels), np.array(weights) / sum(weights)
    parts = stratified_split(labels, tuple(shares), np.random.default_rng(seed))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share * len(labels)) <= 1 + 1e-5
        for c in np.unique(labels):
            assert abs((labels[part] == c).sum() - share * (labels == c).sum()) <= 2 + 1e-5
        if share == 0:
            assert len(part) == 0


def test_which_example_goes_where_is_left_to_chance():
    """0.48/0.12/0.40 of 30 like examples, 400 times: an example is in the test split 160 times, with standard deviation
    √(400·0.4·0.6) = 9.8."""
    labels = np.zeros(30, dtype=np.int64)
    drawn = [stratified_split(labels, (0.48, 0.12, 0.40), np.random.default_rng(seed))[2] for seed in range(400)]
    counts = np.bincount(np.concatenate(drawn), minlength=30)
    assert counts.sum() == 400 * 12
    assert np.abs(counts - 160).max() < 4 * 9.8


# --- local files ---


def picture(value, size=(6, 6), mode="L"):
    return Image.new(mode, size, value)


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# Picture i is evenly grey, i of 255: a pixel tells which row it came from.
N = 60
LABELS = [i % 3 for i in range(N)]
NAMES = ["cat", "dog", "eel"]


def write_with_datasets(path, labels):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    if isinstance(labels[0], str):
        features["label"] = datasets.Value("string")
    table = datasets.Dataset.from_dict({"image": [picture(i) for i in range(len(labels))], "label": labels}, features)
    table.to_parquet(str(path))


def write_with_class_labels(path, labels):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    table = datasets.Dataset.from_dict({"image": [picture(i) for i in range(len(labels))], "label": labels}, features)
    table.to_parquet(str(path))


def structs(pictures):
    return [{"bytes": encoded(image), "path": f"{i}.png"} for i, image in enumerate(pictures)]


def write_with_pyarrow(path, labels, pictures=None, columns=("image", "label")):
    pictures = pictures or [picture(i) for i in range(len(labels))]
    pq.write_table(pa.table({columns[0]: pa.array(structs(pictures)), columns[1]: pa.array(labels)}), path)


def write_with_pandas(path, labels):
    pd.DataFrame({"image": structs([picture(i) for i in range(len(labels))]), "label": labels}).to_parquet(path)


def as_numbers(x):
    """Inputs as a network takes them: pixels are −1..1."""
    return SYMMETRIC(x) if x.dtype == torch.uint8 else x


def check_rows(federation, labels):
    """Every row is in one split of one client, with its own picture and label."""
    seen = []
    for client in clients_of(federation):
        for split in splits(client).values():
            assert (split.y.dtype, split.source.dtype) == (torch.int64, torch.int64)
            assert split.source.shape == (len(split), 1)
            rows = split.source[:, 0]
            expected = (rows / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, 1, 6, 6)
            torch.testing.assert_close(as_numbers(split.x), expected.float())
            assert split.y.tolist() == [labels[i] for i in rows.tolist()]
            seen += rows.tolist()
        assert len(client.train) > 0
        assert len(client.test) > 0
    assert sorted(seen) == list(range(len(labels)))


@pytest.mark.parametrize(
    ("write", "labels", "names"),
    [
        (write_with_datasets, LABELS, ("0", "1", "2")),
        (write_with_datasets, [NAMES[i] for i in LABELS], tuple(NAMES)),
        (write_with_class_labels, LABELS, tuple(NAMES)),
        (write_with_pyarrow, LABELS, ("0", "1", "2")),
        (write_with_pyarrow, [NAMES[i] for i in LABELS], tuple(NAMES)),
        (write_with_pandas, LABELS, ("0", "1", "2")),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_parquet_file(tmp_path, write, labels, names):
    write(tmp_path / "set.parquet", labels)
    federation = load_federation(f"local:{tmp_path / 'set.parquet'}", 3, alpha=1.0)
    assert federation.class_names == names
    assert federation.input_shape == (1, 6, 6)
    assert federation.load(0).train.x.dtype == torch.uint8  # a quarter of the memory
    check_rows(federation, LABELS)


@pytest.mark.parametrize("writer", ["pandas", "pyarrow"])
def test_parquet_file_with_large_string_labels(tmp_path, writer):
    labels = [NAMES[i] for i in LABELS]
    if writer == "pandas":
        write_with_pandas(tmp_path / "set.parquet", labels)
    else:
        write_with_pyarrow(tmp_path / "set.parquet", pa.array(labels, pa.large_string()))
    federation = load_federation(f"local:{tmp_path / 'set.parquet'}", 3, alpha=1.0)
    assert federation.class_names == tuple(NAMES)
    check_rows(federation, LABELS)


def test_folder_of_parquet_files_is_read_in_the_order_of_names(tmp_path):
    write_with_pyarrow(tmp_path / "part-1.parquet", LABELS[30:], [picture(i) for i in range(30, 60)])
    write_with_pyarrow(tmp_path / "part-0.parquet", LABELS[:30], [picture(i) for i in range(30)])
    check_rows(load_federation(f"local:{tmp_path}", 3, alpha=1.0), LABELS)


def test_columns_may_have_other_names(tmp_path):
    write_with_pyarrow(tmp_path / "set.parquet", LABELS, columns=("img", "fine_label"))
    federation = load_federation(
        f"local:{tmp_path / 'set.parquet'}", 3, alpha=1.0, image_column="img", label_column="fine_label"
    )
    check_rows(federation, LABELS)


def image_folder(root, classes=NAMES, per_class=20, size=(6, 6)):
    for (c, name), i in itertools.product(enumerate(classes), range(per_class)):
        (root / name).mkdir(parents=True, exist_ok=True)
        picture(c * per_class + i, size).save(root / name / f"{i:03d}.png")
    return root


def test_folder_with_one_subfolder_per_class(tmp_path):
    federation = load_federation(f"local:{image_folder(tmp_path / 'pictures')}", 3, alpha=1.0)
    assert federation.class_names == tuple(NAMES)
    check_rows(federation, [c for c in range(3) for _ in range(20)])


def test_folder_whose_class_names_look_like_splits(tmp_path):
    """CIFAR-100 has a class "train"; here two kinds of train, and a car that must not get lost."""
    root = image_folder(tmp_path / "pictures", ["car", "freight-train", "steam-train"])
    federation = load_federation(f"local:{root}", 3, alpha=1.0)
    assert federation.class_names == ("car", "freight-train", "steam-train")
    check_rows(federation, [c for c in range(3) for _ in range(20)])


def test_local_data_depends_on_the_seed_only(tmp_path):
    write_with_pyarrow(tmp_path / "set.parquet", LABELS)
    path = f"local:{tmp_path / 'set.parquet'}"
    first = clients_of(load_federation(path, 3, alpha=1.0))
    deal_out.cache_clear()
    again = load_federation(path, 3, alpha=1.0)
    assert all(same(again.load(i), first[i]) for i in (2, 0, 1))
    other = clients_of(load_federation(path, 3, alpha=1.0, seed=1))
    assert [c.train.source.tolist() for c in first] != [c.train.source.tolist() for c in other]


def test_colours_come_first_and_in_order(tmp_path):
    write_with_pyarrow(tmp_path / "set.parquet", LABELS, [picture((255, 0, 51), (5, 4), "RGB")] * N)
    federation = load_federation(f"local:{tmp_path / 'set.parquet'}", 2, alpha=1.0)
    assert federation.input_shape == (3, 4, 5)  # PIL gives width and height, a network takes height and width
    pixel = as_numbers(federation.load(0).train.x)[0, :, 2, 3]
    torch.testing.assert_close(pixel, torch.tensor([1.0, -1.0, 51 / 127.5 - 1]))


def test_images_of_different_sizes_need_image_size(tmp_path):
    pictures = [picture(i, (6 + i % 2, 6)) for i in range(N)]
    write_with_pyarrow(tmp_path / "set.parquet", LABELS, pictures)
    path = f"local:{tmp_path / 'set.parquet'}"
    with pytest.raises(ValueError, match=r"2 different shapes: set data.image-size"):
        load_federation(path, 3, alpha=1.0)
    federation = load_federation(path, 3, alpha=1.0, image_size=6)
    check_rows(federation, LABELS)
    assert load_federation(path, 3, alpha=1.0, image_size=12).input_shape == (1, 12, 12)


def test_sixteen_bit_pictures_keep_their_shades(tmp_path):
    shades = np.tile(np.linspace(0, 65535, 6).astype(np.uint16), (6, 1))
    write_with_pyarrow(tmp_path / "set.parquet", LABELS, [Image.fromarray(shades)] * N)
    row = load_federation(f"local:{tmp_path / 'set.parquet'}", 2, alpha=1.0).load(0).train.x[0, 0, 0]
    torch.testing.assert_close(row, torch.linspace(-1, 1, 6), atol=0.01, rtol=0)


def local_error(path, match, **options):
    with pytest.raises(ValueError, match=match):
        load_federation(f"local:{path}", 3, alpha=1.0, **options)


def test_errors_of_local_sets(tmp_path):
    file = tmp_path / "set.parquet"
    write_with_pyarrow(file, LABELS)
    local_error(file, "no column 'img'; it has image, label.*Set image-column", image_column="img")
    local_error(file, "no column 'class'; it has image, label.*label-column", label_column="class")
    local_error(tmp_path / "nowhere.parquet", "nowhere.parquet.*no such file or folder")
    local_error(tmp_path / "nowhere", "no such file or folder")

    (tmp_path / "table.csv").write_text("image,label\n")
    local_error(tmp_path / "table.csv", r"expected a .parquet file or a folder, got a .csv file")

    with pytest.raises(ValueError, match="60 examples cannot serve 7 clients"):
        load_federation(f"local:{file}", 7, alpha=1.0)


@pytest.mark.parametrize("labels", [[-1, *LABELS[1:]], [0.5] * N, [True, *[False] * 59]], ids=["-1", "0.5", "bool"])
def test_labels_that_are_not_classes(tmp_path, labels):
    write_with_pyarrow(tmp_path / "set.parquet", labels)
    local_error(tmp_path / "set.parquet", "'label' of .*set.parquet' must hold labels 0..C−1 or names")


@pytest.mark.parametrize("labels", [LABELS, [NAMES[i] for i in LABELS]], ids=["numbers", "names"])
def test_a_missing_label_is_an_error_not_a_class(tmp_path, labels):
    write_with_pyarrow(tmp_path / "set.parquet", [*labels[:-1], None])
    local_error(tmp_path / "set.parquet", "set.parquet' has rows without a label in column 'label'")


def test_a_set_whose_labels_are_withheld_is_an_error(tmp_path):
    """The hub's unlabelled test sets have class names, and -1 in every row."""
    write_with_class_labels(tmp_path / "set.parquet", [-1] * N)
    local_error(tmp_path / "set.parquet", "has rows without a label")


@pytest.mark.parametrize("content", [b"no picture", encoded(picture(3))[:40], None], ids=["text", "cut off", "missing"])
def test_a_broken_image_is_named_by_its_row(tmp_path, content):
    rows = structs([picture(i) for i in range(N)])
    rows[37] = None if content is None else {"bytes": content, "path": None}
    pq.write_table(pa.table({"image": pa.array(rows), "label": pa.array(LABELS)}), tmp_path / "set.parquet")
    local_error(tmp_path / "set.parquet", "^row 37 of 'local:.*set.parquet' holds no image that can be read: .")


def test_grey_images_among_coloured_ones_become_coloured(tmp_path):
    """Row i is evenly i of 255 in all channels, whatever mode it is stored in; the last one is black and white."""
    modes = ["L", "RGB", "RGBA", "LA", "P"]
    pictures = [
        picture((i, i, i), mode="RGB").convert(modes[i % 5], palette=Image.Palette.ADAPTIVE) for i in range(N - 1)
    ]
    pictures.append(picture(1, mode="1"))
    write_with_pyarrow(tmp_path / "set.parquet", LABELS, pictures)
    federation = load_federation(f"local:{tmp_path / 'set.parquet'}", 3, alpha=1.0)
    assert federation.input_shape == (3, 6, 6)
    seen = 0
    for client in clients_of(federation):
        for split in splits(client).values():
            for image, row in zip(as_numbers(split.x), split.source[:, 0].tolist(), strict=True):
                value = 255 if row == N - 1 else row
                torch.testing.assert_close(image, torch.full((3, 6, 6), value / 127.5 - 1))
                seen += 1
    assert seen == N


def test_folder_without_classes(tmp_path):
    """Pictures that lie side by side have no classes: nothing can be learnt from them."""
    for i in range(N):
        picture(i).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="class"):
        load_federation(f"local:{tmp_path}", 1)


def test_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_with_pyarrow(Path("~/set.parquet").expanduser(), LABELS)
    check_rows(load_federation("local:~/set.parquet", 3, alpha=1.0), LABELS)


# --- shifts between clients and between training and test ---


@pytest.fixture
def local_set(tmp_path):
    """Path of 240 noisy 6×6 pictures of 3 classes."""
    noise = np.random.default_rng(0).integers(0, 256, size=(240, 6, 6), dtype=np.uint8)
    labels = [i % 3 for i in range(240)]
    write_with_pyarrow(tmp_path / "noise.parquet", labels, [Image.fromarray(image) for image in noise])
    return f"local:{tmp_path / 'noise.parquet'}"


@pytest.fixture(params=["digits", "digit-pairs", "local"])
def data(request, local_set):
    """Name and settings of a set for 8 clients."""
    if request.param == "local":
        return local_set, {"alpha": 1.0}
    return request.param, {"alpha": 0.5, "examples_per_client": 100}


def same_split(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_federation(a, b):
    return all(same(one, two) for one, two in zip(clients_of(a), clients_of(b), strict=True))


def label_counts(federation):
    """Examples of every class that every client has, (clients, classes)."""
    return np.stack(
        [
            np.bincount(torch.cat([s.y for s in splits(c).values()]), minlength=federation.num_classes)
            for c in clients_of(federation)
        ]
    )


@pytest.mark.parametrize(
    ("name", "digest"),
    [("digits", "aad927bb4d6cf0fc6928e2f1715dbd8e"), ("digit-pairs", "8f907e045826a1add9b21e5db10f6780")],
)
def test_without_shifts_the_data_are_what_they_were_before_there_were_any(name, digest):
    """Digest of labels and base digits, which decide the images; pixels may round differently on another machine."""
    seen = hashlib.sha256()
    for client in clients_of(load_federation(name, 8, **{n: o for n, _, o in EMBEDDED}[name])):
        for split in splits(client).values():
            seen.update(split.y.numpy().tobytes())
            seen.update(split.source.numpy().tobytes())
    assert seen.hexdigest()[:32] == digest


@pytest.mark.parametrize(
    "off",
    [
        {"label_groups": 0, "rotations": 1, "validation_share": 0.0, "test_shift": 0.0},
        {"label_groups": 8},  # every client is a group of its own
        {"label_groups": 8, "rotations": 2},  # all clients have turn ⌊i / 8⌋ = 0
    ],
    ids=["defaults", "own groups", "no turn"],
)
def test_shifts_that_are_off_change_no_bit(data, off):
    name, options = data
    assert same_federation(load_federation(name, 8, **options), load_federation(name, 8, **options, **off))


SHIFTS = {"label_groups": 4, "rotations": 3, "validation_share": 0.25}


def test_shifted_data_depend_on_the_seed_only(data):
    name, options = data
    options = {**options, **SHIFTS, "test_shift": 0.0 if name.startswith("local") else 0.5}
    first = clients_of(load_federation(name, 8, **options))
    deal_out.cache_clear()
    digit_pools.cache_clear()
    again = load_federation(name, 8, **options)
    assert all(same(again.load(i), first[i]) for i in reversed(range(8)))
    other = clients_of(load_federation(name, 8, seed=1, **options))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))


# Label groups.


@pytest.mark.slow
def test_clients_of_a_label_group_have_like_labels_and_groups_differ():
    """Total variation ½ Σ_c |p_c − q_c| of 20 clients in 5 groups, for all splits together."""
    for name in ("digits", "digit-pairs"):
        counts = label_counts(load_federation(name, 20, alpha=0.3, label_groups=5))
        shares = counts / counts.sum(1, keepdims=True)
        distance = np.abs(shares[:, None] - shares[None]).sum(-1) / 2
        group = np.arange(20) % 5
        within = group[:, None] == group[None]
        assert distance[within].max() < distance[~within].min() / 2
        assert distance[within].max() < 0.15
        assert distance[~within].min() > 0.3


@pytest.mark.parametrize("partition", ["dirichlet", "pathological"])
@pytest.mark.parametrize(("clients", "groups"), [(9, 3), (8, 3), (7, 1), (6, 6)])
def test_a_group_is_dealt_out_evenly_and_completely(partition, clients, groups):
    """What a group's clients have together is a part of the partition over groups; in size and in every class two of
    them differ by one example at most."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), 60))
    rule = Rule(partition, 1.0, 7)
    parts = partition_labels(labels, clients, rule, 1, groups)
    shared = partition_labels(labels, groups, rule, 1)
    assert len(parts) == clients
    for g in range(groups):
        members = parts[g::groups]
        assert sorted(np.concatenate(members).tolist()) == sorted(shared[g].tolist())
        counts = np.stack([np.bincount(labels[member], minlength=7) for member in members])
        assert np.ptp(counts, axis=0).max() <= 1
        assert np.ptp(counts.sum(1)) <= 1


@pytest.mark.slow
def test_which_client_of_a_group_gets_an_example_is_left_to_chance():
    """Two clients share 60 examples: over 400 seeds client 0 gets each 200 times, standard deviation √400/2 = 10."""
    labels = np.repeat(np.arange(3), 20)
    drawn = [partition_labels(labels, 2, Rule("dirichlet", 1.0), seed, 1)[0] for seed in range(400)]
    counts = np.bincount(np.concatenate(drawn), minlength=60)
    assert counts.sum() == 400 * 30
    assert np.abs(counts - 200).max() < 4.5 * 10


@pytest.mark.slow
def test_a_label_group_of_an_embedded_set_has_the_labels_of_its_first_client():
    alone = label_counts(load_federation("digit-pairs", 20))
    grouped = label_counts(load_federation("digit-pairs", 20, label_groups=5))
    for client in range(20):
        assert grouped[client].tolist() == alone[client % 5].tolist()


@pytest.mark.slow
def test_clients_of_a_label_group_have_images_of_their_own():
    """Alike in the labels of all three splits together, how ever each is split; of different images."""
    federation = load_federation("digit-pairs", 20, label_groups=5)
    counts = label_counts(federation)
    assert counts[2].tolist() == counts[7].tolist()
    first, second = (
        {tuple(row) for split in splits(federation.load(c)).values() for row in split.source.tolist()} for c in (2, 7)
    )
    assert len(first - second) > len(first) / 2
    assert len(second - first) > len(second) / 2


def test_label_groups_of_a_local_set(local_set):
    federation = load_federation(local_set, 8, alpha=0.5, label_groups=2)
    rows = torch.cat([split.source for c in clients_of(federation) for split in splits(c).values()])
    assert sorted(rows[:, 0].tolist()) == list(range(240))
    counts = label_counts(federation)
    for g in range(2):
        assert np.ptp(counts[g::2], axis=0).max() <= 1
    assert np.abs(counts[0] - counts[1]).max() > 5


def test_pathological_label_groups_have_so_many_classes():
    federation = load_federation(
        "digits", 10, partition="pathological", classes_per_client=4, examples_per_client=60, label_groups=5
    )
    classes = [set(np.flatnonzero(row)) for row in label_counts(federation)]
    assert all(len(c) == 4 for c in classes)
    assert all(classes[i] == classes[i + 5] for i in range(5))


# Rotations.


@pytest.mark.slow
@pytest.mark.parametrize("groups", [0, 1, 2])
@pytest.mark.parametrize("rotations", [2, 4])
def test_undoing_a_quarter_turn_gives_the_unrotated_image_bit_for_bit(data, groups, rotations):
    name, options = data
    plain = load_federation(name, 8, **options, label_groups=groups)
    rotated = load_federation(name, 8, **options, label_groups=groups, rotations=rotations)
    for i in range(8):
        quarters = i // max(groups, 1) % rotations * 4 // rotations
        for a, b in zip(splits(plain.load(i)).values(), splits(rotated.load(i)).values(), strict=True):
            assert b.x.is_contiguous()
            assert torch.equal(torch.rot90(b.x, -quarters, (-2, -1)), a.x)
            assert torch.equal(a.x, b.x) == (quarters == 0)
            assert same_split(a[1:], b[1:])


def test_label_groups_and_rotations_are_crossed():
    """20 clients, 5 groups, 4 rotations: each of the 20 combinations once. A client's rotation is found by turning its
    images back until they are those of the federation without rotations."""
    options = {"alpha": 0.5, "examples_per_client": 40, "label_groups": 5}
    plain, rotated = (clients_of(load_federation("digits", 20, **options, rotations=r)) for r in (1, 4))
    seen = [
        (i % 5, quarters)
        for i, quarters in itertools.product(range(20), range(4))
        if torch.equal(torch.rot90(plain[i].train.x, quarters, (-2, -1)), rotated[i].train.x)
    ]
    assert sorted(seen) == list(itertools.product(range(5), range(4)))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 9, 6), (2, 5, 8)])
@pytest.mark.parametrize(("turn", "turns"), [(1, 3), (2, 3), (1, 8), (7, 8), (1, 360)])
@pytest.mark.parametrize("background", [-0.75, None])
def test_other_angles_against_scipy(shape, turn, turns, background):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, *shape))).float()
    for image, rotated in zip(x, rotate(x, turn, turns, background), strict=True):
        fill = float(image.min()) if background is None else background
        expected = ndimage.rotate(
            image.numpy(), 360 * turn / turns, (1, 2), reshape=False, order=1, mode="grid-constant", cval=fill
        )
        np.testing.assert_allclose(rotated.numpy(), expected, atol=1e-4)


def test_scipy_and_quarter_turns_rotate_the_same_way():
    image = np.arange(9.0).reshape(3, 3)
    np.testing.assert_allclose(ndimage.rotate(image, 90, reshape=False, order=1), np.rot90(image), atol=1e-9)
    x = torch.from_numpy(image)[None, None]
    np.testing.assert_array_equal(rotate(x, 1, 4)[0, 0], np.rot90(image))
    assert torch.equal(rotate(x, 2, 8), rotate(x, 1, 4))
    assert torch.equal(rotate(x, 8, 8), x)


def test_rotated_corners_show_the_background():
    x = load_federation("digits", 8, alpha=0.5, examples_per_client=100, rotations=8).load(1).train.x
    torch.testing.assert_close(x[..., 0, 0], torch.full_like(x[..., 0, 0], digits.BACKGROUND))
    assert float(x.min()) == pytest.approx(digits.BACKGROUND)


def test_rotated_corners_of_local_images_show_the_image_s_minimum(local_set):
    plain, rotated = (load_federation(local_set, 8, alpha=1.0, rotations=r).load(1).train.x for r in (1, 8))
    torch.testing.assert_close(rotated[:, 0, 0, 0], plain.flatten(1).amin(1))


@pytest.mark.parametrize("turns", [3, 4])
def test_no_images_can_be_rotated_too(turns):
    assert rotate(torch.zeros(0, 1, 16, 16), 1, turns).shape == (0, 1, 16, 16)
    federation = load_federation(
        "digits", 8, alpha=0.5, examples_per_client=100, shares=(0.6, 0.0, 0.4), rotations=turns
    )
    assert federation.load(1).calibration.x.shape == (0, 1, 16, 16)


def test_oblong_images_may_be_rotated_but_not_by_quarter_turns(tmp_path):
    write_with_pyarrow(tmp_path / "set.parquet", LABELS, [picture(i, (8, 5)) for i in range(N)])
    path = f"local:{tmp_path / 'set.parquet'}"
    with pytest.raises(
        ValueError, match=r"rotations = 4 .*square images, got 5×8: set data.image-size.*4 does not divide"
    ):
        load_federation(path, 3, alpha=1.0, rotations=4)
    assert load_federation(path, 3, alpha=1.0, rotations=4, image_size=6).load(1).train.x.shape[1:] == (1, 6, 6)
    for rotations in (2, 3):
        assert load_federation(path, 3, alpha=1.0, rotations=rotations).load(1).train.x.shape[1:] == (1, 5, 8)


def test_only_images_can_be_rotated(monkeypatch):
    rows = np.zeros((60, 7), dtype=np.float32)
    read = LocalSet(rows, np.array(LABELS), ("0", "1", "2"), lambda name: [])
    monkeypatch.setattr("cafe_flwr.data.sources.read_local", lambda *_: read)
    assert load_federation("local:vectors", 3, alpha=1.0).load(0).train.x.shape[1:] == (7,)
    with pytest.raises(ValueError, match=r"data.rotations needs images .*got inputs \(7,\): set it to 1"):
        load_federation("local:vectors", 3, alpha=1.0, rotations=2)


# Validation.


def rows_of(*parts):
    """Every example as bytes: image, label, source; sorted."""
    return sorted(
        b"".join(t.numpy().tobytes() for t in example) for part in parts for example in zip(*part, strict=True)
    )


def test_training_and_validation_are_the_training_split(data):
    name, options = data
    real, cut = (load_federation(name, 8, **options, validation_share=share) for share in (0.0, 0.3))
    for one, two in zip(clients_of(real), clients_of(cut), strict=True):
        assert rows_of(two.train, two.test) == rows_of(one.train)
        assert abs(len(two.test) - 0.3 * len(one.train)) <= 1
        assert same_split(two.calibration, one.calibration)
        for c in range(real.num_classes):
            assert abs(int((two.test.y == c).sum()) - 0.3 * int((one.train.y == c).sum())) <= 2


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["digits", "digit-pairs"])
def test_with_a_validation_share_no_test_image_is_ever_made(monkeypatch, name, shift):
    render = digits.render

    def refuse_test(dataset, labels, split, *rest):
        assert split != "test"
        return render(dataset, labels, split, *rest)

    monkeypatch.setattr(digits, "render", refuse_test)
    deal_out.cache_clear()
    options = {"alpha": 0.5, "examples_per_client": 100}
    federation = load_federation(name, 8, **options, validation_share=0.2, test_shift=shift)
    own = set(np.concatenate(digit_pools(0)["train"]).tolist())
    for client in clients_of(federation):
        assert len(client.test)
        assert set(client.test.source.flatten().tolist()) <= own
    with pytest.raises(AssertionError):
        load_federation(name, 8, **options).load(0)  # the trap works
    deal_out.cache_clear()


def test_with_a_validation_share_no_row_of_the_test_split_is_used(local_set):
    real, cut = (load_federation(local_set, 8, alpha=1.0, validation_share=share) for share in (0.0, 0.3))
    hidden = {int(row) for client in clients_of(real) for row in client.test.source}
    seen = [int(row) for client in clients_of(cut) for split in splits(client).values() for row in split.source]
    assert not hidden & set(seen)
    assert sorted([*hidden, *seen]) == list(range(240))


# Test shift.


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 9), max_size=60),
    train=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_at_most_the_share_of_labels_changes_and_to_known_classes(labels, train, share, seed):
    labels = np.array(labels, dtype=np.int64)
    before = labels.copy()
    shifted = shift_labels(labels, np.array(train), share, np.random.default_rng(seed))
    changed = shifted != before
    assert (labels == before).all()
    assert changed.sum() <= round(share * len(labels))
    assert set(shifted[changed].tolist()) <= set(train)
    if share == 1:
        assert set(shifted.tolist()) <= set(train)


def test_redrawn_labels_are_uniform_over_the_classes_however_rare():
    """A share of 0.5 of 8,000 labels 0, with classes 0, 1, 2, 9 known: 4,000 + 1,000 zeros and 1,000 of each of the
    others, standard deviation √(4000·¼·¾) = 27.4."""
    train = np.array([0] * 50 + [1, 2, 9])
    shifted = shift_labels(np.zeros(8000, dtype=np.int64), train, 0.5, np.random.default_rng(0))
    counts = np.bincount(shifted, minlength=10)
    assert set(np.flatnonzero(counts)) == {0, 1, 2, 9}
    assert np.abs(counts[[0, 1, 2, 9]] - [5000, 1000, 1000, 1000]).max() < 4 * 27.4


@pytest.mark.parametrize("shift", [0.4, 1.0])
def test_a_test_shift_changes_the_test_labels_and_nothing_else(embedded, shift):
    name, plain = embedded
    options = {n: o for n, _, o in EMBEDDED}[name]
    target = load_digits().target
    pool = set(np.concatenate(digit_pools(0)["test"]).tolist())
    moved = 0
    for a, b in zip(clients_of(plain), clients_of(load_federation(name, 8, **options, test_shift=shift)), strict=True):
        assert same_split(a.train, b.train)
        assert same_split(a.calibration, b.calibration)
        assert len(a.test) == len(b.test)
        changed = a.test.y != b.test.y
        moved += int(changed.sum())
        assert changed.sum() <= round(shift * len(b.test))
        assert set(b.test.y[changed].tolist()) <= set(b.train.y.tolist())
        if shift == 1:
            assert set(b.test.y.tolist()) <= set(b.train.y.tolist())
        assert set(b.test.source.flatten().tolist()) <= pool
        shown = target[b.test.source.numpy()]
        np.testing.assert_array_equal(b.test.y, shown @ (10 ** np.arange(shown.shape[1])[::-1]))
    assert moved > 0.2 * shift * sum(len(client.test) for client in clients_of(plain))


@pytest.mark.slow
def test_full_shift_makes_the_priors_of_a_client_s_classes_even():
    """Total variation between a client's test labels and the uniform distribution over its k classes: after the shift
    it is only noise, ½ Σ_c |n_c/n − 1/k| ≈ ½ √(2k / πn) on average, at most 0.12 for n = 160 and k = 10."""
    options = {"alpha": 0.1, "examples_per_client": 400}

    def unevenness(client):
        classes = torch.unique(client.train.y)
        shares = torch.bincount(client.test.y, minlength=10)[classes] / len(client.test)
        return float((shares - 1 / len(classes)).abs().sum() / 2)

    before, after = (
        np.array([unevenness(c) for c in clients_of(load_federation("digits", 8, **options, test_shift=s))])
        for s in (0.0, 1.0)
    )
    assert after.mean() < 0.12 < 0.24 < before.mean()


def test_a_shifted_validation_split_has_only_classes_that_are_trained_on(embedded):
    name, _ = embedded
    options = {**{n: o for n, _, o in EMBEDDED}[name], "validation_share": 0.3}
    plain, shifted = (load_federation(name, 8, **options, test_shift=s) for s in (0.0, 1.0))
    for a, b in zip(clients_of(plain), clients_of(shifted), strict=True):
        assert same_split(a.train, b.train)
        assert same_split(a.calibration, b.calibration)
        assert len(a.test) == len(b.test)
        assert set(b.test.y.tolist()) <= set(b.train.y.tolist())
        assert not torch.equal(a.test.y, b.test.y)


def test_shifts_come_together():
    """Rotation changes neither labels nor sources of grouped, cut and shifted data; what is turned back is the same."""
    options = {"alpha": 0.5, "label_groups": 2, "validation_share": 0.25, "test_shift": 0.5, "examples_per_client": 100}
    plain, rotated = (load_federation("digit-pairs", 8, **options, rotations=r) for r in (1, 4))
    for i, (a, b) in enumerate(zip(clients_of(plain), clients_of(rotated), strict=True)):
        for one, two in zip(splits(a).values(), splits(b).values(), strict=True):
            assert torch.equal(torch.rot90(two.x, -(i // 2), (-2, -1)), one.x)
            assert same_split(one[1:], two[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_groups": -1}, "label-groups must be from 0 .*num-clients = 8, got -1: lower data.label-groups"),
        ({"label_groups": 9}, "num-clients = 8, got 9: lower data.label-groups or raise num-clients"),
        ({"rotations": 0}, "rotations must be at least 1 .*got 0"),
        ({"validation_share": 1.0}, "validation-share must be 0 .*less than 1, got 1.0"),
        ({"validation_share": -0.1}, "validation-share .*got -0.1"),
        ({"validation_share": float("nan")}, "validation-share .*got nan"),
        ({"test_shift": 1.1}, "test-shift must be from 0 .*to 1 .*got 1.1"),
        ({"test_shift": -0.1}, "test-shift .*got -0.1"),
        # One class each: the 13 examples of class 0 are shared by 4 clients.
    ],
)
def test_shifts_that_cannot_be_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        load_federation("digits", 8, **{"alpha": 0.5, "examples_per_client": 100, **options})


def test_a_test_shift_of_local_data_is_an_error_before_they_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"data.test-shift is for .*nowhere': set it to 0"):
        load_federation(f"local:{tmp_path / 'nowhere'}", 8, test_shift=0.5)


def test_a_test_shift_needs_classes_to_draw_from():
    with pytest.raises(ValueError, match="training split"):
        load_federation("digits", 8, alpha=0.5, shares=(0.0, 0.5, 0.5), test_shift=0.5).load(0)
