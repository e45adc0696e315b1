"""Export of a network to a device: a graph per stage with its exit, and a manifest with what early exit needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cafe_flwr.core.files import atomic_folder, check_replaceable, to_json
from cafe_flwr.cost import macs_per_exit
from cafe_flwr.device import FORMAT, FORMAT_VERSION, MANIFEST
from cafe_flwr.inference.graphs import INSTALL, SUFFIXES, difference, logits_of, on_cpu, write_graphs
from cafe_flwr.inference.policies import MaxProb, PerExit
from cafe_flwr.inference.runner import EarlyExitRunner
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.fingerprint import fingerprint
from cafe_flwr.risk.thresholds import ExitThresholds

_KINDS = {"onnx": ("onnx",), "torch": ("torch",), "both": ("onnx", "torch")}


@dataclass(frozen=True)
class Exported:
    """An export: its folder, the names of its files, and notes for the user, a sentence each.

    ``difference`` has, by kind of graph, the largest difference of its logits from the network's on the example; None
    if it was not verified.
    """

    folder: Path
    files: tuple[str, ...]
    difference: Mapping[str, float | None]
    notes: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Whether all graphs were run and agree with the network."""
        return None not in self.difference.values()


def export(  # noqa: PLR0913 (public, all by name)
    network: EarlyExitNetwork,
    folder: Path,
    example: Tensor,
    *,
    class_names: Sequence[str],
    thresholds: ExitThresholds | PerExit | MaxProb | float | None = None,
    temperatures: Sequence[float] = (),
    format: Literal["onnx", "torch", "both"] = "onnx",
    pixels: tuple[float, float] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a folder from which a device runs the network and stops early (docs/export.md).

    Graph k takes the output ``h`` of stage k − 1 (the input, if k is 0) with any batch size, and gives ``h_next`` and
    ``logits``; the last one gives ``logits`` only. The network's offset is in the logits. The graphs are run on the
    example and compared with the network before the folder appears, which it does whole or not at all.

    Parameters
    ----------
    network
        Left unchanged: a copy in evaluation mode on the CPU is exported.
    folder
        New, empty, or an earlier export, which is replaced.
    example
        A batch of inputs, (B, …), B ≥ 1.
    class_names
        Names of the C classes, in the order of the labels.
    thresholds
        Calibrated ones, or those of a budget, with their temperatures; or θ in [0, 1], also as ``MaxProb(θ)``: leave
        where the largest probability is at least θ, without any guarantee; None: never leave early.
    temperatures
        By which an exit's logits are divided before the softmax, (m,); by default those of the thresholds, or all 1.
    format
        ``"onnx"`` for onnxruntime, ``"torch"`` for ``torch.export.load``, or ``"both"``.
    pixels
        For images: mean and standard deviation by which pixels in 0..1 were normalised in training; without them the
        folder takes arrays only.
    facts
        Where the network comes from, for the manifest.

    Raises
    ------
    ValueError
        If something does not fit the network (above all, thresholds made for another one), the folder holds other
        things, a graph cannot be written, or its logits are not those of the network.

    Examples
    --------
    >>> import tempfile, torch
    >>> from cafe_flwr.networks import ConvNet
    >>> network, x = ConvNet((1, 8, 8), 10, widths=(8, 16)), torch.zeros(2, 1, 8, 8)
    >>> with tempfile.TemporaryDirectory() as home:
    ...     made = export(network, Path(home) / "net", x, class_names="0123456789", thresholds=0.9)
    >>> made.files
    ('stage-0.onnx', 'stage-1.onnx', 'manifest.json')
    >>> made.verified
    True
    """
    if format not in _KINDS:
        raise ValueError(f"format must be {', '.join(map(repr, _KINDS))}, got {format!r}")
    if len(class_names) != network.num_classes:
        raise ValueError(f"the network has {network.num_classes} classes, but {len(class_names)} names of classes")
    folder = folder.expanduser().resolve()
    check_replaceable(folder, MANIFEST, FORMAT)
    policy, notes = _policy(thresholds, network.num_exits - 1, temperatures)
    copied, example = on_cpu(network), example.detach().cpu()
    scale = EarlyExitRunner(copied, policy, temperatures=temperatures).temperatures  # refuses what does not fit
    logits_of(copied, example)
    manifest = {
        **_about(copied, example),
        "class_names": [str(name) for name in class_names],
        "pixels": _check_pixels(pixels),
        "temperatures": list(scale) or [1.0] * network.num_exits,
        "thresholds": policy.to_dict(),
        "macs_per_exit": _macs(copied, example, notes),
        "facts": dict(facts or {}),
    }
    with atomic_folder(folder) as draft:
        _write(draft, copied, example, _KINDS[format], manifest)
    if None in manifest["difference"].values():
        notes.append(f"The graphs were not verified: onnxruntime is not installed here ({INSTALL}).")
    return Exported(folder, (*manifest["files"], MANIFEST), manifest["difference"], tuple(notes))


def _write(
    draft: Path, network: EarlyExitNetwork, example: Tensor, kinds: Sequence[str], manifest: dict[str, Any]
) -> None:
    """Graphs, and the manifest with their names, checksums and differences."""
    files = write_graphs(network, draft, example, kinds)
    manifest["difference"] = {kind: difference(network, draft, example, kind) for kind in kinds}
    stages = range(network.num_exits)
    manifest["stages"] = [{kind: f"stage-{k}.{SUFFIXES[kind]}" for kind in kinds} for k in stages]
    manifest["files"] = {name: hashlib.sha256((draft / name).read_bytes()).hexdigest() for name in files}
    try:
        (draft / MANIFEST).write_text(to_json(manifest, indent=1), encoding="utf-8")
    except TypeError as error:
        raise ValueError(f"facts must be numbers, texts, lists and dictionaries: {error}") from None


def _about(network: EarlyExitNetwork, example: Tensor) -> dict[str, Any]:
    """The manifest's entries on the network itself and on the versions that wrote it."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "num_exits": network.num_exits,
        "num_classes": network.num_classes,
        "input": {"shape": list(example.shape[1:]), "dtype": str(example.dtype).removeprefix("torch.")},
        "fingerprint": fingerprint(network),
        "versions": {name: _version(name) for name in ("cafe-flwr", "torch", "onnx", "onnxscript", "onnxruntime")},
    }


