"""Similarity of student exits to the last exit, by which ``cafedistill-text`` orders students."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.networks.early_exit import EarlyExitNetwork

PROXIES = ("parameters", "gradients")


def classifier_similarity(network: EarlyExitNetwork) -> list[float]:
    """Cosine of every student exit's classifier and the last exit's, (m−1,); NaN where exits have different widths."""
    if len(set(network.feature_widths)) > 1:
        return [math.nan] * (network.num_exits - 1)
    tensors, last = network.state_dict(), network.num_exits - 1
    heads = [torch.cat([tensors[n].flatten() for n in network.head_names(k)]) for k in range(last + 1)]
    return [F.cosine_similarity(head, heads[last], dim=0).item() for head in heads[:last]]


def gradient_similarity(network: EarlyExitNetwork, x: Tensor, y: Tensor) -> list[float]:
    """Cosine of the gradients of exit k's and the last exit's cross-entropy on stages 1..k, for every student exit.

    It measures on one batch the conflict for which the classifiers' cosine is a proxy (docs/method.md).
    """
    network.eval()  # keeps the running statistics unchanged
    losses = [F.cross_entropy(z, y) for z in network(x)]
    stages = [[p for p in network.stages[k].parameters() if p.requires_grad] for k in range(network.num_exits - 1)]

    def gradient(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(loss, parameters, retain_graph=True)) if parameters else []

    of_last = [g.flatten() for g in gradient(losses[-1], [p for stage in stages for p in stage])]
    result, so_far = [], 0
    for k in range(len(stages)):
        so_far += len(stages[k])
        own = [g.flatten() for g in gradient(losses[k], [p for stage in stages[: k + 1] for p in stage])]
        similarity = F.cosine_similarity(torch.cat(own), torch.cat(of_last[:so_far]), dim=0).item() if own else 0.0
        result.append(similarity)
    return result
