"""CAFEDistill with the classifiers of *all* exits mixed, the more in a class the fewer examples the client has of it.

    as cafedistill, and                                      client i, round t
      h̄_i^k ← Σ_j w_ij h_j^k, every exit k                     h_ic^k ← v_ic h̄_ic^k + (1 − v_ic) h_ic^k, class c
                                                               v_ic = κ / (κ + n_ic + n_i/C)

Ours: the weights w are those of cafedistill. A client keeps what it has learnt of classes that it has seen often, and
takes rare ones from others. The counts never leave the client. docs/method.md has the reasons, docs/evidence.md what
helped and what did not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cafe_flwr.core.options import setting
from cafe_flwr.data.split import Split
from cafe_flwr.methods.cafedistill import CafeDistillMethod
from cafe_flwr.methods.client import Tensors
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.training.class_prior import class_counts


@dataclass(frozen=True, kw_only=True)
class CafeDistillPlus(CafeDistillMethod):
    """All classifiers mixed, class by class."""

    name: ClassVar[str] = "cafedistill-plus"

    distill_weight: float = setting(0.3, "λ, the weight of distillation in the local loss; 0: no distillation.", ge=0)
    mixture_examples: float = setting(
        10.0,
        "κ: how many of a client's own examples of a class the mixture counts for; large = the mixture alone.",
        gt=0,
    )

    def upload_names(self, network: EarlyExitNetwork) -> list[str]:
        """The classifiers of all exits."""
        return network.classifier_names()

    def receive(self, tensors: Tensors, download: Tensors, initial: Tensors, data: Split | None = None) -> Tensors:
        """Move the client's classifiers to the mixtures, class by class by :meth:`mixture_share`."""
        if not self.write_back or not download:
            return tensors
        if data is None:
            return {**tensors, **download}
        mixed = {}
        for name, mixture in download.items():
            share = self.mixture_share(data.y, len(mixture)).to(mixture.device)
            share = share.reshape(-1, *(1 for _ in mixture.shape[1:]))
            mixed[name] = share * mixture + (1.0 - share) * tensors[name].to(mixture.device)
        return {**tensors, **mixed}

    def mixture_share(self, labels: Tensor, num_classes: int) -> Tensor:
        """v_c = κ / (κ + n_c + n/C) of every class, (C,).

        Examples
        --------
        >>> import torch
        >>> CafeDistillPlus(mixture_examples=10.0).mixture_share(torch.tensor([0, 0, 0, 0]), 2)
        tensor([0.6250, 0.8333])
        """
        counts = class_counts(labels, num_classes)
        return self.mixture_examples / (self.mixture_examples + counts + counts.mean())
