"""Run an exported early-exit network on a device, with numpy and onnxruntime only."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FORMAT = "cafe-flwr-export"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_NEEDED = {
    "class_names": list,
    "files": dict,
    "input": dict,
    "num_classes": int,
    "num_exits": int,
    "stages": list,
    "temperatures": list,
    "thresholds": dict,
}


class Predictions(NamedTuple):
    """Predictions for a batch.

    ``labels`` are (B,) int64, 0..C−1; ``exits`` (B,) int64, the exit at which each row left, 0..m−1; ``confidence``
    (B,) float32, the largest probability there, after the exit's temperature.
    """

    labels: NDArray[np.int64]
    exits: NDArray[np.int64]
    confidence: NDArray[np.float32]


class ExitedModel:
    """A network that :func:`cafe_flwr.inference.export.export` wrote as ONNX, ready to run.

    Parameters
    ----------
    folder
        Folder of the export. Its files are checked against their sha256.
    threads
        Threads of onnxruntime; 0 for one per core.

    Attributes
    ----------
    manifest
        Contents of ``manifest.json``.
    class_names
        In the order of the labels.
    input_shape
        Shape of one input, without the batch axis.
    thresholds
        (m−1,): a row leaves where its confidence is at least this; inf: never.

    Raises
    ------
    ValueError
        If a file is missing or changed, or the folder is of another format.

    Examples
    --------
    >>> import tempfile, torch
    >>> from cafe_flwr.inference.export import export
    >>> from cafe_flwr.networks import ConvNet
    >>> network, x = ConvNet((1, 8, 8), 10, widths=(8, 16)), torch.zeros(3, 1, 8, 8)
    >>> with tempfile.TemporaryDirectory() as home:
    ...     made = export(network, Path(home) / "net", x, class_names="0123456789", thresholds=0.0)
    ...     model = ExitedModel(made.folder)
    >>> model.predict(x.numpy()).exits
    array([0, 0, 0])
    """

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        folder = Path(folder).expanduser()
        self.manifest = _read_manifest(folder)
        self.num_exits: int = self.manifest["num_exits"]
        self.class_names: tuple[str, ...] = tuple(self.manifest["class_names"])
        early = self.manifest["thresholds"]["thresholds"]
        self.thresholds = np.array([math.inf if t is None else t for t in early])
        self._temperatures = np.array(self.manifest["temperatures"], dtype=np.float32)
        self.input_shape = tuple(self.manifest["input"]["shape"])
        self._dtype = np.dtype(self.manifest["input"]["dtype"])
        _check_files(folder, self.manifest)
        self._sessions = [_session(folder / stage["onnx"], threads) for stage in self.manifest["stages"]]

    def predict(self, x: NDArray[Any]) -> Predictions:
        """Labels, exits and confidence of a batch; rows that left are not computed further.

        Parameters
        ----------
        x
            (B, …), B ≥ 0, in the shape and dtype of the example that was given to the export.

        Raises
        ------
        ValueError
            If shape or dtype are wrong, or the logits of a row are not finite.
        """
        self.check_input(x)
        result = Predictions(
            np.zeros(len(x), np.int64), np.full(len(x), self.num_exits - 1, np.int64), np.zeros(len(x), np.float32)
        )
        rows, h = np.arange(len(x)), x
        for k, session in enumerate(self._sessions):
            if not len(rows):
                break
            outputs = session.run(None, {"h": h})
            confidence = _confidence(outputs[-1], self._temperatures[k], rows)
            result.labels[rows] = outputs[-1].argmax(axis=1)
            result.confidence[rows] = confidence
            if k == self.num_exits - 1:
                break
            leaves = confidence >= self.thresholds[k]
            result.exits[rows[leaves]] = k
            rows = rows[~leaves]
            h = outputs[0] if not leaves.any() else outputs[0][~leaves]
        return result

    def check_input(self, x: NDArray[Any]) -> None:
        """Raise the ValueError with which ``predict`` would refuse this input."""
        if not isinstance(x, np.ndarray):
            raise ValueError(f"the input must be a numpy array, got {type(x).__name__}: use numpy.asarray")
        if x.shape == self.input_shape:
            raise ValueError(f"the input {x.shape} has no batch axis: give x[None]")
        if x.shape[1:] != self.input_shape:
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(f"the network takes inputs of shape (B, {wanted}), got {x.shape}")
        if x.dtype != self._dtype:
            raise ValueError(
                f"the network takes {self._dtype} inputs, got {x.dtype}: normalise them as in training, and give "
                f"x.astype('{self._dtype}')"
            )


def load(folder: Path | str, threads: int = 0) -> ExitedModel:
    """The same as ``ExitedModel(folder, threads)``.

    Examples
    --------
    >>> load("no/such/folder")
    Traceback (most recent call last):
    ...
    ValueError: no/such/folder has no manifest.json: it is not an exported network; write one with cafe-flwr export
    """
    return ExitedModel(folder, threads)


def _confidence(logits: NDArray[np.float32], temperature: np.float32, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Largest probability of each row."""
    if not np.isfinite(logits).all():
        bad = rows[~np.isfinite(logits).all(axis=1)]
        raise ValueError(f"logits of row {bad[0]} are not finite: look for NaN or infinity in that input")
    scaled = logits / temperature
    return 1 / np.exp(scaled - scaled.max(axis=1, keepdims=True)).sum(axis=1)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it is not an exported network; write one with cafe-flwr export")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): export again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not of an exported network: write one with cafe-flwr export")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is in format version {manifest.get('format_version')}, this cafe-flwr reads {FORMAT_VERSION}: "
            "export again with this version, or install the one that wrote it"
        )
    missing = [key for key, kind in _NEEDED.items() if not isinstance(manifest.get(key), kind)]
    if missing:
        raise ValueError(f"{path} is damaged, it lacks {', '.join(missing)}: export again")
    exits, early = manifest["num_exits"], manifest["thresholds"].get("thresholds")
    lengths = (
        len(manifest["stages"]),
        len(manifest["temperatures"]),
        len(early or ()) + 1,
        len(manifest["class_names"]),
    )
    if lengths != (exits, exits, exits, manifest["num_classes"]):
        raise ValueError(f"{path} is damaged, its parts are not of one network: export again")
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    for stage in manifest["stages"]:
        if "onnx" not in stage:
            raise ValueError(f"{folder} holds no ONNX graphs: export with format='onnx' or 'both'")
        name = stage["onnx"]
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: copy the whole folder again, or export again")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != manifest["files"].get(name):
            raise ValueError(
                f"{folder / name} is not the file that was exported (its sha256 differs): copy the whole folder again, "
                "or export again"
            )


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ValueError("onnxruntime is not installed: pip install onnxruntime, or 'cafe-flwr[export]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
