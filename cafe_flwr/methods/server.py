"""A round on the server, as methods see it, and what they decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.core.schema import Schema
from cafe_flwr.methods.pairs import Pairs


@dataclass(frozen=True)
class ClientRecord:
    """What the server knows of a client: its last report.

    Attributes
    ----------
    num_examples
        Training examples.
    seen
        Round of the report.
    upload
        Flat upload, or what ``Method.conclude`` made of it. CAFEDistill: the client's mixture, kept for its next
        request.
    similarity
        (m−1,): similarity of its student exits to its last exit; NaN for exits that it does not hold.
    kind
        Name of its kind (:class:`cafe_flwr.wire.capacity.ClientSpec`).
    level
        CAFEDistill: its deepest exit that has trained as a student, counted from 0.
    """

    num_examples: int
    seen: int
    upload: NDArray[np.float32]
    similarity: NDArray[np.float64]
    kind: str = ""
    level: int = 0


@dataclass(frozen=True)
class ServerRound:
    """What the server knows when it plans a round.

    Where clients are not alike, a round is planned for each group that can learn from one another
    (``Method.comparable``).

    Attributes
    ----------
    server_round, num_rounds
        t and T; t = T + 1 for the evaluation after the last round.
    participants
        Clients of the round, in order.
    num_exits
        m, the largest number that a participant holds.
    known
        The last reports of all clients that ever reported.
    upload
        Schema of an upload.
    rng, seed
        Random generator of this round, and seed of the run.
    held
        Number of exits that participants hold, by client; clients that are missing hold all.
    pairs
        Similarities of clients that took part in the same round.
    trains
        Whether the participants train, or only evaluate.
    """

    server_round: int
    num_rounds: int
    participants: Sequence[int]
    num_exits: int
    known: Mapping[int, ClientRecord]
    upload: Schema
    rng: np.random.Generator
    held: Mapping[int, int] = field(default_factory=dict)
    pairs: Pairs = field(default_factory=Pairs)
    seed: int = 0
    trains: bool = True

    @property
    def all_exits(self) -> NDArray[np.bool_]:
        """``RoundPlan.active`` with all students: a client that holds d exits has d − 1, (participants, m−1)."""
        held = np.array([self.held.get(client, self.num_exits) for client in self.participants], dtype=np.int64)
        return np.arange(1, self.num_exits) < held[:, None]

    @property
    def reported_similarity(self) -> NDArray[np.float64]:
        """Last reported similarities of the participants' student exits, (participants, m−1); NaN if none."""
        similarity = np.full((len(self.participants), self.num_exits - 1), np.nan)
        for row, client in enumerate(self.participants):
            if client in self.known:
                similarity[row] = self.known[client].similarity[: self.num_exits - 1]
        return similarity

    @property
    def teachers(self) -> list[int]:
        """Clients that have reported."""
        return sorted(self.known)

    @property
    def pupils(self) -> list[int]:
        """Participants that have reported before."""
        return sorted(set(self.participants) & set(self.known))

    def uploads(self, clients: Sequence[int]) -> NDArray[np.float32]:
        """Flat uploads of the clients, (clients, values)."""
        return np.stack([self.known[c].upload for c in clients])

    def examples(self, clients: Sequence[int]) -> NDArray[np.float64]:
        """Training examples of the clients."""
        return np.array([self.known[c].num_examples for c in clients], dtype=np.float64)

    def part(self, uploads: NDArray[np.float32], *names: str) -> NDArray[np.float32]:
        """The named tensors of flat uploads (clients, …), concatenated: (clients, values)."""
        ends = np.cumsum(self.upload.sizes)
        spans = [slice(ends[i] - self.upload.sizes[i], ends[i]) for i in map(self.upload.names.index, names)]
        return np.concatenate([uploads[:, span] for span in spans], axis=1)


@dataclass(frozen=True)
class RoundPlan:
    """What the server has decided for a round.

    Attributes
    ----------
    active
        (participants, m−1) bool, rows in the order of the participants.
    downloads
        Flat arrays for single clients, by client.
    weights
        Weights of teachers (columns: ``weight_columns``) for pupils (rows: ``weight_rows``), for the records; or None.
    suspicious
        Clients whose weight as teachers was bounded (:mod:`cafe_flwr.methods.robust_teachers`), with the reason.
    """

    active: NDArray[np.bool_]
    downloads: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    weights: NDArray[np.float64] | None = None
    weight_rows: Sequence[int] = ()
    weight_columns: Sequence[int] = ()
    suspicious: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conclusion:
    """The server's state after a round: ``records`` and ``pairs`` replace the earlier ones of the clients.

    ``plan`` is the round's plan, with new weights if the method mixes at the end of a round. ``unmoved`` are clients
    that returned their classifier unchanged.
    """

    records: Mapping[int, ClientRecord]
    pairs: Pairs
    plan: RoundPlan
    unmoved: Sequence[int] = ()


def joined_plans(
    participants: Sequence[int], plans: Sequence[tuple[Sequence[int], RoundPlan]], num_exits: int
) -> RoundPlan:
    """One plan for all participants from ``plans``, (participants, plan) of groups that do not learn from each other.

    ``num_exits`` is m of the federation; a group's clients may all hold fewer.
    """
    if len(plans) == 1 and plans[0][1].active.shape[1] == num_exits - 1:
        return plans[0][1]
    row_of = {client: row for row, client in enumerate(participants)}
    active = np.zeros((len(participants), num_exits - 1), dtype=bool)
    for clients, plan in plans:
        active[[row_of[client] for client in clients], : plan.active.shape[1]] = plan.active
    downloads = {client: flat for _, plan in plans for client, flat in plan.downloads.items()}
    suspicious = {client: reason for _, plan in plans for client, reason in plan.suspicious.items()}
    taught = [plan for _, plan in plans if plan.weights is not None]
    if not taught:
        return RoundPlan(active, downloads, suspicious=suspicious)
    rows = sorted(client for plan in taught for client in plan.weight_rows)
    columns = sorted(client for plan in taught for client in plan.weight_columns)
    weights = np.zeros((len(rows), len(columns)))
    for plan in taught:
        where = np.searchsorted(rows, plan.weight_rows), np.searchsorted(columns, plan.weight_columns)
        weights[np.ix_(*where)] = plan.weights
    return RoundPlan(active, downloads, weights, rows, columns, suspicious)
