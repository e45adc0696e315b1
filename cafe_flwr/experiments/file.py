"""Experiments: methods × settings × seeds from one YAML file, planned and checked before anything runs.

    YAML file → Experiment → planned runs → checks → worker processes → a results folder per run → tables
    (this file)                                       (execution.py)                               (comparison.py)

All rows of an experiment share the partition, the initial weights, the participants of every round and, with
``budget: equal``, the number of local gradient steps.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator, model_validator

from cafe_flwr.core.text import closest, kebab
from cafe_flwr.methods.registry import METHODS
from cafe_flwr.results.folder import is_bare
from cafe_flwr.server.checkpoints import Checkpoints
from cafe_flwr.settings import STRICT, Settings, keys_of_other_methods

Condition = tuple[tuple[str, Any], ...]
"""What is varied between tables, as (setting, value) pairs; empty if nothing is."""

_OURS = {"name", "seed", "method", "results-dir", "state-dir", "resume"}  # every run gets its own
_BUDGET = {"equal-steps", "validation-share"}  # said by `budget` and `sweep`
_COMMON = {  # a row that changed one of these would not be comparable with the others
    *("num-clients", "fraction-train", "min-train-nodes", "min-available-nodes"),
    *("dataset", "partition", "dirichlet-alpha", "classes-per-client", "examples-per-client"),
    *("dirichlet-cap", "partition-column", "natural-split"),
    *("calibration-share", "test-share", "image-size", "image-column", "label-column"),
    *("label-groups", "rotations", "test-shift"),
    *("data-dir", "augmentation", "max-tokens", "vocabulary", "long-texts", "text-part"),
    *("network", "feature-width", "network-width", "network-depth", "norm", "statistics", "stem-stride"),
    *("attention-heads", "dropout", "evaluate-every"),
}
_STEPS = {"num-server-rounds", "local-steps", "local-epochs"}  # equal in all rows, if the budget is
_FREE = _OURS - {"seed", "method"}  # these and how long to wait change no number
_FREE |= {"wait-seconds", "round-timeout", "round-retries", "min-available-nodes"}
_EVALUATE_EVERY = 10  # rounds, unless the file says otherwise: evaluation is a quarter of a run's time


def _candidates(value: Any) -> Any:
    lists = isinstance(value, dict) and all(isinstance(item, list) and item for item in value.values())
    if lists or (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        return value
    raise ValueError("it should be lists of values ({learning-rate: [0.1, 0.3]}) or a list of mappings")


def _combinations(candidates: Any) -> list[dict[str, Any]]:
    if isinstance(candidates, list):
        return candidates
    return [dict(zip(candidates, values, strict=True)) for values in itertools.product(*candidates.values())]


Candidates = Annotated[dict[str, list[Any]] | list[dict[str, Any]], PlainValidator(_candidates)]
"""Settings to try: every combination of lists, or a list of mappings."""


class _Part(BaseModel):
    model_config = STRICT | ConfigDict(validate_by_name=False)


class Row(_Part):
    """A row of the table: a method with settings of its own."""

    method: str
    """Name of the method."""
    label: str = Field("", max_length=60)
    """How the table names the row; by default the method, with the row's settings if it has any."""
    settings: dict[str, Any] = {}
    """Settings of this row alone."""

    @property
    def name(self) -> str:
        """The row's label, given or made."""
        return self.label or " ".join([self.method, *(f"{key}={value}" for key, value in self.settings.items())])

    @property
    def plain(self) -> bool:
        """Whether the row is a method as it stands, under its own name."""
        return self.name == self.method and not self.settings


class Sweep(_Part):
    """How settings are chosen before the runs, on data that no test split contains."""

    seeds: list[int]
    """Seeds of every trial."""
    settings: dict[str, Any] = {}
    """Settings of the trials alone, e.g. fewer rounds."""
    validation_share: float = Field(0.25, gt=0, lt=1)
    """Share of each client's training split that trials are judged on instead of its test split."""
    trials: Candidates = {}
    """Candidates of rows without own ones."""
    own: dict[str, Candidates] = {}
    """Candidates of single rows, by label."""


