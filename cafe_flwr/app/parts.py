"""Builds from settings what a client needs: data, networks, folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cafe_flwr.client.node_config import data_folder, hosted, is_device
from cafe_flwr.core.options import Options
from cafe_flwr.data.federation import FederatedData, deal_out
from cafe_flwr.data.modalities import ROWS, in_rows, rows_shape
from cafe_flwr.data.options import Data, Heterogeneity
from cafe_flwr.data.split import ClientData
from cafe_flwr.networks.conv import ConvNet, SequenceNet
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.options import PUBLISHED, Model
from cafe_flwr.networks.published import PublishedConvNet, PublishedResNet18, PublishedTransformer
from cafe_flwr.networks.resnet import ResNet18
from cafe_flwr.networks.transformer import TextTransformer
from cafe_flwr.server.options import Federation, Run


def federation(settings: Options, node_config: Mapping[str, Any] | None = None) -> FederatedData:
    """The data of the settings: a data set dealt out to clients, or what the clients bring.

    Parameters
    ----------
    settings
        Of the run: its :class:`~cafe_flwr.settings.Settings`, or what a node reads from the run's config.
    node_config
        Of the node, if this runs on one. A device reads no path from the settings, since they come from the server.

    Raises
    ------
    ValueError
        If there is no such data set, or it cannot be dealt out to so many clients.
    """
    options, num_clients = settings.of(Data), settings.of(Federation).num_clients
    if options.dataset == "local":
        shape = (options.image_channels, options.image_size, options.image_size)
        return FederatedData(
            num_clients, options.classes, shape, lambda client: _own(client, settings, node_config or {})
        )
    if options.dataset.startswith("local:") and node_config is not None and is_device(node_config):
        raise ValueError(
            f"the run names a path on this node, dataset = {options.dataset!r}: a node with a node-config of its own "
            "reads data from its data-dir only; set dataset = 'local'"
        )
    located = replace(options, dataset=_located(options), dir=_copies(options, node_config))
    data = deal_out(located, num_clients, settings.of(Run).seed)
    if ROWS not in settings.of(Heterogeneity).modality_names:
        return data
    return replace(
        data,
        load=lambda client: in_rows(data.load(client)) if modality_of(settings, client) == ROWS else data.load(client),
    )


def _located(options: Data) -> str:
    """The data set, with the path of a local one resolved in data.dir if it is relative."""
    kind, _, path = options.dataset.partition(":")
    if not path or not options.dir or Path(path).expanduser().is_absolute():
        return options.dataset
    return f"{kind}:{Path(options.dir).expanduser() / path}"


def _copies(options: Data, node_config: Mapping[str, Any] | None) -> str:
    """Folder with copies of the hub's data sets, empty for the hub; a device takes no path from the run's settings."""
    if node_config is not None and is_device(node_config):
        return str(node_config.get("data-dir", ""))
    return options.dir


def _own(client: int, settings: Options, node_config: Mapping[str, Any]) -> ClientData:
    from cafe_flwr.data.own import load_own

    options = settings.of(Data)
    return load_own(
        data_folder(node_config, client, hosted(node_config, settings.of(Federation).num_clients)),
        client,
        options,
        class_names=options.classes,
        shape=(options.image_channels, options.image_size, options.image_size),
        seed=settings.of(Run).seed,
    )


def state_dir(settings: Options, node_config: Mapping[str, Any]) -> str:
    """Folder of personal state where a node's own node-config names none; empty, and always on a device: the user's."""
    if is_device(node_config):
        return ""
    results = settings.of(Run).folder(settings.of(Data).dataset)
    return settings.of(Federation).state_dir or str(results / "personal")


def build_network(settings: Options, node_config: Mapping[str, Any] | None = None) -> EarlyExitNetwork:
    """The network of the settings, of the first modality if there are several; errors as :func:`build_networks`."""
    return next(iter(build_networks(settings, node_config).values()))


def build_networks(settings: Options, node_config: Mapping[str, Any] | None = None) -> dict[str, EarlyExitNetwork]:
    """The networks of the settings by modality, under ``""`` where there is only one.

    Raises ValueError if the data are not of the kind or size that the network takes.
    """
    data = federation(settings, node_config)
    found = {name: _network(settings, data, name) for name in settings.of(Heterogeneity).modality_names or ("",)}
    model = settings.of(Model)
    for network in found.values():
        if model.network not in PUBLISHED:  # those take pixels as −1..1, which is what networks start with
            network.pixels = data.pixels
        network.statistics = model.statistics
    return found


def modality_of(settings: Options, client: int) -> str:
    """A client's modality, assigned in turn; empty where there is only one."""
    names = settings.of(Heterogeneity).modality_names or ("",)
    return names[client % len(names)]


def _network(settings: Options, data: FederatedData, modality: str = "") -> EarlyExitNetwork:
    model = settings.of(Model)
    if model.network in PUBLISHED:
        return _published(model.network, data)
    widths = [(model.width or 8) << k for k in range(model.depth or 3)]
    if modality == ROWS:
        return SequenceNet(rows_shape(data.input_shape), data.num_classes, widths, model.feature_width, model.norm)
    if model.network == "transformer":
        return TextTransformer(
            data.vocabulary,
            data.input_shape[0],
            data.num_classes,
            model.feature_width,
            width=model.width or 128,
            heads=model.attention_heads,
            blocks=model.depth or 4,
            norm=model.norm,
            dropout=model.dropout,
        )
    if model.norm == "layer":
        raise ValueError("model.norm = 'layer' is of the transformer: choose 'group' or 'batch'")
    if model.network == "resnet18":
        return ResNet18(
            data.input_shape,
            data.num_classes,
            model.feature_width,
            norm=model.norm,
            width=model.width or 64,
            stem_stride=model.stem_stride,
        )
    return ConvNet(data.input_shape, data.num_classes, widths, model.feature_width, model.norm)


def _published(name: str, data: FederatedData) -> EarlyExitNetwork:
    if name == "published-transformer":
        return PublishedTransformer(data.num_classes, data.vocabulary, data.input_shape[0])
    build = PublishedResNet18 if name == "published-resnet18" else PublishedConvNet
    return build(data.input_shape, data.num_classes)
