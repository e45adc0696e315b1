"""Commands about the personal networks of a run: calibrate, evaluate, export, predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from cafe_flwr.cli.common import bar, console, errors, with_groups

if TYPE_CHECKING:
    from cafe_flwr.personal.published import PersonalNetworks

Results = Annotated[Path, typer.Argument(help="A results folder.", metavar="RESULTS")]
FoldsSeed = Annotated[int, typer.Option(help="Of the split of calibration examples into two folds.")]


@dataclass(frozen=True)
class Claim:
    """Options of a calibration: the guarantee."""

    risk: Annotated[float, typer.Option(help="Share α of errors that is allowed, in (0, 1).")] = 0.05
    confidence_level: Annotated[float, typer.Option(help="Confidence of the guarantee, 1 − δ in (0, 1).")] = 0.9

    def calibrate(self, own: PersonalNetworks, **further: Any) -> None:
        """Find thresholds for the networks, and print who is certified by what."""
        from cafe_flwr.personal.calibration import calibrate_run
        from cafe_flwr.risk.client_calibration import Request

        with bar("calibrating") as progress:
            found = calibrate_run(own, Request(self.risk, self.confidence_level, **further), progress)
        show_calibration(found)


@dataclass(frozen=True)
class Evaluating:
    """Options of an evaluation."""

    risk: Annotated[list[float] | None, typer.Option(help="Risks α to evaluate; by default 0.01, 0.05, 0.1.")] = None
    corruptions: Annotated[bool, typer.Option(help="Also under corrupted inputs.")] = True
    seed: Annotated[int, typer.Option(help="Of corruptions and folds.")] = 0

    def evaluate(self, own: PersonalNetworks, clients: list[int] | None = None) -> None:
        """Evaluate the networks, and print the table."""
        from cafe_flwr.data.corruptions import CORRUPTIONS
        from cafe_flwr.personal.evaluation import RISKS, evaluate_run
        from cafe_flwr.results.inference import evaluation_table

        with bar("evaluating") as progress:
            found = evaluate_run(
                own,
                clients=clients,
                risks=tuple(self.risk or RISKS),
                corruptions=tuple(CORRUPTIONS) if self.corruptions else (),
                seed=self.seed,
                progress=progress,
            )
        console.print(evaluation_table(found))


class Format(StrEnum):
    """Formats of exported graphs."""

    onnx = "onnx"
    torch = "torch"
    both = "both"


@dataclass(frozen=True)
class Exporting:
    """Options of an export."""

    max_prob: Annotated[
        float | None, typer.Option(help="Leave at this probability, in place of calibrated thresholds.")
    ] = None
    format: Annotated[Format, typer.Option(help="Of the graphs.")] = Format.onnx

    def export(self, own: PersonalNetworks, client: int, to: Path) -> None:
        """Export a client's network, and print what was written, with notes."""
        from cafe_flwr.personal.export import export_client

        written = export_client(own, client, to, max_prob=self.max_prob, format=self.format.value)
        for kind, difference in written.difference.items():
            checked = "not verified" if difference is None else f"verified, logits differ by at most {difference:.1e}"
            console.print(f"{kind}: {checked}", highlight=False)
        for note in written.notes:
            console.print(f"· {escape(note)}", soft_wrap=True, highlight=False)
        console.print(f"Exported: {written.folder}", soft_wrap=True)


@with_groups
def calibrate(
    *,
    folder: Results,
    claim: Claim,
    simultaneous: Annotated[
        bool, typer.Option("--simultaneous", help="Guarantees of clients certified by themselves hold all at once.")
    ] = False,
    seed: FoldsSeed = 0,
) -> None:
    """Find, for every client, thresholds to leave early at a risk you state, and say what is certified of whom."""
    from cafe_flwr.app.finished_run import FinishedRun

    with errors():
        claim.calibrate(FinishedRun(folder), simultaneous=simultaneous, seed=seed)
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


@with_groups
def evaluate(
    *,
    folder: Results,
    options: Evaluating,
    clients: Annotated[str | None, typer.Option(help="Only these, such as 0,3,5.")] = None,
) -> None:
    """Accuracy, calibration, risk and coverage of every client's personal network, also under corrupted inputs."""
    from cafe_flwr.app.finished_run import FinishedRun
    from cafe_flwr.app.page import write_page

    with errors():
        options.evaluate(FinishedRun(folder), _numbers(clients) if clients else None)
        console.print(f"Report: {write_page(folder)}", soft_wrap=True)


@with_groups
def export(
    *,
    folder: Results,
    client: Annotated[int, typer.Option(help="Whose personal network.")],
    to: Annotated[
        Path | None, typer.Option(help="Folder to write; by default RESULTS/exported/client-<client>.")
    ] = None,
    options: Exporting,
) -> None:
    """Write a client's network as one graph per stage with its exit, for devices that have onnxruntime and numpy."""
    from cafe_flwr.app.finished_run import FinishedRun

    with errors():
        options.export(FinishedRun(folder), client, to or folder / "exported" / f"client-{client}")


def predict(
    folder: Annotated[Path, typer.Argument(help="Folder of an export.", metavar="EXPORTED")],
    inputs: Annotated[Path, typer.Argument(help="A .npy file, an image or a folder of images.", metavar="INPUTS")],
    out: Annotated[Path | None, typer.Option(help="A .csv or .json file to write; by default CSV is printed.")] = None,
    image_range: Annotated[str, typer.Option(help="data.image-range of the run, such as 0..4095.")] = "",
) -> None:
    """Run an exported network with onnxruntime; inputs that are easy leave early."""
    from cafe_flwr.inference.predict import as_csv, predict_file

    with errors():
        found = predict_file(folder, inputs, out, image_range=image_range)
    if out is None:
        typer.echo(as_csv(found), nl=False)
    else:
        console.print(f"Predictions: {out}", soft_wrap=True)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--clients must be numbers like 0,3,5, got {text!r}") from None
