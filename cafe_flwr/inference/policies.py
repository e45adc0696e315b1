"""Exit policies: which rows of a batch leave at an exit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cafe_flwr.risk.thresholds import checked_temperatures, plain_values


class Policy(Protocol):
    """Decides at every exit but the last, at which all remaining rows leave.

    The attribute ``looks_back = False`` says that a policy does not use the labels of earlier exits, which saves time.
    """

    def leaves(self, k: int, logits: Tensor, labels: Tensor) -> Tensor:
        """Which rows leave at exit k = 0..m−2, (B,) bool.

        Parameters
        ----------
        k
            The exit.
        logits
            Of this exit, (B, C), for the remaining rows, divided by the exit's temperature if it has one.
        labels
            Labels of the same rows by exits 0..k, (B, k + 1); (B, 0) if ``looks_back`` is False.
        """


@dataclass(frozen=True)
class _ByShare:
    """One threshold, a share, for all exits."""

    looks_back: ClassVar[bool] = False
    _never: ClassVar[float] = math.inf

    threshold: float

    def __post_init__(self) -> None:
        if not (0 <= self.threshold <= 1 or self.threshold == self._never):
            name = type(self).__name__
            raise ValueError(
                f"the threshold of {name} must be in 0..1, or {self._never} for never; got {self.threshold!r}"
            )


class MaxProb(_ByShare):
    """Leave when the largest probability is at least the threshold, 0..1 or inf: never (arXiv 2601.10015: 0.6).

    Examples
    --------
    >>> logits = torch.tensor([[4.0, 0.0], [0.1, 0.0]])
    >>> MaxProb(0.6).leaves(0, logits, logits.argmax(1, keepdim=True))
    tensor([ True, False])
    """

    def leaves(self, k: int, logits: Tensor, labels: Tensor) -> Tensor:
        """As :class:`Policy` says."""
        return largest_probability(logits) >= self.threshold


class Entropy(_ByShare):
    """Leave when the entropy of the probabilities, divided by ln C, is at most the threshold (arXiv 1709.01686).

    The threshold is in 0..1, or −inf: never leave. 1 is the entropy of equal probabilities.

    Examples
    --------
    >>> logits = torch.tensor([[4.0, 0.0], [0.1, 0.0]])
    >>> Entropy(0.5).leaves(0, logits, logits.argmax(1, keepdim=True))
    tensor([ True, False])
    """

    _never: ClassVar[float] = -math.inf

    def leaves(self, k: int, logits: Tensor, labels: Tensor) -> Tensor:
        """As :class:`Policy` says."""
        entropy = torch.special.entr(logits.softmax(dim=1)).sum(dim=1)
        return entropy.double() / math.log(logits.shape[1]) <= self.threshold


class Margin(_ByShare):
    """Leave when the largest probability is ahead of the second by at least the threshold, 0..1 or inf: never.

    Examples
    --------
    >>> logits = torch.tensor([[4.0, 0.0], [0.1, 0.0]])
    >>> Margin(0.5).leaves(0, logits, logits.argmax(1, keepdim=True))
    tensor([ True, False])
    """

    def leaves(self, k: int, logits: Tensor, labels: Tensor) -> Tensor:
        """As :class:`Policy` says."""
        first, second = logits.softmax(dim=1).topk(2, dim=1).values.double().unbind(dim=1)
        return first - second >= self.threshold


@dataclass(frozen=True)
class Patience:
    """Leave when ``count`` exits in a row give the same label (PABEE, arXiv 2006.04152, whose patience is one less).

    The current exit is counted: with 1 all leave at the first exit, with more than m − 1 none leaves early.

    Examples
    --------
    >>> labels = torch.tensor([[7, 3, 3], [3, 3, 7]])  # of three exits
    >>> Patience(2).leaves(2, torch.zeros(2, 10), labels)
    tensor([ True, False])
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(
                f"Patience counts exits that agree, it must be a whole number from 1 up, not {self.count!r}"
            )

    def leaves(self, k: int, logits: Tensor, labels: Tensor) -> Tensor:
        """As :class:`Policy` says."""
        if labels.shape[1] < self.count:
            return torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        return (labels[:, -self.count :] == labels[:, -1:]).all(dim=1)


@dataclass(frozen=True)
class PerExit:
    """Leave at exit k when the largest probability is at least the exit's own threshold; nothing is guaranteed.

    For thresholds with a guarantee: :class:`cafe_flwr.risk.thresholds.ExitThresholds`.

    Parameters
    ----------
    thresholds
        Of the first m − 1 exits; inf = never leave there.
    temperatures
        Per exit (m), by which logits are divided first; empty = 1 everywhere.
    fingerprint
        Of the network they were made for (:func:`cafe_flwr.personal.fingerprint`); empty = unknown.

    Examples
    --------
    >>> logits = torch.tensor([[4.0, 0.0], [0.1, 0.0]])
    >>> PerExit((0.99, 0.6)).leaves(1, logits, logits.argmax(1, keepdim=True))
    tensor([ True, False])
    """

    looks_back: ClassVar[bool] = False

    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...] = ()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(float(t) for t in self.thresholds))
        object.__setattr__(self, "temperatures", checked_temperatures(self.temperatures, len(self.thresholds) + 1))
        if not all(t >= 0 for t in self.thresholds):
            raise ValueError(f"thresholds are numbers from 0 up, one for each exit but the last, not {self.thresholds}")

    def leaves(self, k: int, logits: Tensor, labels: Tensor) -> Tensor:
        """As :class:`Policy` says; the logits are those after the temperatures."""
        return largest_probability(logits) >= self.thresholds[k]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as ``cafe_flwr.personal.export`` takes them: ``None`` = never leave there."""
        return {**plain_values(self.thresholds, self.temperatures), "fingerprint": self.fingerprint, "guarantee": None}


def largest_probability(logits: Tensor) -> Tensor:
    """Largest softmax probability, (B,), in double precision so that thresholds are compared as they were given."""
    return logits.softmax(dim=1).amax(dim=1).double()
