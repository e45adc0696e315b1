"""How long runs will take and how much memory they need, from one step and one evaluation on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cafe_flwr.data.federation import FederatedData
from cafe_flwr.data.options import Data
from cafe_flwr.data.split import ClientData
from cafe_flwr.experiments.plan import PlannedRun
from cafe_flwr.networks.early_exit import EarlyExitNetwork
from cafe_flwr.networks.statistics import evaluating
from cafe_flwr.results.run import duration, scaled
from cafe_flwr.settings import OPTIONS, Settings
from cafe_flwr.training.optimizer_state import new_optimizer

_PROCESS = 1e9  # bytes of Python and its libraries in every process, at their most, when a run writes its page
_BESIDES = 3.0  # seconds of a run for its start, its files and its page
_SIZES = tuple(key for key, o in OPTIONS.items() if o.said["sized"])  # what is measured depends on them


@dataclass(frozen=True)
class Measured:
    """What a network costs on this machine, in one thread."""

    step: float  # seconds of a gradient step
    evaluation: float  # seconds of the evaluation of one example
    network: int  # bytes of the weights
    activations: int  # bytes that a step keeps for the backward pass
    example: int  # bytes of one example's inputs
    examples: int  # of all clients, all splits


@dataclass(frozen=True)
class Estimate:
    """Wall-clock seconds and bytes of memory of several runs, all processes together."""

    seconds: float
    memory: float
    step: float
    jobs: int

    def words(self) -> str:
        """The estimate as a sentence.

        Examples
        --------
        >>> Estimate(7500, 3.2e9, 0.21, 2).words().partition(", from ")[::2]
        ('Estimate', 'one step of 0.21 s and one evaluation here: 2 h 5 min with 2 runs at a time, 3.2 GB of memory')
        """
        return (
            f"Estimate, from one step of {self.step:.2g} s and one evaluation here: {duration(self.seconds)} with "
            f"{self.jobs} run{'s' * (self.jobs > 1)} at a time, {scaled(self.memory, 'B')} of memory"
        )


def measure(settings: Settings) -> Measured:
    """Build the network of the settings, take two steps and evaluate a batch, on the first client's data.

    Steps are on the sum of all exits' cross-entropies; the first one warms up.
    """
    from cafe_flwr.app.parts import build_network, federation

    data, network = federation(settings), build_network(settings)
    client = data.load(0)
    rows = torch.arange(settings.train.batch_size) % len(client.train)  # repeated if this client has fewer than a batch
    x, y = client.train.x[rows], client.train.y[rows]
    held = client.test.x[:64]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    try:
        kept = _activations(network, x, y)
        optimizer = new_optimizer(settings.build_budget(), list(network.parameters()))
        step = _seconds(lambda: (_loss(network, x, y).backward(), optimizer.step()))
        with torch.no_grad(), evaluating(network):
            evaluation = _seconds(lambda: network(held)) / max(1, len(held))
    finally:
        torch.set_num_threads(threads)
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    return Measured(step, evaluation, weights, kept, x[:1].nbytes, _num_examples(data, client))


def estimate(runs: Sequence[PlannedRun], jobs: int) -> Estimate:
    """Time and memory of runs (one at least) that have not finished, ``jobs`` processes at a time.

    Time: gradient steps, evaluations, and a few seconds per run for its start and its page. Memory, in every worker:
    libraries, the clients' data (decoded once and kept), four times the network (weights, gradients, momentum, the
    server's), the replies of all participants of a round, and one batch's activations; and the libraries once more for
    the command itself.
    """
    known: dict[tuple[Any, ...], Measured] = {}
    seconds, memory, steps = [], [], []
    for run in runs:
        key = tuple(run.settings.value(key) for key in _SIZES)
        if key not in known:
            known[key] = measure(run.settings)
        steps.append(known[key].step)
        seconds.append(_run_seconds(run, known[key]))
        memory.append(_run_memory(run.settings, known[key]))
    at_once = min(jobs, len(runs))
    longest = max(sum(seconds) / at_once, *seconds)
    return Estimate(longest, _PROCESS + at_once * max(memory), max(steps), at_once)


def _run_seconds(run: PlannedRun, measured: Measured) -> float:
    """Seconds of the rounds that are not done yet."""
    s = run.settings
    rounds = max(0, s.num_server_rounds - run.rounds_done)
    participants = max(1, round(s.federation.fraction_train * s.num_clients))
    training = measured.examples * s.of(Data).shares[0] / s.num_clients  # examples of a mean client
    budget = s.build_budget()
    steps = budget.epochs * max(1.0, training / budget.batch_size) if budget.epochs else budget.steps
    evaluations = -(-rounds // s.federation.evaluate_every)
    tested = 2 * measured.examples * s.data.test_share * participants / s.num_clients  # before and after training
    return _BESIDES + rounds * participants * steps * measured.step + evaluations * tested * measured.evaluation


def _run_memory(s: Settings, measured: Measured) -> float:
    participants = max(1, round(s.federation.fraction_train * s.num_clients))
    data = measured.examples * measured.example
    return _PROCESS + data + (4 + participants) * measured.network + measured.activations


def _loss(network: EarlyExitNetwork, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(z, y) for z in network(x)]).sum()


def _activations(network: EarlyExitNetwork, x: Tensor, y: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the weights; this step also warms up."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = _loss(network, x, y)
    total = sum(kept.values())
    loss.backward()
    network.zero_grad(set_to_none=True)
    return total


def _seconds(compute: Any) -> float:
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def _num_examples(data: FederatedData, client: ClientData) -> int:
    """Examples of all clients; if the data set does not say how many, as if all had as many as the first client."""
    if data.num_examples:
        return data.num_examples
    return data.num_clients * sum(len(split) for split in (client.train, client.calibration, client.test))
