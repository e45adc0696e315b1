"""Exported networks give what PyTorch gives, stop where PyTorch stops, and are refused when something is wrong."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from federations import run_small, small_settings, strict_json, toy_network
from PIL import Image
from torch import Tensor, nn

from cafe_flwr import EarlyExitNetwork
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.data.digits import BACKGROUND
from cafe_flwr.data.local import normalised, read_local
from cafe_flwr.device import ExitedModel, load
from cafe_flwr.inference import EarlyExitRunner, MaxProb, Patience, PerExit
from cafe_flwr.inference.export import export
from cafe_flwr.inference.predict import predict_file
from cafe_flwr.networks import ConvNet, Exit
from cafe_flwr.personal import FinishedRun, fingerprint
from cafe_flwr.personal.export import export_client
from cafe_flwr.risk.thresholds import ExitThresholds

ROOT = Path(__file__).parent.parent


class Case(NamedTuple):
    """A network, inputs, how it should stop, and the folder it was exported to."""

    network: EarlyExitNetwork
    x: Tensor
    temperatures: list[float]
    thresholds: list[float]
    folder: Path


class Answer(NamedTuple):
    labels: np.ndarray
    exits: np.ndarray
    confidence: np.ndarray


@torch.no_grad()
def reference(
    network: EarlyExitNetwork, x: Tensor, thresholds: Sequence[float], temperatures: Sequence[float]
) -> Answer:
    """Compute every exit of every row, and choose afterwards."""
    network = network.eval()
    logits = torch.stack(network(x))
    confidence = torch.stack([(z / t).softmax(1).amax(1) for z, t in zip(logits, temperatures, strict=True)])
    exits = [
        next((k for k, threshold in enumerate(thresholds) if confidence[k, row] >= threshold), network.num_exits - 1)
        for row in range(len(x))
    ]
    rows = range(len(x))
    return Answer(logits.argmax(2).numpy()[exits, rows], np.array(exits), confidence.numpy()[exits, rows])


@torch.no_grad()
def spread_thresholds(network: EarlyExitNetwork, x: Tensor, temperatures: Sequence[float]) -> list[float]:
    """Thresholds at which about an equal share leaves at each exit, in the middle between two confidences."""
    logits, here, chosen = network.eval()(x), torch.arange(len(x)), []
    for k in range(network.num_exits - 1):
        confidence = (logits[k] / temperatures[k]).softmax(1).amax(1)[here]
        ordered, position = confidence.sort().values, len(here) * (network.num_exits - k - 1) // (network.num_exits - k)
        chosen.append(float(ordered[position - 1 : position + 1].double().mean()))
        here = here[confidence < chosen[-1]]
    return chosen


def calibrated(network: EarlyExitNetwork, thresholds: Sequence[float], **changes: Any) -> ExitThresholds:
    """Thresholds as calibration makes them."""
    fields = {"certified": True, "coverage": 0.5, "guarantee": "selective", "risk": 0.05}
    return ExitThresholds(tuple(thresholds), **{**fields, "fingerprint": fingerprint(network), **changes})


class Tokens(nn.Module):
    """Embeds tokens, (B, T) of int64, and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).mean(1)


def text_network() -> EarlyExitNetwork:
    """Takes int64; has batch norm and dropout, which must be in evaluation mode."""
    middle = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    nn.init.normal_(middle[1].running_mean)
    return EarlyExitNetwork([Tokens(), middle], [Exit(nn.Linear(8, 4), 4, 6) for _ in range(2)])


