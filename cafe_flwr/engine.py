"""A Flower grid in one process, without Ray: for tests, debugging and many small runs."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

# Not Flower's public API, but what its engines do before an app runs; without it no Message can be made.
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from flwr.supercore.run import Run

SERVER_NODE_ID = 1
CLIENT_APP_RAISED = 2  # Flower's error code for a ClientApp that raised an exception


class InProcessGrid(Grid):
    """Runs a ClientApp on simulated nodes in this process, one message after the other.

    As in Flower, an exception in the ClientApp becomes an error reply, and nodes keep their context between messages.

    Parameters
    ----------
    client_app, run_config
        The app to run, and the run config that its nodes see.
    num_nodes
        Number of nodes; node p has ``partition-id = p`` in its node config.
    node_config
        Further keys for every node's config.

    Examples
    --------
    A whole federation in a few lines::

        grid = InProcessGrid(make_client_app(build_network, load_data), num_nodes=4)
        result = CafeDistill(num_rounds=10).start(grid)
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: Mapping[str, Any] | None = None,
        node_config: Mapping[str, Any] | None = None,
    ) -> None:
        if num_nodes < 1:
            raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
        self.client_app = client_app
        self.contexts = {
            node_id: Context(
                run_id=1,
                node_id=node_id,
                node_config={"partition-id": p, "num-partitions": num_nodes, **(node_config or {})},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for p, node_id in enumerate(range(1000, 1000 + num_nodes))
        }
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER_NODE_ID, 1
        self._run: Run | None = None
        self._replies: dict[str, Message] = {}
        self._count = 0

    def set_run(self, run: Run) -> None:
        """Set the run this grid works for."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid works for."""
        if self._run is None:
            raise RuntimeError("no run was set: call set_run first")
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the messages; their replies wait to be pulled."""
        ids = []
        for message in messages:
            self._count += 1
            message_id = f"message-{self._count}"
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._handle(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the given messages, once each."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _handle(self, message: Message) -> Message:
        context = self.contexts[message.metadata.dst_node_id]
        copy = Message(
            RecordDict({key: _copy(record) for key, record in message.content.items()}),
            message.metadata.dst_node_id,
            message.metadata.message_type,
        )
        copy.metadata.__dict__["_message_id"] = message.metadata.message_id
        try:
            return self.client_app(copy, context)
        except Exception:
            return Message(Error(CLIENT_APP_RAISED, traceback.format_exc()), reply_to=copy)


def _copy(record: Any) -> Any:
    """A record whose changes by a client do not reach the server; arrays hold immutable bytes and need no copy."""
    return ConfigRecord(dict(record)) if isinstance(record, ConfigRecord) else record
