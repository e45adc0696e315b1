"""Differential privacy of what a client sends: clipped, noised on the client, and accounted for by a library.

A client's round releases two vectors: its shared part and what it sends of its own (CAFEDistill: its last classifier).
Of each only the difference to a point that the server knows already is the client's own; that difference is clipped to
norm C and gets Gaussian noise of standard deviation σC in every value (the Gaussian mechanism: Dwork and Roth, The
Algorithmic Foundations of Differential Privacy, 2014, appendix A). docs/security.md says what this protects and what
it costs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST_SAMPLED = 0.3  # privacy loss distributions of less noise need memory without bound
UNITS = ("add-or-remove", "replace")


@dataclass(frozen=True)
class Privacy:
    """What clients do to what they send.

    Attributes
    ----------
    clip_norm
        C: the update of the shared part is scaled down to this norm; 0: neither clipping nor noise.
    upload_clip_norm
        C of what a client sends of its own; 0: as ``clip_norm``.
    noise_multiplier
        σ: noise has the standard deviation σC; 0: none.
    delta
        δ for which ε is reported.
    report_metrics
        Whether clients report accuracies, losses and similarities, which get no noise.
    """

    clip_norm: float = 0.0
    upload_clip_norm: float = 0.0
    noise_multiplier: float = 0.0
    delta: float = 1e-5
    report_metrics: bool = True

    def __post_init__(self) -> None:
        for name in ("clip_norm", "upload_clip_norm", "noise_multiplier"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of 0 (off) or more, got {value}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, far below 1 / number of clients, got {self.delta}")
        if not self.clip_norm and (self.noise_multiplier or self.upload_clip_norm):
            raise ValueError("noise_multiplier and upload_clip_norm need a clip_norm greater than 0: noise is σ·C")

    @property
    def on(self) -> bool:
        """Whether anything is clipped."""
        return self.clip_norm > 0

    def clip_of(self, kind: str) -> float:
        """C of the ``"shared"`` part or of the ``"upload"``."""
        return self.upload_clip_norm or self.clip_norm if kind == "upload" else self.clip_norm


def clipped(update: NDArray[Any], clip_norm: float) -> NDArray[np.float64]:
    """The update, scaled down to the norm if it is longer; in float64.

    Examples
    --------
    >>> clipped(np.array([3.0, 4.0]), 2.5).tolist(), clipped(np.array([0.3, 0.4]), 2.5).tolist()
    ([1.5, 2.0], [0.3, 0.4])
    """
    wide = update.astype(np.float64)
    length = float(np.linalg.norm(wide))
    return wide if length <= clip_norm else wide * (clip_norm / length)


def release(
    values: NDArray[np.float32],
    reference: NDArray[np.float32],
    clip_norm: float,
    noise_multiplier: float,
    rng: Callable[[str], np.random.Generator],
) -> NDArray[np.float32]:
    """reference + clip(values − reference, C) + N(0, (σC)²).

    Parameters
    ----------
    values
        What the client would send, (d,).
    reference
        (d,), known to the server already. For a personalised download: what this client got, not what others did.
    clip_norm, noise_multiplier
        C > 0 and σ ≥ 0.
    rng
        Generator for a purpose, from a secret of the client (``PersonalStore.private_rng``). The purpose names all
        that is released, so the same release repeats the same noise and tells nothing more, while anything else gets
        noise of its own: noise that two different releases shared would cancel in their difference.

    Examples
    --------
    >>> start, end = np.zeros(2, dtype=np.float32), np.array([30.0, 40.0], dtype=np.float32)
    >>> release(end, start, 5.0, 0.0, lambda purpose: np.random.default_rng(0))
    array([3., 4.], dtype=float32)
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be greater than 0, got {clip_norm}")
    update = clipped(values.astype(np.float64) - reference, clip_norm)
    if noise_multiplier:
        scale = noise_multiplier * clip_norm
        content = hashlib.sha256(reference.tobytes() + update.tobytes()).hexdigest()
        update += rng(f"{scale!r} {content}").normal(scale=scale, size=update.shape)
    return (reference + update).astype(np.float32)


