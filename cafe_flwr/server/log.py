"""Log lines of a run: settings, warnings about clients, and one line per round."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from cafe_flwr.core.log import logger
from cafe_flwr.methods.base import settings_of
from cafe_flwr.server.callbacks import RoundRecord, RunInfo
from cafe_flwr.server.directory import Directory
from cafe_flwr.server.replies import Replies
from cafe_flwr.server.run import RunConstants


class RunLog:
    """Writes the log of a run; clients are named as in ``directory``."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self._unmoved: set[int] = set()  # clients already warned about
        self._seconds: deque[float] = deque(maxlen=10)

    def starting(self, run: RunConstants, last: int) -> None:
        """Log the method and the number of rounds."""
        logger.info("Starting %s:", run.method.name)
        logger.info("\t├── Number of rounds: %d%s", run.num_rounds, f", stop after {last}" * (last < run.num_rounds))

    def settings(self, run: RunConstants) -> None:
        """Log the settings, as a part of Flower's tree of settings."""
        logger.info("\t├──> Settings of %s:", run.method.name)
        unread = run.method.unread()
        settings = {name: value for name, value in settings_of(run.method).items() if name not in unread}
        for i, (name, value) in enumerate(settings.items()):
            logger.info("\t│\t%s %s: %s", "└──" if i == len(settings) - 1 else "├──", name.replace("_", "-"), value)
        local = run.local
        length = f"{local.epochs} epochs" if local.epochs else f"{local.steps} steps"
        optimizer = "AdamW" if local.optimizer == "adamw" else "SGD"
        logger.info(
            "\t├──> Local training: %s of %d, %s at %g", length, local.batch_size, optimizer, local.learning_rate
        )
        if run.learning_rate_schedule == "exponential":
            logger.info("\t├──> Learning rate × %g a round", run.learning_rate_decay)
        if local.keep_momentum:
            logger.info("\t├──> The optimiser's momentum stays on the clients from round to round")
        for part in (run.bounds, run.aggregation, run.privacy):
            if part != type(part)():
                logger.info("\t├──> %s", part)
        if run.wire != "float32":
            logger.info("\t├──> Values travel as %s", run.wire)
        logger.info("\t├──> Seed: %d | round timeout: %g s", run.seed, run.round_timeout)

    def started(self, run: RunInfo, resumed: bool) -> None:
        """Log the number of clients, nodes and parameters."""
        nodes = len({*self.directory.hosts.values()})
        logger.info("%d clients on %d node(s), %d parameters", len(run.clients), nodes, run.num_parameters)
        if resumed:
            logger.info("Resuming after round %d", run.first_round - 1)

    def replies(self, server_round: int, replies: Replies[Any], text: str) -> None:
        """Warn of every client left out (``text`` as in :meth:`warn`), and log the nodes' notes on the others."""
        self.warn(server_round, text, replies.left_out)
        self.warn(server_round, "{}", replies.notes)

    def warn(self, server_round: int, text: str, reasons: Mapping[int, str]) -> None:
        """Warn of every client: the text, with the client in the place of ``{}``, and the reason."""
        for client, reason in sorted(reasons.items()):
            logger.warning("Round %d: %s: %s", server_round, text.format(self.directory.label(client)), reason)

    def suspicious(self, server_round: int, reasons: Mapping[int, str]) -> None:
        """Name clients whose influence on others was bounded."""
        self.warn(server_round, "{} gets almost no weight with other clients", reasons)

    def unmoved(self, clients: Iterable[int]) -> None:
        """Warn once of each client that returned its classifier unchanged."""
        for client in sorted(set(clients) - self._unmoved):
            logger.warning(
                "%s returned its classifier unchanged: its cosine with all others is 0, and it gets the mean of all",
                self.directory.label(client),
            )
        self._unmoved |= set(clients)

    def finished(self, record: RoundRecord) -> None:
        """Log its alarm, if any, and the line of a round, with the time left, estimated from the last ten rounds."""
        if record.alarm:
            logger.warning("Round %d: %s", record.server_round, record.alarm)
        self._seconds.append(record.seconds["total"])
        left = sum(self._seconds) / len(self._seconds) * (record.num_rounds - record.server_round)
        logger.info("%s · %s", record.line(), f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
