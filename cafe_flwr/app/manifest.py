"""Generates both manifests and the tables of docs/settings.md from the declared settings.

``python -m cafe_flwr.app.manifest --write`` writes them in a checkout, ``--check`` says whether they are up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cafe_flwr.core.options import Option
from cafe_flwr.settings import OPTIONS, READ_WHEN, TABLES

MANIFESTS = ("pyproject.toml", "pyproject-flwr.toml")
PAGE = "docs/settings.md"

_CONFIG = re.compile(r"\[tool\.flwr\.app\.config\]\n.*?(?=\n\[(?!tool\.flwr\.app\.config)|\Z)", re.DOTALL)
_TABLES = re.compile(r"(?<=<!-- made from the declarations -->\n).*\Z", re.DOTALL)


def config() -> str:
    """Every setting and its default, as the tables of a manifest."""
    lines = []
    for table in ("", *TABLES):
        lines.append(f"[tool.flwr.app.config{'.' * bool(table)}{table}]")
        lines += [f"{o.key.rpartition('.')[2]} = {toml(o.default)}" for o in _of(table)]
        lines.append("")
    return "\n".join(lines)


def toml(value: Any) -> str:
    """A value as TOML has it.

    Examples
    --------
    >>> toml(True), toml(0.1), toml("sgd")
    ('true', '0.1', '"sgd"')
    """
    return json.dumps(value, ensure_ascii=False)


def tables() -> str:
    """Every setting with its default and meaning, as Markdown."""
    parts = []
    for table in ("", *TABLES):
        parts.append(f"\n## {f'`{table}`' if table else 'In no table'}\n\n| key | default | meaning |\n|---|---|---|\n")
        parts += [f"| `{o.key}` | `{toml(o.default)}` | {_meaning(o)} |\n" for o in _of(table)]
    return "".join(parts)


def _of(table: str) -> list[Option]:
    return [o for o in OPTIONS.values() if o.table == table]


def _meaning(o: Option) -> str:
    """What an option means, what it may be, and when it is read."""
    parts = [o.doc.replace("<", "&lt;").replace("|", "\\|")]
    if o.said["choices"]:
        parts.append(f"One of {', '.join(f'`{toml(choice)}`' for choice in o.said['choices'])}.")
    for key, values in READ_WHEN[o.key].items():
        if o.table not in values:  # a method's or an objective's own table says so by its name
            parts.append(f"Read with `{key}` = {', '.join(f'`{value}`' for value in values)}.")
    return " ".join(parts)


def up_to_date(root: Path) -> dict[Path, str]:
    """The generated files of a checkout, with the contents that they should have."""
    found = {}
    for name in (*MANIFESTS, PAGE):
        path = root / name
        pattern, content = (_TABLES, tables()) if name == PAGE else (_CONFIG, config().rstrip() + "\n")
        text, count = pattern.subn(lambda _, content=content: content, path.read_text(encoding="utf-8"), count=1)  # type: ignore[misc]
        if not count:
            raise ValueError(f"{path} has no place for the settings")
        found[path] = text
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="The settings of the manifests and the docs, from the declarations.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write them")
    action.add_argument("--check", action="store_true", help="say whether they are up to date, by the exit status")
    parser.add_argument("--root", type=Path, default=Path("."), help="the checkout (default: this folder)")
    options = parser.parse_args(arguments)
    old = {path: text for path, text in up_to_date(options.root).items() if path.read_text(encoding="utf-8") != text}
    if options.write:
        for path, text in old.items():
            path.write_text(text, encoding="utf-8")
    elif old:
        sys.exit(f"{', '.join(map(str, old))}: settings differ; run python -m cafe_flwr.app.manifest --write")


if __name__ == "__main__":
    main()
