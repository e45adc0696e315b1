"""The forward of a network as a graph that holds in training and in evaluation, made by torch.fx."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from cafe_flwr.networks.modes import Runner, extracted, hold_constants, join
from cafe_flwr.networks.statistics import evaluating

_BY_HAND = "build an EarlyExitNetwork from stages and exits of your own"
_SIZES = frozenset({"size", "dim", "numel", "nelement", "ndimension", "stride", "is_floating_point", "is_contiguous"})
_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"})
_OF_SIZES = ("zeros", "ones", "empty", "rand", "randn")  # take sizes one by one, and would not take a proxy among them


class Untraceable(Exception):
    """Why a forward cannot be made a graph, as the end of a sentence about it."""


def trace(network: nn.Module, names: Sequence[str], example: Tensor | None = None) -> dict[str, fx.Node]:
    """The named modules in the graph of the forward: the nodes of those that are called once and give one tensor.

    Only modules that contain a named one are traced. Tensors made in the forward are made in the graph. What is decided
    by sizes is decided as for ``example``; without one, it is refused. Up to the last named module, the graph does in
    training and in evaluation what the network does. The network is left in evaluation mode, with modules added for
    constants.

    Raises
    ------
    ValueError
        If torch.fx cannot trace the network, or it does different things in training and in evaluation.
    """
    parts = [name.split(".") for name in names]
    opened = {".".join(part[:i]) for part in parts for i in range(1, len(part))}
    kind = type(network).__name__
    graphs, nodes = [], []
    for training in (True, False):
        tracer = _Tracer(opened, example)
        try:
            graphs.append(tracer.traced(network.train(training)))
        except Exception as error:
            inner = f"and those of {', '.join(sorted(opened))} " if opened else ""
            raise ValueError(
                f"torch.fx cannot trace {kind}{_place(error)}: {error}. Its forward {inner}must be the same operations "
                f"for all inputs. Cut after modules further out, or {_BY_HAND}"
            ) from error
        nodes.append({n: g[0].node for n, g in tracer.given.items() if len(g) == 1 and isinstance(g[0], fx.Proxy)})
    end = names[-1]
    if all(end in n for n in nodes) and not join(network, nodes[0][end], nodes[1][end]):
        raise ValueError(
            f"the forward of {kind} does different things in training and in evaluation (other than dropout, and other "
            f"values): move that into a module of its own, or {_BY_HAND}"
        )
    hold_constants(network, graphs[1])
    return nodes[1]


class _Proxy(fx.Proxy):
    """A proxy whose sizes are numbers where Python asks for one."""

    tracer: _Tracer

    def __getattr__(self, k: str) -> Any:
        return _Attribute(self, k)

    def __int__(self) -> int:
        return int(self.tracer.decided(self))

    def __float__(self) -> float:
        return float(self.tracer.decided(self))

    def __index__(self) -> int:
        return self.tracer.decided(self).__index__()

    def __len__(self) -> int:
        return len(self.tracer.value(self))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", _set_, (self, key, value), {})


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute of a proxy."""


def _set_(tensor: Tensor, key: Any, value: Any) -> Tensor:
    tensor[key] = value
    return tensor


class _Tracer(fx.Tracer):
    """Traces only the opened modules, and records the outputs of the others."""

    proxy_buffer_attributes = True  # what is made of a buffer is made in the graph

    def __init__(self, opened: set[str], example: Tensor | None) -> None:
        super().__init__()
        self.opened = opened
        self.example = example
        self.given: dict[str, list[Any]] = {}
        self.untraced = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}

    def traced(self, network: nn.Module) -> fx.Graph:
        """The graph of the network in its present mode."""
        parameters = list(inspect.signature(network.forward).parameters.values())
        defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
        opened = [network, *(network.get_submodule(name) for name in self.opened)]
        with ExitStack() as stack:
            stack.enter_context(_sizes_as_proxies(opened))
            stack.enter_context(_Factories(self))
            return _in_order(self.trace(network, concrete_args=defaults))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        given = super().call_module(m, forward, args, kwargs)
        self.given.setdefault(self.path_of_module(m), []).append(given)
        return given

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decided(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(self.value(obj)))])  # type: ignore[index]

    def decided(self, obj: fx.Proxy) -> Any:
        """The value of what does not depend on data, with the example as the input."""
        if not _is_fixed(obj.node):
            raise Untraceable("it decides by values in its input or in its weights")
        return self.value(obj)

    def value(self, obj: fx.Proxy) -> Any:
        """The value with the example as the input, in evaluation."""
        if self.example is None:
            raise Untraceable("it decides by sizes, which are not known without an example")
        part, _ = extracted(obj.node)
        with ExitStack() as stack:
            for name, function in self.untraced.items():
                stack.enter_context(_replaced(nn.Module, name, function))
            for context in (torch._C.DisableTorchFunction(), evaluating(self.root), torch.no_grad()):
                stack.enter_context(context)
            return Runner(self.root, graph=part).run(self.example)


class _Factories(TorchFunctionMode):
    """Tensors made from nothing are made in the graph: at every call, and on the device that is asked for."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            raise Untraceable("it turns gradients on or off")
        made = func(*args, **(kwargs or {}))
        if not isinstance(made, Tensor) or any(isinstance(a, Tensor) for a in (*args, *(kwargs or {}).values())):
            return made
        return self.tracer.create_proxy("call_function", func, args, kwargs or {})


@contextmanager
def _sizes_as_proxies(opened: Sequence[nn.Module]) -> Iterator[None]:
    """``len`` in the modules' files, and torch's functions of sizes, take proxies."""

    def length(of: Any) -> Any:
        return of.size(0) if isinstance(of, _Proxy) and isinstance(of.tracer.value(of), Tensor) else len(of)

    def of_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
        def made(*sizes: Any, **options: Any) -> Any:
            several = len(sizes) > 1 and any(isinstance(s, fx.Proxy) for s in sizes)
            return function(sizes, **options) if several else function(*sizes, **options)

        return made

    files = {c.__module__ for m in opened for c in type(m).__mro__} & set(sys.modules)
    with ExitStack() as stack:
        for file in files:
            if not file.startswith("torch.") and not hasattr(sys.modules[file], "len"):
                stack.enter_context(_replaced(sys.modules[file], "len", length))
        for name in _OF_SIZES:
            stack.enter_context(_replaced(torch, name, of_sizes(getattr(torch, name))))
        yield


@contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value for a while."""
    before = getattr(holder, name, None)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(holder, name)
        else:
            setattr(holder, name, before)


def _is_fixed(node: fx.Node) -> bool:
    """Whether a value depends on sizes and constants only."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        if node.op == "call_method" and node.target in _SIZES:
            continue
        if node.target is getattr and node.args[1] in _ATTRIBUTES:
            continue
        if node.op not in ("call_function", "call_method"):
            return False
        more = [n for n in node.all_input_nodes if n not in seen]
        seen.update(more)
        todo += more
    return True


def _in_order(graph: fx.Graph) -> fx.Graph:
    """After a tensor has been changed in place, it is the output of what changed it."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        changed = node.args[0] if node.op in ("call_function", "call_method") and node.args else None
        in_place = (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True
        if in_place and isinstance(changed, fx.Node):
            for user in [u for u in changed.users if order[u] > order[node]]:
                user.replace_input_with(changed, node)
    return graph


def _place(error: BaseException) -> str:
    """Where in somebody's forward an error arose."""
    ours = (__file__, str(torch.__path__[0]), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name}: {frames[-1].line})" if frames else ""
