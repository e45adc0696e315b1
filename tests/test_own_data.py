"""Clients that bring their own data: node-config says where it is and who they are, and nothing about it the server."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from apps import load_app
from federations import run_small, small_settings, strict_json
from flwr.app import Context, RecordDict
from PIL import Image
from sklearn.datasets import load_digits

from cafe_flwr import make_client_app
from cafe_flwr.app.parts import build_network, federation, state_dir
from cafe_flwr.client.node_config import data_folder, hosted, is_device, name_of
from cafe_flwr.data.options import Data
from cafe_flwr.data.own import load_own
from cafe_flwr.engine import InProcessGrid
from cafe_flwr.settings import Settings

pytestmark = pytest.mark.usefixtures("no_report")

CLASSES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
IMAGES, LABELS = load_digits(return_X_y=True)
OWN = {
    "dataset": "local",
    "class_names": ",".join(CLASSES),
    "image_size": 8,
    "image_channels": 1,
    "num_clients": 3,
    "num_server_rounds": 2,
}


def write_folder(folder, rows, names=CLASSES):
    """Real digits as PNG files, in a folder per class."""
    for row in rows:
        path = folder / names[LABELS[row]] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((IMAGES[row].reshape(8, 8) * 255 / 16).astype(np.uint8)).save(path)
    return folder


def write_parquet(path, rows, labels=None):
    images = [(IMAGES[row].reshape(8, 8) * 255 / 16).astype(np.uint8).tolist() for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"image": images, "label": LABELS[rows] if labels is None else labels}).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three clients' folders: 60 digits each, client 1 has only even ones, client 2 a parquet file."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "a", range(60))
    write_folder(root / "b", [row for row in range(60, 180) if LABELS[row] % 2 == 0])
    write_parquet(root / "c" / "set.parquet", range(180, 240))
    return root


def app():
    """As client_app.py makes it."""

    def settings_of(context):
        return Settings.from_run_config(context.run_config)

    return make_client_app(
        lambda context: build_network(settings_of(context), context.node_config),
        lambda client, context: federation(settings_of(context), context.node_config).load(client),
        state_dir=lambda context: state_dir(settings_of(context), context.node_config),
    )


class Devices(InProcessGrid):
    """A node for every node-config."""

    def __init__(self, settings, *configs):
        super().__init__(app(), len(configs), settings.to_run_config())
        for context, config in zip(self.contexts.values(), configs, strict=True):
            context.node_config = dict(config)


def own_settings(folder, **changes):
    return small_settings(folder, **{**OWN, "wait_seconds": 0.0, **changes})


def three(data, tmp_path, **changes):
    places = {"a": "0", "b": "1", "c": "2"}
    configs = {
        name: {
            "clients": client,
            "data-dir": str(data / name),
            "state-dir": str(tmp_path / name),
            "name": f"ward {name}",
        }
        for name, client in places.items()
    }
    for name, config in changes.items():
        configs[name] = {**configs[name], **config}
    return list(configs.values())


def lines_of(settings):
    return [strict_json(line) for line in (settings.results / "rounds.jsonl").read_text().splitlines()]


def test_every_client_trains_on_the_data_of_its_own_node(tmp_path, data, flower_log):
    """Folders of pictures and a parquet file, not the same classes: sizes and classes in the summary are theirs."""
    settings = own_settings(tmp_path)
    run_small(settings, grid=Devices(settings, *three(data, tmp_path)))
    summary = strict_json((settings.results / "summary.json").read_text())
    even = sum(1 for row in range(60, 180) if LABELS[row] % 2 == 0)
    sizes = [c["train"] + c["calibration"] + c["test"] for c in summary["clients"]]
    assert sizes == [60, even, 60]
    assert summary["clients"][1]["classes"] == 5
    assert all(line["left_out"] == {} for line in lines_of(settings))
    for place, client in (("a", 0), ("b", 1), ("c", 2)):
        assert (tmp_path / place / f"client-{client}.safetensors").exists()
    assert not (settings.results / "personal").exists()


def test_the_name_of_a_node_stands_beside_its_clients_in_log_and_record(tmp_path, data, flower_log):
    settings = own_settings(tmp_path)
    configs = three(data, tmp_path, b={"data-dir": str(tmp_path / "nowhere")})
    run_small(settings, grid=Devices(settings, *configs))
    assert [line["names"] for line in lines_of(settings)] == [{"0": "ward a", "2": "ward c"}] * 2
    assert "ward b: client 1 is left out: node-config data-dir" in flower_log.text()


@pytest.mark.parametrize("bad", ["x" * 61, "two\nlines", "\x1b[2J"])
def test_a_name_that_would_spoil_the_log_is_refused(tmp_path, data, flower_log, bad):
    settings = own_settings(tmp_path)
    run_small(settings, grid=Devices(settings, *three(data, tmp_path, b={"name": bad})))
    assert "a node failed to start: ValueError: a node's name must be at most 60 printable characters" in (
        flower_log.text()
    )
    assert lines_of(settings)[0]["participants"] == [0, 2]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"data-dir": ""}, "this node has no data: the run asks for the clients' own (dataset = 'local'), and its"),
        ({"data-dir": "/nowhere/at/all"}, "data-dir = '/nowhere/at/all': there is no such file or folder on this node"),
        ({"data-dir": "data"}, "node-config data-dir must be an absolute path or start with '~', got 'data'"),
        ({"clients": "1,5"}, "has no client-1: a node of several clients needs a folder client-<number>"),
    ],
    ids=["none", "not there", "relative", "several clients, one folder"],
)
def test_a_node_without_data_says_so_in_the_servers_log_and_the_others_go_on(
    tmp_path, data, flower_log, config, reason
):
    settings = own_settings(tmp_path)
    run_small(settings, grid=Devices(settings, *three(data, tmp_path, b=config)))
    assert f"ward b: client 1 is left out: {reason}" in flower_log.text() or reason in flower_log.text()
    assert [line["participants"] for line in lines_of(settings)] == [[0, 2]] * 2


def test_labels_that_the_federation_does_not_know_are_named_in_the_servers_log(tmp_path, data, flower_log):
    names = (*CLASSES[:3], "seagull", *CLASSES[4:])
    odd = write_folder(tmp_path / "odd", range(60), names)
    settings = own_settings(tmp_path)
    run_small(settings, grid=Devices(settings, *three(data, tmp_path, b={"data-dir": str(odd)})))
    count = int((LABELS[:60] == 3).sum())
    assert (
        f"has labels the federation does not know: 'seagull' ({count} of 60 examples); data.class-names has '0', '1'"
        in (flower_log.text())
    )
    assert [line["participants"] for line in lines_of(settings)] == [[0, 2]] * 2


def test_a_node_of_several_clients_has_a_folder_for_each(tmp_path):
    write_folder(tmp_path / "all" / "client-4", range(40))
    write_parquet(tmp_path / "all" / "client-7.parquet", range(40, 90))
    settings = own_settings(tmp_path, num_clients=2)
    node = {"clients": "4,7", "data-dir": str(tmp_path / "all"), "state-dir": str(tmp_path / "state")}
    run_small(settings, grid=Devices(settings, node))
    summary = strict_json((settings.results / "summary.json").read_text())
    sizes = {c["client"]: c["train"] + c["calibration"] + c["test"] for c in summary["clients"]}
    assert sizes == {4: 40, 7: 50}


# --- what is read ---


def load(path, client=0, **options):
    names, channels = options.pop("class_names", CLASSES), options.pop("channels", 1)
    data = Data(**{"calibration_share": 0.2, "test_share": 0.3, **options})
    return load_own(path, client, data, class_names=names, shape=(channels, 8, 8))


def test_splits_are_disjoint_together_everything_and_the_same_every_time(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", range(100))
    first, again, other = load(path), load(path), load(path, client=1)
    rows = [split.source.flatten().tolist() for split in (first.train, first.calibration, first.test)]
    assert sorted(row for part in rows for row in part) == list(range(100))
    assert [len(r) for r in rows] == [50, 20, 30]
    assert torch.equal(first.train.source, again.train.source)
    assert not torch.equal(first.train.source, other.train.source)
    for split in (first.train, first.calibration, first.test):
        assert split.y.tolist() == LABELS[split.source.flatten().numpy()].tolist()
        pixels = np.round(IMAGES[split.source.flatten().numpy()].reshape(-1, 1, 8, 8) * 255 / 16 // 1 / 127.5 - 1, 6)
        np.testing.assert_allclose(split.x.numpy(), pixels, atol=1e-5)


def test_labels_are_found_by_name_whatever_their_number_in_the_file(tmp_path):
    """A client's folder has two of the federation's classes, and numbers them itself."""
    write_folder(tmp_path / "pictures", [r for r in range(100) if LABELS[r] in (7, 3)])
    names = ("9", "8", "7", "6", "5", "4", "3", "2", "1", "0")
    found = load(tmp_path / "pictures", class_names=names)
    labels = torch.cat([found.train.y, found.calibration.y, found.test.y])
    counts = {name: int((labels == k).sum()) for k, name in enumerate(names)}
    assert counts == {name: int((LABELS[:100] == int(name)).sum()) if name in "73" else 0 for name in names}


@pytest.mark.parametrize(("have", "want"), [("L", 3), ("RGB", 1)])
def test_images_get_the_channels_of_the_federation(tmp_path, have, want):
    """Grey becomes three equal channels; colours become pillow's grey, to the rounding of its 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(have)
    for name in "01":
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(6):
            image.save(tmp_path / "set" / name / f"{i}.png")
    x = load(tmp_path / "set", channels=want).train.x[0]
    grey = np.asarray(image.convert("L"), dtype=np.float32) / 127.5 - 1
    assert x.shape == (want, 8, 8)
    np.testing.assert_allclose(x.numpy(), np.broadcast_to(grey, (want, 8, 8)), atol=0.5 / 127.5 + 1e-6)


