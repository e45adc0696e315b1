"""The Flower ClientApp of this package: networks and data as the settings say."""

import torch
from flwr.app import Context

from cafe_flwr import EarlyExitNetwork, make_client_app
from cafe_flwr.app.parts import build_networks, federation, modality_of, state_dir
from cafe_flwr.core.options import RunOptions
from cafe_flwr.data import ClientData

torch.set_num_threads(1)  # a worker per core; threads of one worker only get in each other's way


def build(context: Context) -> dict[str, EarlyExitNetwork]:
    """The network that the run's settings name, or that of each modality."""
    return build_networks(RunOptions(context.run_config), context.node_config)


def load(client: int, context: Context) -> ClientData:
    """The data of one client."""
    return federation(RunOptions(context.run_config), context.node_config).load(client)


def modality(client: int, context: Context) -> str:
    """Modality of one client."""
    return modality_of(RunOptions(context.run_config), client)


def personal_state(context: Context) -> str:
    """Folder of the clients' personal state, where the node's own node-config names none."""
    return state_dir(RunOptions(context.run_config), context.node_config)


app = make_client_app(build, load, modality_of=modality, state_dir=personal_state)
