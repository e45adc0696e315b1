"""Checks between the parts of an experiment's file: names that clash, settings that are not allowed where they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cafe_flwr.core.text import nearest
from cafe_flwr.experiments.contents import Contents, combinations, slug, words
from cafe_flwr.methods.registry import METHODS
from cafe_flwr.settings import OPTIONS

_OURS, _COMMON, _STEPS = (
    {key for key, o in OPTIONS.items() if o.compare == what}
    for what in ("own", "all", "budget")  # the comparison's; of all rows; of all rows if the budget is equal
)


def disagreements(experiment: Contents) -> list[str]:
    """All problems, a sentence each."""
    rules = (_about_seeds, _about_rows, _unknown_rows, _misplaced, _about_smoke, _about_vary, _about_trials)
    return list(dict.fromkeys(itertools.chain.from_iterable(rule(experiment) for rule in rules)))


def _about_seeds(experiment: Contents) -> Iterator[str]:
    for where, seeds in (("seeds", experiment.seeds), ("sweep: seeds", experiment.sweep and experiment.sweep.seeds)):
        if seeds is not None and not seeds:
            yield f"{where} is empty"
        yield from (f"{where} has {seed} more than once" for seed in _repeated(seeds or []))


def _about_rows(experiment: Contents) -> Iterator[str]:
    for row in experiment.rows:
        if row.method not in METHODS:
            yield f"unknown method {row.method!r}; {nearest(row.method, METHODS)}"
        if len(row.name) > 60:
            yield f"row {row.name!r}: give it a label of at most 60 characters"
    labels = experiment.labels
    yield from (f"two rows have the label {label!r}" for label in _repeated(labels))
    slugs = [slug(label) for label in dict.fromkeys(labels)]
    for one in _repeated(slugs):
        same = [repr(label) for label in dict.fromkeys(labels) if slug(label) == one]
        yield f"rows {', '.join(same)} would share the folder {one!r}: choose labels that differ in letters or digits"


def _unknown_rows(experiment: Contents) -> Iterator[str]:
    named = {"reference": [experiment.reference_row], "baselines": experiment.baseline_rows}
    named["sweep: own"] = list(experiment.sweep.own) if experiment.sweep else []
    for where, used in named.items():
        yield from _not_among(experiment.labels, where, used)


def _not_among(labels: Sequence[str], where: str, used: Iterable[str]) -> Iterator[str]:
    yield from (f"{where}: no row is called {u!r}; {nearest(u, labels)}" for u in used if u not in labels)


def _misplaced(experiment: Contents) -> Iterator[str]:
    """Settings that are not allowed where they are."""
    smoke = experiment.smoke
    if smoke:
        varied = _varied_when_small(experiment) & set(smoke.settings)
        yield from (f"smoke: settings: {key} is varied, so it cannot be one value for all" for key in sorted(varied))
    for where, keys, not_here in _places(experiment):
        for key in keys:
            if key in _OURS:
                yield f"{where}: {key} is set by the comparison itself"
            elif key in not_here:
                yield f"{where}: {key} must be the same in all rows; set it under 'settings' or 'vary'"


def _places(experiment: Contents) -> Iterator[tuple[str, Iterable[str], set[str]]]:
    """Every place with settings, their names, and names not allowed there because all rows share them."""
    shared = _COMMON | experiment.varied
    of_rows = shared | (_STEPS if experiment.budget == "equal" else set())
    yield "settings", experiment.settings, set()
    yield "vary", sorted(experiment.varied), set()
    for row in experiment.rows:
        yield f"row {row.name!r}", row.settings, of_rows
        tried = itertools.chain.from_iterable(experiment.trials(row.name))
        yield f"sweep: trials of {row.name!r}", tried, of_rows
    if experiment.sweep:
        yield "sweep: settings", experiment.sweep.settings, shared
    if experiment.smoke:
        yield "smoke: vary", sorted(_varied_when_small(experiment)), set()
        yield "smoke: settings", experiment.smoke.settings, set()


def _varied_when_small(experiment: Contents) -> set[str]:
    """Settings that differ between the conditions of the smoke size."""
    smoke = experiment.smoke
    vary = experiment.vary if smoke is None or smoke.vary is None else smoke.vary
    return {key for values in combinations(vary) for key in values}


def _about_smoke(experiment: Contents) -> Iterator[str]:
    smoke = experiment.smoke
    if smoke is None:
        return
    yield from _not_among(experiment.labels, "smoke", smoke.rows)
    yield from (f"smoke: seeds has {seed} more than once" for seed in _repeated(smoke.seeds))
    if len(experiment.name) > 54:
        yield "name: at most 54 characters, where there is a smoke size (its folder is called <name>-smoke)"


def _about_vary(experiment: Contents) -> Iterator[str]:
    if not experiment.conditions:
        yield "vary is an empty list"
    yield from (f"vary: {words(twice) or 'nothing'} stands there twice" for twice in _repeated(experiment.conditions))


def _about_trials(experiment: Contents) -> Iterator[str]:
    if experiment.sweep is None:
        return
    counts = {label: len(experiment.trials(label)) for label in experiment.labels}
    if min(counts.values()) < 1:
        yield f"sweep: no trials for {', '.join(repr(label) for label, n in counts.items() if not n)}"
    elif len(set(counts.values())) > 1:
        have = ", ".join(f"{label!r} {n}" for label, n in counts.items())
        yield f"sweep: all rows should have the same number of trials, got {have}"


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if values.index(value) < i]
