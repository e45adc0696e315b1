"""The ClientApp."""

from flwr.app import Context

from cafe_flwr import make_client_app
from cafe_flwr.data import ClientData
from digits.task import Net, load_data


def network(context: Context) -> Net:
    """The network, as everybody starts: torch's generator is seeded before."""
    return Net()


def data(client: int, context: Context) -> ClientData:
    """Data of one client; asked for once per process."""
    return load_data(client, context.node_config["num-partitions"])


app = make_client_app(network, data)
