"""Who trains a node's clients: one after the other, or several that are handed over together."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import Recorded, run_small, small_settings, toy_app, toy_data, toy_network

from cafe_flwr.core.random import rng_for
from cafe_flwr.data import ClientData, Split
from cafe_flwr.methods import METHODS, LocalTask
from cafe_flwr.networks import EarlyExitNetwork
from cafe_flwr.training import LocalBudget
from cafe_flwr.training.trainer import LoopTrainer


class ThreeAtOnce(LoopTrainer):
    """Gets three tasks at once, and trains them in another order."""

    at_once = 3

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def train(self, method: Any, tasks: Sequence[LocalTask]) -> list[Any]:
        self.sizes.append(len(tasks))
        networks = [id(task.network) for task in tasks]
        assert len(set(networks)) == len(tasks)  # each has its own
        return super().train(method, tasks[::-1])[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cafedistill", "ditto", "fedbabu"])
def test_clients_that_are_trained_together_get_what_they_get_alone(
    tmp_path: Path, no_report: None, method: str
) -> None:
    """Bit for bit, and one that fails fails alone: client 2 trains on what is no number."""

    def load(client: int) -> ClientData:
        data = toy_data(client)
        return replace(data, augment=lambda x, rng: x * torch.nan) if client == 2 else data

    found, trainer = [], ThreeAtOnce()
    for name, chosen in (("alone", None), ("together", trainer)):
        settings = small_settings(
            tmp_path / name, method=method, num_server_rounds=2, depth_shares="2:0.4", clip_norm=5.0, name="small"
        )
        run_small(settings, num_nodes=1, app=toy_app(load, trainer=chosen))
        found.append(Recorded.read(settings.results))
    found[1].assert_same(found[0])
    assert trainer.sizes == [3, 2] * 2
    assert list(found[0].rounds[0]["left_out"]) == ["2"]


def test_a_task_that_fails_leaves_the_others_alone() -> None:
    """Its place in the results has the error; NaN after training is one."""
    method = METHODS["fedper"]()

    def task(client: int, factor: float = 1.0) -> LocalTask:
        torch.manual_seed(0)
        data = toy_data(client).train
        return LocalTask(
            toy_network(),
            Split(data.x * factor, data.y),
            [True, True],
            {},
            LocalBudget(steps=2),
            lambda purpose: rng_for(0, 1, client, purpose),
        )

    tasks = [task(0), task(1, float("nan")), task(1)]
    first, second, third = LoopTrainer().train(method, tasks)
    assert first.loss > 0
    assert third.loss > 0
    assert isinstance(second, ValueError)
    assert "training ended with NaN or infinite values in stages.0.0.weight" in str(second)
    networks: list[EarlyExitNetwork] = [task.network for task in tasks]
    measured = LoopTrainer().evaluate(networks[::2], [toy_data(0).test, toy_data(1).test])
    assert [len(one.accuracy) for one in measured] == [3, 3]
