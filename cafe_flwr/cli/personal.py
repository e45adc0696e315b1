"""Commands about the personal networks of a run: calibrate, evaluate, export, predict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from cafe_flwr.cli.common import (
    ConfidenceOption,
    CorruptionsOption,
    EvaluationSeedOption,
    FoldsSeedOption,
    Format,
    FormatOption,
    MaxProbOption,
    RiskOption,
    RisksOption,
    bar,
    console,
    errors,
)

if TYPE_CHECKING:
    from cafe_flwr.inference.export import Exported

_Results = Annotated[Path, typer.Argument(help="A results folder.", metavar="RESULTS")]


def calibrate(
    folder: _Results,
    risk: RiskOption = 0.05,
    confidence_level: ConfidenceOption = 0.9,
    simultaneous: Annotated[
        bool, typer.Option("--simultaneous", help="Clients certified by themselves shall all be right at once.")
    ] = False,
    seed: FoldsSeedOption = 0,
) -> None:
    """Find, for every client, thresholds to leave early at a risk you state, and say what is certified of whom."""
    from cafe_flwr.app.finished_run import FinishedRun
    from cafe_flwr.personal.calibration import calibrate_run
    from cafe_flwr.risk.client_calibration import Request

    with errors(), bar("calibrating") as progress:
        request = Request(risk, confidence_level, simultaneous, seed)
        found = calibrate_run(FinishedRun(folder), request, progress)
    show_calibration(found)
    console.print(f"Thresholds: {folder / 'personal'}/client-*.thresholds.json", soft_wrap=True)


def show_calibration(found: Mapping[str, Any]) -> None:
    """Print who is certified by what, from what ``calibration.json`` holds."""
    table = Table("client", "certified by", box=box.SIMPLE_HEAD)
    for column in ("examples", "leave early", "realised risk"):
        table.add_column(column, justify="right")
    claims: dict[str, str] = {}
    for line in found["clients"]:
        certified = line["basis"] != "not certified"
        seen = (f"{line['coverage']:.0%}", f"{line['realised_risk']:.3f}") if certified else ("never", "–")
        table.add_row(str(line["client"]), line["basis"], str(line["examples"]), *seen)
        claims.setdefault(line["basis"], f"client {line['client']}: {line['claim']}")
    console.print(table)
    for basis, claim in claims.items():
        console.print(f"· {basis}, e.g. {escape(claim)}", soft_wrap=True, highlight=False)


def evaluate(
    folder: _Results,
    risk: RisksOption = None,
    corruptions: CorruptionsOption = True,
    seed: EvaluationSeedOption = 0,
    clients: Annotated[str | None, typer.Option(help="Only these, such as 0,3,5.")] = None,
) -> None:
    """Accuracy, calibration, risk and coverage of every client's personal network, also under corrupted inputs."""
    from cafe_flwr.app.finished_run import FinishedRun
    from cafe_flwr.app.page import write_page
    from cafe_flwr.data.corruptions import CORRUPTIONS
    from cafe_flwr.personal.evaluation import RISKS, evaluate_run
    from cafe_flwr.results.inference import evaluation_table

    with errors():
        with bar("evaluating") as progress:
            found = evaluate_run(
                FinishedRun(folder),
                clients=_numbers(clients) if clients else None,
                risks=tuple(risk or RISKS),
                corruptions=tuple(CORRUPTIONS) if corruptions else (),
                seed=seed,
                progress=progress,
            )
        console.print(evaluation_table(found))
        console.print(f"Report: {write_page(folder)}", soft_wrap=True)


def export(
    folder: _Results,
    client: Annotated[int, typer.Option(help="Whose personal network.")],
    to: Annotated[
        Path | None, typer.Option(help="Folder to write; by default RESULTS/exported/client-<client>.")
    ] = None,
    max_prob: MaxProbOption = None,
    format: FormatOption = Format.onnx,
) -> None:
    """Write a client's network as one graph per stage with its exit, for devices that have onnxruntime and numpy."""
    from cafe_flwr.app.finished_run import FinishedRun
    from cafe_flwr.personal.export import export_client

    target = to or folder / "exported" / f"client-{client}"
    with errors():
        written = export_client(FinishedRun(folder), client, target, max_prob=max_prob, format=format.value)
    show_export(written)


def show_export(written: Exported) -> None:
    """Print what an export has written, and what must be known of it."""
    for kind, difference in written.difference.items():
        checked = "not verified" if difference is None else f"verified, logits differ by at most {difference:.1e}"
        console.print(f"{kind}: {checked}", highlight=False)
    for note in written.notes:
        console.print(f"· {escape(note)}", soft_wrap=True, highlight=False)
    console.print(f"Exported: {written.folder}", soft_wrap=True)


def predict(
    folder: Annotated[Path, typer.Argument(help="Folder of an export.", metavar="EXPORTED")],
    inputs: Annotated[Path, typer.Argument(help="A .npy file, an image or a folder of images.", metavar="INPUTS")],
    out: Annotated[Path | None, typer.Option(help="A .csv or .json file to write; by default CSV is printed.")] = None,
) -> None:
    """Run an exported network with onnxruntime; inputs that are easy leave early."""
    from cafe_flwr.inference.predict import as_csv, predict_file

    with errors():
        found = predict_file(folder, inputs, out)
    if out is None:
        typer.echo(as_csv(found), nl=False)
    else:
        console.print(f"Predictions: {out}", soft_wrap=True)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--clients must be numbers like 0,3,5, got {text!r}") from None