def _policy(given: object, early: int, temperatures: Sequence[float]) -> tuple[ExitThresholds | PerExit, list[str]]:
    """Thresholds of the first ``early`` exits, and notes about them."""
    if isinstance(given, ExitThresholds | PerExit):
        notes = [given.describe() if isinstance(given, ExitThresholds) else "The thresholds guarantee nothing."]
        if not given.fingerprint:
            notes.append("The thresholds do not say for which network they were made; that was not checked.")
        return given, notes
    if given is None:
        given = MaxProb(math.inf)
    if isinstance(given, int | float):
        given = MaxProb(given)
    if not isinstance(given, MaxProb):
        raise ValueError(f"a device stops by thresholds of the largest probability, not by {given!r}")
    note = f"Examples leave at a largest probability of {given.threshold:g} or more, without any guarantee."
    if given.threshold == math.inf:
        note = "No thresholds: no example leaves early."
    return PerExit((given.threshold,) * early, tuple(temperatures)), [note]


def _macs(network: EarlyExitNetwork, example: Tensor, notes: list[str]) -> list[int] | None:
    try:
        return macs_per_exit(network, example)
    except ValueError as error:
        notes.append(f"MACs are not in the manifest: {error}.")
        return None


def _check_pixels(pixels: tuple[float, float] | None) -> dict[str, float] | None:
    if pixels is None:
        return None
    mean, std = pixels
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"pixels must be a mean and a standard deviation above 0, got {pixels}")
    return {"mean": float(mean), "std": float(std)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