def epsilon(
    noise_multiplier: float,
    rounds: int,
    *,
    delta: float = 1e-5,
    releases: int = 2,
    unit: str = "add-or-remove",
    poisson_rate: float | None = None,
) -> float:
    """ε(δ) of a client that took part in so many rounds, by the `dp-accounting` library.

    k Gaussian mechanisms of noise multiplier σ, however each depends on those before, are together exactly one of σ/√k,
    whose ε is known in closed form (Balle and Wang, arXiv 1805.06530). With sampling: privacy loss distributions.
    Assumes that every release is a Gaussian mechanism with noise σC per value for sensitivity C, chosen with knowledge
    of all before it. Nothing is gained from taking part now and then unless ``poisson_rate`` says so.

    Parameters
    ----------
    noise_multiplier
        σ; 0 gives infinity.
    rounds
        Rounds in which the client took part (with ``poisson_rate``: all rounds).
    delta
        δ.
    releases
        Vectors a round: 2 for the shared part and the upload.
    unit
        ``"add-or-remove"``: all of the client's update against none (zero). ``"replace"``: against any other update,
        of up to twice the distance.
    poisson_rate
        Claims amplification by sampling: only if every client is drawn independently with this probability and nobody
        who sees a release knows who was. Sampling in this package is neither.

    Raises
    ------
    ValueError
        For impossible values, or if the library is not installed.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"noise_multiplier must be 0 or more, got {noise_multiplier}")
    if rounds < 0 or releases < 0:
        raise ValueError(f"rounds and releases must be 0 or more, got {rounds} and {releases}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, got {delta}")
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}; got {unit!r}")
    if poisson_rate is not None and not 0 < poisson_rate <= 1:
        raise ValueError(f"poisson_rate must lie in (0, 1], got {poisson_rate}")
    if rounds * releases == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    try:
        dp_accounting = import_module("dp_accounting")
    except ImportError as error:
        raise ValueError(
            f"ε needs the dp-accounting library ({error}): pip install 'cafe-flwr[privacy]', or 'dp-accounting>=0.6'"
        ) from error
    per_round = noise_multiplier / (math.sqrt(releases) * (2.0 if unit == "replace" else 1.0))
    if poisson_rate is None:
        return float(dp_accounting.get_epsilon_gaussian(per_round / math.sqrt(rounds), delta))
    if per_round < _LEAST_SAMPLED:
        raise ValueError(f"with sampling, ε is not computed for so little noise (σ of a round {per_round:.3g})")
    if unit == "replace":
        raise ValueError("with sampling, only add-or-remove is computed")
    # Releases of one round share the draw: together they are one Gaussian.
    sampled = dp_accounting.PoissonSampledDpEvent(poisson_rate, dp_accounting.GaussianDpEvent(per_round))
    accountant = import_module("dp_accounting.pld").PLDAccountant()
    accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, rounds))
    return float(accountant.get_epsilon(delta))


def stricter(asked: Privacy, node_config: Mapping[str, Any]) -> Privacy:
    """What a node does: what the server asks for, if that is no less than the node's own node-config demands.

    ``clip-norm`` is the largest and ``noise-multiplier`` the smallest the node accepts; ``report-metrics = false``
    withholds metrics whatever the server says.

    Raises
    ------
    ValueError
        If the server asks for less protection than the node demands, with both values.

    Examples
    --------
    >>> stricter(Privacy(clip_norm=1.0), {"noise-multiplier": 2.0})
    Traceback (most recent call last):
        ...
    ValueError: this node sends nothing with a noise-multiplier below 2, and the server asks for 0
    """
    try:
        least_noise = float(node_config.get("noise-multiplier", 0.0))
        largest_clip = float(node_config.get("clip-norm", math.inf))
    except ValueError as error:
        raise ValueError(f"node-config clip-norm and noise-multiplier must be numbers: {error}") from None
    withhold = str(node_config.get("report-metrics", "true")).lower()
    if withhold not in ("true", "false"):
        raise ValueError(f"node-config report-metrics must be true or false, got {withhold!r}")
    if asked.noise_multiplier < least_noise:
        raise ValueError(
            f"this node sends nothing with a noise-multiplier below {least_noise:g}, and the server asks for "
            f"{asked.noise_multiplier:g}"
        )
    longest = max(asked.clip_norm, asked.upload_clip_norm) or math.inf
    if longest > largest_clip:
        raise ValueError(
            f"this node sends nothing with a clip-norm beyond {largest_clip:g}, and the server asks for "
            f"{longest if asked.on else 'no clipping'}"
        )
    return asked if withhold == "true" else Privacy(**{**vars(asked), "report_metrics": False})
