"""Predictions of an exported network for the inputs of a file or folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cafe_flwr.data.folders import files_below, pictures_among
from cafe_flwr.data.local import normalised
from cafe_flwr.data.pictures import Scales, alike, as_pixels, read_picture, scales_of
from cafe_flwr.device import ExitedModel

_ROWS = 256  # computed at a time


class FilePrediction(NamedTuple):
    """Prediction for one input of a file or folder.

    ``input`` is the image's name, or the number of the array's row, from 0; ``label`` 0..C−1 and ``class_name`` its
    name; ``exit`` 1..m, counted as in the report and the tables of a run; ``confidence`` the largest probability.
    """

    input: str
    label: int
    class_name: str
    exit: int
    confidence: float


def predict_file(folder: Path, inputs: Path, out: Path | None = None, *, image_range: str = "") -> list[FilePrediction]:
    """Run the exported network in ``folder`` on inputs of a file or folder, as ``cafe-flwr predict`` does.

    Parameters
    ----------
    inputs
        A ``.npy`` file with a batch (or one input), an image, or a folder of images, also in subfolders; hidden files
        are left out. Images are read, brought to the network's size and channels, and normalised as in training
        (:mod:`cafe_flwr.data.pictures`); they need Pillow.
    out
        A ``.csv`` or ``.json`` file to write, if any.
    image_range
        Numbers of black and white in images of more than 8 bits, as ``data.image-range`` of the run.

    Raises
    ------
    ValueError
        If the export or an input cannot be used.

    Examples
    --------
    >>> predict_file(Path("net"), Path("x.npy"), Path("out.xlsx"))
    Traceback (most recent call last):
    ...
    ValueError: out.xlsx: predictions are written as .csv or .json
    """
    if out is not None and out.suffix not in (".csv", ".json"):
        raise ValueError(f"{out}: predictions are written as .csv or .json")
    model = ExitedModel(folder)
    if not inputs.exists():
        raise ValueError(f"{inputs} is not there: give a .npy file, an image or a folder of images")
    array, names = _read_array(inputs, model) if inputs.suffix == ".npy" else (None, _image_names(inputs))
    found: list[FilePrediction] = []
    scales: Scales = {}
    for start in range(0, len(names), _ROWS):
        part = names[start : start + _ROWS]
        if array is None:
            x, scales = _read_images(inputs, part, model, image_range, scales)
        else:
            x = array[start : start + _ROWS]
        rows = zip(part, *(values.tolist() for values in model.predict(x)), strict=True)
        found += [FilePrediction(name, y, model.class_names[y], k + 1, c) for name, y, k, c in rows]
    if out is not None:
        out.write_text(_as_json(found) if out.suffix == ".json" else as_csv(found), encoding="utf-8")
    return found


def as_csv(predictions: Sequence[FilePrediction]) -> str:
    r"""Predictions as text of a CSV file, with a header.

    Examples
    --------
    >>> as_csv([FilePrediction("a.png", 3, "cat", 1, 0.5)])
    'input,label,class_name,exit,confidence\na.png,3,cat,1,0.5\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([FilePrediction._fields, *predictions])
    return text.getvalue()


def _as_json(predictions: Sequence[FilePrediction]) -> str:
    return json.dumps([row._asdict() for row in predictions], indent=1, ensure_ascii=False) + "\n"


def _read_array(path: Path, model: ExitedModel) -> tuple[NDArray[Any], list[str]]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array of numbers: {error}") from None
    if array.shape == model.input_shape:
        array = array[None]
    model.check_input(array)
    return array, [str(row) for row in range(len(array))]


def _image_names(path: Path) -> list[str]:
    if find_spec("PIL") is None:
        raise ValueError("images need Pillow: pip install pillow, or give a .npy file")
    if path.is_file():
        return [path.name]
    names = sorted(file.relative_to(path).as_posix() for file in pictures_among(files_below(path)))
    if not names:
        raise ValueError(f"{path} holds no images, of formats such as .png, .jpg and .tif")
    return names


def _read_images(
    path: Path, names: Sequence[str], model: ExitedModel, image_range: str, known: Scales
) -> tuple[NDArray[Any], Scales]:
    """Images as the network wants them, (B, C, H, W): pixels, or normalised; and the scales of their numbers."""
    takes_pixels = model.manifest["input"]["dtype"] == "uint8"
    pixels: dict[str, float] | None = model.manifest.get("pixels")
    if (pixels is None and not takes_pixels) or len(model.input_shape) != 3:
        raise ValueError(
            "this export does not say how pixels become its inputs: give a .npy file, or export with pixels=(mean, std)"
        )
    home = path if path.is_dir() else path.parent
    channels, height, width = model.input_shape
    pictures = []
    for name in names:
        try:
            picture = read_picture(home / name, height if height == width else 0)
        except ValueError as error:
            raise ValueError(f"{home / name} cannot be read as an image: {error}") from None
        if picture.values.shape[1:] != (height, width):
            size = "×".join(map(str, picture.values.shape[:0:-1]))
            raise ValueError(f"{home / name} has {size} pixels, the network takes {width}×{height}")
        pictures.append(picture)
    scales = scales_of(pictures, image_range, known)
    images = np.stack([normalised(image) for image in alike(pictures, scales, channels)])
    if takes_pixels or pixels is None:
        return as_pixels(images), scales
    return (images - np.float32(2 * pixels["mean"] - 1)) / np.float32(2 * pixels["std"]), scales