def test_a_validation_share_takes_the_place_of_the_test_split(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", range(100))
    plain, held_out = load(path), load(path, validation_share=0.2)
    assert (len(held_out.train), len(held_out.test)) == (40, 10)
    assert set(held_out.test.source.flatten().tolist()) <= set(plain.train.source.flatten().tolist())


# --- what node-config says ---


def test_hosted_clients_are_those_of_the_node_config_first():
    assert hosted({"clients": "3"}, 20) == [3]
    assert hosted({"clients": 3}, None) == [3]
    assert hosted({"clients": "7, 3,7", "partition-id": 0, "num-partitions": 2}, 20) == [3, 7]
    assert hosted({"partition-id": 5}, None) == [5]
    for wrong in ("-1", "3,-7", "", "a"):
        with pytest.raises(ValueError, match="node-config clients must be numbers like '3' or '3,7', got"):
            hosted({"clients": wrong}, None)


def test_a_simulated_node_is_no_device_and_all_others_are():
    assert not is_device({"partition-id": 0, "num-partitions": 2})
    for config in ({}, {"partition-id": 0}, {"partition-id": 0, "num-partitions": 2, "state-dir": "/x"}):
        assert is_device(config)
    assert name_of({"name": "Zürich 3"}) == "Zürich 3"
    assert name_of({}) == ""


def test_a_data_folder_of_one_client_is_itself_or_has_the_clients(tmp_path):
    assert data_folder({"data-dir": str(tmp_path)}, 3, [3]) == tmp_path
    (tmp_path / "client-3").mkdir()
    assert data_folder({"data-dir": str(tmp_path)}, 3, [3]) == tmp_path / "client-3"


def test_no_path_of_the_run_leads_to_a_devices_files(tmp_path, data, flower_log):
    """Whoever submits a run chooses its settings: on a device they choose no folder, for data or for state."""
    settings = small_settings(
        tmp_path, dataset=f"local:{data / 'a'}", num_clients=1, state_dir=str(tmp_path / "elsewhere"), wait_seconds=0.0
    )
    with pytest.raises(RuntimeError, match=r"the run names a path on this node, .*set dataset = 'local'"):
        run_small(settings, grid=Devices(settings, {"clients": "0"}))
    context = Context(1, 1, {"clients": "0"}, RecordDict(), settings.to_run_config())
    assert state_dir(settings, context.node_config) == ""
    assert state_dir(settings, {"partition-id": 0, "num-partitions": 1}) == str(tmp_path / "elsewhere")
    assert len(federation(settings).load(0).train) > 0  # in a simulation, and here, it may


def test_the_apps_own_client_app_reads_the_node_config(tmp_path, data):
    """client_app.py, as Flower loads it."""
    real = load_app(Path(__file__).parents[1])
    settings = own_settings(tmp_path, num_clients=1)
    grid = InProcessGrid(real.client, 1, settings.to_run_config())
    (context,) = grid.contexts.values()
    context.node_config = three(data, tmp_path)[2]
    run_small(settings, grid=grid)
    assert sorted(p.name for p in (tmp_path / "c").glob("client-*")) == ["client-2.json", "client-2.safetensors"]


# --- settings ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ""}, "needs data.class-names, at least two different ones separated by commas, got ''"),
        ({"class_names": "a,a"}, "needs data.class-names, at least two different"),
        ({"class_names": "a,,b"}, "needs data.class-names"),
        ({"image_size": 0}, r"needs data.image-size and data.image-channels \(1 or 3\): .* got 0 and 1"),
        ({"image_channels": 0}, "got 8 and 0"),
        ({"rotations": 4}, "data.rotations changes data that is dealt out, .* set it to 1"),
        ({"label_groups": 2}, "data.label-groups changes data"),
        ({"test_shift": 0.5}, "data.test-shift changes data"),
    ],
)
def test_a_run_with_the_clients_own_data_must_say_what_it_looks_like(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        own_settings(tmp_path, **changes)


@pytest.mark.slow
def test_a_resumed_run_with_own_data_has_the_numbers_of_one_that_was_not_stopped(tmp_path, data):
    whole, parts = (own_settings(tmp_path / name, num_server_rounds=3) for name in ("whole", "parts"))
    run_small(whole, grid=Devices(whole, *three(data, tmp_path / "whole")))

    class Dies(Devices):
        def push_messages(self, messages):
            messages = list(messages)
            if any(m.content["config"].get("server-round") == 3 for m in messages):
                raise KeyboardInterrupt
            return super().push_messages(messages)

    with pytest.raises(KeyboardInterrupt):
        run_small(parts, grid=Dies(parts, *three(data, tmp_path / "parts")))
    again = type(parts).from_run_config({**parts.to_run_config(), "resume": True})
    run_small(again, grid=Devices(again, *three(data, tmp_path / "parts")))
    lines = [lines_of(settings) for settings in (whole, parts)]
    for line in [*lines[0], *lines[1]]:
        del line["seconds"]
    assert lines[0] == lines[1]
