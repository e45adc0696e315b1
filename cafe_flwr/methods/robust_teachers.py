"""Bounds the weight of suspicious classifiers as teachers: those whose norm or direction is unlike all others.

Such a classifier may be that of an attacker, a broken device or an unusual honest client; so the client loses most of
its influence on others, but not its place in the federation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cafe_flwr.teaching import cosine_similarity

MAX_SCORE = 6.0  # robust standard deviations of the log norm
MIN_SPREAD = 0.15  # least standard deviation of the log norm; 6 · 0.15 is a factor of 2.5
MIN_COSINE = 0.1  # to the nearest other classifier
CAP = 0.01  # largest weight of a suspicious teacher
_FEWEST = 3


def suspicious_heads(heads: ArrayLike, *, min_cosine: float = MIN_COSINE) -> dict[int, str]:
    """Rows of ``heads``, (n, d) and finite, whose norm or direction is far from all others, with the reason.

    The norm: |log‖h‖ − median| / max(1.4826·MAD, 0.15) beyond 6. The direction: the largest cosine to any other row is
    below ``min_cosine``, unless that holds for half of the rows or more. Of fewer than three rows none is suspicious,
    since it is unknown which one is wrong. ValueError for other shapes, or values that are not finite.

    Examples
    --------
    >>> suspicious_heads([[1.0, 0.1], [1.0, 0.2], [0.9, 0.1], [-1.0, -0.1], [80.0, 9.0]])
    {3: 'its largest cosine to any other is -1.00', 4: 'its norm 80.5 is 80 times the median'}
    """
    h = np.asarray(heads)
    if h.ndim != 2 or not np.isfinite(h).all():
        raise ValueError(f"heads must be finite and of shape (clients, values), got shape {h.shape}")
    if len(h) < _FEWEST or not h.shape[1]:
        return {}
    norms = np.linalg.norm(h.astype(np.float64), axis=1)
    typical = float(np.median(norms))
    if typical == 0:
        return {}
    logs = np.log(np.maximum(norms, typical * 1e-12))
    deviation = np.abs(logs - np.median(logs))
    absurd = deviation / max(1.4826 * float(np.median(deviation)), MIN_SPREAD) > MAX_SCORE
    cosine = cosine_similarity(h)
    np.fill_diagonal(cosine, -np.inf)
    nearest = cosine.max(axis=1)
    far = nearest < min_cosine
    if 2 * far.sum() >= len(h):
        far[:] = False
    found = {}
    for i in np.flatnonzero(absurd | far):
        reasons = [f"its norm {norms[i]:.3g} is {norms[i] / typical:.2g} times the median"] if absurd[i] else []
        reasons += [f"its largest cosine to any other is {nearest[i]:.2f}"] if far[i] else []
        found[int(i)] = " and ".join(reasons)
    return found


def teacher_caps(heads: ArrayLike, suspicious: ArrayLike, own: ArrayLike, cap: float = CAP) -> NDArray[np.float64]:
    """Largest weight of every teacher for every pupil, (pupils, n): 1 except for suspicious teachers.

    A suspicious teacher gets at most ``cap``, and so little that it adds no more to a mixture than ``cap`` times a
    classifier of median norm would. A client's weight for itself is not bounded.

    Parameters
    ----------
    heads, suspicious
        (n, d), and indices of its suspicious rows.
    own
        (pupils,): the row of ``heads`` that is the pupil's own.

    Examples
    --------
    >>> teacher_caps([[1.0], [1.0], [50.0]], [2], [0, 2], cap=0.1)
    array([[1.   , 1.   , 0.002],
           [1.   , 1.   , 1.   ]])
    """
    norms = np.linalg.norm(np.asarray(heads, dtype=np.float64), axis=1)
    mine = np.asarray(own, dtype=np.int64)
    bound = np.ones(len(norms))
    rows = np.asarray(suspicious, dtype=np.int64)
    bound[rows] = cap * np.median(norms) / np.maximum(norms[rows], np.median(norms))
    caps = np.broadcast_to(bound, (len(mine), len(norms))).copy()
    caps[np.arange(len(mine)), mine] = 1.0
    return caps


def project_to_capped_simplex(rows: ArrayLike, caps: ArrayLike) -> NDArray[np.float64]:
    """Euclidean projection of every row onto {0 ≤ w ≤ u, Σw = 1}: w = clip(v − τ, 0, u), exact.

    Σ clip(v − τ, 0, u) falls in τ and is linear between the 2n points v and v − u; sorting finds the piece in which it
    is 1. O(n log n) a row.

    Parameters
    ----------
    rows
        (rows, n); −∞ keeps a weight at 0.
    caps
        u, 0 or more, (n,) or (rows, n).

    Raises
    ------
    ValueError
        If the caps of a row sum to less than 1.

    Examples
    --------
    >>> project_to_capped_simplex([[0.9, 0.1, 0.0]], [0.5, 1.0, 1.0])
    array([[0.5, 0.3, 0.2]])
    """
    v = np.asarray(rows, dtype=np.float64)
    u = np.broadcast_to(np.asarray(caps, dtype=np.float64), v.shape)
    if (u < 0).any() or not np.isfinite(u).all():
        raise ValueError("caps must be finite and 0 or more")
    reachable = np.where(np.isneginf(v), 0.0, u).sum(axis=1)
    if (reachable < 1.0 - 1e-12).any():
        raise ValueError(f"caps must sum to at least 1, row {int(np.argmin(reachable))} has {reachable.min():.6g}")
    return np.stack([_project(row, bound) for row, bound in zip(v - v.max(axis=1, keepdims=True), u, strict=True)])


def _project(v: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.float64]:
    finite = np.isfinite(v)
    w = np.zeros_like(v)
    x, bound = v[finite], u[finite]
    points = np.sort(np.concatenate([x, x - bound]))
    low, high = 0, len(points) - 1  # the sum is at least 1 at points[low], and at most at points[high]
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(x - points[middle], 0.0, bound).sum() >= 1.0:
            low = middle
        else:
            high = middle
    inside = (x >= points[high]) & (x - bound <= points[low])
    at_cap = x - bound >= points[high]
    # Nothing inside: the sum is 1 all along the piece.
    shift = (x[inside].sum() + bound[at_cap].sum() - 1.0) / inside.sum() if inside.any() else points[low]
    w[finite] = np.clip(x - shift, 0.0, bound)
    return w


def bounded_teacher_weights(similarity: ArrayLike, prior: ArrayLike, mu: float, caps: ArrayLike) -> NDArray[np.float64]:
    """Teacher weights as :func:`cafe_flwr.teaching.teacher_weights`, no weight beyond its cap.

    w_i = argmin_{w ∈ Δ, w ≤ u_i}  −Σ_j s_ij w_j + μ ‖w − p‖², the projection of p + s_i/(2μ).

    Parameters
    ----------
    similarity, prior, mu
        As there.
    caps
        u, (n,) or like the similarity; those of a row sum to at least 1.

    Examples
    --------
    >>> bounded_teacher_weights([[1.0, 0.6, 0.2]], [0.4, 0.3, 0.3], 0.5, [1.0, 0.05, 1.0]).round(3)
    array([[0.925, 0.05 , 0.025]])
    """
    s, p = np.asarray(similarity, dtype=np.float64), np.asarray(prior, dtype=np.float64)
    p = np.broadcast_to(p, s.shape)
    if np.isinf(mu):
        return project_to_capped_simplex(p, caps)
    if mu == 0:
        best = s >= s.max(axis=1, keepdims=True) - 1e-9
        return project_to_capped_simplex(np.where(best, p, -np.inf), caps)
    return project_to_capped_simplex(p + (s - s.max(axis=1, keepdims=True)) / (2.0 * mu), caps)


def guarded_weights(
    weights: NDArray[np.float64],
    similarity: ArrayLike,
    prior: ArrayLike,
    mu: float,
    heads: ArrayLike,
    own: ArrayLike,
    *,
    min_cosine: float = MIN_COSINE,
) -> tuple[NDArray[np.float64], dict[int, str]]:
    """Teacher weights, bounded where a teacher is suspicious, and the suspicious rows of ``heads`` with the reason.

    ``weights`` (pupils, n) solve the QP of ``similarity``, ``prior`` and ``mu`` without bounds; they are returned
    unchanged if no row is suspicious. ``heads`` and ``own`` as for :func:`teacher_caps`; ``min_cosine`` as for
    :func:`suspicious_heads`, −1 to consider only norms.
    """
    suspicious = suspicious_heads(heads, min_cosine=min_cosine)
    if not suspicious:
        return weights, {}
    caps = teacher_caps(heads, list(suspicious), own)
    return bounded_teacher_weights(similarity, prior, mu, caps), suspicious
