"""Teacher matching: how much each client learns from every other (CAFEDistill, arXiv 2601.10015; docs/method.md)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

TEACHERS = ("matched", "uniform", "own")


def cosine_similarity(rows: ArrayLike) -> NDArray[np.float64]:
    """Cosine of every pair of rows, (n, d) → (n, n). A row of zeros is similar to nothing, itself included.

    Rows of float32 are multiplied in float32, which is twice as fast, all others in float64.

    Examples
    --------
    >>> cosine_similarity([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]]).round(2)
    array([[1.  , 0.96, 0.  ],
           [0.96, 1.  , 0.  ],
           [0.  , 0.  , 0.  ]])
    """
    x = np.asarray(rows)
    x = x if x.dtype == np.float32 else x.astype(np.float64)
    norm = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))[:, None].astype(x.dtype)
    unit = np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)  # NaN stays NaN
    return np.clip((unit @ unit.T).astype(np.float64), -1.0, 1.0)


def project_to_simplex(rows: ArrayLike) -> NDArray[np.float64]:
    """Euclidean projection of every row onto {w ≥ 0, Σw = 1}, by sorting: O(n log n) a row.

    Examples
    --------
    >>> project_to_simplex([[0.5, 0.5], [2.0, 0.0], [0.6, 0.8]])
    array([[0.5, 0.5],
           [1. , 0. ],
           [0.4, 0.6]])
    """
    v = np.asarray(rows, dtype=np.float64)
    v = v - v.max(axis=1, keepdims=True)  # the projection does not change; very large values keep their digits
    descending = -np.sort(-v, axis=1)
    excess = np.cumsum(descending, axis=1) - 1.0
    count = np.arange(1, v.shape[1] + 1)
    support = (descending * count > excess).sum(axis=1, keepdims=True)
    shift = np.take_along_axis(excess, support - 1, axis=1) / support
    return np.maximum(v - shift, 0.0)


def teacher_weights(similarity: ArrayLike, prior: ArrayLike, mu: float, solver: str = "exact") -> NDArray[np.float64]:
    """Weights of the teachers of every client, the solutions of one QP per client.

    w_i = argmin_{w ∈ Δ}  −Σ_j s_ij w_j + μ ‖w − p‖²

    The Hessian is 2μI, so w_i is the projection of p + s_i/(2μ) onto the simplex: ``solver="exact"`` computes it for
    all clients in one call. Any other name is a solver of `qpsolvers`, called once per client, as an independent check.

    Parameters
    ----------
    similarity
        (n, n), s_ij: how similar client j's last exit is to client i's. With fewer rows, the weights of those clients.
    prior
        (n,) shares of the data, p_j = n_j/Σn; or (n, n), one prior per row.
    mu
        Pull towards the prior, ≥ 0. At 0 a client learns from the most similar one (itself); at infinity w = p.
    solver
        ``"exact"`` or a solver that qpsolvers finds installed, e.g. ``"osqp"``.

    Returns
    -------
    (n, n), like the similarity; rows on the simplex.

    Examples
    --------
    >>> teacher_weights([[1.0, 0.6], [0.6, 1.0]], [0.5, 0.5], mu=0.5)
    array([[0.7, 0.3],
           [0.3, 0.7]])
    """
    s = np.asarray(similarity, dtype=np.float64)
    if s.ndim != 2:
        raise ValueError(f"similarity must have shape (clients, teachers), got {s.shape}")
    p = np.asarray(prior, dtype=np.float64)
    if p.shape not in {(s.shape[1],), s.shape}:
        raise ValueError(f"prior must have shape ({s.shape[1]},) or {s.shape}, got {p.shape}")
    if not (np.isfinite(s).all() and np.isfinite(p).all()):
        raise ValueError("similarity and prior must be finite")
    if (p < 0).any() or not np.allclose(p.sum(axis=-1), 1.0, atol=1e-6):
        raise ValueError("prior must be non-negative and sum to 1")
    if not mu >= 0:
        raise ValueError(f"mu must be 0 or more, got {mu}")
    p = np.broadcast_to(p, s.shape)
    if solver != "exact":
        check_solver(solver)
    if np.isinf(mu):
        return p.copy()
    if mu == 0:
        best = s >= s.max(axis=1, keepdims=True) - 1e-9  # a cosine of 1 with oneself is 1 only up to rounding
        return project_to_simplex(np.where(best, p, -np.inf))
    if solver == "exact":
        # Centred first, so that a tiny mu cannot overflow or drown the prior's digits.
        return project_to_simplex(p + (s - s.max(axis=1, keepdims=True)) / (2.0 * mu))
    return _solve_with(solver, s, p, mu)


def check_solver(solver: str, key: str = "solver") -> None:
    """Raise ValueError, naming the setting and those installed, if qpsolvers knows no solver of this name."""
    import qpsolvers

    if solver not in qpsolvers.available_solvers:
        installed = ", ".join(qpsolvers.available_solvers)
        raise ValueError(f"{key} must be 'exact' or one of: {installed}; got {solver!r}")


def simplex_qp(hessian: ArrayLike, linear: ArrayLike, solver: str = "osqp") -> NDArray[np.float64] | None:
    """argmin_{w ∈ Δ} ½ wᵀHw + qᵀw by a solver that `qpsolvers` finds installed; None if it finds no solution.

    H is (n, n), positive semidefinite, q (n,).

    Examples
    --------
    >>> simplex_qp([[1.0, 0.0], [0.0, 3.0]], [0.0, 0.0]).round(6)
    array([0.75, 0.25])
    """
    import qpsolvers
    from scipy import sparse

    h, q = np.asarray(hessian, dtype=np.float64), np.asarray(linear, dtype=np.float64)
    n = len(q)
    sum_to_one: Any = np.ones((1, n))
    matrix: Any = h
    if solver in qpsolvers.sparse_solvers:
        matrix, sum_to_one = sparse.csc_matrix(h), sparse.csc_matrix(sum_to_one)
    # OSQP stops at 1e-3 by default and returns weights down to −1e-3.
    options: dict[str, Any] = (
        {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000, "polishing": True, "raise_error": False}
        if solver == "osqp"
        else {}
    )
    w = qpsolvers.solve_qp(matrix, q, A=sum_to_one, b=np.ones(1), lb=np.zeros(n), solver=solver, **options)
    if w is None:
        return None
    w = np.clip(w, 0.0, None)
    return np.asarray(w / w.sum())


def _solve_with(solver: str, s: NDArray[np.float64], p: NDArray[np.float64], mu: float) -> NDArray[np.float64]:
    hessian = 2.0 * mu * np.eye(s.shape[1])
    weights = np.empty_like(s)
    for i in range(len(s)):
        w = simplex_qp(hessian, -(s[i] + 2.0 * mu * p[i]), solver)
        if w is None:  # at extreme values of mu, where the projection is still exact
            warnings.warn(f"{solver} found no teacher weights for row {i}: the exact ones are used", stacklevel=3)
            w = teacher_weights(s[i : i + 1], p[i], mu)[0]
        weights[i] = w
    return weights