def flat_offset(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """With a log-prior that changes labels."""
    network.offset = torch.linspace(-1, 1, network.num_classes)
    return network


BUILD: dict[str, tuple[Callable[[], EarlyExitNetwork], tuple[int, ...]]] = {
    "conv, 100 classes, offset": (lambda: flat_offset(ConvNet((1, 16, 16), 100)), (1, 16, 16)),
    "conv, colour": (lambda: ConvNet((3, 20, 16), 7, widths=(4, 8)), (3, 20, 16)),
    "mlp": (lambda: flat_offset(toy_network(exits=3)), (5,)),
    "one exit": (lambda: toy_network(exits=1), (5,)),
    "text": (text_network, (12,)),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Each network is exported once."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            build, shape = BUILD[name]
            with torch.random.fork_rng():
                torch.manual_seed(3)
                network = build().eval()
                x = torch.randint(0, 50, (64, *shape)) if name == "text" else torch.randn(64, *shape)
            temperatures = [0.5 + 0.25 * k for k in range(network.num_exits)]
            thresholds = spread_thresholds(network, x, temperatures)
            risk = calibrated(network, thresholds, temperatures=temperatures) if thresholds else None
            folder = tmp_path_factory.mktemp("export") / "net"
            result = export(
                network,
                folder,
                x[:4],
                class_names=[f"c{label}" for label in range(network.num_classes)],
                thresholds=risk,
                temperatures=temperatures,
                format="both" if name == "mlp" else "onnx",
                pixels=(0.5, 0.5),
            )
            assert result.verified
            made[name] = Case(network, x, temperatures, thresholds, folder)
        return made[name]

    return case


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_device_stops_where_computing_everything_says(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    model = load(case.folder)
    expected = reference(case.network, case.x, case.thresholds, case.temperatures)
    assert set(expected.exits) == set(range(case.network.num_exits))  # or the test would show nothing
    for size in (1, 3, 64):
        for start in range(0, 64 - size + 1, size):
            rows = slice(start, start + size)
            labels, exits, confidence = model.predict(case.x[rows].numpy())
            np.testing.assert_array_equal(exits, expected.exits[rows])
            np.testing.assert_array_equal(labels, expected.labels[rows])
            np.testing.assert_allclose(confidence, expected.confidence[rows], atol=1e-5)
    policy = PerExit(tuple(case.thresholds), tuple(case.temperatures))
    np.testing.assert_array_equal(EarlyExitRunner(case.network, policy).predict(case.x).exits, expected.exits)
    assert model.predict(case.x[:0].numpy()).labels.shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv, 100 classes, offset", "text"])
def test_onnx_logits_are_those_of_torch(cases: Callable[[str], Case], name: str) -> None:
    import onnxruntime

    case = cases(name)
    for size in (1, 3, 64):
        with torch.no_grad():
            expected = case.network(case.x[:size])
        h = case.x[:size].numpy()
        for k in range(case.network.num_exits):
            session = onnxruntime.InferenceSession(case.folder / f"stage-{k}.onnx", providers=["CPUExecutionProvider"])
            names = [output.name for output in session.get_outputs()]
            assert names == (["logits"] if k == case.network.num_exits - 1 else ["h_next", "logits"])
            outputs = session.run(None, {"h": h})
            np.testing.assert_allclose(outputs[-1], expected[k].numpy(), atol=1e-4)
            h = outputs[0]


@pytest.mark.slow
def test_torch_graphs_round_trip(cases: Callable[[str], Case]) -> None:
    case = cases("mlp")
    for size in (1, 3, 64):
        with torch.no_grad():
            expected, h = case.network(case.x[:size]), case.x[:size]
            for k in range(case.network.num_exits):
                outputs = torch.export.load(case.folder / f"stage-{k}.pt2").module()(h)
                h, logits = outputs if k < case.network.num_exits - 1 else (None, outputs)
                torch.testing.assert_close(logits, expected[k], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_confidence_equal_to_the_threshold_leaves(cases: Callable[[str], Case]) -> None:
    model, x = load(cases("mlp").folder), cases("mlp").x[:1].numpy()
    model.thresholds[:] = 0
    model.thresholds[0] = model.predict(x).confidence[0]
    assert model.predict(x).exits[0] == 0
    model.thresholds[0] = np.nextafter(model.thresholds[0], 2)
    assert model.predict(x).exits[0] == 1


class Watched:
    """A session that remembers how many rows it was given."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.rows: list[int] = []

    def run(self, names: Any, inputs: dict[str, np.ndarray]) -> Any:
        self.rows.append(len(inputs["h"]))
        return self.session.run(names, inputs)


@pytest.mark.slow
def test_rows_that_left_are_not_computed_further(cases: Callable[[str], Case]) -> None:
    case = cases("mlp")
    model = load(case.folder)
    watched = model._sessions = [Watched(session) for session in model._sessions]
    exits = model.predict(case.x.numpy()).exits
    assert [session.rows for session in watched] == [[int((exits >= k).sum())] for k in range(3)]
    first = int(np.flatnonzero(exits == 0)[0])
    model.predict(case.x[first : first + 1].numpy())
    assert [session.rows[1:] for session in watched] == [[1], [], []]


@pytest.mark.slow
def test_manifest(cases: Callable[[str], Case]) -> None:
    case = cases("conv, 100 classes, offset")
    manifest = strict_json((case.folder / "manifest.json").read_text())
    assert (manifest["num_exits"], manifest["num_classes"], manifest["class_names"][42]) == (3, 100, "c42")
    assert manifest["input"] == {"shape": [1, 16, 16], "dtype": "float32"}
    assert manifest["temperatures"] == case.temperatures
    made = calibrated(case.network, case.thresholds, temperatures=case.temperatures)
    assert ExitThresholds.from_dict(manifest["thresholds"]) == made
    assert manifest["macs_per_exit"] == macs_per_exit(case.network, case.x)
    assert manifest["fingerprint"] == fingerprint(case.network)
    files = {path.name for path in case.folder.iterdir()}
    assert files == {"manifest.json", *manifest["files"]} == {"manifest.json", *(f"stage-{k}.onnx" for k in range(3))}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((case.folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv, 100 classes, offset", "mlp"])
def test_a_graph_holds_its_own_weights_and_no_path_of_this_machine(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    for path in case.folder.iterdir():
        content = path.read_bytes()
        for home in (ROOT, Path(torch.__file__).parent):
            assert str(home).encode() not in content, path.name
        if path.suffix != ".json":
            for k, head in enumerate(e.head.weight for e in case.network.exits):
                mine = path.stem == f"stage-{k}"
                assert (head.detach().numpy().tobytes() in content) == mine, (path.name, k)


def test_the_network_is_left_as_it_is(tmp_path: Path) -> None:
    network = flat_offset(toy_network(exits=2)).train()
    offset, before = network.offset, fingerprint(network)
    export(network, tmp_path / "net", torch.zeros(1, 5), class_names="abc", format="torch")
    assert network.training
    assert network.offset is offset
    assert fingerprint(network) == before
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.slow
def test_other_thresholds(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """None: never; θ; infinite: never here. Temperatures of the thresholds are used, all 1 if they have none."""
    case, x = cases("mlp"), cases("mlp").x[:2]
    shutil.copytree(case.folder, tmp_path / "net")
    for thresholds, exits, temperatures, notes in (
        (None, [2, 2], [1, 1, 1], ["no example leaves early"]),
        (0.0, [0, 0], [1, 1, 1], ["without any guarantee"]),
        (1.0, [2, 2], [1, 1, 1], ["without any guarantee"]),
        (MaxProb(0.0), [0, 0], [1, 1, 1], ["without any guarantee"]),
        (PerExit((np.inf, 0.0), (1, 2, 3), fingerprint(case.network)), [1, 1], [1, 2, 3], ["guarantee nothing"]),
        (calibrated(case.network, [np.inf, 0.0]), [1, 1], [1, 1, 1], ["With confidence 0.9"]),
        (
            calibrated(case.network, [np.inf, np.inf], certified=False, temperatures=(1, 2, 3), fingerprint=""),
            [2, 2],
            [1, 2, 3],
            ["Nothing could be certified", "do not say for which network"],
        ),
    ):
        made = export(case.network, tmp_path / "t", x, class_names="abc", thresholds=thresholds, format="torch")
        assert len(made.notes) == len(notes)
        assert all(text in note for text, note in zip(notes, made.notes, strict=True))
        manifest = strict_json((made.folder / "manifest.json").read_text())
        assert manifest["temperatures"] == temperatures
        _edit(thresholds=manifest["thresholds"], temperatures=manifest["temperatures"])(tmp_path / "net")
        assert load(tmp_path / "net").predict(x.numpy()).exits.tolist() == exits


def test_thresholds_of_another_network_are_refused(tmp_path: Path) -> None:
    thresholds = calibrated(toy_network(), [0.5, 0.5])
    network = toy_network()
    with pytest.raises(ValueError, match=rf"network {thresholds.fingerprint}, this one is {fingerprint(network)}"):
        export(network, tmp_path / "net", torch.zeros(2, 5), class_names="abc", thresholds=thresholds)
    assert list(tmp_path.iterdir()) == []


def unbound(*thresholds: float) -> ExitThresholds:
    """Thresholds that name no network."""
    return ExitThresholds(thresholds, certified=True, coverage=0.5, guarantee="selective", risk=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": 1.5}, r"in 0\.\.1.* got 1\.5"),
        ({"thresholds": float("nan")}, r"in 0\.\.1.* got nan"),
        ({"thresholds": unbound(0.5)}, "1 thresholds do not fit a network of 3 exits"),
        ({"thresholds": Patience(2)}, "largest probability, not by Patience"),
        ({"temperatures": [1.0]}, "temperatures are 3 positive numbers"),
        ({"temperatures": [1.0, 1.0, 0.0]}, "positive numbers"),
        ({"temperatures": [2.0, 1.0, 1.0], "thresholds": unbound(0.5, 0.5)}, "made at temperatures of 1, not at"),
        ({"class_names": "abcd"}, "3 classes, but 4 names"),
        ({"format": "pickle"}, "format must be"),
        ({"pixels": (0.5, 0.0)}, "deviation above 0"),
        ({"facts": {"run": object()}}, "facts must be"),
        ({"example": torch.zeros(0, 5)}, "B ≥ 1"),
        ({"example": torch.zeros(2, 6)}, "cannot compute the example"),
        ({"example": torch.full((2, 5), torch.nan)}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"example": torch.zeros(2, 5), "class_names": "abc", "format": "torch"} | changes
    with pytest.raises(ValueError, match=message):
        export(toy_network(), tmp_path / "net", **arguments)
    assert list(tmp_path.iterdir()) == []


class Undecided(nn.Module):
    """Looks at a value: no graph can hold that."""

    def forward(self, h: Tensor) -> Tensor:
        return h if h.sum() > 0 else -h


class Noisy(nn.Module):
    """Never gives the same twice."""

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.rand(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "message"), [(Undecided(), "stage 1 of the network"), (Noisy(), "stage-1.pt2 gives")]
)
def test_an_export_that_fails_changes_nothing(tmp_path: Path, stage: nn.Module, message: str) -> None:
    folder, x = tmp_path / "net", torch.ones(2, 5)
    export(toy_network(exits=2), folder, x, class_names="abc", format="torch")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    network = toy_network(exits=2)
    network.stages[1].append(stage)
    with pytest.raises(ValueError, match=message):
        export(network, folder, x, class_names="abc", format="torch")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    folder, x = tmp_path / "net", torch.ones(2, 5)

    def write(exits: int) -> None:
        export(toy_network(exits=exits), folder, x, class_names="abc", format="torch")

    folder.mkdir()
    write(2)
    write(1)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "stage-0.pt2"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds notes\.txt"):
        write(1)
    for name, content in (("manifest.json", "{}"), ("thesis.tex", "x")):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match="holds other things"):
            write(1)
        assert (folder / name).read_text() == content
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(ValueError, match="holds other things"):
        write(1)


@pytest.mark.slow
def test_without_the_extra(cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases("mlp")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        made = export(toy_network(exits=1), tmp_path / "net", case.x[:2], class_names="abc")
        assert not made.verified
        assert made.difference == {"onnx": None}
        assert "not verified" in made.notes[-1]
        with pytest.raises(ValueError, match="pip install onnxruntime"):
            load(case.folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ValueError, match=r"needs onnxscript, which is not installed: pip install 'cafe-flwr\["):
            export(toy_network(), tmp_path / "other", case.x[:2], class_names="abc")


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest.update(changes)
        manifest = {key: value for key, value in manifest.items() if value is not None}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def _flip(folder: Path) -> None:
    content = bytearray((folder / "stage-2.onnx").read_bytes())
    content[-200] ^= 1
    (folder / "stage-2.onnx").write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "has no manifest.json"),
        (lambda folder: (folder / "stage-1.onnx").unlink(), r"stage-1\.onnx is missing: copy the whole folder"),
        (_flip, r"stage-2\.onnx is not the file that was exported"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "not of an exported network"),
        (_edit(format="other"), "not of an exported network"),
        (_edit(format_version=2), "version 2, this cafe-flwr reads 1"),
        (_edit(temperatures=None, stages=None), "lacks stages, temperatures"),
        (_edit(temperatures=[1.0]), "not of one network"),
        (_edit(thresholds={"thresholds": [0.5]}), "not of one network"),
        (_edit(stages=[{"torch": f"stage-{k}.pt2"} for k in range(3)]), "no ONNX graphs"),
    ],
)
def test_a_damaged_folder_is_refused(
    cases: Callable[[str], Case], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "net"
    shutil.copytree(cases("mlp").folder, folder)
    ExitedModel(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        ExitedModel(folder)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 6), np.float32), r"shape \(B, 5\), got \(2, 6\)"),
        (np.zeros(5, np.float32), r"give x\[None\]"),
        (np.zeros((2, 5)), r"takes float32 inputs, got float64.*astype\('float32'\)"),
        (torch.zeros(2, 5), "numpy array, got Tensor"),
        (np.array([[0] * 5, [np.nan] * 5], np.float32), "row 1 are not finite"),
    ],
)
def test_wrong_inputs_are_refused(cases: Callable[[str], Case], x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(cases("mlp").folder).predict(x)


def run_python(code: str, *arguments: Path) -> str:
    """Output of a Python process of its own, in which warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_device_needs_neither_torch_nor_flower(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("conv, colour")
    np.save(tmp_path / "x.npy", case.x.numpy())
    Image.new("RGB", (16, 20)).save(tmp_path / "black.png")
    code = """
import sys
from pathlib import Path
from cafe_flwr.device import load
from cafe_flwr.inference.predict import predict_file
folder, home = map(Path, sys.argv[1:])
rows = predict_file(folder, home / "x.npy") + predict_file(folder, home / "black.png")
print(*(row.exit for row in rows))
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "flwr", "pydantic", "datasets", "pandas"}))
"""
    exits, heavy = run_python(code, case.folder, tmp_path).split("\n")[:2]
    expected = reference(case.network, case.x, case.thresholds, case.temperatures).exits + 1
    assert list(map(int, exits.split()))[:-1] == expected.tolist()
    assert heavy == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv, 100 classes, offset", "mlp"])
def test_the_program_of_the_docs(cases: Callable[[str], Case], tmp_path: Path, name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    (program,) = (block for block in blocks if "onnxruntime" in block)
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    assert "cafe_flwr" not in program
    case = cases(name)
    np.save(tmp_path / "x.npy", case.x.numpy())
    lines = [line.split() for line in run_python(program, case.folder, tmp_path / "x.npy").splitlines()]
    model = load(case.folder)
    ours = model.predict(case.x.numpy())
    assert [int(exit) for _, exit, _ in lines] == ours.exits.tolist()
    assert [label for label, _, _ in lines] == [model.class_names[y] for y in ours.labels]
    np.testing.assert_allclose([float(c) for _, _, c in lines], ours.confidence, atol=1e-5)


def test_predict_file_of_arrays(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("mlp")
    x = case.x.repeat(5, 1).numpy()  # more than are computed at a time
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "one.npy", x[0])
    expected = reference(case.network, case.x, case.thresholds, case.temperatures)
    rows = predict_file(case.folder, tmp_path / "x.npy", tmp_path / "out.csv")
    assert [row.exit - 1 for row in rows] == expected.exits.tolist() * 5
    assert [row.label for row in rows] == expected.labels.tolist() * 5
    assert rows[70].class_name == f"c{rows[70].label}"
    with open(tmp_path / "out.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(r["input"], int(r["label"]), int(r["exit"]), float(r["confidence"])) for r in table] == [
        (str(i), row.label, row.exit, row.confidence) for i, row in enumerate(rows)
    ]
    (one,) = predict_file(case.folder, tmp_path / "one.npy", tmp_path / "out.json")
    assert strict_json((tmp_path / "out.json").read_text()) == [one._asdict()]
    assert one[1:4] == rows[0][1:4]


@pytest.mark.slow
def test_predict_file_reads_images_as_training_does(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("conv, colour")
    rng = np.random.default_rng(0)
    for k, mode in enumerate(("RGB", "L", "RGBA")):
        pixels = rng.integers(0, 256, size=(20, 16, len(mode)), dtype=np.uint8).squeeze()
        (tmp_path / "images" / f"class-{k}").mkdir(parents=True)
        Image.fromarray(pixels, mode=None).save(tmp_path / "images" / f"class-{k}" / "image.png")
    (tmp_path / "images" / "readme.txt").write_text("no image")
    rows = predict_file(case.folder, tmp_path / "images")
    (tmp_path / "images" / "readme.txt").unlink()
    images = normalised(read_local(tmp_path / "images", 0, "image", "label").images)
    expected = load(case.folder).predict(images)
    assert [row.input for row in rows] == [f"class-{k}/image.png" for k in range(3)]
    assert [row.label for row in rows] == expected.labels.tolist()
    assert [row.confidence for row in rows] == expected.confidence.tolist()


@pytest.mark.slow
def test_predict_file_refuses(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case, mlp = cases("conv, colour"), cases("mlp")
    np.save(tmp_path / "wide.npy", np.zeros((2, 6), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
    for folder, name, message in (
        (mlp.folder, "none.npy", "is not there"),
        (mlp.folder, "wide.npy", r"\(B, 5\)"),
        (mlp.folder, "objects.npy", "cannot be read as an array"),
        (mlp.folder, "small.png", "how pixels become"),
        (case.folder, "broken.png", "cannot be read as an image"),
        (case.folder, "empty", "holds no images"),
        (case.folder, "small.png", "9×9 pixels, the network takes 16×20"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_file(folder, tmp_path / name, tmp_path / "out.csv")
    with pytest.raises(ValueError, match=r"\.csv or \.json"):
        predict_file(mlp.folder, tmp_path / "wide.npy", tmp_path / "out.txt")
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_export_of_a_client(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, num_server_rounds=1, num_clients=2, classifier_start="own")
    run_small(settings)  # at zero, classifiers would hardly tell inputs apart after one round
    run, folder = FinishedRun(settings.results), tmp_path / "net"
    personal, data = run.personal(1), run.data(1)
    path = run.folder / "personal" / "client-1.thresholds.json"
    temperatures, x = [2.0, 1.0, 0.5], data.test.x
    made = calibrated(personal.network, spread_thresholds(personal.network, x, temperatures), temperatures=temperatures)
    path.write_text(json.dumps(made.to_dict()))
    assert export_client(run, 1, folder).verified
    expected = reference(personal.network, x, made.thresholds, temperatures)
    assert set(expected.exits) == {0, 1, 2}
    np.testing.assert_array_equal(load(folder).predict(x.numpy()).exits, expected.exits)
    manifest = strict_json((folder / "manifest.json").read_text())
    assert manifest["class_names"] == list(run.class_names)
    assert manifest["facts"]["run"] == settings.results.name
    assert (manifest["facts"]["client"], manifest["facts"]["method"]) == (1, settings.method)
    mean, std = manifest["pixels"]["mean"], manifest["pixels"]["std"]
    assert (0 - mean) / std == BACKGROUND

    def manifest_now(**options: Any) -> dict[str, Any]:
        export_client(run, 1, folder, format="torch", **options)
        return strict_json((folder / "manifest.json").read_text())

    manifest = manifest_now(max_prob=0.25)
    assert (manifest["thresholds"]["thresholds"], manifest["temperatures"]) == ([0.25, 0.25], personal.temperatures)
    path.write_text(json.dumps(calibrated(run.personal(0).network, made.thresholds).to_dict()))
    with pytest.raises(ValueError, match="calibrate this one"):
        export_client(run, 1, folder)
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"thresholds\.json is damaged"):
            export_client(run, 1, folder)
    path.unlink()
    manifest = manifest_now()
    assert (manifest["thresholds"]["thresholds"], manifest["temperatures"]) == ([None, None], personal.temperatures)
    with pytest.raises(ValueError, match="clients 0, 1"):
        export_client(run, 7, tmp_path / "other")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_network_on_the_gpu_is_exported(tmp_path: Path) -> None:
    network = flat_offset(toy_network(exits=2)).cuda()
    network.offset = network.offset.cuda()
    assert export(network, tmp_path / "net", torch.zeros(2, 5, device="cuda"), class_names="abc").verified
    assert network.offset.is_cuda
