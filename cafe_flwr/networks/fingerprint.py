"""Fingerprints of networks, so that what was made for one network's weights is not used with another's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from cafe_flwr.networks.early_exit import EarlyExitNetwork


def fingerprint(network: EarlyExitNetwork) -> str:
    """Fingerprint of a network's weights, 16 hexadecimal digits.

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
