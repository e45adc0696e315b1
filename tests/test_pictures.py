"""One reader of pictures: whatever a picture is stored as, training, prediction and conversion see the same numbers."""

import io
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn

from cafe_flwr import EarlyExitNetwork
from cafe_flwr.data.convert import split_from_datasets, split_from_torch
from cafe_flwr.data.local import normalised, read_local
from cafe_flwr.data.options import Data
from cafe_flwr.data.own import load_own
from cafe_flwr.data.pictures import alike, read_picture, scales_of
from cafe_flwr.inference import predict
from cafe_flwr.networks import Exit

GREY = np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)
GREY[0, :2] = 0, 255
COLOUR = np.stack([GREY] * 3, axis=-1)
UPRIGHT = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE}


def see_through():
    """A palette with a transparent shade; its colours stay."""
    made = Image.fromarray(GREY).convert("P")
    made.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    made.info["transparency"] = bytes([0, *[128] * 255])
    return made


def turned(orientation, form="PNG"):
    image = Image.fromarray(GREY).transpose(UPRIGHT[orientation])
    tag = image.getexif()
    tag[0x0112] = orientation
    return image, {"exif": tag, "format": form, "quality": 100}


def alpha(mode):
    image = Image.fromarray(GREY).convert(mode)
    image.putalpha(Image.fromarray(GREY[::-1].copy()))
    return image


# How a picture is stored → (image, arguments of save, largest difference in shades of 255).
ENCODINGS = {
    "grey": (Image.fromarray(GREY), {"format": "PNG"}, 0),
    "colour": (Image.fromarray(COLOUR), {"format": "PNG"}, 0),
    "grey with alpha": (alpha("LA"), {"format": "PNG"}, 0),
    "colour with alpha": (alpha("RGBA"), {"format": "PNG"}, 0),
    "palette": (Image.fromarray(GREY).convert("P"), {"format": "PNG"}, 0),
    "palette, transparent": (see_through(), {"format": "PNG"}, 0),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257), {"format": "PNG"}, 0),
    "32-bit integers": (Image.fromarray(GREY.astype(np.int32) * 257), {"format": "TIFF"}, 0),
    "floats 0..1": (Image.fromarray(GREY.astype(np.float32) / 255), {"format": "TIFF"}, 0),
    "floats 0..255": (Image.fromarray(GREY.astype(np.float32)), {"format": "TIFF"}, 0),
    **{f"turned {k}": (*turned(k), 0) for k in UPRIGHT},
    "turned JPEG": (*turned(6, "JPEG"), 3),
    "CMYK": (Image.fromarray(COLOUR).convert("CMYK"), {"format": "TIFF"}, 0),
}
NUMBERS = {
    "bytes": GREY,
    "integers": GREY.astype(int),
    "floats 0..1": GREY / 255,
    "floats 0..255": GREY.astype(float),
    "single precision": (GREY / 255).astype(np.float32),
    "16 bits": GREY.astype(np.uint16) * 257,
    "colours": COLOUR,
    "colours, floats": COLOUR / 255,
    "channels first": COLOUR.transpose(2, 0, 1).copy(),
    "one channel": GREY[..., None],
}


@pytest.fixture
def seen(monkeypatch):
    """What a network of an export is given by `predict_file`."""
    inputs = []

    class Model:
        manifest: ClassVar = {"input": {"dtype": "float32"}, "pixels": {"mean": 0.5, "std": 0.5}}
        class_names = ("a", "b")

        def __init__(self, folder):
            self.input_shape = folder

        def predict(self, x):
            inputs.extend(x)
            return (np.zeros(len(x), int), np.zeros(len(x), int), np.zeros(len(x)))

    monkeypatch.setattr(predict, "ExitedModel", Model)
    return inputs


def stored(name):
    image, how, tolerance = ENCODINGS[name]
    stream = io.BytesIO()
    image.save(stream, **how)
    return stream.getvalue(), how["format"].lower(), tolerance * 2 / 255


