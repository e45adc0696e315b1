"""Calibration over clients from counts alone: no example leaves a client, and pooled counts can be summed securely.

A path of thresholds is fixed before the calibration examples are looked at (``fixed_path``, or ``pooled_path`` from
other examples, both in :mod:`cafe_flwr.risk.counts`); every client counts along it. A single binomial test over the
summed counts is not offered: it holds for the sampled mixture of clients only and fails when the mixture shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from cafe_flwr.risk.counts import ClientCounts
from cafe_flwr.risk.exact_tests import (
    binomial_p_values,
    controlled_position,
    fixed_sequence,
    likeliest_start,
    minimum_trials,
    upper_bounds,
)
from cafe_flwr.risk.path import ThresholdPath
from cafe_flwr.risk.thresholds import ExitThresholds, check_level


def pooled_crc(counts: Sequence[ClientCounts], risk: float) -> int:
    """Laxest position with (Σ_j E_j + J)/(N + J) ≤ α, or −1: conformal risk control over clients, from sums alone.

    Claim: if client j meets a new example with probability ∝ n_j + 1, then E[1{left early and wrong}] ≤ α, on average
    over calibration sets and over the J clients. Nothing is claimed of one client, nor of another mixture. It needs
    examples that are exchangeable within each client, clients chosen without looking at their counts, this position at
    all of them, and a loss that grows along the path, so E_j is ``ever_wrong``. (Add one unseen example to each client;
    the loss of the N + J has mean ≤ α at the laxest position where it does, which is as lax as ours or laxer.)
    """
    pooled = reduce(ClientCounts.__add__, _checked(counts, risk))
    return controlled_position(pooled.ever_wrong, pooled.n, risk, pooled.clients)


@dataclass(frozen=True)
class EveryMixture:
    """A certificate for every mixture of the clients it covers.

    ``positions`` of each client along the path, −1 = not covered; ``bounds`` U⁺(E_j, A_j; δ/J) there, at most α, 1
    where not covered; ``common``, for a network without personal thresholds: the laxest position that is certified for
    all clients at once, or −1.
    """

    positions: tuple[int, ...]
    bounds: tuple[float, ...]
    common: int


def every_mixture(
    counts: Sequence[ClientCounts],
    risk: float,
    confidence_level: float = 0.9,
    *,
    proposals: Sequence[ClientCounts] | None = None,
) -> EveryMixture:
    """Clients whose selective risk is at most α, all at once: max_j U⁺(E_j, A_j; δ/J) ≤ α (Clopper–Pearson).

    Claim: with confidence 1 − δ, P(wrong | left early) ≤ α at every covered client at its position, and so for every
    mixture of covered clients, whatever its weights (a mixture's selective risk is a weighted mean of theirs).

    Each client walks the path at level δ/J as a fixed sequence. That is valid, and no factor for the positions is
    needed, because the order is fixed (strict to lax) and the start does not depend on the examples that are tested: a
    wrong certificate needs the first position of the walk that is too risky to pass, with probability ≤ δ/J; the union
    over clients gives δ. Being covered is part of what is tested, so it may depend on the counts.

    ``proposals`` are counts along the same path of *other* examples of each client, for example those of its histogram:
    its walk then starts where it most likely passes by these counts. Without them it starts where 2·n_min examples
    should leave early by the other clients' coverage, which needs another client and suits clients that are alike.
    """
    level = (1 - confidence_level) / len(_checked(counts, risk, confidence_level, proposals))
    walks = [_walk(counts, j, risk, level, proposals) for j in range(len(counts))]
    bounds = [
        float(upper_bounds(c.wrong[end], c.left[end], level)) if end >= 0 else 1.0
        for c, (_, end) in zip(counts, walks, strict=True)
    ]
    starts, ends = zip(*walks, strict=True)
    return EveryMixture(ends, tuple(bounds), min(ends) if min(ends) >= max(starts) else -1)


@dataclass(frozen=True)
class ClientCertificate:
    """What is certified of one client, on the basis of ``"itself"``, ``"every-mixture"`` or ``"mixture"``.

    Where nothing is certified (``"not certified"``) the thresholds are infinite and ``reason`` says why. Otherwise the
    thresholds' ``describe()`` states the claim.
    """

    basis: str
    thresholds: ExitThresholds
    reason: str = ""


def certify(
    counts: Sequence[ClientCounts],
    risk: float,
    confidence_level: float = 0.9,
    *,
    path: ThresholdPath,
    enough: int | None = None,
    simultaneous: bool = False,
    proposals: Sequence[ClientCounts] | None = None,
) -> list[ClientCertificate]:
    """For every client, the thresholds it may use and the claim that goes with them, from its counts along ``path``.

    A client with ``enough`` examples (by default 2·n_min) is tested alone. ``itself``: P(wrong | left early) ≤ α with
    confidence 1 − δ, for this client; of many such claims a share δ may fail. With ``simultaneous``,
    ``every-mixture``: the same for all that get it at once (:func:`every_mixture`, also on ``proposals``), which needs
    more examples. The smaller clients are pooled. ``mixture``: :func:`pooled_crc` over them, a claim about their
    average. Who is pooled is decided by the number of examples and never by errors, and pooled clients all use the
    pooled position: otherwise the average would not be that of those who use it.

    Examples
    --------
    >>> from cafe_flwr.risk.counts import count, fixed_path
    >>> path = fixed_path(num_exits=2)
    >>> rng = np.random.default_rng(0)
    >>> sizes = [300, 20, 20, 20]
    >>> clients = [count(c, rng.random((len(c), 2)) < 0.5 + c / 2, path) for c in (rng.random((n, 2)) for n in sizes)]
    >>> [c.basis for c in certify(clients, 0.15, path=path)]
    ['itself', 'mixture', 'mixture', 'mixture']
    """
    _checked(counts, risk, confidence_level, proposals)
    if len(counts[0].left) != len(path) or any(c.clients != 1 for c in counts):
        raise ValueError(f"certificates need the counts of each client alone, along the path of {len(path)} positions")
    delta = 1 - confidence_level
    enough = 2 * minimum_trials(risk, delta) if enough is None else enough
    pool = [c for c in counts if c.n < enough]
    level = delta / max(len(counts) - len(pool), 1) if simultaneous else delta
    pooled = pooled_crc(pool, risk) if pool else -1
    certificates = []
    for j, c in enumerate(counts):
        if c.n < enough:
            basis, guarantee, position, trials = "mixture", "mixture", pooled, np.full(len(path), c.n)
            why = (
                f"{c.n} examples are too few to test this client alone ({enough} are needed), and the pool of "
                f"{len(pool)} such clients cannot be certified at risk {risk:g}"
            )
        else:
            basis, guarantee = ("every-mixture", "every-mixture") if simultaneous else ("itself", "selective")
            position, trials = _walk(counts, j, risk, level, proposals)[1], c.left
            why = f"its {c.n} examples do not show a risk of at most {risk:g}"
        thresholds = ExitThresholds(
            **path.chosen(position, c.left, c.wrong, trials, c.n),
            guarantee=guarantee,
            risk=float(risk),
            confidence_level=float(confidence_level),
            num_examples=c.n,
        )
        found = thresholds.certified
        certificates.append(ClientCertificate(basis if found else "not certified", thresholds, "" if found else why))
    return certificates


def _checked(
    counts: Sequence[ClientCounts],
    risk: float,
    confidence_level: float = 0.5,
    proposals: Sequence[ClientCounts] | None = None,
) -> Sequence[ClientCounts]:
    """The counts; ValueError unless levels lie in (0, 1), and counts and proposals are along one path."""
    check_level("risk", risk)
    check_level("confidence_level", confidence_level)
    if not counts:
        raise ValueError("there are no clients to certify")
    if len({len(c.left) for c in counts}) > 1:
        raise ValueError("the clients' counts are along paths of different lengths")
    if proposals is not None and (
        len(proposals) != len(counts) or any(len(p.left) != len(counts[0].left) for p in proposals)
    ):
        raise ValueError("proposals must be one for each client, along the same path as the counts")
    return counts


def _walk(
    counts: Sequence[ClientCounts], j: int, risk: float, level: float, proposals: Sequence[ClientCounts] | None
) -> tuple[int, int]:
    """Start and end (−1 = it fails at once) of client j's walk."""
    own = counts[j]
    start = _start(counts, j, risk, level) if proposals is None else _own_start(proposals[j], own.n, risk, level)
    return start, fixed_sequence(binomial_p_values(own.wrong, own.left, risk), start, level)


def _own_start(proposal: ClientCounts, n: int, risk: float, level: float) -> int:
    return likeliest_start(proposal.left / max(proposal.n, 1) * n, proposal.wrong, proposal.left, risk, level)


def _start(counts: Sequence[ClientCounts], j: int, risk: float, level: float) -> int:
    """Where 2·n_min examples of client j should leave early (half-way from n_min to all of them if it has few)."""
    others = [c for i, c in enumerate(counts) if i != j]
    known, n, fewest = sum(c.n for c in others), counts[j].n, minimum_trials(risk, level)
    if not known:
        raise ValueError(
            "with no other clients to judge by, a client's test needs proposals: counts along the path of examples "
            "that are not among those it is tested on"
        )
    left = np.sum([c.left for c in others], axis=0)
    reached = left / known * n >= min(2 * fewest, (fewest + n) / 2)
    return int(reached.argmax()) if reached.any() else len(reached) - 1
