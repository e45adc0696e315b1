"""Whose examples: data sets, partitions, the clients' data."""

from cafe_flwr.data.federation import FederatedData, load_federation
from cafe_flwr.data.shifts import rotate, shift_labels
from cafe_flwr.data.split import ClientData, Split

__all__ = ["ClientData", "FederatedData", "Split", "load_federation", "rotate", "shift_labels"]
