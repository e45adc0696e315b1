"""The report page of a run, which shows the settings that its method reads."""

from __future__ import annotations

from pathlib import Path

from cafe_flwr.results.page import write_report
from cafe_flwr.settings import keys_of_other_methods


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, see :func:`cafe_flwr.results.page.write_report`."""
    return write_report(folder, keys_of_other_methods)
