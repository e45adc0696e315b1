"""Which node a client is asked on: a node may claim any client, but only one that answers well for it keeps it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

MAX_CLAIMS = 10_000  # of a node, where the number of clients is not known
MAX_CLIENT = 2**31 - 1
_LACKS = "its personal state of round"  # a node's reason if it does not have the state asked for


def check_claims(clients: Sequence[int], num_clients: int | None, own_numbers: bool = False) -> None:
    """ValueError if a node claims clients that there cannot be, or too many.

    ``num_clients`` is the number of clients of the federation; None where that is not known. With ``own_numbers`` their
    numbers need not be below it.

    Examples
    --------
    >>> check_claims([0, 7], 5)
    Traceback (most recent call last):
        ...
    ValueError: claims clients that there are not: their numbers are 0 to 4
    """
    most = MAX_CLAIMS if num_clients is None else num_clients
    last = MAX_CLIENT if num_clients is None or own_numbers else num_clients - 1
    if len(clients) > most:
        raise ValueError(f"claims {len(clients)} clients, at most {most} are allowed")
    if not all(0 <= client <= last for client in clients):
        raise ValueError(f"claims clients that there are not: their numbers are 0 to {last}")


class Claims:
    """The node that each client is asked on (``hosts``), and what is known of the answers for it.

    Of several nodes that claim a client, the first that answers well for it keeps it for as long as it answers well;
    before that, the first to come is asked. Nodes that failed are asked when the others have failed, too.
    """

    def __init__(self) -> None:
        self.hosts: dict[int, int] = {}
        self._holders: dict[int, int] = {}  # by client, the last node that answered well for it
        self._rivals: dict[int, set[int]] = {}  # by client, nodes that claimed it at the same time
        # By client and node:
        self._failed: dict[tuple[int, int], int] = {}  # when, counted
        self._trained: dict[tuple[int, int], int] = {}  # in which round last
        self._lacking: set[tuple[int, int]] = set()  # those that do not have another node's state of the client
        self._count = 0

    def assign(self, claimed: Mapping[int, Sequence[int]]) -> dict[tuple[int, int], list[int]]:
        """Choose a node for every client, from the clients of every node in the order in which they came.

        Returns the clients that were taken from a node which still claims them, by that node and the new one.
        """
        claiming: dict[int, list[int]] = defaultdict(list)
        for node, clients in claimed.items():
            for client in clients:
                claiming[client].append(node)
        before, self.hosts = self.hosts, {client: self._best(client, nodes) for client, nodes in claiming.items()}
        moved: dict[tuple[int, int], list[int]] = defaultdict(list)
        for client, nodes in claiming.items():
            if len(nodes) > 1:
                self._rivals[client] = {*nodes, *self._rivals.get(client, ())}
            old, new = before.get(client), self.hosts[client]
            if old != new and old in nodes and (client, old) in self._failed:
                moved[old, new].append(client)
        return moved

    def _best(self, client: int, nodes: Sequence[int]) -> int:
        holder = self._holders.get(client)
        return min(nodes, key=lambda node: (self._failed.get((client, node), 0), node != holder))

    def note(
        self, asked: Mapping[int, Sequence[int]], left_out: Mapping[int, str], trained_in: int | None = None
    ) -> dict[int, list[int]]:
        """Note for which of the clients asked of it each node answered well: all but those left out, with the reason.

        ``trained_in`` is the round if they trained. Returns the clients, by node, that a node has won from others.
        """
        won: dict[int, list[int]] = defaultdict(list)
        self._count += 1
        for node, client in ((node, client) for node, clients in asked.items() for client in clients):
            if client not in left_out:
                if node != self._holders.get(client) and client in self._rivals:
                    won[node].append(client)
                self._holders[client] = node
                self._failed.pop((client, node), None)
                if trained_in is not None:
                    self._trained[client, node] = trained_in
            elif self._is_new(client, node) and _LACKS in left_out[client]:
                self._lacking.add((client, node))  # the state is on the rival's disk: asked once more, without it
            else:
                self._failed[client, node] = self._count
        return won

    def _is_new(self, client: int, node: int) -> bool:
        """Whether a node is asked, for the first time, for a client that so far a rival has answered for."""
        rivals, holder = self._rivals.get(client, set()), self._holders.get(client)
        return holder != node and {node, holder} <= rivals and (client, node) not in self._lacking

    def version(self, client: int, seen: int) -> int:
        """The round after which a client's node has its state; ``seen`` is the last round in which the client trained.

        It is another one only where that was on a rival's node: then the last of its own, or 0 if it has said that it
        lacks the rival's.
        """
        node, holder = self.hosts[client], self._holders.get(client)
        if holder is None or holder == node:
            return seen
        return self._trained.get((client, node), 0 if (client, node) in self._lacking else seen)
