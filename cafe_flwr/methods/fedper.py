"""FedPer-EE (Arivazhagan et al., arXiv 1912.00818): a shared backbone, personal classifiers, trained jointly.

server, round t                          client i, round t
  send backbone                            minimise Σ_k CE(z_k, y)/m over backbone and own classifiers
  average the backbones by n_i             send backbone, keep h_i^1 … h_i^m
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cafe_flwr.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class FedPer(Method):
    """The base class :class:`cafe_flwr.methods.base.Method`, unchanged."""

    name: ClassVar[str] = "fedper"
