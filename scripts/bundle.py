"""Build the bundle for deployment: the two app files under the slim manifest ``pyproject-flwr.toml``.

``python scripts/bundle.py`` leaves ``dist/<publisher>.<name>.<version>.<hash>.fab``. The settings of both manifests
are made from their declarations: ``python -m cafe_flwr.app.manifest --write``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from cafe_flwr.settings import todays

ROOT = Path(__file__).resolve().parent.parent
MANIFEST, SLIM = "pyproject.toml", "pyproject-flwr.toml"
APP_FILES = ("client_app.py", "server_app.py", "README.md", "LICENSE")


def disagreements(root: Path) -> list[str]:
    """Where the slim manifest of a checkout says something else than the package's own, in words."""
    main, slim = (tomllib.loads((root / name).read_text()) for name in (MANIFEST, SLIM))
    found = [
        f"[project].{key} is {slim['project'].get(key)!r} in {SLIM}, {main['project'].get(key)!r} in {MANIFEST}"
        for key in ("version", "requires-python", "license")
        if slim["project"].get(key) != main["project"].get(key)
    ]
    theirs, mine = (manifest["tool"]["flwr"]["app"] for manifest in (main, slim))
    found += [
        f"[tool.flwr.app].{key} is {mine.get(key)!r} in {SLIM}, {theirs.get(key)!r} in {MANIFEST}"
        for key in ("publisher", "fab-format-version", "flwr-version-target", "components")
        if mine.get(key) != theirs.get(key)
    ]
    found += _settings_apart(todays(theirs["config"]), todays(mine.get("config", {})))
    return found + _dependencies_apart(main["project"], slim["project"]["dependencies"])


def _settings_apart(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    apart = [key for key in {**theirs, **mine} if (key in theirs, theirs.get(key)) != (key in mine, mine.get(key))]
    return [f"settings differ: {', '.join(apart)}; run python -m cafe_flwr.app.manifest --write"] if apart else []


def _dependencies_apart(project: dict[str, Any], slim: list[str]) -> list[str]:
    """The bundle needs this release of the package; whatever else it names, in the package's own range."""
    package = f"{project['name']}=={project['version']}"
    ranges = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    needs = {need.name: need for need in map(Requirement, slim)}
    found = [] if package in slim else [f"{SLIM} must depend on {package}"]
    for name, need in needs.items():
        if name != project["name"] and need.specifier != ranges.get(name):
            found.append(f"{SLIM} depends on {need}, {MANIFEST} on {name}{ranges.get(name, ' not at all')}")
    return found


def bundle(root: Path, into: Path) -> Path:
    """Build the bundle of a checkout; the path of the file.

    Raises
    ------
    ValueError
        If the two manifests disagree.
    """
    if found := disagreements(root):
        raise ValueError("the manifests disagree:\n  " + "\n  ".join(found))
    flwr = Path(sys.executable).with_name("flwr")
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder, "cafe-flwr-bundle")
        stage.mkdir()
        shutil.copy(root / SLIM, stage / MANIFEST)
        for name in APP_FILES:
            shutil.copy(root / name, stage)
        subprocess.run([flwr, "build", "--app", stage], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (built,) = Path(folder).glob("*.fab")
        into.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(built, into / built.name))


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description="Build the bundle for deployment from pyproject-flwr.toml.")
    parser.add_argument("--into", type=Path, default=ROOT / "dist", help="folder of the bundle (default: dist)")
    options = parser.parse_args()
    try:
        print(bundle(ROOT, options.into))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
