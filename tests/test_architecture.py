"""ARCHITECTURE.md says what is there: the rooms in the order that import-linter holds, and a round's concepts."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cafe_flwr"
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
CONCEPTS = re.findall(r"^\| (\d+) \| `(\w+)` \| `([\w/.]+)` \|", PAGE, re.MULTILINE)


def test_the_rooms_stand_in_the_order_of_the_floors():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    floors = [[name.strip() for name in layer.split("|")] for layer in layers]
    table = PAGE.split("## The rooms")[1].split("## ")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]
    assert rows == floors


def test_every_room_and_public_module_is_on_the_page():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    missing = {name for name in rooms | modules if f"`{name}`" not in PAGE}
    assert not missing


def test_a_round_has_thirty_concepts():
    assert [int(number) for number, _, _ in CONCEPTS] == list(range(1, 31))


@pytest.mark.parametrize(("name", "file"), [(name, file) for _, name, file in CONCEPTS])
def test_a_concept_is_defined_in_its_file(name: str, file: str):
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"`((?:\w+/)+[\w.]*)`", PAGE))
    missing = {path for path in named if not any((base / path).exists() for base in (ROOT, PACKAGE))}
    assert not missing


def test_the_page_is_at_most_two_pages_long():
    assert len(PAGE.splitlines()) <= 110