class Smoke(_Part):
    """The experiment at a size that shows within minutes that everything runs. Its figures mean nothing."""

    settings: dict[str, Any] = {}
    """In the place of those of all rows."""
    seeds: list[int] = Field([0], min_length=1)
    """In the place of the experiment's."""
    vary: Candidates | None = None
    """In the place of the experiment's; none: as it has it."""
    rows: list[str] = []
    """Labels of the rows that run; by default all."""


class Experiment(_Part):
    """Contents of an experiment's YAML file.

    Examples
    --------
    >>> experiment = Experiment.model_validate(
    ...     {"name": "two", "seeds": [0, 1], "rows": ["cafedistill", {"method": "cafedistill", "settings": {"mu": 2}}]}
    ... )
    >>> [row.name for row in experiment.rows]
    ['cafedistill', 'cafedistill mu=2']
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)
    """Name of the experiment's folder below the folder of all results."""
    title: str = ""
    """Of the page; by default the name."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of every row."""
    budget: Literal["equal", "published"] = "equal"
    """'equal': every row takes the same number of local gradient steps; 'published': as its paper has it."""
    settings: dict[str, Any] = {}
    """Settings of all rows."""
    vary: Candidates = {}
    """Conditions, with a table for each: every combination of lists of values, or a list of mappings."""
    rows: list[Row] = Field(min_length=1)
    """Rows of the tables."""
    reference: str = ""
    """Label of the row that differences are taken to; by default the first."""
    baselines: list[str] | None = None
    """Rows that count as baselines in their published form; 'published', the default: all that are no more than a
    method's name, without CAFEDistill and its variants. The best of them sets the accuracy at which MACs are compared.
    """
    sweep: Sweep | None = None
    """How settings are chosen before the runs; none: they are taken as they stand."""
    smoke: Smoke | None = None
    """What ``compare --smoke`` changes."""

    is_smoke: ClassVar[bool] = False
    """Whether this is the small size, whose figures mean nothing."""

    @field_validator("rows", mode="before")
    @classmethod
    def _names_are_rows(cls, rows: Any) -> Any:
        return [{"method": row} if isinstance(row, str) else row for row in rows] if isinstance(rows, list) else rows

    @field_validator("baselines", mode="before")
    @classmethod
    def _default_baselines(cls, labels: Any) -> Any:
        return None if labels == "published" else labels

    @model_validator(mode="after")
    def _agree(self) -> Experiment:
        if problems := list(dict.fromkeys(_disagreements(self))):
            raise ValueError("\n".join(problems))
        return self

    @property
    def labels(self) -> list[str]:
        """Labels of the rows."""
        return [row.name for row in self.rows]

    @property
    def reference_row(self) -> str:
        """Label of the row that differences are taken to."""
        return self.reference or self.labels[0]

    @property
    def baseline_rows(self) -> list[str]:
        """Labels of the baselines in published form."""
        if self.baselines is not None:
            return self.baselines
        return [row.name for row in self.rows if row.plain and not row.method.startswith("cafedistill")]

    @property
    def conditions(self) -> list[Condition]:
        """Every combination of what is varied."""
        return [tuple(values.items()) for values in _combinations(self.vary)]

    @property
    def varied(self) -> set[str]:
        """Settings that differ between conditions."""
        return {key for condition in self.conditions for key, _ in condition}

    def trials(self, label: str) -> list[dict[str, Any]]:
        """Candidate settings of a row; empty without a sweep."""
        if self.sweep is None:
            return []
        candidates = self.sweep.own.get(label, self.sweep.trials)
        return _combinations(candidates) if candidates else []


class SmokeExperiment(Experiment):
    """An experiment at its smoke size, see :func:`smoke_size`."""

    is_smoke: ClassVar[bool] = True


