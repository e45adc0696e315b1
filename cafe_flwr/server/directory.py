"""A directory of which node hosts which client, filled by asking the nodes, since Flower's server does not know."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from cafe_flwr import __version__
from cafe_flwr.core.log import logger
from cafe_flwr.core.text import shown
from cafe_flwr.methods.base import Method, settings_of
from cafe_flwr.server.agreement import Agreement, Own
from cafe_flwr.server.claims import Claims, check_claims
from cafe_flwr.wire.capacity import ClientSpec, are_unequal
from cafe_flwr.wire.codec import method_config
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.keys import PROTOCOL, Keys
from cafe_flwr.wire.slices import SharedSlice

_LISTED = 20  # clients that a line of the log names, and problems of a node that it has


def describe_request(seed: int, method: Method, num_clients: int | None) -> dict[str, Any]:
    """Config of the first message to every node."""
    clients = {} if num_clients is None else {"num-clients": num_clients}
    return {"protocol": PROTOCOL, "seed": seed, **method_config(method.name, settings_of(method)), **clients}


class Directory:
    """The nodes of a federation, and the clients they host; ``request`` is made by :func:`describe_request`.

    What most nodes say of network and method when the wait for them ends stands; nodes that say something else are
    refused. ``own`` is that of :class:`cafe_flwr.server.agreement.Agreement`, ``own_numbers`` that of
    :func:`cafe_flwr.server.claims.check_claims`.
    """

    poll_seconds = 1.0  # between two looks for nodes while waiting
    grace_seconds = 5.0  # to wait for a working node when all that are present failed
    late_seconds = 10.0  # to wait, in a round, for the answer of a new node
    retry_seconds = 30.0  # until a node that did not answer is asked again

    def __init__(self, keys: Keys, request: Mapping[str, Any], own: Own = None, own_numbers: bool = False) -> None:
        self.keys = keys
        self.request, self.own_numbers = request, own_numbers
        self.nodes: dict[int, NodeInfo] = {}
        self.names: dict[int, str] = {}  # of nodes, by client; also of nodes that are gone
        self.held: dict[int, ClientSpec] = {}  # by client, as of the last note_held
        self.problems: list[str] = []
        self.agreement, self.claims = Agreement(own), Claims()
        self._described: dict[int, NodeInfo] = {}  # nodes that can be read; those that differ, too, until that stands
        self._refused: set[int] = set()
        self._asked_at: dict[int, float] = {}
        self._unanswered: dict[str, int] = {}  # node by the id of a pending describe request

    @property
    def hosts(self) -> Mapping[int, int]:
        """The node that each client is asked on."""
        return self.claims.hosts

    @property
    def reference(self) -> NodeInfo:
        """What all nodes say of network and method."""
        return self.agreement.reference

    @property
    def kinds(self) -> Mapping[str, ClientSpec]:
        """Kinds of clients by name, also of nodes that are gone."""
        return self.agreement.kinds

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
            votes = Counter(info.num_nodes for info in self.nodes.values())
            expected = max(votes, key=lambda number: (votes[number], number), default=0)
            answered = len(self._described) + len(self._refused)
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
                wanted = _wanted(len(self.hosts), min_nodes, expected, num_clients)
                logger.info("Waiting for nodes: %d here, %s", present, wanted)
                told = True
            time.sleep(self.poll_seconds)
        self.agreement.stands = bool(self.hosts)
        self._settle()
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
            logger.warning("Starting without clients %s", _listed(absent))

    def refresh(self, grid: Grid, timeout: float | None = None) -> int:
        """Ask new nodes, forget nodes that are gone, and return the number of nodes present.

        An answer that comes after the timeout (by default ``late_seconds``) is read at the next call, since a small
        device may take longer to start than a round should wait.
        """
        present = sorted(grid.get_node_ids())
        for node in set(self._described) - set(present):
            info = self._described.pop(node)
            logger.warning("The node of %s is gone", _clients(info))
        self._unanswered = {message: node for message, node in self._unanswered.items() if node in present}
        if self._unanswered:
            self._take(grid.pull_messages(list(self._unanswered)))
        now = time.monotonic()
        known = self._refused | set(self._described)
        new = [n for n in present if n not in known and now - self._asked_at.get(n, -math.inf) >= self.retry_seconds]
        if new:
            self._asked_at |= dict.fromkeys(new, now)
            asked = {node: self.request_to(node) for node in new}
            timeout = self.late_seconds if timeout is None else timeout
            replies = grid.send_and_receive(list(asked.values()), timeout=timeout)
            self._unanswered |= {message.metadata.message_id: node for node, message in asked.items()}
            self._take(replies)
        self._settle()
        return len(present)

    def _take(self, replies: Iterable[Message]) -> None:
        """Read answers, and refuse the nodes whose answers cannot be used."""
        found = {}
        for reply in replies:
            node = self._unanswered.pop(reply.metadata.reply_to_message_id, None)
            if node is not None and node not in self._described:
                found[node] = self._read(node, reply)
        infos = {node: info for node, info in found.items() if info is not None}
        # In the order of the clients: node ids are random, and of equally many the first node's word counts.
        self._described |= dict(sorted(infos.items(), key=lambda item: min(item[1].clients, default=math.inf)))

    def note_answers(
        self, asked: Mapping[int, Sequence[int]], left_out: Mapping[int, str], trained_in: int | None = None
    ) -> None:
        """Note for which of the clients asked of it each node answered well: all but those left out, with the reason.

        ``trained_in`` is the round if they trained. Where several nodes claim a client, who is asked depends on it.
        """
        for node, clients in self.claims.note(asked, left_out, trained_in).items():
            who = _clients(self.nodes[node])
            logger.warning("Of the nodes that claim clients %s, that of %s answered well", _listed(clients), who)

    def _settle(self) -> None:
        """Admit the nodes that agree with the others; until that stands, they are all looked at again."""
        self.agreement.update(list(self._described.values()))
        kept = self._described if self.agreement.stands else {}
        self.nodes = {node: info for node, info in self.nodes.items() if node in kept}
        hosted = {client for info in self.nodes.values() for client in info.clients}
        for node, info in [item for item in self._described.items() if item[0] not in self.nodes]:
            if not (difference := self.agreement.difference(info)):
                self._admit(node, info, hosted)
                hosted |= {*info.clients}
            elif self.agreement.stands:
                del self._described[node]
                self._refuse(node, f"the node of {_clients(info)} was refused: {difference}")
        self._assign()

    def _admit(self, node: int, info: NodeInfo, hosted: Collection[int]) -> None:
        more = len(info.problems) - _LISTED
        for problem in [*info.problems[:_LISTED], *([f"and {more} more problems"] if more > 0 else [])]:
            self._problem(f"{info.name}: {problem}" if info.name else problem)
        if taken := [client for client in info.clients if client in hosted]:
            who = f"the node of {_clients(info)}"
            self._problem(f"{who}: clients {_listed(taken)} are hosted by another node already")
        self.nodes[node] = info
        self.agreement.learn(info)

    def _assign(self) -> None:
        """Choose a node for each client, and say so where it was taken from one that failed."""
        moved = self.claims.assign({node: info.clients for node, info in self.nodes.items()})
        for (old, new), clients in moved.items():
            before, now = _clients(self.nodes[old]), _clients(self.nodes[new])
            logger.warning("Clients %s are asked on the node of %s: that of %s failed", _listed(clients), now, before)
        for client, node in self.hosts.items():
            if name := self.nodes[node].name:
                self.names[client] = name
            else:
                self.names.pop(client, None)

    def _read(self, node: int, reply: Message) -> NodeInfo | None:
        """A node's description; None if it failed to start, or is refused."""
        if reply.has_error():
            self._problem(f"a node failed to start: {last_line(reply.error.reason)}")
            return None
        who = "a node"
        try:
            info = NodeInfo.from_message(reply, self.keys)
            who = f"the node {info.name}" if info.name else who
            check_claims(info.clients, self.request.get("num-clients"), self.own_numbers)
            who = f"the node of {_clients(info)}"
            if info.version and info.version != __version__:
                raise ValueError(f"runs cafe-flwr {info.version}, the server {__version__}")
        except Exception as error:  # whatever a node may send
            self._refuse(node, f"{who} was refused: it {error}")
            return None
        return info

    def _refuse(self, node: int, problem: str) -> None:
        self._refused.add(node)
        self._problem(problem)

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)
            logger.warning("%s", text)


def _wanted(hosted: int, min_nodes: int, expected: int, num_clients: int | None) -> str:
    if expected or num_clients is None:
        return f"{max(min_nodes, expected)} wanted"
    return f"{hosted} of {num_clients} clients"


def _clients(info: NodeInfo) -> str:
    """The clients of a node, and its name if it has one."""
    name = f" ({info.name})" if info.name else ""
    return f"clients {_listed(info.clients) or '(none)'}{name}"


def _listed(clients: Sequence[int]) -> str:
    """Numbers of clients, of many the first."""
    more = f", … ({len(clients)})" if len(clients) > _LISTED else ""
    return ", ".join(map(str, clients[:_LISTED])) + more


def last_line(reason: str | None) -> str:
    """The line of a traceback that says what happened, cut and made printable."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return shown(lines[-1].removesuffix("'>")) if lines else "no reason given"  # Ray's errors come in <class 'x'>:<'…'>
