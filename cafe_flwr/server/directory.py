"""A directory of which node hosts which client, filled by asking the nodes, since Flower's server does not know."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from cafe_flwr import __version__
from cafe_flwr.core.log import logger
from cafe_flwr.core.text import shown
from cafe_flwr.methods.base import Method, settings_of
from cafe_flwr.wire.capacity import ClientSpec, are_unequal
from cafe_flwr.wire.codec import method_config
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.keys import PROTOCOL, Keys
from cafe_flwr.wire.slices import SharedSlice


def describe_request(seed: int, method: Method, num_clients: int | None) -> dict[str, Any]:
    """Config of the first message to every node."""
    clients = {} if num_clients is None else {"num-clients": num_clients}
    return {"protocol": PROTOCOL, "seed": seed, **method_config(method.name, settings_of(method)), **clients}


class Directory:
    """The nodes of a federation, and the clients they host; ``request`` is made by :func:`describe_request`."""

    poll_seconds = 1.0  # between two looks for nodes while waiting
    grace_seconds = 5.0  # to wait for a working node when all that are present failed
    late_seconds = 10.0  # to wait, in a round, for the answer of a new node
    retry_seconds = 30.0  # until a node that did not answer is asked again

    def __init__(self, keys: Keys, request: Mapping[str, Any]) -> None:
        self.keys = keys
        self.request = request
        self.nodes: dict[int, NodeInfo] = {}
        self.hosts: dict[int, int] = {}
        self.kinds: dict[str, ClientSpec] = {}  # by name of the kind; also of nodes that are gone
        self.names: dict[int, str] = {}  # of nodes, by client; also of nodes that are gone
        self.held: dict[int, ClientSpec] = {}  # by client, as of the last note_held
        self.problems: list[str] = []
        self._refused: set[int] = set()
        self._asked_at: dict[int, float] = {}
        self._unanswered: dict[str, int] = {}  # node by the id of a pending describe request
        self._suspects: set[int] = set()

    @property
    def reference(self) -> NodeInfo:
        """The node of the first client; all others must agree with it."""
        return self.nodes[self.hosts[min(self.hosts)]]

    def by_node(self, clients: Sequence[int]) -> dict[int, list[int]]:
        """These clients grouped by node, nodes in the order of their first client."""
        groups: dict[int, list[int]] = defaultdict(list)
        for client in sorted(clients):
            groups[self.hosts[client]].append(client)
        return dict(groups)

    def kind(self, client: int) -> ClientSpec:
        """What a client holds."""
        return self.nodes[self.hosts[client]].kind(client)

    def examples(self, client: int) -> int:
        """Training examples of a client, as its node first reported them."""
        info = self.nodes[self.hosts[client]]
        return info.num_examples[info.clients.index(client)]

    def view(self, clients: Sequence[int]) -> SharedSlice:
        """The slice of the shared part that these clients hold together."""
        return SharedSlice(self.reference.shared, [self.kind(client).shared for client in clients])

    def note_held(self) -> None:
        """Record in ``held`` what the clients present hold; entries of absent clients stay."""
        self.held |= {client: self.kind(client) for client in sorted(self.hosts)}

    @property
    def macs(self) -> Sequence[int]:
        """MACs per exit of the largest network, from any node that knows them: the reference node may not."""
        info = self.reference
        known = [list(kind.macs) for kind in self.kinds.values() if kind.num_exits == info.num_exits]
        return max([info.macs, *known], key=lambda macs: macs[-1])

    @property
    def unequal(self) -> bool:
        """Whether some clients hold only a part of what others hold."""
        return are_unequal(self.kinds.values())

    def request_to(self, node: int, message_type: str = MessageType.QUERY, **values: Any) -> Message:
        """A message to a node that carries the common request and these values."""
        config = ConfigRecord({**self.request, **values})
        return Message(RecordDict({self.keys.config: config}), node, message_type)

    def label(self, client: int) -> str:
        """A client as logs show it: its number, and its node's name if it has one."""
        name = self.names.get(client)
        return f"client {client} ({name})" if name else f"client {client}"

    def wait(self, grid: Grid, *, min_nodes: int, num_clients: int | None, seconds: float) -> None:
        """Wait until the clients are there; after ``seconds`` go on without the missing ones.

        In simulation a node says how many nodes there will be; elsewhere the wait is for ``num_clients``, or for
        ``min_nodes`` where that is not known. RuntimeError, with all reasons, if no client can take part.
        """
        deadline = time.monotonic() + seconds
        told = False
        while True:
            present = self.refresh(grid, timeout=max(seconds, self.poll_seconds))
            expected = max((info.num_nodes for info in self.nodes.values()), default=0)
            answered = len(self.nodes) + len(self._refused)
            if not self.nodes and present >= min_nodes and self.problems:
                deadline = min(deadline, time.monotonic() + self.grace_seconds)  # all that are here failed
            complete = answered >= max(min_nodes, expected) and (
                bool(expected)
                or (num_clients is not None and len(self.hosts) >= num_clients)
                or (num_clients is None and bool(self.nodes))
            )
            if complete or time.monotonic() > deadline:
                break
            if not told:
                logger.info("Waiting for nodes: %d here, %s", present, self._wanted(min_nodes, expected, num_clients))
                told = True
            time.sleep(self.poll_seconds)
        if not self.hosts:
            reasons = "\n  ".join(self.problems) or f"no node was there within {seconds:.0f} s"
            raise RuntimeError(f"no client can take part:\n  {reasons}")
        if not complete and answered < min_nodes:
            raise RuntimeError(
                f"only {answered} of the {min_nodes} nodes asked for (min-available-nodes) were there within "
                f"{seconds:.0f} s: start more nodes, or raise wait-seconds"
            )
        if num_clients is not None and len(self.hosts) < num_clients:
            absent = sorted(set(range(num_clients)) - set(self.hosts))
            logger.warning("Starting without clients %s", ", ".join(map(str, absent)))

    def refresh(self, grid: Grid, timeout: float | None = None) -> int:
        """Ask new nodes, forget nodes that are gone, and return the number of nodes present.

        An answer that comes after the timeout (by default ``late_seconds``) is read at the next call, since a small
        device may take longer to start than a round should wait.
        """
        present = sorted(grid.get_node_ids())
        for node in set(self.nodes) - set(present):
            info = self.nodes.pop(node)
            logger.warning("The node of %s is gone", _clients(info))
        self._unanswered = {message: node for message, node in self._unanswered.items() if node in present}
        if self._unanswered:
            self._take(grid.pull_messages(list(self._unanswered)))
        now = time.monotonic()
        known = self._refused | set(self.nodes)
        new = [n for n in present if n not in known and now - self._asked_at.get(n, -math.inf) >= self.retry_seconds]
        if new:
            self._asked_at |= dict.fromkeys(new, now)
            asked = {node: self.request_to(node) for node in new}
            timeout = self.late_seconds if timeout is None else timeout
            replies = grid.send_and_receive(list(asked.values()), timeout=timeout)
            self._unanswered |= {message.metadata.message_id: node for node, message in asked.items()}
            self._take(replies)
        self._assign()
        return len(present)

    def _take(self, replies: Iterable[Message]) -> None:
        """Read answers, and admit or refuse their nodes."""
        answers = {}
        for reply in replies:
            node = self._unanswered.pop(reply.metadata.reply_to_message_id, None)
            if node is not None and node not in self.nodes:
                answers[node] = reply
        infos = self._read(answers)
        # In the order of the clients: node ids are random, and the first node is the reference.
        for node in sorted(infos, key=lambda node: min(infos[node].clients, default=math.inf)):
            self._admit(node, infos[node])

    def suspect(self, node: int, failed: bool) -> None:
        """Note whether a node failed: where two nodes host a client, the one that did not fail is asked."""
        if failed:
            self._suspects.add(node)
        else:
            self._suspects.discard(node)

    def _assign(self) -> None:
        """Choose for each client the first node that hosts it; nodes that failed come last."""
        self.hosts = {}
        for node in sorted(self.nodes, key=lambda node: node in self._suspects):  # stable: in the order of arrival
            for client in self.nodes[node].clients:
                self.hosts.setdefault(client, node)

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)
            logger.warning("%s", text)

    def _read(self, answers: Mapping[int, Message]) -> dict[int, NodeInfo]:
        infos = {}
        for node, reply in answers.items():
            if reply.has_error():
                self._problem(f"a node failed to start: {last_line(reply.error.reason)}")
                continue
            try:
                infos[node] = NodeInfo.from_message(reply, self.keys)
            except (ValueError, KeyError) as error:
                self._refuse(node, f"a node was refused: it {error}")
        return infos

    def _admit(self, node: int, info: NodeInfo) -> None:
        who = f"the node of {_clients(info)}"
        if info.version and info.version != __version__:
            self._refuse(node, f"{who} was refused: it runs cafe-flwr {info.version}, the server {__version__}")
            return
        serving = [other for other in self.nodes.values() if other.clients]
        if info.clients and serving and info.digest != serving[0].digest:
            self._refuse(node, f"{who} was refused: its network or method differs from that of the nodes before it")
            return
        kinds = info.kinds or ([info.whole] if info.clients else [])
        for kind in kinds:
            if not kind.like(self.kinds.get(kind.name, kind)):
                what = f"clients with {kind.name}" if kind.name else "clients with the whole network"
                self._refuse(node, f"{who} was refused: what it says of {what} differs from the nodes before it")
                return
        for problem in info.problems:
            self._problem(f"{info.name}: {problem}" if info.name else problem)
        hosted = {client for other in self.nodes.values() for client in other.clients}
        taken = [client for client in info.clients if client in hosted]
        if taken:
            self._problem(f"{who}: clients {', '.join(map(str, taken))} are hosted by another node already")
        self.nodes[node] = info
        self.kinds |= {kind.name: kind for kind in kinds}
        if info.name:
            self.names |= dict.fromkeys(set(info.clients) - set(taken), info.name)

    def _refuse(self, node: int, problem: str) -> None:
        self._refused.add(node)
        self._problem(problem)

    def _wanted(self, min_nodes: int, expected: int, num_clients: int | None) -> str:
        if expected or num_clients is None:
            return f"{max(min_nodes, expected)} wanted"
        return f"{len(self.hosts)} of {num_clients} clients"


def _clients(info: NodeInfo) -> str:
    """The clients of a node, and its name if it has one."""
    name = f" ({info.name})" if info.name else ""
    return f"clients {', '.join(map(str, info.clients)) or '(none)'}{name}"


def last_line(reason: str | None) -> str:
    """The line of a traceback that says what happened, cut and made printable."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return shown(lines[-1].removesuffix("'>")) if lines else "no reason given"  # Ray's errors come in <class 'x'>:<'…'>
