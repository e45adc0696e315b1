"""A ClientApp written by hand: it needs flwr, numpy and torch, and docs/messages.md, but not cafe-flwr."""

import math
import time
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from torch import Tensor
from torch.nn import functional as F

from shapes import data, measuring
from shapes.contract import Layout, Request, answer, check, prefixed
from shapes.model import ExitNet
from shapes.state import Versions

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Say who is here, with which network and how many examples."""
    network, client = begin(message.content["config"], context)
    layout = Layout(network)
    x, y = data.tensors(client, "train")
    metadata = {
        "version": "",  # of cafe-flwr, which does not run here
        "clients": [client],
        "num-examples": [len(y)],
        "num-nodes": int(context.node_config.get("num-partitions", 0)),
        "digest": layout.digest,
        "shared": layout.shared.text(),
        "upload": layout.upload.text(),
        "download": layout.download.text(),
        "num-exits": len(network.exits),
        "num-parameters": sum(tensor.numel() for tensor in network.state_dict().values()),
        "macs": measuring.macs(network, x),
    }
    return answer(message, {"config": metadata})


@app.query("initial")
def initial(message: Message, context: Context) -> Message:
    """Give the shared weights to start from, if the server has none."""
    network, _ = begin(message.content["config"], context)
    return answer(message, {"arrays": Layout(network).shared.pack(network.state_dict())})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate, train, evaluate; keep the heads, send the rest."""
    config = message.content["config"]
    network, client = begin(config, context)
    layout = Layout(network)
    request = Request.read(message, layout, client)
    store = Versions(context, str(config["run"]), client)
    start_from(network, layout, request, store)
    x, y = data.tensors(client, "test")
    start = time.perf_counter()
    before = evaluated(network, x, y, bool(config["evaluate"]))
    evaluated_at = time.perf_counter()
    losses = learn(network, client, request)
    trained_at = time.perf_counter()
    after = evaluated(network, x, y, bool(config["evaluate"]))
    done = time.perf_counter()
    tensors = network.state_dict()
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError("training ended with NaN or infinite values: lower the learning rate")
    metrics: dict[str, Any] = {
        "num-examples": [data.SIZES["train"]],
        "test-examples": [len(y)],
        "train-loss": [float(np.mean(losses))],
        "local-steps": [len(losses)],
        "seconds-train": [trained_at - evaluated_at],
        "seconds-evaluate": [(evaluated_at - start) + (done - trained_at)],
        "similarity": similarity(network),
        **{f"{name}-before": values for name, values in before.items()},
        **{f"{name}-after": values for name, values in after.items()},
    }
    server_round = int(config["server-round"])
    personal = {name: tensors[name] for name, _ in layout.personal.entries}
    store.save(server_round, personal, base=request.version, resumable_from=int(config["resumable-from"]))
    flat = request.sent(layout.shared.pack(tensors), layout.upload.pack(tensors))
    said = {"server-round": server_round, "digest": layout.digest, "clients": [client]}
    return answer(message, {"arrays": flat, "metrics": MetricRecord(metrics), "config": said})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the personal network: the server's shared weights, the client's own heads and its mixture."""
    config = message.content["config"]
    network, client = begin(config, context)
    layout = Layout(network)
    request = Request.read(message, layout, client)
    store = Versions(context, str(config["run"]), client)
    start_from(network, layout, request, store)
    inputs, labels = zip(*(data.tensors(client, split) for split in ("calibration", "test")), strict=True)
    logits = [measuring.logits_of(network, x) for x in inputs]
    scale = torch.tensor([measuring.temperature(z, labels[0]) for z in logits[0]])[:, None, None]
    metrics: dict[str, Any] = {
        "client": client,
        "train-examples": data.SIZES["train"],
        "calibration-examples": len(labels[0]),
        "test-examples": len(labels[1]),
        "classes": len(data.tensors(client, "train")[1].unique()),
        "local-steps": 0,
        "ensemble": (logits[1].softmax(dim=2).mean(dim=0).argmax(dim=1) == labels[1]).float().mean().item(),
        **measuring.exit_metrics(logits[1], labels[1]),
        **{f"adapted-{name}": [math.nan] * len(scale) for name in ("accuracy", "loss", "ece")},
    }
    for split, z, y in zip(("calibration", "test"), logits, labels, strict=True):
        metrics |= {f"{split}-{name}": counts for name, counts in measuring.leaving_early(z / scale, y).items()}
    if config["publish"]:
        tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        np.savez(store.folder / "personal.npz", **tensors)
    return answer(message, {f"client-{client}": MetricRecord(metrics), "config": {}})


def begin(config: Any, context: Context) -> tuple[ExitNet, int]:
    """The network as everybody starts, its heads at zero, and the number of the client on this node."""
    check(config)
    torch.manual_seed(int(config["seed"]))
    network = ExitNet()
    for k in range(len(network.exits)):
        for name in network.head_names(k):
            torch.nn.init.zeros_(network.get_parameter(name))
    return network, int(context.node_config["partition-id"])


def start_from(network: ExitNet, layout: Layout, request: Request, store: Versions) -> None:
    """The shared weights, the client's own heads, and in the place of the last one the mixture, if there is one."""
    own = {**store.load(request.version), **request.mixture}
    network.load_state_dict({**network.state_dict(), **layout.shared.unpack(request.base), **own})


