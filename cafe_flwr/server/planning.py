"""Planning of a round: what every participant trains and receives, and what the server keeps of its report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cafe_flwr.core.random import rng_for
from cafe_flwr.methods.server import ClientRecord, RoundPlan, ServerRound, joined_plans
from cafe_flwr.server.checkpoints import ServerState
from cafe_flwr.server.run import StrategyPart
from cafe_flwr.wire.capacity import ClientSpec
from cafe_flwr.wire.reports import ClientReport


@dataclass(frozen=True)
class RoundPlanner(StrategyPart):
    """Asks the method for its plan; where clients are not alike, once for every group with comparable uploads."""

    def plan(self, state: ServerState, server_round: int, clients: Sequence[int], trains: bool = True) -> RoundPlan:
        """The plan for the participants; ``trains`` is false where they only evaluate."""
        tasks = self._tasks(state, server_round, clients, trains)
        plans = [(task.participants, self.run.method.plan(task)) for task in tasks]
        return joined_plans(clients, plans, self.directory.reference.num_exits)

    def conclude(
        self,
        state: ServerState,
        server_round: int,
        clients: Sequence[int],
        plan: RoundPlan,
        reports: Sequence[ClientReport],
    ) -> tuple[RoundPlan, set[int]]:
        """Let the method conclude a round, in the groups of its plan, and update the state.

        Returns the round's plan, with new weights if the method mixes at the end of a round; and the clients that
        returned their classifier unchanged.
        """
        records = {report.client: self._record(report, server_round) for report in reports}
        rows = {client: row for row, client in enumerate(clients)}
        unmoved: set[int] = set()
        plans = []
        for task in self._tasks(state, server_round, clients):
            here = {client: records[client] for client in task.participants if client in records}
            active = plan.active[[rows[client] for client in task.participants], : task.num_exits - 1]
            group_plan = replace(plan, active=active)
            if here:
                done = self.run.method.conclude(task, group_plan, here)
                group_plan, state.pairs = done.plan, done.pairs
                state.known |= {client: self._as_sent(record) for client, record in done.records.items()}
                unmoved |= set(done.unmoved)
            plans.append((task.participants, group_plan))
        if any(group_plan.weights is not plan.weights for _, group_plan in plans):
            plan = state.plan = joined_plans(clients, plans, self.directory.reference.num_exits)
        return plan, unmoved

    def _record(self, report: ClientReport, server_round: int) -> ClientRecord:
        similarity, kind = np.asarray(report.similarity, dtype=np.float64), self.directory.kind(report.client).name
        return ClientRecord(report.num_examples, server_round, report.upload, similarity, kind)

    def _as_sent(self, record: ClientRecord) -> ClientRecord:
        """The record with its upload rounded as the client will receive it if values travel as float16."""
        if self.run.wire == "float32":
            return record
        return replace(record, upload=record.upload.astype(np.float16).astype(np.float32))

    def _tasks(
        self, state: ServerState, server_round: int, clients: Sequence[int], trains: bool = True
    ) -> Iterator[ServerRound]:
        """One planning task for each group of clients that can learn from one another."""
        rng = rng_for(self.run.seed, server_round, -1, "selection")
        here, known = {client: self.directory.kind(client) for client in clients}, state.known
        for alike in self._comparable(here.values()):
            participants = [client for client in clients if here[client].name in alike]
            yield ServerRound(
                server_round=server_round,
                num_rounds=self.run.num_rounds,
                participants=participants,
                num_exits=max(here[client].num_exits for client in participants),
                known={
                    client: record
                    for client, record in known.items()
                    if record.kind in alike
                    and (client not in here or here[client].name == record.kind)
                    and len(record.upload) == self.directory.kinds[record.kind].upload.size
                },
                upload=here[participants[0]].upload,
                rng=rng,
                held={client: here[client].num_exits for client in participants},
                pairs=state.pairs,
                seed=self.run.seed,
                trains=trains,
            )

    def _comparable(self, here: Iterable[ClientSpec]) -> list[set[str]]:
        """Groups of kinds, by name, whose clients can learn from one another."""
        key = self.run.method.comparable
        groups: list[set[str]] = []
        for kind in {kind.name: kind for kind in here}.values():
            alike = {name for name, other in self.directory.kinds.items() if key(other) == key(kind)}
            if alike not in groups:
                groups.append(alike)
        return groups
