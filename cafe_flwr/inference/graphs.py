"""The stages of a network, each with its exit, as graphs that run without its code."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cafe_flwr.networks.early_exit import EarlyExitNetwork

SUFFIXES = {"onnx": "onnx", "torch": "pt2"}
TOLERANCE = 1e-4  # of logits, relative to the largest one where that is above 1
INSTALL = "pip install 'cafe-flwr[export]'"


def on_cpu(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """A copy in evaluation mode on the CPU, with the offset."""
    copied = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    if copied.offset is not None:
        copied.offset = copied.offset.detach().cpu()
    return copied


def write_graphs(network: EarlyExitNetwork, folder: Path, example: Tensor, kinds: Sequence[str]) -> dict[str, str]:
    """Write ``stage-<k>.onnx`` and ``stage-<k>.pt2``, as ``kinds`` asks for; return the kind of each file by its name.

    :func:`cafe_flwr.inference.export.export` describes inputs and outputs of a graph. The network is from
    :func:`on_cpu`, the example a batch of inputs, (B, …), B ≥ 1.

    Raises ValueError if torch cannot write a stage as a graph, or ONNX is not installed.
    """
    h = example[:2] if len(example) > 1 else example.repeat(2, *[1] * (example.dim() - 1))  # 1 would be taken as fixed
    written = {}
    for k in range(network.num_exits):
        step = _Step(network, k)
        try:
            program = _program(step, h)
            for kind in kinds:
                name = f"stage-{k}.{SUFFIXES[kind]}"
                (_write_onnx if kind == "onnx" else _write_torch)(program, folder / name, h, step.outputs)
                written[name] = kind
        except ModuleNotFoundError as error:
            raise ValueError(f"ONNX needs {error.name}, which is not installed: {INSTALL}, or format='torch'") from None
        except Exception as error:  # torch.export raises many kinds
            raise ValueError(
                f"torch cannot write stage {k} of the network as a graph for any batch size: {error}"
            ) from error
        with torch.no_grad():
            h = network.stage(k, h)
    return written


def logits_of(network: EarlyExitNetwork, example: Tensor) -> list[Tensor]:
    """Logits of all exits on the example; ValueError if it cannot be computed, or gives NaN or infinity."""
    if example.dim() < 2 or not len(example):
        raise ValueError(f"the example must be a batch (B, …) with B ≥ 1, got the shape {tuple(example.shape)}")
    try:
        with torch.no_grad():
            logits = network(example)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"the network cannot compute the example, {tuple(example.shape)}: {error}") from error
    if not all(bool(z.isfinite().all()) for z in logits):
        raise ValueError("the network's logits on the example are not finite: it must not be used")
    return list(logits)


def difference(network: EarlyExitNetwork, folder: Path, example: Tensor, kind: str) -> float | None:
    """Largest difference of the graphs' logits from the network's, on the example and on its first row alone.

    None if onnxruntime is needed and not installed. ValueError if it is above 1e-4 (relative to the largest logit,
    where that is above 1).
    """
    paths = [folder / f"stage-{k}.{SUFFIXES[kind]}" for k in range(network.num_exits)]
    if kind == "torch":
        steps: list[Any] = [torch.export.load(path).module() for path in paths]
    else:
        try:
            steps = [_session(path) for path in paths]
        except ModuleNotFoundError:
            return None
    worst = 0.0
    for h in (example, example[:1]):
        for k, expected in enumerate(logits_of(network, h)):
            with torch.no_grad():
                outputs = steps[k](h)
            logits = outputs if isinstance(outputs, Tensor) else outputs[-1]
            gap = float((logits - expected).abs().max())
            if not gap <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise ValueError(
                    f"{paths[k].name} gives logits that differ from the network's by {gap:.2g}, more than {TOLERANCE}: "
                    "a stage does something that depends on its batch or that a graph cannot hold"
                )
            worst = max(worst, gap)
            h = outputs[0]
    return worst


class _Step(nn.Module):
    """From the output of stage k − 1 to that of stage k and the logits of exit k."""

    def __init__(self, network: EarlyExitNetwork, k: int) -> None:
        super().__init__()
        self.network = network
        self.k = k
        self.outputs = ["logits"] if k == network.num_exits - 1 else ["h_next", "logits"]
        self.eval()

    def forward(self, h: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h_next = self.network.stage(self.k, h)
        logits = self.network.exit(self.k, h_next)[1]
        return (h_next, logits) if len(self.outputs) == 2 else logits


def _program(step: _Step, h: Tensor) -> ExportedProgram:
    """The step as a graph with the weights it uses, and without the paths of this machine."""
    program = torch.export.export(step, (h,), dynamic_shapes=({0: Dim("batch")},), strict=False)
    used = {node.name for node in program.graph.nodes if node.users}
    for spec in program.graph_signature.input_specs:
        if spec.target in program.state_dict and spec.arg.name not in used:
            program.state_dict[spec.target] = nn.Parameter(torch.empty(0), requires_grad=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_torch(program: ExportedProgram, path: Path, h: Tensor, outputs: list[str]) -> None:
    torch.export.save(program, path)


def _write_onnx(program: ExportedProgram, path: Path, h: Tensor, outputs: list[str]) -> None:
    import onnxscript  # noqa: F401  # torch's own message names the module, not the extra

    with _without_remarks():
        torch.onnx.export(
            program,
            (h,),
            path,
            input_names=["h"],
            output_names=outputs,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Hide that torchvision, which is not needed, is not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _session(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda h: [torch.from_numpy(output) for output in session.run(None, {"h": h.numpy()})]
