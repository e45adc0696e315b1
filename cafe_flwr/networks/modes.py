"""One graph for training and evaluation: values that differ follow the mode, constants move with the network."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx, nn


class Held(nn.Module):
    """Gives a constant, which moves with the network and is not in its state dict."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        """The constant."""
        return self.value


class ByMode(nn.Module):
    """Gives one value in training and another in evaluation, such as whether dropout is on."""

    def __init__(self, training: Any, evaluation: Any) -> None:
        super().__init__()
        self.values = (evaluation, training)

    def forward(self) -> Any:
        """The value of the present mode."""
        return self.values[self.training]


def join(network: nn.Module, training: fx.Node, evaluation: fx.Node) -> bool:
    """Whether the graphs up to two nodes are the same; constants that differ then follow the mode in the second."""
    here, there = ancestors(training), ancestors(evaluation)
    same, found = dict(zip(here, there, strict=False)), []
    for a, b in same.items():
        ours, others = _leaves(a), _leaves(b)
        if a.op != b.op or len(ours) != len(others) or not _same_target(network, a, b):
            return False
        for i, (x, y) in enumerate(zip(ours, others, strict=True)):
            if isinstance(x, fx.Node) or isinstance(y, fx.Node):
                if same.get(x) is not y:
                    return False
            elif type(x) is not type(y) or x != y:
                found.append((b, i, x, y))
    if len(here) != len(there):
        return False
    for node, i, x, y in found:
        name = f"_by_mode_{node.name}_{i}"
        network.add_module(name, ByMode(x, y).train(network.training))
        with node.graph.inserting_before(node):
            value = node.graph.call_module(name)
        node.args, node.kwargs = _with_leaf(node, i, value)
    return True


def _with_leaf(node: fx.Node, i: int, value: fx.Node) -> Any:
    """Arguments of a node, the i-th of its leaves replaced."""
    places = itertools.count()
    return fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: value if next(places) == i else leaf)


def _same_target(network: nn.Module, a: fx.Node, b: fx.Node) -> bool:
    if a.op == "get_attr":
        x, y = (_attribute(network, node) for node in (a, b))
        return x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y))
    return a.target == b.target or a.op == "placeholder"


def _leaves(node: fx.Node) -> list[Any]:
    """Arguments of a node, those in lists and slices too."""
    leaves: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: leaves.append(leaf))
    return leaves


def extracted(end: fx.Node) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The graph up to a node, its output; and its nodes by those of the whole."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in ancestors(end):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    return graph, copies


class Runner(fx.Interpreter):
    """Runs a graph as its code does: modules get lists that they may change."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a node, as they were computed."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(list(a) if isinstance(a, list) else a for a in args), kwargs


def ancestors(node: fx.Node) -> list[fx.Node]:
    """The input, what a node is computed from, and itself, in order."""
    inputs = [n for n in node.graph.nodes if n.op == "placeholder"]
    needed, todo = {node, *inputs}, [node]
    while todo:
        more = [n for n in todo.pop().all_input_nodes if n not in needed]
        needed.update(more)
        todo += more
    return [n for n in node.graph.nodes if n in needed]


def _attribute(network: nn.Module, node: fx.Node) -> Any:
    *path, name = str(node.target).split(".")
    return getattr(network.get_submodule(".".join(path)), name)


def hold_constants(network: nn.Module, graph: fx.Graph) -> None:
    """Tensors that are no parameters and no buffers become modules: otherwise they would be in the state dict."""
    kept = {id(t) for t in (*network.parameters(), *network.buffers())}
    for node in graph.nodes:
        if node.op == "get_attr" and id(value := _attribute(network, node)) not in kept and isinstance(value, Tensor):
            name = f"_held_{node.name}"
            network.add_module(name, Held(value))
            node.op, node.target = "call_module", name
