"""The ClientApp."""

from cafe_flwr import make_client_app
from cafe_flwr.data import ClientData, Split
from cafe_flwr.networks import EarlyExitNetwork, Exit
from shapes import data, model

app = make_client_app(
    lambda context: EarlyExitNetwork(model.ShapeNet().stages, [Exit(model.pool(), *model.HEAD) for _ in range(3)]),
    lambda client, context: ClientData(*(Split(*data.tensors(client, split)) for split in data.SPLITS)),
)
