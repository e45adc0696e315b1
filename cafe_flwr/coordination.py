"""Student coordination: which exits of which clients train in a round (CAFEDistill, arXiv 2601.10015).

:func:`conflict_ramp` and :func:`student_levels` follow the authors' code; :func:`student_budget` and
:func:`active_exits` follow the paper's abstract, for ``cafedistill-text``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

SELECTIONS = ("shallow-first", "deep-first", "random", "none")


def student_budget(server_round: int, num_rounds: int, num_students: int) -> int:
    """N_t = ceil(R(t) · students) with the ramp R(t) = min(2t/T, 1), in exact integer arithmetic.

    ``server_round`` is t = 1..T; ``num_students`` is (m − 1) · n_t, the student exits of all participants.

    Examples
    --------
    >>> [student_budget(t, 8, 10) for t in (1, 2, 3, 4, 5, 8)]
    [3, 5, 8, 10, 10, 10]
    """
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be at least 1, got {num_rounds}")
    if server_round < 1:
        raise ValueError(f"server_round counts from 1, got {server_round}")
    return min(-(-2 * server_round * num_students // num_rounds), num_students)


def active_exits(
    server_round: int,
    num_rounds: int,
    similarity: ArrayLike,
    *,
    selection: str = "shallow-first",
    rng: np.random.Generator | None = None,
    there: ArrayLike | None = None,
) -> NDArray[np.bool_]:
    """Student exits that train in this round.

    The budget of :func:`student_budget` is filled depth by depth: exit 1 of all clients, then exit 2, and so on.
    Within a depth that is filled only in part, clients whose exit conflicts least with their last exit (highest
    similarity) come first; ties go to the client with the lower index.

    Parameters
    ----------
    server_round, num_rounds
        Round t (from 1) and the number of rounds T.
    similarity
        (n, m−1): similarity of exit k of client i to the client's last exit, as last reported. NaN (not known yet)
        counts as the greatest conflict.
    selection
        ``"shallow-first"`` is the published order. Ablations: ``"deep-first"`` fills from exit m−1 down,
        ``"random"`` spreads the same budget over all students by chance, ``"none"`` trains all from round 1.
    rng
        Random generator, needed by ``"random"`` only.
    there
        (n, m−1) bool: which students exist, where clients hold different numbers of exits; by default all.

    Returns
    -------
    (n, m−1) bool: True where exit k of client i trains. From t = T/2 on, all that exist train.

    Examples
    --------
    >>> similarity = [[0.1, 0.5], [0.9, 0.2], [0.4, 0.8]]
    >>> active_exits(1, 6, similarity).astype(int)  # budget: ceil(1/3 · 6) = 2 of 6
    array([[0, 0],
           [1, 0],
           [1, 0]])
    >>> active_exits(2, 6, similarity).astype(int)  # budget 4: exit 1 of all, exit 2 of the client at 0.8
    array([[1, 0],
           [1, 0],
           [1, 1]])
    """
    scores = np.asarray(similarity, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"similarity must have shape (clients, exits - 1), got {scores.shape}")
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}; got {selection!r}")
    students = np.ones(scores.shape, dtype=bool) if there is None else np.asarray(there, dtype=bool)
    if students.shape != scores.shape:
        raise ValueError(f"there must have the shape of similarity, {scores.shape}, got {students.shape}")
    if selection == "none":
        return students.copy()
    budget = student_budget(server_round, num_rounds, int(students.sum()))
    active = np.zeros(scores.shape, dtype=bool)
    if selection == "random":
        if rng is None:
            raise ValueError("selection='random' needs a random generator: pass rng=")
        positions = np.flatnonzero(students)
        active.flat[positions[rng.permutation(len(positions))[:budget]]] = True
        return active
    depths = scores.shape[1]
    for k in range(depths - 1, -1, -1) if selection == "deep-first" else range(depths):
        holders = np.flatnonzero(students[:, k])
        conflict = -np.nan_to_num(scores[holders, k], nan=-np.inf)
        chosen = holders[np.argsort(conflict, kind="stable")[:budget]]
        active[chosen, k] = True
        budget -= len(chosen)
    return active


def conflict_ramp(server_round: int, num_rounds: int, num_exits: int, conflict: float) -> float:
    """R = clip( (2t/T)·(1 − 1/m) + conflict, 0, 1 − 1/m ): the share of all exits that may train as students.

    Here t = ``server_round`` − 1, so R is 0 in the first round. The conflict is the mean of min(S_ij, 0) over all pairs
    (i, j) of participants; being 0 or less, it slows the ramp down.

    Examples
    --------
    >>> [round(conflict_ramp(t, 8, 4, -0.1), 4) for t in (1, 2, 3, 4, 5, 6)]
    [0.0, 0.0875, 0.275, 0.4625, 0.65, 0.75]
    """
    if num_rounds < 1 or num_exits < 1 or server_round < 1:
        raise ValueError(
            f"rounds and exits count from 1, got round {server_round} of {num_rounds} with {num_exits} exits"
        )
    most = 1.0 - 1.0 / num_exits
    return float(np.clip(2.0 * (server_round - 1) / num_rounds * most + conflict, 0.0, most))


def student_levels(levels: ArrayLike, share: float, agreement: ArrayLike) -> NDArray[np.int64]:
    """The level of every participant: its deepest exit that trains as a student, counted from 0.

    The budget B = ⌊R·m·n⌋, with the share R of :func:`conflict_ramp`, goes to exit 0 of all participants, then to exit
    1, …; where it is not enough for all, participants with the least conflict get the exit and the others keep their
    level. Ties go to the client with the lower index.

    Parameters
    ----------
    levels
        (n,): the levels ℓ_i so far, 0..m−2. The result has the same form.
    agreement
        (n, m−1), 0 or less: the larger, the less exit k of client i is in conflict. The authors' code uses the column
        sums Σ_j min(S_ij, 0), the same for every exit.

    Examples
    --------
    >>> student_levels([0, 0, 0, 0], 6 / 16, [[-2.0] * 3, [0.0] * 3, [-1.0] * 3, [-3.0] * 3])
    array([0, 1, 1, 0])
    """
    column = np.asarray(agreement, dtype=np.float64)
    found = np.array(levels, dtype=np.int64)
    if column.ndim != 2 or len(column) != len(found):
        raise ValueError(f"agreement must have shape (clients, exits - 1), got {column.shape} for {len(found)} clients")
    n, students = column.shape
    if len(found) and not 0 <= found.min() <= found.max() <= max(students - 1, 0):
        raise ValueError(f"levels must lie in 0..{students - 1} (exits - 2), got {found.min()}..{found.max()}")
    left = math.floor(share * (students + 1) * n + 1e-9)
    for k in range(students):
        chosen = np.argsort(-column[:, k], kind="stable")[: max(left, 0)]
        found[chosen] = k
        left -= n
    return found
