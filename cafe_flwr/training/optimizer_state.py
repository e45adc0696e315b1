"""Save and restore an optimiser's state as named tensors.

It is a momentum buffer for each parameter with SGD, two running means and a count of steps with AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cafe_flwr.training.options import LocalBudget


def new_optimizer(budget: LocalBudget, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """A new optimiser, as the budget says."""
    if budget.optimizer == "adamw":
        return torch.optim.AdamW(parameters, budget.learning_rate, weight_decay=budget.weight_decay)
    return torch.optim.SGD(parameters, budget.learning_rate, momentum=budget.momentum, weight_decay=budget.weight_decay)


def taken(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The state of an optimiser with one parameter group, by ``<parameter>/<what>``; tensors are not copied.

    ``names`` are those of its parameters, in order. Parameters that never had a gradient have no state.
    """
    return {
        f"{names[i]}/{what}": value
        for i, state in optimizer.state_dict()["state"].items()
        for what, value in state.items()
        if isinstance(value, Tensor)
    }


def given_back(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Let a new optimiser with one parameter group go on from a state that was :func:`taken`, on any device.

    Its learning rate and other settings stay. ``names`` are those of its parameters, in order. Parameters without a
    state, or with another shape now, start without one; the state of other parameters is ignored.
    """
    (group,) = optimizer.param_groups
    place = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        if name in place:
            state.setdefault(place[name], {})[what] = value.clone()
    fitting = {
        i: values
        for i, values in state.items()
        if all(value.dim() == 0 or value.shape == group["params"][i].shape for value in values.values())
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": fitting})
