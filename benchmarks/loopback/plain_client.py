"""The ClientApp that Flower's quickstart shows, with the same work."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from network import build, data
from torch.nn.functional import cross_entropy

torch.set_num_threads(1)
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate, one step of SGD, evaluate again."""
    network = build(int(context.run_config["tensors"]), float(context.run_config["megabytes"]))
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    examples = data(int(context.node_config["partition-id"]))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    measure(network, examples.test)
    loss = torch.stack([cross_entropy(z, examples.train.y) for z in network(examples.train.x)]).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    metrics = MetricRecord({"num-examples": len(examples.train), "accuracy": measure(network, examples.test)})
    return Message(RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy of the last exit."""
    network = build(int(context.run_config["tensors"]), float(context.run_config["megabytes"]))
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    examples = data(int(context.node_config["partition-id"])).test
    metrics = MetricRecord({"num-examples": len(examples), "accuracy": measure(network, examples)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def measure(network, examples) -> float:
    """Accuracy of the last exit."""
    with torch.no_grad():
        return float((network(examples.x)[-1].argmax(1) == examples.y).float().mean())
