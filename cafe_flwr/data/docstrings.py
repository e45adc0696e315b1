"""A text data set that needs no download: from which Python package is this sentence?

The sentences are from the docstrings of packages that this one depends on. Their sources are parsed, not imported.
Whole modules go to train, calibration or test, so that no test sentence is from a module of training. Names of the
packages are removed from the sentences. The same versions of Python and of the packages give the same data.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.core.random import rng_for

PACKAGES = (
    *("python", "numpy", "scipy", "pandas", "sklearn", "torch"),
    *("matplotlib", "sympy", "networkx", "datasets", "flwr", "pydantic"),
)
"""The classes; ``python`` is the standard library."""

PER_PACKAGE = 600  # sentences, about
_ALIASES = ("np", "pd", "sp", "plt", "mpl", "nx", "pytorch", "scikit", "learn", "flower", "pyplot", "dataframe")
_NAMES = re.compile(rf"\b({'|'.join((*PACKAGES, *_ALIASES))})\b", re.IGNORECASE)
_SKIPPED = {"tests", "test", "testing", "site-packages", "dist-packages", "_vendor", "externals", "idlelib", "v1"}
_LARGEST = 150_000  # bytes of a source file; larger ones are tables and generated code
_MARKUP = re.compile(r">>>|---|===|::")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


class Sentences(NamedTuple):
    """All N sentences, which differ, with labels (positions in ``PACKAGES``) and numbers of their modules."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    modules: NDArray[np.int64]


@lru_cache(maxsize=1)
def sentences() -> Sentences:
    """Read about 600 sentences of every package; ValueError if a package has no sources here."""
    packages: dict[str, set[int]] = {}  # packages with the sentence
    found: list[tuple[str, int, int]] = []
    modules = 0
    for label, package in enumerate(PACKAGES):
        number = 0
        for file in _sources(package):
            modules += 1
            for text in _sentences_of(file):
                said_by = packages.setdefault(text, set())
                if not said_by:
                    found.append((text, label, modules))
                    number += 1
                said_by.add(label)
            if number >= PER_PACKAGE:
                break
        if not number:
            raise ValueError(f"dataset = 'docstrings' needs the sources of {package}, which have no docstrings here")
    kept = [row for row in found if len(packages[row[0]]) == 1]  # in one package only
    texts, labels, numbers = zip(*kept, strict=True)
    return Sentences(texts, np.array(labels, dtype=np.int64), np.array(numbers, dtype=np.int64))


def draw(num_examples: int, shares: Sequence[float], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of ``sentences()`` for a federation, ascending, equally many of every package, and the split of each row.

    There are ``num_examples`` in all, or fewer if a package has too few. Splits are 0, 1 or 2 (train, calibration and
    test) and hold about these shares of a package's sentences, in whole modules.
    """
    data = sentences()
    rng = rng_for(seed, 0, -1, "docstrings")
    wanted = -(-num_examples // len(PACKAGES))
    rows, splits = [], []
    for label in range(len(PACKAGES)):
        chosen = np.sort(rng.permutation(np.flatnonzero(data.labels == label))[:wanted])
        rows.append(chosen)
        splits.append(_by_module(data.modules[chosen], shares, rng))
    return np.concatenate(rows), np.concatenate(splits)


def _by_module(modules: NDArray[np.int64], shares: Sequence[float], rng: np.random.Generator) -> NDArray[np.int64]:
    """A split for every row, one for each module; large modules come first, each to the split that lacks most."""
    names, counts = np.unique(modules, return_counts=True)
    order = rng.permutation(len(names))
    order = order[np.argsort(-counts[order], kind="stable")]
    need = np.asarray(shares, dtype=np.float64) * len(modules)
    split_of = np.zeros(len(names), dtype=np.int64)
    for k in order:
        split_of[k] = int(np.argmax(need))
        need[split_of[k]] -= counts[k]
    return split_of[np.searchsorted(names, modules)]


def _sources(package: str) -> list[Path]:
    """Source files of a package, in an order that mixes its topics and is always the same."""
    if package == "python":
        roots = [Path(sysconfig.get_paths()["stdlib"])]
    else:
        spec = importlib.util.find_spec(package)
        roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [
        (zlib.crc32(name.as_posix().encode()), name.as_posix(), root / name)
        for root in roots
        for name in (file.relative_to(root) for file in root.rglob("*.py"))
        if not _SKIPPED.intersection(name.parts)
    ]
    return [path for _, _, path in sorted(files)]


def _sentences_of(file: Path) -> Iterator[str]:
    if file.stat().st_size > _LARGEST:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the packages' sources
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for docstring in _docstrings(tree):
        for paragraph in docstring.split("\n\n"):
            for text in _SENTENCE.split(" ".join(paragraph.split())):
                if _is_prose(text):
                    yield _NAMES.sub("", text)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child)


def _is_prose(text: str) -> bool:
    """A sentence of 6 to 60 words, no code, no table, no heading."""
    return 6 <= len(text.split()) <= 60 and text[0].isupper() and text[-1] in ".!?" and not _MARKUP.search(text)
