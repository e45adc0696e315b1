"""All settings of a run: declared by the subpackages that read them, collected and checked before the first round."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model, model_validator
from pydantic.alias_generators import to_snake

from cafe_flwr.core.log import logger
from cafe_flwr.core.older_settings import renamed
from cafe_flwr.core.options import Option, in_keys, options_of
from cafe_flwr.core.strict import STRICT, fields_of
from cafe_flwr.core.tables import leaves, nested
from cafe_flwr.core.text import MAX_MESSAGE, brief, closest, shown
from cafe_flwr.data.options import TEXT_SETS, Data, Heterogeneity, check_clients, check_data
from cafe_flwr.methods.base import Method, ObjectiveName
from cafe_flwr.methods.registry import METHODS
from cafe_flwr.networks.capacity import read_shares
from cafe_flwr.networks.options import TEXT_NETWORKS, Compute, Model, check_model
from cafe_flwr.risk.options import Calibration
from cafe_flwr.server.options import Aggregation, Federation, Run
from cafe_flwr.training.objectives.base import Objective
from cafe_flwr.training.objectives.registry import OBJECTIVES
from cafe_flwr.training.options import LocalBudget, Schedule, check_training
from cafe_flwr.wire.options import Bounds, Privacy

_SECTIONS = (
    *(Run, ObjectiveName, Federation, Aggregation, Bounds, Privacy, Data, Heterogeneity, Model),
    *(LocalBudget, Schedule, Method, Compute, Calibration),
)


def _declared() -> dict[str, Option]:
    """Every option by its key: those in no table first, the tables of objectives and methods last."""
    found: dict[str, Option] = {}
    for declaration in (*_SECTIONS, *OBJECTIVES.values(), *METHODS.values()):
        found |= {o.key: o for o in options_of(declaration) if o.key not in found}
    tables = list(dict.fromkeys(["", *(o.table for o in found.values())]))
    return dict(sorted(found.items(), key=lambda pair: tables.index(pair[1].table)))


OPTIONS: Mapping[str, Option] = _declared()
"""Mapping from key to setting: ``"seed"``, ``"federation.fraction-train"``."""

FREE_ON_RESUME = frozenset(key for key, o in OPTIONS.items() if o.free)
"""Keys that change no number, and may differ when a run is resumed."""

TABLES = tuple(dict.fromkeys(o.table for o in OPTIONS.values() if o.table))


def _former() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for key, o in OPTIONS.items():
        if o.formerly:
            found[o.formerly] = (*found.get(o.formerly, ()), key)
    return found


FORMER: Mapping[str, tuple[str, ...]] = _former()
"""Today's keys by the name that a setting had before there were tables; two where two objectives read it."""


def _read_when() -> dict[str, Mapping[str, Sequence[Any]]]:
    """For every option, the values that other settings must have for it to be read."""
    of_methods = {name: {o.key for o in options_of(method)} for name, method in METHODS.items()}
    found: dict[str, Mapping[str, Sequence[Any]]] = {}
    for key, o in OPTIONS.items():
        readers = tuple(name for name, keys in of_methods.items() if key in keys)
        of_method = {"method": readers} if 0 < len(readers) < len(METHODS) else {}
        found[key] = {**of_method, **({"objective": (o.table,)} if o.table in OBJECTIVES else {}), **o.only}
    return found


READ_WHEN = _read_when()