@pytest.mark.parametrize("size", [12, 5])
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_picture_gives_the_same_tensor_however_it_is_stored_and_whoever_reads_it(tmp_path, seen, name, size):
    content, suffix, tolerance = stored(name)
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        for k in range(5):
            (tmp_path / "set" / label / f"{k}.{suffix}").write_bytes(content)
    rows = pa.table({"image": [{"bytes": content, "path": None}] * 4, "label": [0, 1, 0, 1]})
    pq.write_table(rows, tmp_path / "set.parquet")
    opened = Image.open(io.BytesIO(content))
    data = Data(image_size=size, calibration_share=0.2, test_share=0.3)
    predict.predict_file((3, size, size), tmp_path / "set")
    predict.predict_file((1, size, size), tmp_path / "set" / "a" / f"0.{suffix}")
    found = {
        "folder": normalised(read_local(tmp_path / "set", size, "image", "label").images)[0],
        "parquet": normalised(read_local(tmp_path / "set.parquet", size, "image", "label").images)[0],
        "own, grey": load_own(tmp_path / "set", 0, data, class_names="ab", shape=(1, size, size)).train.x[0],
        "own, colour": load_own(tmp_path / "set", 0, data, class_names="ab", shape=(3, size, size)).train.x[0],
        "prediction, colour": seen[0],
        "prediction, grey": seen[-1],
        "torch": normalised(split_from_torch([(opened, 0)], image_size=size).x.numpy())[0],
        "datasets": normalised(
            split_from_datasets(Dataset(rows), "image", image_size=size).x.numpy(),
        )[0],
    }
    shades = Image.fromarray(GREY.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    expected = np.asarray(shades) / np.float32(127.5) - np.float32(1)
    rounding = 0 if size == 12 else (1 / 255 if ENCODINGS[name][0].mode in ("P", "RGB", "RGBA", "CMYK") else 1e-6)
    for reader, x in found.items():
        difference = np.abs(np.asarray(x) - expected).max()
        assert difference <= tolerance + rounding, reader
    same = [np.asarray(found[name])[0] for name in ("folder", "parquet", "own, colour", "prediction, colour", "torch")]
    assert all(np.array_equal(x, same[0]) for x in same)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_in_a_table_give_the_same_tensor_as_the_picture(tmp_path, name):
    values = NUMBERS[name]
    pd.DataFrame({"image": [values.tolist()] * 4, "label": [0, 1] * 2}).to_parquet(tmp_path / "set.parquet")
    image_range = "0..65535" if name == "16 bits" else ""  # a list does not say that they are
    stored = normalised(read_local(tmp_path / "set.parquet", 0, "image", "label", image_range).images)
    given = read_picture(values)
    for x in (stored[0], alike([given], scales_of([given]))[0]):
        np.testing.assert_array_equal(normalised(x), np.broadcast_to(GREY / np.float32(127.5) - np.float32(1), x.shape))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((4, 4), 3.0), "floats with numbers 3..3"),
        (np.linspace(-1, 1, 16).reshape(4, 4), "floats with numbers -1..1"),
        (np.linspace(0, 1e4, 16).reshape(4, 4), "floats with numbers 0..10000"),
        (np.arange(16).reshape(4, 4) * 300, "integers with numbers 0..4500"),
        (np.arange(16).reshape(4, 4) % 2, "integers with numbers 0..1"),
        (np.arange(16, dtype=np.uint16).reshape(4, 4) * 200, "16 bits with numbers 0..3000"),
        (Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4)), "16 bits with numbers 0..15"),
    ],
)
def test_a_range_that_cannot_be_told_is_refused_with_the_setting_that_tells_it(values, said):
    with pytest.raises(ValueError, match=rf"pictures of {said}: .* cannot be told\. Set data\.image-range"):
        scales_of([read_picture(values)])


@pytest.mark.parametrize(
    ("image_range", "white"), [("0..1", 1), ("0..255", 255), ("-1..1", 1), ("0..4095", 4095), ("0..65535", 65535)]
)
def test_a_range_that_is_set_is_used_everywhere(tmp_path, seen, image_range, white):
    black = -1 if image_range.startswith("-") else 0
    values = (np.linspace(black, white * 0.9, 16).reshape(4, 4)).astype(np.float32)
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / "set" / label / "0.tif")
    expected = (values - black) / ((white - black) / 2) - 1
    predict.predict_file((1, 4, 4), tmp_path / "set", image_range=image_range)
    local = read_local(tmp_path / "set", 0, "image", "label", image_range).images
    torch_split = split_from_torch([(Image.fromarray(values), 0)], image_range=image_range).x
    for x in (seen[0], local[0], torch_split[0].numpy()):
        np.testing.assert_allclose(x[0], expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"do not fit the range .* that is set: set data.image-range"):
        read_local(tmp_path / "set", 0, "image", "label", "0..1" if white > 1 else "0..0.5")


def test_a_dark_picture_among_others_is_read_with_their_range():
    dark, light = np.full((2, 2), 0.5), np.array([[0.0, 128.0], [255.0, 3.0]])
    x = split_from_torch([(Image.fromarray(p.astype(np.float32)), 0) for p in (dark, light)]).x
    torch.testing.assert_close(x[0, 0], torch.full((2, 2), 0.5 / 127.5 - 1))


def test_batches_of_a_prediction_have_one_range(tmp_path, seen, monkeypatch):
    monkeypatch.setattr(predict, "_ROWS", 1)
    for name, white in (("a", 1.0), ("b", 255.0)):
        Image.fromarray(np.linspace(0, white, 16).reshape(4, 4).astype(np.float32)).save(tmp_path / f"{name}.tif")
    with pytest.raises(ValueError, match=r"0\.\.255 do not fit the range 0\.\.1 of those before"):
        predict.predict_file((1, 4, 4), tmp_path)


def test_prediction_leaves_out_hidden_files_follows_links_and_makes_colours_grey(tmp_path, seen):
    (tmp_path / "there").mkdir()
    Image.fromarray(COLOUR).save(tmp_path / "there" / "a.png")
    (tmp_path / "there" / "._a.png").write_bytes(b"of a Mac")
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "b.png").write_bytes(b"")
    (tmp_path / "link").symlink_to("there")
    found = predict.predict_file((1, 12, 12), tmp_path)
    assert [row.input for row in found] == ["link/a.png", "there/a.png"]
    assert np.array_equal(seen[0][0], GREY / np.float32(127.5) - np.float32(1))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (None, "there is none"),
        ([0.5, 1.0], r"numbers of shape \(2,\): expected \(height, width\)"),
        ([[0.5, None]], "no numbers"),
        ([[0.5], [0.5, 1.0]], "no array of numbers"),
        ([[0.5, float("nan")]], "NaN or infinite"),
        ("cat.png", "no numbers"),
        (b"cat", "damaged, or of a format"),
        ({"bytes": None, "path": "/no/such/file.png"}, "No such file"),
    ],
)
def test_what_is_no_picture_is_told_without_a_library_s_words(values, reason):
    with pytest.raises(ValueError, match=reason) as error:
        read_picture(values)
    assert "0x" not in str(error.value)
    assert "/no/such" not in str(error.value)


def test_a_network_sees_what_the_reader_gives():
    network = EarlyExitNetwork([nn.Flatten(), nn.Identity()], [Exit(nn.Linear(144, 2), 144, 2) for _ in range(2)])
    x = split_from_torch([(Image.fromarray(GREY), 0)]).x
    assert torch.equal(network.inputs(x), torch.from_numpy(normalised(x.numpy())))
