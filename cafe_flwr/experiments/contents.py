"""The contents of an experiment's YAML file, each part checked by itself: rows, conditions, sweep and smoke size."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, field_validator

from cafe_flwr.core.strict import STRICT
from cafe_flwr.settings import todays

Condition = tuple[tuple[str, Any], ...]
"""The settings of one table that differ between tables, as (setting, value) pairs; empty if nothing is varied."""


def _candidates(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [todays(item) for item in value]
    lists = todays(value) if isinstance(value, dict) else {"": value}
    if all(isinstance(item, list) and item for item in lists.values()):
        return lists
    raise ValueError("it should be lists of values ({learning-rate: [0.1, 0.3]}) or a list of mappings")


def combinations(candidates: Any) -> list[dict[str, Any]]:
    """The settings that candidates stand for: every combination of lists, or the mappings as they are."""
    if isinstance(candidates, list):
        return candidates
    return [dict(zip(candidates, values, strict=True)) for values in itertools.product(*candidates.values())]


Candidates = Annotated[dict[str, list[Any]] | list[dict[str, Any]], PlainValidator(_candidates)]
"""Settings to try: every combination of lists, or a list of mappings."""


def _settings(value: Any) -> Any:
    return todays(value) if isinstance(value, dict) else value


SomeSettings = Annotated[dict[str, Any], BeforeValidator(_settings)]
"""Settings under today's keys; in the file, tables are nested or a dot."""


class Part(BaseModel):
    """A mapping in the file: kebab-case keys, no unknown ones."""

    model_config = STRICT | ConfigDict(validate_by_name=False)


class Row(Part):
    """A row of the table: a method with settings of its own."""

    method: str
    """Name of the method."""
    label: str = Field("", max_length=60)
    """How the table names the row; by default the method, with the row's settings if it has any."""
    settings: SomeSettings = {}
    """Settings of this row alone."""

    @property
    def name(self) -> str:
        """The row's label, given or made."""
        return self.label or " ".join([self.method, *(f"{short(key)}={value}" for key, value in self.settings.items())])

    @property
    def plain(self) -> bool:
        """Whether the row is a method as it stands, under its own name."""
        return self.name == self.method and not self.settings


class Sweep(Part):
    """How settings are chosen before the runs, on data that no test split contains."""

    seeds: list[int]
    """Seeds of every trial."""
    settings: SomeSettings = {}
    """Settings of the trials alone, e.g. fewer rounds."""
    validation_share: float = Field(0.25, gt=0, lt=1)
    """Share of each client's training split that trials are judged on instead of its test split."""
    trials: Candidates = {}
    """Candidates of all rows that have none of their own."""
    own: dict[str, Candidates] = {}
    """Candidates of single rows, by their label."""


class Smoke(Part):
    """A small size of the experiment that shows within minutes that everything runs; its figures mean nothing."""

    settings: SomeSettings = {}
    """Settings that replace those of all rows."""
    seeds: list[int] = Field([0], min_length=1)
    """Seeds that replace the experiment's."""
    vary: Candidates | None = None
    """What is varied instead; by default what the experiment varies."""
    rows: list[str] = []
    """Labels of the rows that run; by default all."""


class Contents(Part):
    """Contents of an experiment's YAML file, without the checks between its parts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)
    """Name of the experiment's folder below the folder of all results."""
    title: str = ""
    """Title of the page; by default the name."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of every row."""
    budget: Literal["equal", "published"] = "equal"
    """'equal': every row takes the same number of local gradient steps; 'published': as its paper has it."""
    settings: SomeSettings = {}
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
    """How settings are chosen before the runs; by default they are taken as given."""
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
        return [tuple(values.items()) for values in combinations(self.vary)]

    @property
    def varied(self) -> set[str]:
        """Settings that differ between conditions."""
        return {key for condition in self.conditions for key, _ in condition}

    def trials(self, label: str) -> list[dict[str, Any]]:
        """Candidate settings of a row; empty without a sweep."""
        if self.sweep is None:
            return []
        candidates = self.sweep.own.get(label, self.sweep.trials)
        return combinations(candidates) if candidates else []


def slug(text: str) -> str:
    """A text as part of a folder's name.

    Examples
    --------
    >>> slug("FedAvg + prior (λ = 0.1)")
    'fedavg-prior-0.1'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def short(key: str) -> str:
    """A setting's name without its table: as tables and folders call it."""
    return key.rpartition(".")[2]


def words(condition: Condition) -> str:
    """A condition as text; empty if nothing is varied.

    Examples
    --------
    >>> words((("dirichlet-alpha", 0.1), ("data.label-groups", 5)))
    'dirichlet-alpha = 0.1, label-groups = 5'
    """
    return ", ".join(f"{short(key)} = {value}" for key, value in condition)


def settings_words(settings: Mapping[str, Any]) -> str:
    """Settings as text: ``mu=2.0, learning-rate=0.1``."""
    return ", ".join(f"{short(key)}={value}" for key, value in settings.items())