if TYPE_CHECKING:

    class _Declared(BaseModel):
        def __init__(self, **values: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
else:
    _CONFIG = ConfigDict(**{**STRICT, "use_attribute_docstrings": False})

    def _model() -> type[BaseModel]:
        of_table = {table: [o for o in OPTIONS.values() if o.table == table] for table in ("", *TABLES)}
        found = fields_of(of_table.pop(""))
        for table, options in of_table.items():
            part = create_model(table, __config__=_CONFIG, **fields_of(options))
            found[to_snake(table)] = (part, part())
        return create_model("_Declared", __config__=_CONFIG, **found)

    _Declared = _model()

Wanted = TypeVar("Wanted")


class Settings(_Declared):
    """Settings of a run: ``settings.seed``, and those in tables as ``settings.federation.fraction_train``.

    In ``pyproject.toml``, in experiments and on the command line names are kebab-case, and tables are nested or written
    with a dot: ``federation.fraction-train``.

    Examples
    --------
    >>> settings = Settings.from_run_config({"num-clients": 10, "federation.fraction-train": 0.5})
    >>> settings.num_clients, settings.federation.fraction_train, settings.learning_rate
    (10, 0.5, 0.15)
    >>> Settings.from_run_config({"dirichlet-alhpa": 0.3})
    Traceback (most recent call last):
        ...
    ValueError: unknown setting 'dirichlet-alhpa'; did you mean 'dirichlet-alpha'?
    """

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Settings:
        """Read settings from a run config; names from before there were tables are still read, with a warning.

        Raises ValueError naming every key that is unknown (with the nearest known one), has the wrong type or an
        invalid value.
        """
        try:
            return cls.model_validate(nested(todays(run_config)), by_alias=True, by_name=False)
        except ValueError as error:
            details = error.errors() if isinstance(error, ValidationError) else []
            said = "; ".join(map(_explain, details)) or str(error)
            raise ValueError(shown(said, MAX_MESSAGE)) from None

    def __reduce__(self) -> Any:  # the classes of tables cannot be pickled by their names
        return Settings.from_run_config, (self.to_run_config(),)

    def to_run_config(self) -> dict[str, bool | int | float | str]:
        """All settings by their keys."""
        return {key: self.value(key) for key in OPTIONS}

    def value(self, key: str) -> Any:
        """The value of a key."""
        table, _, name = key.rpartition(".")
        return getattr(getattr(self, to_snake(table)) if table else self, to_snake(name))

    def of(self, declared: type[Wanted], **instead: Any) -> Wanted:
        """The options of a part, as the dataclass that declares them; ``instead`` replaces some of them."""
        try:
            return declared(**{**{o.field: self.value(o.key) for o in options_of(declared)}, **instead})
        except ValueError as error:
            raise ValueError(in_keys(str(error), declared)) from None

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.method not in METHODS:
            hint = f"; did you mean {near!r}?" if (near := closest(self.method, METHODS)) else ""
            raise ValueError(f"method should be one of {', '.join(METHODS)}, got {brief(self.method)}{hint}")
        check_data(self.of(Data))
        check_model(self.of(Model))
        self.of(Bounds), self.of(Privacy)
        for held in read_shares(self.heterogeneity.depth_shares):
            held.check(self.of(Model).num_exits, "heterogeneity.depth-shares")
        check_clients(self.of(Heterogeneity), self.network, self.dataset)
        check_training(self.build_budget(), self.of(Schedule), self.num_server_rounds)
        for problem in (*_disagreements(self), *_relative_paths(self)):
            raise ValueError(problem)
        return self

    def build_objective(self) -> Objective:
        """What every exit minimises, with its own settings."""
        return self.of(OBJECTIVES[self.objective])

    def build_method(self) -> Method:
        """The method, with its own settings."""
        return self.of(METHODS[self.method], objective=self.build_objective())

    def build_budget(self) -> LocalBudget:
        """How a client trains in one round."""
        return self.of(LocalBudget, **({} if self.train.optimizer == "sgd" else {"momentum": 0.0}))

    def not_read(self) -> dict[str, str]:
        """Keys that no chosen part reads, each with a sentence on what would read it."""
        found = {}
        for key, conditions in READ_WHEN.items():
            for other, values in conditions.items():
                if not _among(has := self.value(other), values):
                    readers = " or ".join(repr(value) for value in values)
                    found[key] = f"it is read with {other} = {readers}, and {other} = {brief(has)}"
        if not self.privacy.noise_multiplier:
            found["privacy.delta"] = "it is read with privacy.noise-multiplier above 0"
        if self.data.partition == "natural" and self.data.natural_split == "even":
            found["dirichlet-alpha"] = "it is read with data.natural-split = 'dirichlet', and that is 'even'"
        return found

    def unread(self) -> dict[str, str]:
        """Keys that are not at their defaults although nothing reads them, with the sentences of :meth:`not_read`."""
        return {key: why for key, why in self.not_read().items() if self.value(key) != OPTIONS[key].default}

    def check_read(self) -> None:
        """Raise ValueError if a setting was changed that nothing reads, naming what would."""
        if found := self.unread().items():
            said = (f"{k} = {brief(self.value(k))} would change nothing: {why}" for k, why in found)
            raise ValueError(shown("; ".join(said), MAX_MESSAGE))

    @property
    def run_name(self) -> str:
        """The name of the run, see :meth:`cafe_flwr.server.options.Run.called`."""
        return self.of(Run).called(self.dataset)

    @property
    def results(self) -> Path:
        """Folder of this run's results."""
        return self.of(Run).folder(self.dataset)


def _disagreements(s: Settings) -> Iterator[str]:
    """Contradictions between settings that are each valid."""
    method = s.build_method()
    if s.federation.min_train_nodes > s.num_clients:
        yield (
            f"federation.min-train-nodes ({s.federation.min_train_nodes}) must not exceed num-clients ({s.num_clients})"
        )
    if method.equal_steps and not s.local_epochs and s.local_steps < method.phases:
        yield (
            f"local-steps = {s.local_steps} cannot be shared by the {method.phases} things that {s.method} "
            "trains in a round: raise it, or set train.equal-steps = false"
        )
    takes, holds = ("texts" if it else "images" for it in (s.network in TEXT_NETWORKS, s.dataset in TEXT_SETS))
    if takes != holds:
        fitting = "'transformer'" if holds == "texts" else "'conv' or 'resnet18'"
        yield f"network = {s.network!r} takes {takes}, and {s.dataset!r} holds {holds}: set network to {fitting}"
    if s.objective == "neo-kd" and takes == "texts":
        yield "objective = 'neo-kd' perturbs inputs, which tokens cannot be: choose another one"
    if s.train.optimizer != "sgd" and s.train.momentum not in (0.0, OPTIONS["train.momentum"].default):
        yield f"train.momentum = {s.train.momentum} is read by sgd alone: set it to 0, or train.optimizer = 'sgd'"


def _relative_paths(s: Settings) -> Iterator[str]:
    for key in ("results-dir", "federation.state-dir", "data.dir", "dataset"):
        path = s.value(key)
        if key == "dataset":
            path = "" if s.data.dir else path.partition(":")[2]
        if why := _unusable(path):
            yield f"{key} is no path that can be used, got {brief(path)}: {why}"
        elif path and not Path(path).expanduser().is_absolute():
            yield (
                f"{key} must be an absolute path or start with '~', got {brief(path)}: Flower's processes have "
                "their own working directory" + "; or set data.dir, where it lies" * (key == "dataset")
            )


def _unusable(path: str) -> str:
    """Why a path cannot be used; empty if it can."""
    if not path.isprintable():
        return "it has characters that cannot be printed"
    try:
        parts = Path(path).expanduser().parts
    except RuntimeError:
        return "there is no such user"
    return "a name in it is longer than 255 bytes" * any(len(os.fsencode(part)) > 255 for part in parts)


def _among(value: Any, values: Sequence[Any]) -> bool:
    """Whether a value is among some; ``"local:<path>"`` stands for all paths."""
    return value in values or (str(value).startswith("local:") and "local:<path>" in values)


def todays(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """A run config under today's keys, with a dot for tables; names and values are not checked.

    Raises ValueError if a setting is given twice, for example by its former and its present name, or a table is given
    as a value.

    Examples
    --------
    >>> todays({"seed": 1, "federation": {"wait-seconds": 5.0}})
    {'seed': 1, 'federation.wait-seconds': 5.0}
    """
    given: dict[str, Any] = {}
    for key, value in leaves(run_config):
        if not key.isprintable():
            raise ValueError(f"unknown setting {brief(key)}: names of settings are letters, digits, '-' and '.'")
        if key in given:
            raise ValueError(f"{brief(key)} is there twice, in a table and with a dot: leave one out")
        if key in TABLES:
            name = next(k for k, o in OPTIONS.items() if o.table == key)
            raise ValueError(
                f"{key} is a table of settings, got {brief(value)}: write {name} = {OPTIONS[name].default!r}"
            )
        given[key] = value
    found: dict[str, Any] = {}
    former = []
    for key, value in given.items():
        now = FORMER.get(key, (key,))
        if len(now) > 1:  # of the objective that is chosen
            now = tuple(k for k in now if k.startswith(f"{given.get('objective')}.")) or now
        if key in FORMER:
            former.append((key, " and ".join(map(repr, now))))
        for k in now:
            if k in found or (k != key and k in given):
                raise ValueError(f"{key!r} and {k!r} are the same setting: leave out {key!r}, its name of before")
            found[k] = value
    if former:
        _tell_former(tuple(former))
    return found


@lru_cache(maxsize=64)
def _tell_former(names: tuple[tuple[str, str], ...]) -> None:
    """Warn, once per process, of former names, which will not be read for ever."""
    pairs = [f"{name!r} is {now}" for name, now in names[:8]]
    more = f" and {len(names) - len(pairs)} more" * (len(names) > len(pairs))
    said = "Settings have other names now, and this release is the last to read the old ones"
    logger.warning("%s: %s%s", said, ", ".join(pairs), more)


def _explain(detail: Any) -> str:
    """One pydantic error in words for people."""
    if not detail["loc"]:  # raised by a rule about several settings
        return str(detail["ctx"]["error"])
    key, value = ".".join(map(str, detail["loc"])), detail["input"]
    if detail["type"] == "extra_forbidden":
        key = next(leaves({key: value}), (key, None))[0]
        if now := renamed(key):
            return f"unknown setting {key!r}: {now}"
        hint = f"did you mean {near!r}?" if (near := _nearest(key)) else "cafe-flwr settings lists all there are"
        return f"unknown setting {brief(key)}; {hint}"
    if isinstance(value, dict):
        return f"{key} is one value, got the table {brief(value)}: write {key} = {OPTIONS[key].default!r}, or the like"
    expected = detail["msg"].partition(" should ")[2] or detail["msg"]
    return f"{key} should {shown(expected)}, got {brief(value)} ({OPTIONS[key].doc})"


def _nearest(key: str) -> str | None:
    """The key most like a name, compared with whole keys, their names in their tables and their former names."""
    names = {name: k for k, o in OPTIONS.items() for name in (k.rpartition(".")[2], o.formerly) if name}
    names |= {k: k for k in OPTIONS}
    table, _, name = key.rpartition(".")
    if table in TABLES and name in names:  # right, but in the wrong table
        return names[name]
    return names.get(closest(key, names) or "")
