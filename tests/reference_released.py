"""CAFEDistill as released, METHODS' steps 1–7, as slow and as plain as they are written: what the fast code must equal.

Everything of all clients is in one place, there are no messages, and the server sees what it must not see in a
federation. Names are those of the formulas: n participants, m exits counted from 0, rounds t = 0, …, T−1.

1. C = min(S[P, P], 0) over the participants P
2. R = clip((2t/T)(1 − 1/m) + Σ C/n², 0, 1 − 1/m),  B = ⌊R·m·n⌋
3. for k = 0, 1, …: b = min(B left, n), stop at 0; the b participants of least conflict get ℓ ← k
4. L = (1/m)[Σ_{k<ℓ} CE(z_k) + CE(z_{m−1})] + λ Σ_{k≤ℓ} τ² KL(softmax(sg z_{m−1}/τ) ‖ softmax(z_k/τ))
5. Δ_i = h_i before − after,  S_ij = cos(Δ_i, Δ_j) for i, j ∈ P
6. w_i = argmin_{w ∈ Δ} ‖w‖² − (s_i/α + 2/n)ᵀw
7. h_i ← Σ_j w_ij h_j, kept for the client until it is next asked
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cafe_flwr.core.random import rng_for, seeded
from cafe_flwr.core.schema import Schema
from cafe_flwr.data import ClientData
from cafe_flwr.methods.starts import classifier_start
from cafe_flwr.networks import EarlyExitNetwork
from cafe_flwr.training import batches

Tensors = dict[str, Tensor]


@dataclass
class Client:
    """What a client keeps, and what waits for it at the server."""

    data: ClientData
    heads: Tensors
    level: int = 0
    momentum: Tensors = field(default_factory=dict)
    waiting: Tensors = field(default_factory=dict)
    exit_cosines: list[float] = field(default_factory=list)  # 0 before it has reported any


@dataclass
class Round:
    """What a round has decided."""

    participants: list[int]
    levels: list[int]
    weights: list[list[float]]


@dataclass
class Reference:
    """A federation of so many clients; call :meth:`round` with the participants of t = 0, 1, …

    ``kappa`` 0 is the released form: the last classifier is mixed. Otherwise the classifiers of all exits are, and the
    mixture of class c counts κ/(κ + n_c + n/C). ``conflict`` is ``"clients"`` or ``"exits"``.
    """

    build: Callable[[], EarlyExitNetwork]
    load: Callable[[int], ClientData]
    num_clients: int
    T: int
    batch_size: int
    steps: int
    learning_rate: Callable[[int], float]
    momentum: float
    weight_decay: float
    alpha: float = 0.6
    lam: float = 1.0
    tau: float = 2.0
    kappa: float = 0.0
    conflict: str = "clients"
    start: str = "zero"
    seed: int = 0
    t: int = 0

    def __post_init__(self) -> None:
        with seeded(self.seed):
            self.network = self.build()
        self.m = self.network.num_exits
        self.last = self.network.head_names(self.m - 1)
        heads = self.network.classifier_names()
        start = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.shared = {name: tensor for name, tensor in start.items() if name not in heads}
        entries = Schema.of(start, heads).entries
        self.clients = [
            Client(
                self.load(i),
                classifier_start(entries, self.start, self.seed, i),
                exit_cosines=[0.0] * (self.m - 1),
            )
            for i in range(self.num_clients)
        ]
        self.S = [[0.0] * self.num_clients for _ in range(self.num_clients)]
        self.rounds: list[Round] = []

    # --- steps 1 to 3 ---

    def set_levels(self, P: Sequence[int]) -> None:
        n, m = len(P), self.m
        if self.conflict == "clients":
            columns = {j: [sum(min(self.S[i][j], 0.0) for i in P)] * (m - 1) for j in P}
            slower = sum(columns[j][0] for j in P) / n**2
        else:  # exit k of each client and its last exit, as it has last reported; the mean of all slows down
            columns = {j: [min(c, 0.0) for c in self.clients[j].exit_cosines] for j in P}
            slower = sum(sum(columns[j]) for j in P) / (n * (m - 1))
        R = min(max(2 * self.t / self.T * (1 - 1 / m) + slower, 0.0), 1 - 1 / m)
        left, k = math.floor(R * m * n + 1e-9), 0  # 8 clients at R = 1 − 1/m are (m − 1)·8 places, not one fewer
        while left > 0:
            b = min(left, n)
            for j in sorted(P, key=lambda j: -columns[j][k])[:b]:
                self.clients[j].level = k
            left, k = left - b, k + 1

    # --- step 4 ---

    def loss(self, logits: Sequence[Tensor], y: Tensor, level: int) -> Tensor:
        teacher = torch.softmax(logits[self.m - 1].detach() / self.tau, dim=1)
        total = _cross_entropy(logits[self.m - 1], y) / self.m
        for k in range(level):
            total = total + _cross_entropy(logits[k], y) / self.m
        for k in range(level + 1):
            student = torch.log_softmax(logits[k] / self.tau, dim=1)
            kl = (teacher * (teacher.log() - student)).sum(dim=1).mean()
            total = total + self.lam * self.tau**2 * kl
        return total

    def train(self, i: int) -> Tensors:
        """Local training; the client's whole network afterwards."""
        client, network = self.clients[i], self.network
        network.load_state_dict({**self.shared, **client.heads})
        network.train()
        x, y = client.data.train.x, client.data.train.y
        size = min(self.batch_size, len(y))
        rng = rng_for(self.seed, self.t + 1, i, "batches")
        for index in batches(len(y), size, self.steps * size, rng):
            for p in network.parameters():
                p.grad = None
            self.loss(network(x[index]), y[index], client.level).backward()
            with torch.no_grad():
                for name, p in network.named_parameters():
                    if p.grad is None:  # of exits that do not train
                        continue
                    gradient = p.grad + self.weight_decay * p
                    if name in client.momentum:
                        gradient = self.momentum * client.momentum[name] + gradient
                    client.momentum[name] = gradient
                    p -= self.learning_rate(self.t) * gradient
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}

    # --- what waits is received ---

    def received(self, client: Client) -> Tensors:
        """The client's classifiers once the mixture that waits for it has arrived."""
        heads = dict(client.heads)
        for name, mixture in client.waiting.items():
            heads[name] = mixture
            if self.kappa:
                heads[name] = torch.zeros_like(mixture)
                n = len(client.data.train.y)
                for c in range(len(mixture)):
                    n_c = int((client.data.train.y == c).sum())
                    v = self.kappa / (self.kappa + n_c + n / len(mixture))
                    heads[name][c] = v * mixture[c] + (1 - v) * client.heads[name][c]
        return heads

    # --- a round ---

    def round(self, P: Sequence[int], lost: Sequence[int] = ()) -> None:
        """A round of so many; whose reply is lost has a part in the plan of the levels, and else was not there."""
        before = {i: self.clients[i].level for i in lost}
        self.set_levels(P)
        for i in lost:
            self.clients[i].level = before[i]
        P = [i for i in P if i not in lost]
        after, delta = {}, {}
        for i in P:
            client = self.clients[i]
            known = {**client.heads, **client.waiting}  # what the server has sent, or knows as the start
            client.heads, client.waiting = self.received(client), {}
            after[i] = self.train(i)
            delta[i] = _flat([known[name] - after[i][name] for name in self.last])
            client.heads = {name: after[i][name] for name in client.heads}
            client.exit_cosines = [
                _cosine(*(_flat([after[i][name] for name in self.network.head_names(e)]) for e in (k, self.m - 1)))
                for k in range(self.m - 1)
            ]
        examples = {i: len(self.clients[i].data.train.y) for i in P}
        for name in self.shared:
            total = sum(examples[i] * after[i][name].double() for i in P)
            self.shared[name] = (total / sum(examples.values())).float()
        for i in P:
            for j in P:
                self.S[i][j] = _cosine(delta[i], delta[j])
        weights = [self.weights([self.S[i][j] for j in P]) for i in P]
        mixed = self.network.classifier_names() if self.kappa else self.last
        for i, w in zip(P, weights, strict=True):
            for name in mixed:
                mixture = sum(w_j * after[j][name].double() for w_j, j in zip(w, P, strict=True))
                self.clients[i].waiting[name] = mixture.float()
        self.rounds.append(Round(list(P), [self.clients[i].level for i in P], weights))
        self.t += 1

    # --- step 6 ---

    def weights(self, s: Sequence[float]) -> list[float]:
        """argmin ‖w‖² − bᵀw on the simplex, b = s/α + 2/n: w_j = max(b_j/2 − ν, 0), ν by bisection from Σ w_j = 1."""
        b = [s_j / self.alpha + 2 / len(s) for s_j in s]
        low, high = min(b) / 2 - 1, max(b) / 2
        for _ in range(200):
            nu = (low + high) / 2
            if sum(max(b_j / 2 - nu, 0.0) for b_j in b) > 1:
                low = nu
            else:
                high = nu
        return [max(b_j / 2 - nu, 0.0) for b_j in b]

    # --- the end ---

    def personal(self, i: int) -> Tensors:
        """The client's network at the end."""
        return {**self.shared, **self.received(self.clients[i])}


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return -torch.log_softmax(logits, dim=1)[torch.arange(len(y)), y].mean()


def _flat(tensors: Sequence[Tensor]) -> list[float]:
    return [value for tensor in tensors for value in tensor.flatten().tolist()]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """0 where one of them is all zeros."""
    product = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / product if product else 0.0
