"""Small local copies of the hub's data sets, and of files that others might have made of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as Pictures

from cafe_flwr.data.hub import HUB_SETS
from cafe_flwr.data.stand_ins import TOPICS, label_of, picture, text
from cafe_flwr.data.stand_ins import write_stand_in as write_copy

__all__ = ["CLASSES", "TOPICS", "label_of", "picture", "text", "write_copy", "write_plain"]

CLASSES = {name: about.num_classes for name, about in HUB_SETS.items()}


def write_plain(path: Path, columns: dict[str, list[Any]]) -> None:
    """A parquet file without the hub's notes on its columns; pictures are encoded as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: [_encoded(value) for value in values] for name, values in columns.items()}
    pq.write_table(pa.table(plain), path)


def _encoded(value: Any) -> Any:
    if not isinstance(value, Pictures.Image):
        return value
    stream = io.BytesIO()
    value.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}
