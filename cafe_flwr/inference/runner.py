"""Early-exit inference: rows of a batch that have left at an exit are not computed any further."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cafe_flwr.core.numbers import check_counts
from cafe_flwr.inference.batches import available, batches_of, progress_bar, rows_of
from cafe_flwr.inference.policies import PerExit, Policy
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.fingerprint import fingerprint
from cafe_flwr.networks.placement import device_of
from cafe_flwr.networks.statistics import evaluating
from cafe_flwr.risk.thresholds import ExitThresholds, checked_temperatures

_Part = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Prediction:
    """Predictions for N rows.

    ``labels`` are (N,) int64, 0..C−1; ``exits`` (N,) int64, the exit at which each row left, 0..m−1; ``confidence``
    (N,) float32, the largest probability there, after the exit's temperature.

    Examples
    --------
    >>> rows = Prediction(np.array([3, 1]), np.array([0, 2]), np.array([0.9, 0.8], dtype=np.float32))
    >>> rows.mean_macs([10, 20, 40])
    25.0
    """

    labels: NDArray[np.int64]
    exits: NDArray[np.int64]
    confidence: NDArray[np.float32]

    def macs(self, macs_per_exit: Sequence[int]) -> NDArray[np.int64]:
        """MACs of each row, (N,), given those of leaving at each exit (``cafe_flwr.cost.macs_per_exit``)."""
        return np.asarray(macs_per_exit, dtype=np.int64)[self.exits]

    def mean_macs(self, macs_per_exit: Sequence[int]) -> float:
        """Mean MACs per row; NaN without rows."""
        return float(self.macs(macs_per_exit).mean()) if len(self.exits) else float("nan")


class EarlyExitRunner:
    """Runs a network stage by stage, and after each exit computes on with the remaining rows only.

    Labels and exits are the same as when every exit is computed first. That requires a network whose output for a row
    does not depend on the other rows of the batch. An exit whose threshold is infinite is not computed, so a network
    that may never leave early runs as fast as without early exits.

    Parameters
    ----------
    network
        Its stages give tensors whose first dimension is the batch, or tuples of such tensors.
    policy
        Says which rows leave: ``MaxProb(θ)``, ``Entropy(θ)``, ``Margin(θ)``, ``Patience(P)``, ``PerExit(…)``,
        calibrated ``ExitThresholds``, or any other :class:`Policy`. It is not asked at the last exit.
    device
        The network is moved to this device; by default it stays where it is.
    batch_size
        Rows at a time, of an input that is a single tensor or array.
    progress
        Show a progress bar.
    temperatures
        By which the logits of an exit are divided, (m,); by default those of the policy, or all 1.

    Raises
    ------
    ValueError
        If the policy does not fit the network or was made for another one, the device is not available, a value is
        invalid, or the network normalises by the statistics of the batch at hand.

    Examples
    --------
    >>> from cafe_flwr.inference import MaxProb
    >>> from cafe_flwr.networks import ConvNet
    >>> network = ConvNet((1, 16, 16), num_classes=10)
    >>> EarlyExitRunner(network, MaxProb(0.0)).predict(torch.zeros(3, 1, 16, 16)).exits
    array([0, 0, 0])
    """

    def __init__(
        self,
        network: EarlyExitNetwork,
        policy: Policy | ExitThresholds,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 256,
        progress: bool = False,
        temperatures: Sequence[float] = (),
    ) -> None:
        check_counts(batch_size=batch_size)
        if not isinstance(policy, ExitThresholds) and not hasattr(policy, "leaves"):
            raise ValueError(
                f"policy must say which rows leave: MaxProb(0.9) for one threshold, PerExit((0.9, 0.8)) for one at "
                "each exit but the last, ExitThresholds, or another object with leaves(k, logits, labels); not "
                f"{policy!r}"
            )
        if network.num_classes < 2:
            raise ValueError("a network of one class has nothing to decide: two classes or more are needed")
        _check_rows_are_independent(network)
        if isinstance(policy, ExitThresholds):
            policy = PerExit(policy.thresholds, policy.temperatures, policy.fingerprint)
        self._closed: frozenset[int] = frozenset()  # exits by which nobody leaves: not even computed
        if isinstance(policy, PerExit):
            temperatures = _fitting(policy, network, temperatures)
            self._closed = frozenset(k for k, t in enumerate(policy.thresholds) if t == math.inf)
        self._looks_back = getattr(policy, "looks_back", True)
        self.network, self.policy, self.batch_size, self.progress = network, policy, batch_size, progress
        self.temperatures = checked_temperatures(temperatures, network.num_exits)
        self._dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.get_default_dtype())
        self.device = device_of(network)
        if device is not None:
            self.device = available(device)
            network.to(self.device)
            if network.offset is not None:
                network.offset = network.offset.to(self.device)

    def predict(self, x: Tensor | NDArray[Any] | Iterable[Any]) -> Prediction:
        """Labels, exits and confidence of all rows, in their order.

        Parameters
        ----------
        x
            A tensor or array of rows, (N, …), N ≥ 0; or an iterable of batches, such as a DataLoader: each a tensor,
            an array, or a tuple (or list) that begins with one, as (x, y). Floats are cast to the network's precision.

        Raises
        ------
        ValueError
            If the input is of another kind, or a row's probabilities are NaN.
        """
        batches, total = batches_of(x, self.batch_size)
        parts: list[_Part] = []
        with evaluating(self.network), progress_bar(total, self.progress) as advance:
            for rows in map(rows_of, batches):
                if len(rows):
                    parts.append(self._run(rows))
                advance()
        labels, exits, confidence = (
            (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True)) if parts else _NOTHING
        )
        if np.isnan(confidence).any():
            row = int(np.isnan(confidence).argmax())
            raise ValueError(
                f"the probabilities of {np.isnan(confidence).sum()} rows are not numbers, the first is row {row}: look "
                "for NaN or infinity in the input or in the network's weights"
            )
        return Prediction(labels, exits, confidence)

    @torch.inference_mode()
    def _run(self, x: Tensor) -> _Part:
        """Labels, exits and confidence of a batch, which is not empty."""
        h: Any = x.to(self.device, self._dtype if x.is_floating_point() else x.dtype)
        last = self.network.num_exits - 1
        rows = history = None  # remaining rows (None: all), and their labels by the exits so far (None: not needed)
        for k in range(last + 1):
            h = self.network.stage(k, h)
            if k in self._closed:
                continue
            logits = self.network.exit(k, h)[1]
            if self.temperatures:
                logits = logits / self.temperatures[k]
            label = logits.argmax(dim=1) if self._looks_back or k == last else None
            stay = None
            if k < last:
                if label is not None:
                    history = label[:, None] if history is None else torch.cat([history, label[:, None]], dim=1)
                leaves = self.policy.leaves(k, logits, logits[:, :0] if history is None else history)
                if not leaves.any():
                    continue
                stay = (~leaves).nonzero()[:, 0]
            if label is None:
                label = logits.argmax(dim=1)
            best = logits.softmax(dim=1).amax(dim=1).float()
            if rows is None:
                labels, confidence, exits = label.clone(), best, torch.full_like(label, k)
            else:  # rows that stay are overwritten later: cheaper than selecting those that leave
                labels[rows], confidence[rows], exits[rows] = label, best, k
            if stay is None or not len(stay):
                break
            h = _select(h, stay, k)
            if history is not None:
                history = _select(history, stay, k)
            rows = stay if rows is None else rows[stay]
        return labels, exits, confidence


_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def _select(h: Any, stay: Tensor, k: int) -> Any:
    """The rows that stay, of the output of stage k."""
    if isinstance(h, Tensor):
        return h.index_select(0, stay)
    if isinstance(h, tuple):
        parts = [_select(part, stay, k) for part in h]
        return type(h)(*parts) if hasattr(h, "_fields") else tuple(parts)
    raise ValueError(f"stage {k + 1} gives a {type(h).__name__}: rows can be dropped from tensors and tuples of them")


def _fitting(policy: PerExit, network: EarlyExitNetwork, temperatures: Sequence[float]) -> Sequence[float]:
    """The policy's temperatures; ValueError if its thresholds were made for another network or temperatures."""
    if len(policy.thresholds) != network.num_exits - 1:
        raise ValueError(
            f"{len(policy.thresholds)} thresholds do not fit a network of {network.num_exits} exits: it needs "
            f"{network.num_exits - 1}, the last exit has none"
        )
    if len(temperatures) and tuple(temperatures) != policy.temperatures:
        raise ValueError(
            f"the thresholds were made at temperatures {policy.temperatures or 'of 1'}, not at {tuple(temperatures)}: "
            "leave the temperatures out"
        )
    if policy.fingerprint and (own := fingerprint(network)) != policy.fingerprint:
        raise ValueError(
            f"the thresholds were made for the network {policy.fingerprint}, this one is {own}: calibrate this one "
            "(cafe-flwr calibrate)"
        )
    return policy.temperatures


def _check_rows_are_independent(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name} normalises by the statistics of the batch at hand, so rows that leave would change the "
                "answers of those that stay: train with running statistics ('average' or 'personal', not 'drop')"
            )