def smoke_size(experiment: Experiment) -> SmokeExperiment:
    """The experiment at the size that its ``smoke`` section gives, under a name and title that say so.

    There is no sweep: settings are taken as they stand.

    Raises
    ------
    ValueError
        If the experiment has no such section.

    Examples
    --------
    >>> smoke = {"settings": {"num-server-rounds": 2}, "rows": ["local"]}
    >>> whole = Experiment.model_validate({"name": "a", "seeds": [1, 2], "rows": ["fedavg", "local"], "smoke": smoke})
    >>> small = smoke_size(whole)
    >>> small.name, small.seeds, small.labels, small.settings
    ('a-smoke', [0], ['local'], {'num-server-rounds': 2})
    """
    if experiment.smoke is None:
        raise ValueError(
            f"the experiment {experiment.name!r} has no smoke size: add a section 'smoke' with the settings that make "
            "it small, or leave --smoke out"
        )
    smoke = experiment.smoke
    rows = [row for row in experiment.rows if row.name in smoke.rows or not smoke.rows]
    labels = [row.name for row in rows]
    return SmokeExperiment.model_validate(
        {
            "name": f"{experiment.name}-smoke",
            "title": f"SMOKE RUN, figures mean nothing: {experiment.title or experiment.name}",
            "seeds": smoke.seeds,
            "budget": experiment.budget,
            "settings": {**experiment.settings, **smoke.settings},
            "vary": experiment.vary if smoke.vary is None else smoke.vary,
            "rows": rows,
            "reference": experiment.reference_row if experiment.reference_row in labels else "",
            "baselines": [label for label in experiment.baseline_rows if label in labels],
        }
    )


