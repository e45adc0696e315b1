"""A node's description of itself for the strategy: its clients, their network, and how much data they have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from cafe_flwr import __version__
from cafe_flwr.client.model import ClientModel
from cafe_flwr.client.node_config import name_of
from cafe_flwr.client.privacy import withholds
from cafe_flwr.client.process import NodeContext, ProcessCache
from cafe_flwr.core.log import logger
from cafe_flwr.data.split import ClientData
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.placement import device_of
from cafe_flwr.wire.capacity import ClientSpec
from cafe_flwr.wire.describe import NodeInfo

SPLITS = ("train", "calibration", "test")


def describe(here: NodeContext) -> NodeInfo:
    """The clients that the node can serve, and the reasons why it cannot serve others."""
    process, node_config = here.process, here.context.node_config
    clients, sizes, problems, models = [], [], [], []
    macs: dict[int, list[int]] = {}  # by model
    for client in here.hosted:
        try:
            model, data, notes = _checked(here, client)
            for counted in (process.wholes[model.modality], model):
                if id(counted) not in macs:
                    macs[id(counted)] = _macs(counted, data, compiled=process.placement.compile)
        except Exception as error:
            logger.warning("client %d cannot serve: %s", client, error, exc_info=True)
            problems.append(f"client {client} is left out: {error}")
            continue
        problems += [f"client {client} {note}" for note in notes]
        clients.append(client)
        sizes.append(len(data.train))
        models.append(model)
    kinds = [kind_of(model, macs[id(model)]) for model in models]
    alike = not any(kind.name for kind in kinds)
    different = list(dict.fromkeys(kinds))
    network = describe_network(process)
    return replace(
        network,
        clients=clients,
        num_examples=sizes,
        problems=problems,
        num_nodes=0 if "clients" in node_config else int(node_config.get("num-partitions", 0)),
        macs=macs.get(id(process.largest), network.macs),
        name=name_of(node_config),
        kinds=[] if alike else different,
        kind_of=[] if alike else [different.index(kind) for kind in kinds],
    )


def describe_network(process: ProcessCache) -> NodeInfo:
    """What a description says of network and method, without clients; MACs are not counted."""
    largest = process.largest
    return NodeInfo(
        version=__version__,
        clients=[],
        num_examples=[],
        problems=[],
        num_nodes=0,
        digest=process.digest,
        shared=process.shared,
        upload=largest.schemas["upload"],
        download=largest.schemas["download"],
        num_exits=largest.network.num_exits,
        num_parameters=_num_parameters(largest.network),
        macs=[0] * largest.network.num_exits,
    )


def _checked(here: NodeContext, client: int) -> tuple[ClientModel, ClientData, list[str]]:
    """A client's model and data, and remarks on the data; ValueError if it cannot take part.

    Where metrics are withheld, nothing is said about the data, not even why they cannot be used.
    """
    if here.process.trouble:
        raise ValueError(here.process.trouble)
    model, withheld = here.model(client), withholds(here.context.node_config, here.context.run_config)
    try:
        data = here.data(client)
        notes = check_data(data, model.network.num_classes)
        for name in SPLITS:
            model.network.check_inputs(getattr(data, name).x)
    except Exception as error:
        if withheld:
            raise ValueError("its data cannot be used: the node's own log says why") from error
        raise
    return model, data, [] if withheld else notes


def _macs(model: ClientModel, data: ClientData, *, compiled: bool) -> list[int]:
    from cafe_flwr.cost import macs_per_exit  # imported here, since no other message needs it

    network = copy.deepcopy(model.network) if compiled else model.network
    return macs_per_exit(network, data.train.x[:1].to(device_of(network)))


def kind_of(model: ClientModel, macs: Sequence[int]) -> ClientSpec:
    """What clients with this model hold, as the server needs it."""
    depth, part = model.network.num_exits, ""
    if model.held:
        width = f" at width {model.held.width:g}" if model.held.width < 1 else ""
        part = f"{depth} exit{'s' * (depth > 1)}{width}"
    return ClientSpec(
        name=", ".join(filter(None, (model.modality, part))),
        num_exits=depth,
        num_parameters=_num_parameters(model.network),
        macs=tuple(macs),
        shared=model.shared,
        upload=model.schemas["upload"],
        download=model.schemas["download"],
    )


def _num_parameters(network: EarlyExitNetwork) -> int:
    tensors = network.state_dict()
    return sum(tensors[name].numel() for name in network.kept_names())


def check_data(data: ClientData, num_classes: int) -> list[str]:
    """Remarks on unusual data of a client; ValueError if it cannot take part."""
    if not len(data.train):
        raise ValueError("its training split is empty")
    for name in SPLITS:
        x, y = getattr(data, name)[:2]
        if y.dim() != 1 or len(x) != len(y):
            raise ValueError(
                f"its {name} split has inputs of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)}: every "
                "input needs one label"
            )
        if x.is_floating_point() and not torch.isfinite(x).all():
            row = int((~torch.isfinite(x)).reshape(len(x), -1).any(dim=1).int().argmax())
            raise ValueError(f"its {name} split has NaN or infinite inputs, first in example {row}: mend the data")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
            raise ValueError(
                f"its {name} split has labels {int(y.min())}..{int(y.max())}, expected 0..{num_classes - 1}"
            )
    if data.train.x.dtype not in (torch.float32, torch.uint8, torch.int64) or data.train.y.dtype != torch.int64:
        raise ValueError(
            "its inputs must be float32 (pixels of images: uint8; tokens of texts: int64) and its labels int64, got "
            f"{data.train.x.dtype} and {data.train.y.dtype}"
        )
    notes = []
    if len(data.train.y.unique()) == 1:
        notes.append("has a single class in its training split; it takes part")
    if not len(data.test):
        notes.append("has an empty test split; it takes part, but its accuracy is unknown")
    return notes


def check_fits(data: ClientData, input_shape: Sequence[int], num_classes: int) -> None:
    """ValueError if a network cannot take a client's data: unknown labels, or inputs of another shape."""
    check_data(data, num_classes)
    for name in SPLITS:
        x = getattr(data, name).x
        if len(x) and tuple(x.shape[1:]) != tuple(input_shape):
            raise ValueError(
                f"inputs of the {name} split have shape {tuple(x.shape[1:])}, the network takes {tuple(input_shape)}: "
                "give the data it was made for"
            )
