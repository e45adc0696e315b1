"""Export of a client's personal network to a device, with its thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cafe_flwr.inference.export import Exported, export
from cafe_flwr.personal.calibration import read_thresholds
from cafe_flwr.personal.published import PersonalNetworks
from cafe_flwr.risk.thresholds import ExitThresholds


def export_client(
    run: PersonalNetworks,
    client: int,
    folder: Path,
    *,
    max_prob: float | None = None,
    format: Literal["onnx", "torch", "both"] = "onnx",
) -> Exported:
    """Export a client's personal network, with its calibrated thresholds if there are any.

    Parameters
    ----------
    run
        A finished run, or the client's network on its node.
    folder, format
        As for :func:`export`.
    max_prob
        θ in [0, 1], in place of calibrated thresholds: leave where the largest probability is at least θ. With neither,
        the exported network never leaves early.

    Raises
    ------
    ValueError
        As :func:`export`, and if there is no such client, or its thresholds cannot be read.
    """
    personal = run.personal(client)
    thresholds = read_thresholds(run.networks, client) if max_prob is None else max_prob
    return export(
        personal.network,
        folder,
        run.data(client).train.x[:8],
        class_names=run.class_names,
        thresholds=thresholds,
        temperatures=() if isinstance(thresholds, ExitThresholds) else personal.temperatures,
        format=format,
        pixels=run.pixels,
        facts={
            "run": run.name,
            "client": client,
            **{k: v for k, v in personal.metadata.items() if k in ("method", "round", "accuracy_per_exit")},
        },
    )
