"""The settings of a calibration: the risk to keep, and with which confidence."""

from __future__ import annotations

from dataclasses import dataclass

from cafe_flwr.core.options import option, section

_CALIBRATES = {"mode": ("calibrate",)}


@section("calibration")
@dataclass(frozen=True)
class Calibration:
    """The guarantee that a calibration is to give."""

    risk: float = option(
        0.05, "Share α of errors allowed among examples that leave early (docs/risk.md).", gt=0, lt=1, only=_CALIBRATES
    )
    confidence_level: float = option(0.9, "Confidence 1 − δ of the guarantee.", gt=0, lt=1, only=_CALIBRATES)
    simultaneous: bool = option(
        False, "The guarantees of clients that are certified by themselves hold all at once.", only=_CALIBRATES
    )
