"""The ClientApp: digits, dealt out to clients who see some of them more often than others."""

from cafe_flwr import make_client_app
from cafe_flwr.data import load_federation
from widths.network import SlimmableConvNet

app = make_client_app(
    lambda context: SlimmableConvNet(in_channels=1, num_classes=10),
    lambda client, context: load_federation("digits", int(context.run_config["num-clients"]), alpha=0.3).load(client),
)
