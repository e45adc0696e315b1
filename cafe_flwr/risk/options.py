"""What a calibration is to promise."""

from __future__ import annotations

from dataclasses import dataclass

from cafe_flwr.core.options import option, section

_CALIBRATES = {"mode": ("calibrate",)}


@section("calibration")
@dataclass(frozen=True)
class Calibration:
    """The risk that is allowed, and how surely."""

    risk: float = option(
        0.05,
        "Share α of errors that is allowed among those who leave early (docs/risk.md).",
        gt=0,
        lt=1,
        only=_CALIBRATES,
    )
    confidence_level: float = option(0.9, "How surely, 1 − δ.", gt=0, lt=1, only=_CALIBRATES)
    simultaneous: bool = option(
        False, "Clients that are certified by themselves shall all be right at once.", only=_CALIBRATES
    )
