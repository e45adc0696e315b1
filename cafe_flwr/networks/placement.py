"""Where a network computes, and how precisely: device, autocast, memory format, compilation.

Every node decides for itself: whatever it computes with, it sends and keeps float32 on the CPU (docs/devices.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cafe_flwr.core.options import values_of
from cafe_flwr.networks.options import DEVICE_PATTERN, Compute
from cafe_flwr.networks.weights import tie

if TYPE_CHECKING:
    from cafe_flwr.networks.early_exit import EarlyExitNetwork


PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INIT_SCALE = 1024.0  # low enough that hardly any gradient overflows, as lost steps weigh in short rounds


@dataclass(frozen=True)
class Placement:
    """Where and how a node computes; the fields are those of :class:`cafe_flwr.networks.options.Compute`."""

    device: str = "auto"
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not re.match(DEVICE_PATTERN, self.device):
            raise ValueError(f"device must be auto, cpu, cuda, cuda:<number> or mps, got {self.device!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")

    @classmethod
    def of(cls, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Placement:
        """The placement that a run's settings ask for, on the node's own node-config ``device`` if it has one.

        Examples
        --------
        >>> Placement.of({"compute.device": "cuda", "compute.precision": "bfloat16"}, {"device": "cpu"})
        Placement(device='cpu', precision='bfloat16', channels_last=False, compile=False)
        """
        said = {f.name: value for f in fields(cls) if (value := values_of(Compute, run_config).get(f.name)) is not None}
        return cls(**said | ({"device": node_config["device"]} if "device" in node_config else {}))

    def place(self, network: EarlyExitNetwork) -> None:
        """Move a network to the device and set how it computes; its weights stay float32.

        ValueError if the device does not exist (those that do are listed) or cannot compute with the precision, or if
        the network's weights are of half precision or complex.
        """
        _check_weights(network)
        tie(network)
        device = find_device(self.device)
        dtype = PRECISIONS[self.precision]
        if dtype is not None:
            _check_precision(device, dtype)
        network.to(device)
        if network.offset is not None:
            network.offset = network.offset.to(device)
        if self.channels_last:
            for parameter in network.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        network.autocast = dtype
        if self.compile:
            for module in (*network.stages, *network.exits):
                module.compile()


def devices_here() -> list[str]:
    """Devices that this process can compute on, the CPU first."""
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def find_device(name: str) -> torch.device:
    """The device of a name; ``"auto"`` is the first GPU, or else the CPU. ValueError if it does not exist.

    Examples
    --------
    >>> find_device("cpu")
    device(type='cpu')
    """
    here = devices_here()
    if name == "auto":
        return torch.device(here[1] if len(here) > 1 else "cpu")
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in here:
        hint = ""
        if wanted.startswith("cuda") and torch.version.cuda is None:
            hint = " (this PyTorch was built without CUDA)"
        elif wanted.startswith("cuda") and len(here) == 1:
            hint = " (in a simulation, workers see a GPU only if client-resources-num-gpus is above 0)"
        raise ValueError(
            f"device = {name!r} is not there: this process can compute on {', '.join(here)}{hint}; set device to one "
            "of them, or to 'auto'"
        )
    return torch.device(wanted)


def _check_weights(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if parameter.is_complex() or (parameter.is_floating_point() and parameter.element_size() < 4):
            raise ValueError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, and weights travel and are kept as float32: "
                "build the network in float32; compute.precision = 'bfloat16' lets it compute in half precision"
            )


def _check_precision(device: torch.device, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    try:
        with torch.autocast(device.type, dtype):
            x = torch.ones(2, 2, device=device)
            ok = (x @ x).dtype == dtype
        if device.type == "cuda" and dtype == torch.bfloat16:
            ok = ok and torch.cuda.is_bf16_supported()
    except RuntimeError:
        ok = False
    if not ok:
        raise ValueError(f"precision = {name!r} cannot be had on {device}: set compute.precision to 'float32'")


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are; the CPU if it has none."""
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device: itself if it is there; moved from the CPU to CUDA through pinned memory, asynchronously."""
    if x.device == device:
        return x
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class OnDevice(Mapping[str, Tensor]):
    """Tensors by name, moved to a device when they are first read."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._moved: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._moved:
            self._moved[name] = self._tensors[name].to(self._device)
        return self._moved[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def gradient_scaler(network: nn.Module) -> torch.amp.GradScaler | None:
    """The scaler that keeps small gradients from vanishing in float16; None for other types."""
    if getattr(network, "autocast", None) != torch.float16:
        return None
    return torch.amp.GradScaler(device_of(network).type, init_scale=_INIT_SCALE)
