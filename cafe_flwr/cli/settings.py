"""The command that lists the settings."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from cafe_flwr.cli.common import console, fail


def settings(
    table: Annotated[str, typer.Argument(help="Of one table alone, such as 'train'.", show_default=False)] = "",
) -> None:
    """List every setting with its default and meaning."""
    from cafe_flwr.core.text import nearest
    from cafe_flwr.settings import OPTIONS, TABLES

    if table and table not in TABLES:
        fail(f"there is no table {table!r}; {nearest(table, TABLES)}")
    listed = Table("setting", "default", "meaning", box=box.SIMPLE_HEAD)
    for key, o in OPTIONS.items():
        if not table or o.table == table:
            listed.add_row(key, repr(o.default), o.doc)
    console.print(listed)
