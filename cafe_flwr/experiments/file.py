"""Reads an experiment, methods × settings × seeds, from one YAML file and checks it before anything runs.

    YAML file → Experiment → planned runs → checks → worker processes → a results folder per run → tables
    (this file)              (plan.py)               (execution.py)                               (comparison.py)

All rows of an experiment share the partition, the initial weights, the participants of every round and, with
``budget: equal``, the number of local gradient steps.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError, model_validator

from cafe_flwr.core.text import in_words, kebab
from cafe_flwr.experiments.checks import disagreements
from cafe_flwr.experiments.contents import Contents, Part, Row, Smoke, Sweep


class Experiment(Contents):
    """Contents of an experiment's YAML file.

    Examples
    --------
    >>> experiment = Experiment.model_validate(
    ...     {"name": "two", "seeds": [0, 1], "rows": ["cafedistill", {"method": "cafedistill", "settings": {"mu": 2}}]}
    ... )
    >>> [row.name for row in experiment.rows]
    ['cafedistill', 'cafedistill mu=2']
    """

    @model_validator(mode="after")
    def _agree(self) -> Experiment:
        if problems := disagreements(self):
            raise ValueError("\n".join(problems))
        return self


class SmokeExperiment(Experiment):
    """An experiment at its smoke size, see :func:`smoke_size`."""

    is_smoke: ClassVar[bool] = True


def smoke_size(experiment: Experiment) -> SmokeExperiment:
    """The experiment at the size of its ``smoke`` section, without a sweep, under a name and title that say so.

    Raises ValueError if the experiment has no such section.

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
    return experiment.model_copy(update={"settings": {**experiment.settings, "data.dir": str(folder)}})


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands there twice", mark)
        return super().construct_mapping(node, deep)


# Numbers like 1e-3, which YAML 1.1 reads as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_experiment(path: Path) -> Experiment:
    """Read an experiment's YAML file.

    Raises ValueError naming the file and every problem in it; for unknown names, the nearest known one.
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


def _keys(part: type[Part]) -> list[str]:
    return [kebab(name) for name in part.model_fields]


def _explain(detail: Any) -> str:
    """One pydantic error in words for people."""
    parts: dict[Any, type[Part]] = {"sweep": Sweep, "rows": Row, "smoke": Smoke}
    part = parts.get(detail["loc"][0], Experiment) if detail["loc"][1:] else Experiment
    return in_words(detail, _keys(part))
