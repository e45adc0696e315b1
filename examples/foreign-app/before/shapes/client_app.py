"""The ClientApp."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional as F
from torch.utils.data import DataLoader

from shapes import data, model

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global network for an epoch."""
    network = received(message)
    images = data.ShapeImages(int(context.node_config["partition-id"]), "train")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    for x, y in DataLoader(images, batch_size=12, shuffle=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(images), "loss": loss.item()})
    return Message(RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
@torch.no_grad()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global network on this client's test pictures."""
    x, y = data.tensors(int(context.node_config["partition-id"]), "test")
    accuracy = (received(message)(x).argmax(dim=1) == y).float().mean().item()
    metrics = MetricRecord({"num-examples": len(y), "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def received(message: Message) -> model.ShapeNet:
    """The network with the weights that the server sent."""
    network = model.ShapeNet()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return network