def with_data_dir(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with copies of the hub's sets in another folder."""
    return experiment.model_copy(update={"settings": {**experiment.settings, "data-dir": str(folder)}})


def _disagreements(experiment: Experiment) -> Iterator[str]:
    """What is wrong with an experiment whose parts are each well formed."""
    labels = experiment.labels
    for where, seeds in (("seeds", experiment.seeds), ("sweep: seeds", experiment.sweep and experiment.sweep.seeds)):
        if seeds is not None and not seeds:
            yield f"{where} is empty"
        yield from (f"{where} has {seed} more than once" for seed in _repeated(seeds or []))
    for row in experiment.rows:
        if row.method not in METHODS:
            yield f"unknown method {row.method!r}; {nearest(row.method, METHODS)}"
        if len(row.name) > 60:
            yield f"row {row.name!r}: give it a label of at most 60 characters"
    yield from (f"two rows have the label {label!r}" for label in _repeated(labels))
    slugs = [slug(label) for label in dict.fromkeys(labels)]
    for one in _repeated(slugs):
        same = [repr(label) for label in dict.fromkeys(labels) if slug(label) == one]
        yield f"rows {', '.join(same)} would share the folder {one!r}: choose labels that differ in letters or digits"
    named = {"reference": [experiment.reference_row], "baselines": experiment.baseline_rows}
    named["sweep: own"] = list(experiment.sweep.own) if experiment.sweep else []
    for where, used in named.items():
        yield from (f"{where}: no row is called {u!r}; {nearest(u, labels)}" for u in used if u not in labels)
    yield from _misplaced(experiment)
    if experiment.smoke:
        used = experiment.smoke.rows
        yield from (f"smoke: no row is called {u!r}; {nearest(u, labels)}" for u in used if u not in labels)
        yield from (f"smoke: seeds has {seed} more than once" for seed in _repeated(experiment.smoke.seeds))
        if len(experiment.name) > 54:
            yield "name: at most 54 characters, where there is a smoke size (its folder is called <name>-smoke)"
    if not experiment.conditions:
        yield "vary is an empty list"
    yield from (f"vary: {words(twice) or 'nothing'} stands there twice" for twice in _repeated(experiment.conditions))
    if experiment.sweep:
        counts = {label: len(experiment.trials(label)) for label in labels}
        if min(counts.values()) < 1:
            yield f"sweep: no trials for {', '.join(repr(label) for label, n in counts.items() if not n)}"
        elif len(set(counts.values())) > 1:
            have = ", ".join(f"{label!r} {n}" for label, n in counts.items())
            yield f"sweep: all rows should have the same number of trials, got {have}"


def _misplaced(experiment: Experiment) -> Iterator[str]:
    """Settings that stand where they may not."""
    places: list[tuple[str, Iterable[str], set[str]]] = [
        ("settings", experiment.settings, set()),
        ("vary", sorted(experiment.varied), set()),
    ]
    fixed = _COMMON | experiment.varied | (_STEPS if experiment.budget == "equal" else set())
    for row in experiment.rows:
        trials = experiment.trials(row.name)
        places.append((f"row {row.name!r}", row.settings, fixed))
        places.append((f"sweep: trials of {row.name!r}", list(itertools.chain.from_iterable(trials)), fixed))
    if experiment.sweep:
        places.append(("sweep: settings", experiment.sweep.settings, _COMMON | experiment.varied))
    if experiment.smoke:
        vary = experiment.vary if experiment.smoke.vary is None else experiment.smoke.vary
        varied = sorted({key for values in _combinations(vary) for key in values} & set(experiment.smoke.settings))
        places.append(("smoke: vary", sorted({key for values in _combinations(vary) for key in values}), set()))
        yield from (f"smoke: settings: {key} is varied, so it cannot be one value for all" for key in varied)
        places.append(("smoke: settings", experiment.smoke.settings, set()))
    for where, keys, not_here in places:
        for key in keys:
            if key in _OURS | _BUDGET:
                yield f"{where}: {key} is set by the comparison itself"
            elif key in not_here:
                yield f"{where}: {key} must be the same in all rows; set it under 'settings' or 'vary'"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known."""
    known = list(known)
    near = closest(name, known)
    return f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"


def slug(text: str) -> str:
    """A text as part of a folder's name.

    Examples
    --------
    >>> slug("FedAvg + prior (λ = 0.1)")
    'fedavg-prior-0.1'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def words(condition: Condition) -> str:
    """A condition as a person reads it; empty if nothing is varied.

    Examples
    --------
    >>> words((("dirichlet-alpha", 0.1), ("num-clients", 20)))
    'dirichlet-alpha = 0.1, num-clients = 20'
    """
    return ", ".join(f"{key} = {value}" for key, value in condition)


def settings_words(settings: Mapping[str, Any]) -> str:
    """Settings as a person reads them: ``mu=2.0, learning-rate=0.1``."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if values.index(value) < i]


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands there twice", mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for a text; people do not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_experiment(path: Path) -> Experiment:
    """Read an experiment's YAML file.

    Raises
    ------
    ValueError
        Naming the file and everything in it that cannot be used: unknown keys and methods with the nearest known one.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should be a mapping with the keys {', '.join(_keys(Experiment))}")
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors()]
        raise ValueError("\n".join(f"{path}: {line}" for p in problems for line in p.splitlines())) from None


def _keys(part: type[_Part]) -> list[str]:
    return [kebab(name) for name in part.model_fields]


def _explain(detail: Any) -> str:
    """One pydantic error in words for people."""
    if not detail["loc"]:  # raised by a rule about the whole file
        return str(detail["ctx"]["error"])
    *outer, key = detail["loc"]
    where = f"{_place(outer)}: " if outer else ""
    if detail["type"] == "extra_forbidden":
        parts: dict[Any, type[_Part]] = {"sweep": Sweep, "rows": Row, "smoke": Smoke}
        return f"{where}unknown key {key!r}; {nearest(str(key), _keys(parts[outer[0]] if outer else Experiment))}"
    if detail["type"] == "missing":
        return f"{where}the key {key!r} is missing"
    expected = detail["msg"].partition(" should ")[2] or detail["msg"]
    return f"{_place(detail['loc'])} should {expected}, got {detail['input']!r}"


def _place(loc: Sequence[Any]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc).removeprefix(".")


