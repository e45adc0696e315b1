"""Whose examples: data sets, partitions, the clients' data."""

from cafe_flwr.data.federation import ClientData, FederatedData, Split, load_federation, rotate, shift_labels

__all__ = ["ClientData", "FederatedData", "Split", "load_federation", "rotate", "shift_labels"]
