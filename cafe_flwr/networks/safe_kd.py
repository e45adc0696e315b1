"""SAFE-KD's exits (arXiv 2602.03043) for convolutional stages."""

from __future__ import annotations

from torch import nn

from cafe_flwr.networks.early_exit import Exit


def safe_kd_exit(channels: int, num_classes: int, width: int = 0) -> Exit:
    """Global average pool → layer norm → linear classifier, as an exit of an early-exit network.

    The input is a stage's output (B, channels, height, width). ``width`` is the feature width that all exits of a
    network share, so that their classifiers can be compared; 0: ``channels``, the published exit. For another width a
    linear layer leads to it **(ours)**; two linear layers are still a linear classifier of the normed features.

    Examples
    --------
    >>> import torch
    >>> features, logits = safe_kd_exit(32, num_classes=10, width=24)(torch.zeros(2, 32, 8, 8))
    >>> tuple(features.shape), tuple(logits.shape)
    ((2, 24), (2, 10))
    """
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(channels)]
    if width and width != channels:
        layers.append(nn.Linear(channels, width))
    return Exit(nn.Sequential(*layers), width or channels, num_classes)
