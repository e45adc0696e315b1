"""The node's own demands on privacy, compared with what the server asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cafe_flwr.core.options import values_of
from cafe_flwr.wire.options import Privacy


def stricter(asked: Privacy, node_config: Mapping[str, Any]) -> Privacy:
    """The protection the server asks for; ValueError, with both values, if the node-config demands more.

    ``clip-norm`` is the largest and ``noise-multiplier`` the smallest the node accepts; ``report-metrics = false``
    withholds metrics whatever the server says.

    Examples
    --------
    >>> stricter(Privacy(clip_norm=1.0), {"noise-multiplier": 2.0})
    Traceback (most recent call last):
        ...
    ValueError: this node sends nothing with a noise-multiplier below 2, and the server asks for 0
    """
    try:
        least_noise = float(node_config.get("noise-multiplier", 0.0))
        largest_clip = float(node_config.get("clip-norm", math.inf))
    except ValueError as error:
        raise ValueError(f"node-config clip-norm and noise-multiplier must be numbers: {error}") from None
    if asked.noise_multiplier < least_noise:
        raise ValueError(
            f"this node sends nothing with a noise-multiplier below {least_noise:g}, and the server asks for "
            f"{asked.noise_multiplier:g}"
        )
    longest = max(asked.clip_norm, asked.upload_clip_norm) or math.inf
    if longest > largest_clip:
        raise ValueError(
            f"this node sends nothing with a clip-norm beyond {largest_clip:g}, and the server asks for "
            f"{longest if asked.on else 'no clipping'}"
        )
    return replace(asked, report_metrics=False) if withholds(node_config) else asked


def withholds(node_config: Mapping[str, Any], run_config: Mapping[str, Any] | None = None) -> bool:
    """Whether the node, or the run's settings, let clients report no metrics."""
    said = str(node_config.get("report-metrics", "true")).lower()
    if said not in ("true", "false"):
        raise ValueError(f"node-config report-metrics must be true or false, got {said!r}")
    asked = values_of(Privacy, run_config or {}).get("report_metrics", True)
    return said == "false" or str(asked).lower() == "false"
