"""The runs of an experiment: every row, condition and seed with all its settings; checked before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe_flwr.experiments.contents import Condition, Row, slug
from cafe_flwr.experiments.file import Experiment
from cafe_flwr.settings import Settings, keys_of_other_methods

_EVALUATE_EVERY = 10  # rounds, unless the file says otherwise: evaluation is a quarter of a run's time


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment."""

    row: str  # label
    condition: Condition
    settings: Settings  # all of them; they name its folder
    trial: int | None = None  # position among the row's trials; None: it is no trial but counts for the table

    @property
    def name(self) -> str:
        """Name of its folder, from row, condition, trial and seed."""
        return self.settings.name

    @property
    def folder(self) -> Path:
        """Its results folder."""
        return self.settings.results

    @property
    def log(self) -> Path:
        """Its log, beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def rounds_done(self) -> int:
        """Number of rounds on record."""
        try:
            return (self.folder / "rounds.jsonl").read_text().count("\n")
        except OSError:
            return 0


Chosen = Mapping[tuple[str, Condition], Mapping[str, Any]]
"""Settings that a sweep has chosen, by row and condition."""


def plan_trials(experiment: Experiment, folder: Path) -> list[PlannedRun]:
    """Runs of the sweep, below the experiment's folder: row × condition × trial × seed. Empty without a sweep.

    Raises ValueError naming the row, for settings that cannot be used.
    """
    if experiment.sweep is None:
        return []
    sweep = experiment.sweep
    return [
        _planned(experiment, folder, row, condition, seed, {**sweep.settings, **trial}, number)
        for condition in experiment.conditions
        for seed in sweep.seeds
        for row in experiment.rows
        for number, trial in enumerate(experiment.trials(row.name))
    ]


def plan_runs(experiment: Experiment, folder: Path, chosen: Chosen | None = None) -> list[PlannedRun]:
    """Runs of the tables, below the experiment's folder: row × condition × seed.

    ``chosen`` are the settings that the sweep chose; with a sweep, a row that is not among them has no runs yet, unless
    no choice is made (None). Raises ValueError naming the row, for settings that cannot be used.
    """
    return [
        _planned(experiment, folder, row, condition, seed, (chosen or {}).get((row.name, condition), {}))
        for condition in experiment.conditions
        for seed in experiment.seeds
        for row in experiment.rows
        if chosen is None or experiment.sweep is None or (row.name, condition) in chosen
    ]


def _planned(
    experiment: Experiment,
    folder: Path,
    row: Row,
    condition: Condition,
    seed: int,
    further: Mapping[str, Any],
    trial: int | None = None,
) -> PlannedRun:
    parts = [slug(row.name), slug("_".join(f"{key}-{value}" for key, value in condition)).replace("_", "-")]
    name = "--".join(filter(None, parts)) + ("" if trial is None else f"--trial{trial}") + f"-seed{seed}"
    config = {
        "evaluate-every": _EVALUATE_EVERY,
        **experiment.settings,
        **dict(condition),
        **row.settings,
        **further,
        "name": name,
        "seed": seed,
        "method": row.method,
        "results-dir": str(folder / ("runs" if trial is None else "trials")),
        "equal-steps": experiment.budget == "equal",
    }
    if trial is not None and experiment.sweep:
        config["validation-share"] = experiment.sweep.validation_share
    try:
        settings = Settings.from_run_config(config)
        if experiment.budget == "equal" and (extra := settings.build_method().extra_rounds()):
            rounds = settings.num_server_rounds - extra
            if rounds < 1:
                raise ValueError(
                    f"{row.method} fine-tunes for {extra} rounds' worth of steps at the end: that leaves "
                    f"no rounds of num-server-rounds ({settings.num_server_rounds})"
                )
            settings = settings.model_copy(update={"num_server_rounds": rounds})
    except ValueError as error:
        raise ValueError(f"row {row.name!r}: {error}") from None
    return PlannedRun(row.name, condition, settings, trial)


def check_experiment(experiment: Experiment, folder: Path) -> None:
    """Build what every run needs: its settings, its network and its method.

    Raises ValueError with a line for every reason why a run could not start.
    """
    problems: dict[str, None] = {}  # each once, in order
    for row in experiment.rows:
        others = keys_of_other_methods(row.method)
        for key in dict.fromkeys([*row.settings, *itertools.chain.from_iterable(experiment.trials(row.name))]):
            if key in others:
                problems[f"row {row.name!r}: {row.method} has no setting {key!r}, so it would change nothing"] = None
    try:
        runs = plan_trials(experiment, folder) + plan_runs(experiment, folder)
    except ValueError as error:
        raise ValueError("\n".join([*problems, str(error)])) from None
    for run in sorted(runs, key=lambda run: (run.settings.shares, experiment.conditions.index(run.condition))):
        try:
            _check_run(run)
        except ValueError as error:
            problems[f"row {run.row!r}: {error}"] = None
    if problems:
        raise ValueError("\n".join(problems))


def _check_run(run: PlannedRun) -> None:
    """Raise ValueError if the run cannot start."""
    from cafe_flwr.app.parts import build_networks
    from cafe_flwr.networks.capacity import networks_of, read_shares

    method = run.settings.build_method()
    for network in networks_of(build_networks(run.settings)).values():
        method.check(network)
        for names in (method.shared_names, method.personal_names, method.upload_names, method.download_names):
            names(network)
        for held in read_shares(run.settings.depth_shares):
            held.check(network.num_exits, "depth-shares").of(network)
