"""Shared by the commands: options, the settings of ``--run-config``, progress bars and error messages."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from cafe_flwr.core.locks import InUse

console = Console()

_PAIR = r"""(\S+?)=('[^']*'|"[^"]*"|\S+)"""  # as Flower reads its run config

RunConfigOption = Annotated[
    list[str] | None, typer.Option("--run-config", "-c", help="Settings, as for `flwr run`: 'key=value …'.")
]
ResultsDirOption = Annotated[Path | None, typer.Option(help="Where results go; overrides the setting.")]


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command for typer, with every dataclass among its parameters replaced by its fields as options."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {p.name: p.annotation for p in signature.parameters.values() if is_dataclass(p.annotation)}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        group = groups.get(parameter.name)
        found = inspect.signature(group, eval_str=True).parameters.values() if group else [parameter]
        parameters += [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in found]

    def grouped(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        command(**given)

    grouped.__name__, grouped.__doc__ = command.__name__, command.__doc__
    grouped.__annotations__ = {p.name: p.annotation for p in parameters}
    grouped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return grouped


def overridden(run_config: Sequence[str] | None, results_dir: Path | None) -> dict[str, Any]:
    """Settings of the command line in Flower's form: pairs like 'key=1 other="x"', or one TOML file."""
    overrides = _pairs(run_config or [])
    if results_dir is not None:
        overrides["results-dir"] = str(results_dir.expanduser().resolve())
    return overrides


def _pairs(run_config: Sequence[str]) -> dict[str, Any]:
    try:
        if len(run_config) == 1 and run_config[0].endswith(".toml"):
            return tomllib.loads(Path(run_config[0]).expanduser().read_text())
        text = " ".join(run_config)
        pairs = re.findall(_PAIR, text)
        if rest := re.sub(_PAIR, "", text).strip():
            raise ValueError(f"{rest!r} is not a pair key=value")
        return tomllib.loads("\n".join(f"{key} = {value}" for key, value in pairs))
    except (OSError, ValueError) as error:
        fail(f"--run-config takes 'key=1 other=\"text\"' or one TOML file: {error}")


def fail(reason: object) -> NoReturn:
    """Print an error, and end with exit code 1."""
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(reason))}", soft_wrap=True, highlight=False)
    raise typer.Exit(1) from None


@contextmanager
def errors() -> Iterator[None]:
    """Show errors meant for users as a sentence, without a traceback."""
    try:
        yield
    except (ValueError, OSError, InUse) as error:
        fail(error)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that is told (done, of how many)."""
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
