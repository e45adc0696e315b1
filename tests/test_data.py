"""Data dealt out to clients: nothing leaks between splits, nothing depends on who asks first, errors say what to do."""

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
from sklearn.datasets import load_digits

from cafe_flwr import digits
from cafe_flwr.data import load_federation, partition_labels, stratified_split
from cafe_flwr.digits import SPLITS, digit_pools

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
    load_federation.cache_clear()
    federation = load_federation("digit-pairs", 6, alpha=0.3, examples_per_client=80)
    x = {name: torch.cat([splits(c)[name].x for c in clients_of(federation)]) for name in SPLITS}
    load_federation.cache_clear()
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
    load_federation.cache_clear()
    first = load_federation(name, clients, **options)
    forwards = [first.load(i) for i in range(clients)]
    load_federation.cache_clear()
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
        ("mnist", 10, {}, "'digits', 'digit-pairs' or 'local:<path>', got 'mnist'"),
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
    parts = partition_labels(labels, 9, partition, alpha=0.3, classes_per_client=3, seed=seed)
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


def check_rows(federation, labels):
    """Every row is in one split of one client, with its own picture and label."""
    seen = []
    for client in clients_of(federation):
        for split in splits(client).values():
            assert (split.x.dtype, split.y.dtype, split.source.dtype) == (torch.float32, torch.int64, torch.int64)
            assert split.source.shape == (len(split), 1)
            rows = split.source[:, 0]
            expected = (rows / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, 1, 6, 6)
            torch.testing.assert_close(split.x, expected.float())
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
    load_federation.cache_clear()
    again = load_federation(path, 3, alpha=1.0)
    assert all(same(again.load(i), first[i]) for i in (2, 0, 1))
    other = clients_of(load_federation(path, 3, alpha=1.0, seed=1))
    assert [c.train.source.tolist() for c in first] != [c.train.source.tolist() for c in other]


def test_colours_come_first_and_in_order(tmp_path):
    write_with_pyarrow(tmp_path / "set.parquet", LABELS, [picture((255, 0, 51), (5, 4), "RGB")] * N)
    federation = load_federation(f"local:{tmp_path / 'set.parquet'}", 2, alpha=1.0)
    assert federation.input_shape == (3, 4, 5)  # PIL gives width and height, a network takes height and width
    pixel = federation.load(0).train.x[0, :, 2, 3]
    torch.testing.assert_close(pixel, torch.tensor([1.0, -1.0, 51 / 127.5 - 1]))


def test_images_of_different_sizes_need_image_size(tmp_path):
    pictures = [picture(i, (6 + i % 2, 6)) for i in range(N)]
    write_with_pyarrow(tmp_path / "set.parquet", LABELS, pictures)
    path = f"local:{tmp_path / 'set.parquet'}"
    with pytest.raises(ValueError, match="2 different shapes: set image-size"):
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
            for image, row in zip(split.x, split.source[:, 0].tolist(), strict=True):
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
