"""Cut a network into pieces after named modules, by tracing its forward with torch.fx."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from cafe_flwr.networks.modes import Runner, extracted
from cafe_flwr.networks.tracing import trace

_LISTED = 60  # candidates in an error


def cut(network: nn.Module, at: Sequence[str], end: str, example: Tensor | None = None) -> list[nn.Module]:
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
    example
        A batch that the network takes. Needed if its forward reads sizes that are used after a cut, or decides by them.

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
    nodes = trace(network, [*at, end], example)
    for name in (*at, end):
        if name not in nodes:
            raise ValueError(
                f"{name!r} of {_kind(network)} is not called once, giving one tensor: it cannot be cut after; "
                f"{candidates(network)}"
            )
    _check_order(at, [nodes[name] for name in at], nodes[end], end)
    starts = [None, *(nodes[name] for name in at)]
    ends = [*(nodes[name] for name in at), nodes[end].all_input_nodes[0]]
    cutter = _Cutter(network, nodes[end], example)
    return [cutter.piece(start, stop, name) for start, stop, name in zip(starts, ends, ["the input", *at], strict=True)]


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


class _Cutter:
    """Makes pieces of the graph of a network's forward."""

    def __init__(self, network: nn.Module, end: fx.Node, example: Tensor | None) -> None:
        self.network, self.end, self.example = network, end, example
        self.nodes = list(end.graph.nodes)

    @cached_property
    def seen(self) -> list[dict[fx.Node, Any]]:
        """What every node gives for two batches that differ in size; nothing, without an example."""
        batches = [] if self.example is None else [self.example, torch.cat([self.example, self.example[:1]])]
        return [_values(self.network, self.end, batch) for batch in batches]

    def piece(self, start: fx.Node | None, stop: fx.Node, name: str) -> nn.Module:
        """What the graph does from one node (the input, if None) to another."""
        if start is stop:
            return nn.Identity()
        source = self.nodes[0] if start is None else start
        after = _descendants(source)
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {source: graph.placeholder("h")}
        needed: set[fx.Node] = set()
        todo: list[tuple[fx.Node, fx.Node | None]] = [(stop, None)]
        while todo:
            node, crossing = todo.pop()
            if node in needed or node in copies:
                continue
            if node not in after:
                crossing = crossing or node
                if self._is_size(node):
                    copies[node] = self._size([seen[node] for seen in self.seen], copies[source])
                    continue
            if node.op == "placeholder":
                raise ValueError(
                    f"{_kind(self.network)} needs more after {name!r} than what comes out of it: "
                    f"{_called(crossing or node)} is used there as well (a connection around it): cut after whole "
                    f"blocks; {candidates(self.network)}"
                )
            needed.add(node)
            todo += [(n, crossing) for n in node.all_input_nodes]
        for node in self.nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[stop])
        return fx.GraphModule(self.network, graph)

    def _is_size(self, node: fx.Node) -> bool:
        """Whether a node gives the same for every batch, but for the number of examples in it."""
        if node.op not in ("call_function", "call_method"):
            return False
        values = [seen[node] for seen in self.seen if node in seen]
        return len(values) > 1 and self._follows(values)

    def _follows(self, values: list[Any]) -> bool:
        first, second = values
        if isinstance(first, tuple) and len(first) == len(second):
            return all(self._follows(list(pair)) for pair in zip(first, second, strict=True))
        return isinstance(first, _PLAIN) and (first == second or self._is_batch(values))

    def _is_batch(self, values: list[Any]) -> bool:
        return values == [len(next(iter(seen.values()))) for seen in self.seen]

    def _size(self, values: list[Any], h: fx.Node) -> Any:
        """What :meth:`_is_size`, from a later output of the network: batch and device of that, else as they were."""
        first, second = values
        if isinstance(first, tuple):
            return tuple(self._size(list(pair), h) for pair in zip(first, second, strict=True))
        if isinstance(first, torch.device):
            return h.graph.call_function(getattr, (h, "device"))
        return h.graph.call_method("size", (h, 0)) if self._is_batch(values) else first


_PLAIN = (int, float, bool, str, torch.device, torch.dtype, type(None))


@torch.no_grad()
def _values(network: nn.Module, end: fx.Node, x: Tensor) -> dict[fx.Node, Any]:
    """What every node up to one gives for a batch; of tensors, shape and type."""
    graph, copies = extracted(end)
    originals = {copied: node for node, copied in copies.items()}
    seen: dict[fx.Node, Any] = {}

    class Noting(Runner):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in originals:
                seen[originals[n]] = value.to("meta") if isinstance(value, Tensor) else value
            return value

    try:
        Noting(network, graph=graph).run(x)
    except Exception as error:
        reason = str(error).partition("While executing")[0].strip()
        raise ValueError(
            f"the forward of {_kind(network)}, traced by torch.fx, does not run ({reason}): cut after modules further "
            "out, or build an EarlyExitNetwork from stages and exits of your own"
        ) from error
    return seen


def _descendants(node: fx.Node) -> set[fx.Node]:
    """What is computed from a node."""
    found, todo = {node}, [node]
    while todo:
        more = todo.pop().users.keys() - found
        found |= more
        todo += more
    return found


def _called(node: fx.Node) -> str:
    """The output of a node, for people."""
    if node.op == "placeholder":
        return "its input"
    return f"the output of {str(node.target)!r}" if node.op == "call_module" else f"the output of {node.name}"


def _kind(network: nn.Module) -> str:
    return type(network).__name__