# --- planned runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment.

    Attributes
    ----------
    row
        Label of its row.
    condition
        Values of what is varied.
    settings
        All its settings; they name its folder.
    trial
        Position among the row's trials; None: it is no trial but counts for the table.
    """

    row: str
    condition: Condition
    settings: Settings
    trial: int | None = None

    @property
    def name(self) -> str:
        """Of its folder: row, condition, trial and seed."""
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
        """Rounds on record."""
        try:
            return (self.folder / "rounds.jsonl").read_text().count("\n")
        except OSError:
            return 0


Chosen = Mapping[tuple[str, Condition], Mapping[str, Any]]
"""Settings that a sweep has chosen, by row and condition."""


def plan_trials(experiment: Experiment, folder: Path) -> list[PlannedRun]:
    """Runs of the sweep: row × condition × trial × seed. Empty without a sweep.

    Parameters
    ----------
    experiment
        What was asked for.
    folder
        Of the experiment.

    Raises
    ------
    ValueError
        Naming the row, for settings that cannot be used.
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
    """Runs of the tables: row × condition × seed.

    Parameters
    ----------
    experiment, folder
        As for :func:`plan_trials`.
    chosen
        Settings that the sweep chose; with a sweep, a row that is not in it has no runs yet. None: no choice is made.

    Raises
    ------
    ValueError
        Naming the row, for settings that cannot be used.
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


# --- checks before anything runs -------------------------------------------------------------------------------------


def check_experiment(experiment: Experiment, folder: Path) -> None:
    """Build what every run needs: its settings, its clients' data, its network and its method.

    Raises
    ------
    ValueError
        A line for every reason why a run could not start.
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


State = Literal["finished", "resumable", "new"]


def state_of(run: PlannedRun, undecided: Iterable[str] = ()) -> State:
    """How far a run is, by what its folder holds. Settings that only other methods read do not count.

    Parameters
    ----------
    run
        As it is wanted.
    undecided
        Settings that may still change, and are not compared.

    Raises
    ------
    ValueError
        If the folder holds something else than (a part of) this run.
    """
    if not run.folder.is_dir() or is_bare(run.folder):
        return "new"
    advice = "choose another name for the experiment, or another --results-dir"
    try:
        before = json.loads((run.folder / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{run.folder} is in the way, it is no run of cafe-flwr ({error}): {advice}") from None
    wanted, defaults = run.settings.to_run_config(), Settings.from_run_config({}).to_run_config()
    differing = [key for key, value in wanted.items() if key not in _FREE and before.get(key, defaults[key]) != value]
    ignored = keys_of_other_methods(run.settings.method).union(undecided)
    if changed := [key for key in differing if key not in ignored]:
        details = "; ".join(f"{key} was {before.get(key, defaults[key])!r}, now {wanted[key]!r}" for key in changed)
        raise ValueError(f"row {run.row!r}: {run.folder} is the result of another experiment ({details}): {advice}")
    if read_summary(run):
        return "finished"
    return "resumable" if not differing and Checkpoints(run.folder / "checkpoint").load() else "new"


def is_finished(run: PlannedRun) -> bool:
    """Whether the run's figures are there; see :func:`state_of` for what is raised."""
    return state_of(run) == "finished"


def read_summary(run: PlannedRun) -> dict[str, Any] | None:
    """Figures of a run, None if there are none that can be read."""
    try:
        return dict(json.loads((run.folder / "summary.json").read_text()))
    except (OSError, ValueError):
        return None


def check_folders(experiment: Experiment, folder: Path) -> None:
    """See that the folders of all runs are free, or hold just these runs.

    Raises
    ------
    ValueError
        A line for every row with a folder that holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is in the way, it is no folder")
    problems: dict[str, str] = {}
    for run in plan_trials(experiment, folder) + plan_runs(experiment, folder):
        swept = {key for trial in experiment.trials(run.row) for key in trial} if run.trial is None else set()
        if swept:  # rounds left after fine-tuning may follow from it
            swept.add("num-server-rounds")
        try:
            state_of(run, swept)
        except ValueError as error:
            problems.setdefault(run.row, str(error))
    if problems:
        raise ValueError("\n".join(problems.values()))
