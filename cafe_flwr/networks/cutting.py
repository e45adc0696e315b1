"""Cut a network into pieces after named modules, by tracing its forward with torch.fx."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

_LISTED = 60  # candidates in an error


def cut(network: nn.Module, at: Sequence[str], end: str) -> list[nn.Module]:
    """Cut the forward of a network into len(at) + 1 modules that run one after another, up to the input of ``end``.

    The pieces hold the network's own modules, under their own names. Only modules that contain a named one are traced;
    all others are called as they are, whatever their forward does. The network takes one tensor (further arguments have
    defaults) and is left in evaluation mode.

    Parameters
    ----------
    at
        Modules in the order in which they run; the rest of the network must need nothing but the output of each.
    end
        The classifier.

    Raises
    ------
    ValueError
        If a module does not exist, does not run, or cannot be cut after; if the order is wrong; if torch.fx cannot
        trace the network.

    Examples
    --------
    >>> import torch
    >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    >>> pieces = cut(network, at=["1"], end="4")
    >>> [list(piece.state_dict()) for piece in pieces]
    [['0.weight', '0.bias'], ['2.weight', '2.bias']]
    """
    if not at:
        raise ValueError(f"at must name the modules after which there is an exit: {candidates(network)}")
    modules = dict(network.named_modules())
    for name in at:
        if name not in modules or not name:
            raise ValueError(f"there is no module {name!r} in {_kind(network)}: {candidates(network, near=name)}")
    graph, nodes = _trace(network, [*at, end])
    for name in (*at, end):
        if name not in nodes:
            raise ValueError(
                f"{name!r} of {_kind(network)} is not called once, giving one tensor: it cannot be cut after; "
                f"{candidates(network)}"
            )
    _check_order(at, [nodes[name] for name in at], nodes[end], end)
    starts = [None, *(nodes[name] for name in at)]
    ends = [*(nodes[name] for name in at), nodes[end].all_input_nodes[0]]
    return [
        _piece(network, graph, start, stop, name)
        for start, stop, name in zip(starts, ends, ["the input", *at], strict=True)
    ]


def candidates(network: nn.Module, near: str = "") -> str:
    """A sentence that lists where a network can be cut: after its parts and the numbered blocks inside them.

    Examples
    --------
    >>> candidates(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)))
    'choose from 0, 1'
    """
    names = [
        name
        for name, module in network.named_modules()
        if name and ("." not in name or (re.search(r"\d$", name) and any(True for _ in module.children())))
    ]
    close = difflib.get_close_matches(near, [name for name, _ in network.named_modules() if name], n=3) if near else []
    hint = f"did you mean {' or '.join(close)}? Or " if close else ""
    more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
    return f"{hint}choose from {', '.join(names[:_LISTED])}{more}"


class _Tracer(fx.Tracer):
    """Traces only the opened modules, and records the outputs of the others."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self.opened = opened
        self.given: dict[str, list[Any]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        given = super().call_module(m, forward, args, kwargs)
        self.given.setdefault(self.path_of_module(m), []).append(given)
        return given


def _trace(network: nn.Module, names: Sequence[str]) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """The graph of the forward, and the nodes of the named modules that are called once and give one tensor."""
    parts = [name.split(".") for name in names]
    opened = {".".join(part[:i]) for part in parts for i in range(1, len(part))}
    parameters = list(inspect.signature(network.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    graphs, nodes = [], {}
    try:
        for training in (True, False):
            tracer = _Tracer(opened)
            graphs.append(tracer.trace(network.train(training), concrete_args=defaults))
            nodes = {n: g[0].node for n, g in tracer.given.items() if len(g) == 1 and isinstance(g[0], fx.Proxy)}
    except Exception as error:
        inner = f"and those of {', '.join(sorted(opened))} " if opened else ""
        raise ValueError(
            f"torch.fx cannot trace {_kind(network)} ({error}). Its forward {inner}must not branch on the data. Cut "
            "after modules further out, or build an EarlyExitNetwork from stages and exits of your own"
        ) from error
    _unbake_dropout(network, *graphs)
    return graphs[1], nodes


def _unbake_dropout(network: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> None:
    """Replace dropout that was traced as "off" by a module, which follows the mode; nothing else may differ."""
    here, there = list(training.nodes), list(evaluation.nodes)
    if len(here) == len(there):
        for a, b in zip(here, there, strict=True):
            if b.target is F.dropout and str((a.args, a.kwargs)) != str((b.args, b.kwargs)):
                name = f"{b.name}_off_in_evaluation"
                p = b.kwargs.get("p", b.args[1] if len(b.args) > 1 else 0.5)
                network.add_module(name, nn.Dropout(p).eval())
                for node in (a, b):
                    data = node.args[0] if node.args else node.kwargs["input"]
                    node.op, node.target, node.args, node.kwargs = "call_module", name, (data,), {}
    if str(training) != str(evaluation):
        raise ValueError(
            f"the forward of {_kind(network)} does different things in training and in evaluation (other than "
            "dropout): move that into a module of its own, or build an EarlyExitNetwork from stages and exits of your "
            "own"
        )


def _check_order(at: Sequence[str], nodes: Sequence[fx.Node], end: fx.Node, end_name: str) -> None:
    order = {node: i for i, node in enumerate(end.graph.nodes)}
    for name, node in zip(at, nodes, strict=True):
        if order[node] >= order[end]:
            raise ValueError(f"{name!r} is not before the classifier {end_name!r}: there is always an exit at the end")
    places = [order[node] for node in nodes]
    if len(set(places)) < len(places):
        raise ValueError(f"two of the exits {', '.join(at)} are at the same place: name each once")
    if places != sorted(places):
        right = [name for _, name in sorted(zip(places, at, strict=True))]
        raise ValueError(f"exits out of order: give them as they run, at={right}, not {list(at)}")


def _piece(network: nn.Module, graph: fx.Graph, start: fx.Node | None, stop: fx.Node, name: str) -> nn.Module:
    """What the graph does from one node (the input, if None) to another."""
    if start is stop:
        return nn.Identity()
    needed: set[fx.Node] = set()
    todo = [stop]
    source = start if start is not None else next(node for node in graph.nodes if node.op == "placeholder")
    while todo:
        node = todo.pop()
        if node in needed or node is source:
            continue
        if node.op == "placeholder":
            raise ValueError(
                f"{_kind(network)} needs more after {name!r} than what comes out of it (is there a connection around "
                f"it?): cut after whole blocks; {candidates(network)}"
            )
        needed.add(node)
        todo += node.all_input_nodes
    piece = fx.Graph()
    copies = {source: piece.placeholder("h")}
    for node in graph.nodes:
        if node in needed:
            copies[node] = piece.node_copy(node, copies.__getitem__)
    piece.output(copies[stop])
    return fx.GraphModule(network, piece)


def _kind(network: nn.Module) -> str:
    return type(network).__name__
