"""CAFEDistill as a Flower strategy whose arguments are the settings of the method."""

from __future__ import annotations

from typing import Any

from cafe_flwr.methods.cafedistill import CafeDistillMethod
from cafe_flwr.server.strategy import FederatedStrategy
from cafe_flwr.training.objectives.base import Objective


class CafeDistill(FederatedStrategy):
    """CAFEDistill (arXiv 2601.10015, as its authors run it) as a Flower strategy.

    Averages the shared backbone, decides which student exits train on which client, and mixes the last classifiers of
    clients whose updates agree; the mixture becomes the client's own. The method itself is
    :class:`cafe_flwr.methods.cafedistill.CafeDistillMethod`.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`FederatedStrategy`, and so for Flower's FedAvg.
    num_rounds
        T; students join over its first half. None: the number given to ``start``.
    mu, distill_weight, temperature
        μ of matching (the authors' α), λ and τ of distillation.
    conflict, selection, match_by, write_back, solver, classifier_start
        Ablations and variants, see :class:`cafe_flwr.methods.cafedistill.CafeDistillMethod`.
    objective
        Loss in the place of the published cross-entropies: a :class:`cafe_flwr.training.objectives.Objective` or its
        name (docs/objectives.md).

    Raises
    ------
    ValueError
        For values out of range, naming the setting.

    Examples
    --------
    In your own ServerApp::

        strategy = CafeDistill(fraction_train=0.5, num_rounds=50, mu=0.6)
        result = strategy.start(grid, initial_arrays=ArrayRecord(network.state_dict()))
    """

    def __init__(  # noqa: PLR0913 (public constructor: the settings of the method)
        self,
        *args: Any,
        num_rounds: int | None = None,
        mu: float = 0.6,
        distill_weight: float = 1.0,
        temperature: float = 2.0,
        conflict: str = "clients",
        selection: str = "shallow-first",
        match_by: str = "updates",
        write_back: bool = True,
        solver: str = "exact",
        classifier_start: str = "zero",
        objective: Objective | str = "cross-entropy",
        **kwargs: Any,
    ) -> None:
        method = CafeDistillMethod(
            objective=objective,
            mu=mu,
            distill_weight=distill_weight,
            temperature=temperature,
            conflict=conflict,
            selection=selection,
            match_by=match_by,
            write_back=write_back,
            solver=solver,
            classifier_start=classifier_start,
        )
        super().__init__(*args, method=method, num_rounds=num_rounds, **kwargs)
