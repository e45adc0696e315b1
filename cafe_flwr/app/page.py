"""The report page of a run, which shows the settings that its method reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cafe_flwr.results.page import write_report
from cafe_flwr.settings import READ_WHEN, todays


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, see :func:`cafe_flwr.results.page.write_report`."""
    return write_report(folder, _read_by_its_method)


def _read_by_its_method(saved: dict[str, Any]) -> Mapping[str, Any]:
    """A run's settings under today's keys, without those that only other methods read; unchanged if that fails."""
    try:
        settings = todays(saved)
    except ValueError:
        return saved
    method = str(settings.get("method"))
    return {k: value for k, value in settings.items() if method in READ_WHEN.get(k, {}).get("method", (method,))}
