"""Plans the runs of an experiment: every row, condition and seed with all its settings, checked before any starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe_flwr.data.options import Data
from cafe_flwr.experiments.contents import Condition, Row, short, slug
from cafe_flwr.experiments.file import Experiment
from cafe_flwr.settings import Settings

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
    """Runs of the sweep, below the experiment's folder: row × condition × trial × seed; none without a sweep.

    Raises ValueError naming the row whose settings are invalid.
    """
    if experiment.sweep is None:
        return []
    sweep = experiment.sweep
    return [
        _planned(experiment, folder, row, condition, seed, trial, number)
        for condition in experiment.conditions
        for seed in sweep.seeds
        for row in experiment.rows
        for number, trial in enumerate(experiment.trials(row.name))
    ]


def plan_runs(experiment: Experiment, folder: Path, chosen: Chosen | None = None) -> list[PlannedRun]:
    """Runs of the tables, below the experiment's folder: row × condition × seed.

    ``chosen`` are the settings that the sweep chose; a row of a sweep that is not among them has no runs yet. With None
    all rows have runs, without chosen settings. Raises ValueError naming the row whose settings are invalid.
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
    varied = "_".join(f"{short(key)}-{value}" for key, value in condition)
    parts = [slug(row.name), slug(varied).replace("_", "-")]
    name = "--".join(filter(None, parts)) + ("" if trial is None else f"--trial{trial}") + f"-seed{seed}"
    sweep = None if trial is None else experiment.sweep
    config = {
        "federation.evaluate-every": _EVALUATE_EVERY,
        **experiment.settings,
        **dict(condition),
        **row.settings,
        **(sweep.settings if sweep else {}),
        **further,
        "name": name,
        "seed": seed,
        "method": row.method,
        "results-dir": str(folder / ("runs" if trial is None else "trials")),
        "train.equal-steps": experiment.budget == "equal",
        **({"data.validation-share": sweep.validation_share} if sweep else {}),
    }
    try:
        settings = Settings.from_run_config(config)
        others = settings.unread().keys() - row.settings.keys() - further.keys()  # common ones that other rows read
        if others:
            settings = Settings.from_run_config({key: value for key, value in config.items() if key not in others})
        settings = _within_budget(settings, experiment, row)
    except ValueError as error:
        raise ValueError(f"row {row.name!r}: {error}") from None
    return PlannedRun(row.name, condition, settings, trial)


def _within_budget(settings: Settings, experiment: Experiment, row: Row) -> Settings:
    """Settings with fewer rounds where the budget is equal and the method fine-tunes at the end."""
    extra = settings.build_method().extra_rounds()
    if experiment.budget != "equal" or not extra:
        return settings
    rounds = settings.num_server_rounds - extra
    if rounds < 1:
        raise ValueError(
            f"{row.method} fine-tunes for {extra} rounds' worth of steps at the end: that leaves "
            f"no rounds of num-server-rounds ({settings.num_server_rounds})"
        )
    return settings.model_copy(update={"num_server_rounds": rounds})


def check_experiment(experiment: Experiment, folder: Path) -> None:
    """Build settings, network and method of every run; ValueError with a line for every reason why one cannot start."""
    problems: dict[str, None] = {}  # each once, in order
    runs = plan_trials(experiment, folder) + plan_runs(experiment, folder)
    for run in runs:
        problems |= {
            f"row {run.row!r}: {key} would change nothing: {why}": None for key, why in run.settings.unread().items()
        }
    if not experiment.is_smoke:  # where rows may be left out
        problems |= dict.fromkeys(_read_by_no_row(experiment, runs))
    for run in sorted(runs, key=lambda run: (run.settings.of(Data).shares, experiment.conditions.index(run.condition))):
        try:
            _check_run(run)
        except ValueError as error:
            problems[f"row {run.row!r}: {error}"] = None
    if problems:
        raise ValueError("\n".join(problems))


def _read_by_no_row(experiment: Experiment, runs: Sequence[PlannedRun]) -> Iterator[str]:
    """A sentence for every common setting that no row reads."""
    for where, keys in (("settings", experiment.settings.keys()), ("vary", experiment.varied)):
        for key in sorted(keys):
            reasons = [run.settings.not_read().get(key) for run in runs]
            if reasons and reasons[0] and all(reasons):
                yield f"{where}: {key} would change nothing: {reasons[0]}"


def _check_run(run: PlannedRun) -> None:
    """Raise ValueError if the run cannot start."""
    from cafe_flwr.app.parts import build_networks
    from cafe_flwr.networks.capacity import networks_of, read_shares

    method = run.settings.build_method()
    for network in networks_of(build_networks(run.settings)).values():
        method.check(network)
        for names in (method.shared_names, method.personal_names, method.upload_names, method.download_names):
            names(network)
        for held in read_shares(run.settings.heterogeneity.depth_shares):
            held.check(network.num_exits, "heterogeneity.depth-shares").of(network)
