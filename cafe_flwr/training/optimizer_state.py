"""What an optimiser remembers of its parameters from step to step, as named tensors to be put away and given back.

Of SGD with momentum that is a parameter's momentum buffer, of AdamW its two running means and its count of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cafe_flwr.training.options import LocalBudget


def new_optimizer(budget: LocalBudget, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimiser of a budget, as it starts."""
    if budget.optimizer == "adamw":
        return torch.optim.AdamW(parameters, budget.learning_rate, weight_decay=budget.weight_decay)
    return torch.optim.SGD(parameters, budget.learning_rate, momentum=budget.momentum, weight_decay=budget.weight_decay)


def taken(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimiser's state, not copied: ``<parameter>/<what>``; parameters that never had a gradient have none.

    Parameters
    ----------
    optimizer
        Of one group of parameters.
    names
        Of its parameters, in order.
    """
    return {
        f"{names[i]}/{what}": value
        for i, state in optimizer.state_dict()["state"].items()
        for what, value in state.items()
        if isinstance(value, Tensor)
    }


def given_back(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Let the optimiser go on from a state that was :func:`taken`; its own learning rate and the like stay.

    A parameter that has another shape now starts at rest, as one does that has no state.

    Parameters
    ----------
    optimizer
        New, of one group of parameters.
    names
        Of its parameters, in order.
    tensors
        State by ``<parameter>/<what>``, on any device; what is of no parameter named here is left alone.
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