def evaluated(network: ExitNet, x: Tensor, y: Tensor, wanted: bool) -> dict[str, list[float]]:
    """Metrics of every exit, NaN if not wanted."""
    if not wanted:
        return {name: [math.nan] * len(network.exits) for name in ("accuracy", "loss", "ece")}
    return measuring.exit_metrics(measuring.logits_of(network, x), y)


def learn(network: ExitNet, client: int, request: Request) -> list[float]:
    """Local training as the server asks for it; the loss of every step."""
    local, method = prefixed(request.config, "local."), prefixed(request.config, "method.")
    x, y = data.tensors(client, "train")
    parameters = list(network.parameters())
    if local.get("keep-momentum"):
        raise ValueError("this client starts its optimiser anew in every round: set keep-momentum to false")
    rate, decay = local["learning-rate"], local["weight-decay"]
    if local["optimizer"] == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(parameters, rate, local["momentum"], weight_decay=decay)
    rng = np.random.default_rng([int(request.config[key]) for key in ("seed", "server-round")] + [client])
    network.train()
    losses = []
    for index in mini_batches(local, len(y), rng):
        optimizer.zero_grad()
        loss = loss_of(network(x[index]), y[index], request.active, method["distill-weight"], method["temperature"])
        loss.backward()
        if local["max-grad-norm"]:
            torch.nn.utils.clip_grad_norm_(parameters, local["max-grad-norm"])
        optimizer.step()
        losses.append(loss.item())
    return losses


def loss_of(logits: list[Tensor], y: Tensor, active: list[bool], weight: float, tau: float) -> Tensor:
    """The last exit and the active students but the deepest learn the labels; students learn from the last exit."""
    *students, last = logits
    students = [student for student, trains in zip(students, active, strict=True) if trains]
    labelled = [F.cross_entropy(z, y) for z in [*students[:-1], last]]
    loss = torch.stack(labelled).sum() / len(logits)
    target = F.log_softmax(last.detach() / tau, dim=1)
    for student in students:
        log_p = F.log_softmax(student / tau, dim=1)
        loss = loss + weight * tau**2 * F.kl_div(log_p, target, reduction="batchmean", log_target=True)
    return loss


def mini_batches(local: dict[str, Any], size: int, rng: np.random.Generator) -> list[Tensor]:
    """Positions of the mini-batches of a round, from shuffled passes over the data."""
    batch = min(local["batch-size"], size)
    draws = local["epochs"] * size or local["steps"] * batch
    order = torch.from_numpy(np.concatenate([rng.permutation(size) for _ in range(-(-draws // size))])[:draws])
    return list(order.split(batch))


def similarity(network: ExitNet) -> list[float]:
    """Cosine of every student's classifier and the last one."""
    *students, last = [torch.cat([p.detach().flatten() for p in each.parameters()]) for each in network.exits]
    return [F.cosine_similarity(student, last, dim=0).item() for student in students]
