"""``cafe-flwr settings``: every setting with its default and meaning."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(settings)


def settings(
    table: Annotated[str, typer.Argument(help="Of one table alone, such as 'train'.", show_default=False)] = "",
) -> None:
    """List every setting with its default and meaning."""
    from cafe_flwr.core.text import closest
    from cafe_flwr.settings import OPTIONS, TABLES

    if table and table not in TABLES:
        near = closest(table, TABLES)
        hint = f"did you mean {near!r}?" if near else f"known tables: {', '.join(TABLES)}"
        Console(stderr=True).print(f"[bold red]Error:[/] no table {table!r}; {hint}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)
    listed = Table("setting", "default", "meaning", box=box.SIMPLE_HEAD)
    for key, o in OPTIONS.items():
        if not table or o.table == table:
            listed.add_row(key, repr(o.default), o.doc)
    Console().print(listed)
