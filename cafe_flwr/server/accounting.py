"""The privacy budget ε of a run, computed by the ``dp-accounting`` library."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from cafe_flwr.core.log import logger
from cafe_flwr.wire.describe import NodeInfo
from cafe_flwr.wire.options import Privacy

_LEAST_SAMPLED = 0.3  # privacy loss distributions of less noise need memory without bound
UNITS = ("add-or-remove", "replace")


def epsilon(
    noise_multiplier: float,
    rounds: int,
    *,
    delta: float = 1e-5,
    releases: int = 2,
    unit: str = "add-or-remove",
    poisson_rate: float | None = None,
) -> float:
    """ε(δ) of a client that took part in a number of rounds.

    Every release is taken to be a Gaussian mechanism with noise σC per value for sensitivity C, which may depend on all
    earlier releases. k of them compose to exactly one of noise multiplier σ/√k, whose ε has a closed form (Balle and
    Wang, arXiv 1805.06530). With ``poisson_rate``, ε comes from privacy loss distributions.

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
        Claims amplification by sampling. Valid only if every client is drawn independently with this probability and
        nobody who sees a release knows who was drawn; neither holds for the sampling of this package.

    Raises
    ------
    ValueError
        For values out of range, or if the library is not installed.
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
    dp_accounting = _library()
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


def _library() -> Any:
    try:
        return import_module("dp_accounting")
    except ImportError as error:
        raise ValueError(
            f"ε needs the dp-accounting library ({error}): pip install 'cafe-flwr[privacy]', or 'dp-accounting>=0.6'"
        ) from error


def tell_guarantee(privacy: Privacy, num_rounds: int, info: NodeInfo) -> None:
    """Log the ε that the clients' noise guarantees; ``info`` says which vectors a client sends."""
    if not privacy.on:
        return
    if not privacy.noise_multiplier:
        logger.info("Updates are clipped to norm %g, without noise: this is no differential privacy", privacy.clip_norm)
        return
    releases = sum(schema.size > 0 for schema in (info.shared, info.upload))
    try:
        value = epsilon(privacy.noise_multiplier, num_rounds, delta=privacy.delta, releases=releases)
    except ValueError as error:
        logger.warning("Updates get noise, but what it guarantees is not known here: %s", error)
        return
    logger.info(
        "Differential privacy of what a client sends: ε = %.4g at δ = %g, for a client that takes part in all %d "
        "rounds (its whole update against none; %d release(s) of σ = %g a round; nothing claimed for sampling)",
        value,
        privacy.delta,
        num_rounds,
        releases,
        privacy.noise_multiplier,
    )
    if privacy.report_metrics:
        logger.warning("Accuracies, losses and similarities get no noise: report-metrics = false withholds them")
