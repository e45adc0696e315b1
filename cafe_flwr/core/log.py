"""The log of the package: Flower's, so that its lines appear where Flower's do."""

import logging

logger = logging.getLogger("flwr")
