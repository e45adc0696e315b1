"""ClientApp of this package."""

import torch
from network import build, data

from cafe_flwr import make_client_app

torch.set_num_threads(1)
app = make_client_app(
    lambda context: build(int(context.run_config["tensors"]), float(context.run_config["megabytes"])),
    lambda client, context: data(client),
)
