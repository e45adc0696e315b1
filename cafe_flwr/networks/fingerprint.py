"""Which network it is: what was made for the weights of one must not be used with another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from cafe_flwr.networks.early_exit import EarlyExitNetwork


def fingerprint(network: EarlyExitNetwork) -> str:
    """Of a network's weights: what was calibrated or exported for one network must not be used with another.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> network = ConvNet((1, 16, 16), num_classes=10)
    >>> before = fingerprint(network)
    >>> _ = torch.nn.init.zeros_(network.exits[0].head.bias)
    >>> fingerprint(network) == before
    False
    """
    return weights_hash(network.state_dict())


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of the network that has these tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype};".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
