"""A Flower ClientApp that hosts one or more clients on its node."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from cafe_flwr.client.description import describe
from cafe_flwr.client.evaluation import evaluate
from cafe_flwr.client.privacy import withholds
from cafe_flwr.client.process import BuildNetwork, LoadData, ModalityOf, Node, NodeContext, Parts
from cafe_flwr.client.round import train
from cafe_flwr.client.texts import without_local_texts
from cafe_flwr.training.trainer import LocalTrainer, LoopTrainer
from cafe_flwr.wire.keys import FLAT, Keys

PARTS = "cafe_flwr_parts"


def make_client_app(
    build_network: BuildNetwork,
    load_data: LoadData,
    *,
    modality_of: ModalityOf | None = None,
    keys: Keys | None = None,
    state_dir: Callable[[Context], str] | None = None,
    trainer: LocalTrainer | None = None,
) -> ClientApp:
    """A ready Flower ClientApp for the strategies of this package.

    Parameters
    ----------
    build_network
        ``(context) -> EarlyExitNetwork``. Called once per process, with torch's random generator seeded by the run's
        seed, so that all clients start from the same weights. Where clients have different modalities, it returns a
        network by name of each modality, the same on all nodes (docs/modalities.md).
    load_data
        ``(client, context) -> ClientData``. Called once per process and client.
    modality_of
        ``(client, context) -> name`` of the client's modality, where there are several.
    keys
        Names of the records in messages, if the strategy was given others than Flower's.
    state_dir
        ``(context) -> folder`` of the personal state where the node-config names none; by default the user's state
        folder.
    trainer
        Trains the node's clients; by default one after the other.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> from cafe_flwr.data import load_federation
    >>> federation = load_federation("digits", num_clients=4)
    >>> app = make_client_app(
    ...     lambda context: ConvNet(federation.input_shape, federation.num_classes),
    ...     lambda client, context: federation.load(client),
    ... )
    """
    app = ClientApp()
    parts = Parts(build_network, load_data, modality_of)
    answers = _Answers(Node(parts, keys or Keys(), state_dir or (lambda context: "")), trainer or LoopTrainer())
    setattr(app, PARTS, parts)  # for the commands that work without a server
    app.query()(answers.describe)
    app.query("initial")(answers.initial)
    app.query("calibrate")(answers.calibrate)
    app.train()(answers.train)
    app.evaluate()(answers.evaluate)
    return app


class _Answers:
    """What the node answers to each type of message."""

    def __init__(self, node: Node, trainer: LocalTrainer) -> None:
        self.node = node
        self.trainer = trainer

    @without_local_texts
    def describe(self, message: Message, context: Context) -> Message:
        """Describe the node, as the strategy asks first."""
        info = describe(NodeContext(self.node, message, context))
        return Message(info.to_content(self.node.keys), reply_to=message)

    @without_local_texts
    def initial(self, message: Message, context: Context) -> Message:
        """Send the shared parameters that the seed gives, flat."""
        flat = NodeContext(self.node, message, context).process.initial()
        return Message(RecordDict({self.node.keys.arrays: ArrayRecord({FLAT: Array(flat)})}), reply_to=message)

    @without_local_texts
    def calibrate(self, message: Message, context: Context) -> Message:
        """Answer a step of calibration."""
        from cafe_flwr.client.calibration import NodeCalibration  # SciPy takes longer to import than this to answer

        if withholds(context.node_config):
            raise ValueError(
                "this node reports no metrics (report-metrics = false in its node-config), and so no counts for "
                "calibration: `cafe-flwr node calibrate` finds its thresholds on the node itself"
            )
        here = NodeContext(self.node, message, context)
        side = NodeCalibration(here.state_folder, here.process.networks)
        return side.answer(message, self.node.keys, lambda client: here.data(client).calibration)

    @without_local_texts
    def train(self, message: Message, context: Context) -> Message:
        """Train the clients asked for."""
        return Message(train(NodeContext(self.node, message, context), self.trainer), reply_to=message)

    @without_local_texts
    def evaluate(self, message: Message, context: Context) -> Message:
        """Evaluate personal networks; after the last round, publish them."""
        return Message(evaluate(NodeContext(self.node, message, context)), reply_to=message)
