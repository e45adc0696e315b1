"""A user's own data: from a `datasets.Dataset` or a torch `Dataset` to clients of a real federation."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from federations import WatchedGrid
from PIL import Image
from torch.utils.data import TensorDataset

from cafe_flwr import CafeDistill, make_client_app
from cafe_flwr.data import ClientData, Split
from cafe_flwr.data.augmentation import Augmentation
from cafe_flwr.data.convert import divide, split_from_datasets, split_from_torch
from cafe_flwr.data.tokenizer import Tokenizer
from cafe_flwr.networks import ConvNet, ResNet18, TextTransformer
from cafe_flwr.training import LocalBudget

TOKENIZER = Tokenizer(max_tokens=5, vocabulary=200)


def picture(row, mode="RGB", size=(8, 8)):
    rng = np.random.default_rng(row)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)).convert(mode)


def own_texts(client):
    words = ("apple", "pear", "plum") if client % 2 else ("hammer", "saw", "nail")
    rows = range(30)
    return Dataset.from_dict({"review": [f"{words[r % 3]} number {r}" for r in rows], "stars": [r % 3 for r in rows]})


def own_pictures(client):
    return [(picture(100 * client + row), row % 3) for row in range(30)]


def texts_of(client, context):
    return divide(split_from_datasets(own_texts(client), "review", "stars", tokenizer=TOKENIZER))


def pictures_of(client, context):
    return divide(split_from_torch(own_pictures(client)), augment=Augmentation(1))


@pytest.mark.parametrize(
    ("build", "load"),
    [
        (lambda context: TextTransformer(200, 5, 3, features=8, width=8, heads=2, blocks=2), texts_of),
        (lambda context: ConvNet((3, 8, 8), 3, widths=(4, 8), features=8), pictures_of),
    ],
    ids=["datasets", "torch"],
)
def test_own_data_take_part_in_a_federation(tmp_path, build, load):
    grid = WatchedGrid(make_client_app(build, load), 2, node_config={"state-dir": str(tmp_path)})
    strategy = CafeDistill(num_rounds=2, local=LocalBudget(steps=2, learning_rate=0.1), wait_seconds=0.0)
    result = strategy.start(grid)
    accuracy = result.train_metrics_clientapp[2]["accuracy-after"]
    assert len(accuracy) == 2
    assert all(0 <= a <= 1 for a in accuracy)
    assert (tmp_path / "client-1.safetensors").is_file()


# --- what is made of a data set ---


def test_texts_pictures_and_numbers_of_a_dataset():
    split = split_from_datasets(own_texts(1), "review", "stars", tokenizer=TOKENIZER)
    assert torch.equal(split.x, TOKENIZER(own_texts(1)["review"]))
    assert split.y.tolist() == [0, 1, 2] * 10
    pictures = Dataset.from_dict({"image": [picture(0), picture(1)], "label": [0, 1]})
    split = split_from_datasets(pictures)
    assert split.x.dtype == torch.uint8
    assert np.array_equal(split.x[1], np.asarray(picture(1)).transpose(2, 0, 1))
    assert split_from_datasets(pictures, image_size=4).x.shape == (2, 3, 4, 4)
    numbers = Dataset.from_dict({"values": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]})
    split = split_from_datasets(numbers, "values")
    assert (split.x.dtype, split.x.tolist()) == (torch.float32, [[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.uint8, torch.uint8),
        (torch.int32, torch.int64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float32),
    ],
)
def test_inputs_of_a_torch_dataset_keep_what_they_are(given, kept):
    x, y = torch.arange(12).reshape(4, 3).to(given), torch.tensor([2, 0, 1, 1])
    split = split_from_torch(TensorDataset(x, y))
    assert split.x.dtype == kept
    assert torch.equal(split.x, x.to(kept))
    assert torch.equal(split.y, y)


def test_grey_pictures_have_one_colour_unless_others_have_three():
    assert split_from_torch([(picture(0, "L"), 0), (picture(1, "L"), 1)]).x.shape == (2, 1, 8, 8)
    mixed = split_from_torch([(picture(0, "L"), 0), (picture(1), 1)]).x
    assert mixed.shape == (2, 3, 8, 8)
    assert torch.equal(mixed[0, 0], mixed[0, 2])


def test_a_division_keeps_every_example_once():
    whole = Split(torch.arange(100.0)[:, None], torch.arange(100) % 4)
    data = divide(whole, (0.5, 0.2, 0.3), seed=3)
    parts = (data.train, data.calibration, data.test)
    assert [len(part) for part in parts] == [50, 20, 30]
    assert sorted(torch.cat([part.x for part in parts]).flatten().tolist()) == list(range(100))
    assert all(torch.equal(part.y, part.x.flatten().long() % 4) for part in parts)
    assert [part.y.bincount().tolist() for part in parts[1:]] == [[5] * 4, pytest.approx([7.5] * 4, abs=1)]
    assert data.augment is None
    assert divide(whole, augment=Augmentation(1)).augment == Augmentation(1)
    assert torch.equal(divide(whole, (0.5, 0.2, 0.3), seed=3).test.x, data.test.x)
    assert not torch.equal(divide(whole, (0.5, 0.2, 0.3), seed=4).test.x, data.test.x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split_from_datasets(own_texts(0), "text"), "no column 'text'; it has review, stars"),
        (lambda: split_from_datasets(own_texts(0), "review", "label"), "no column 'label'"),
        (lambda: split_from_torch([(picture(0), None), (picture(1), 0)]), "1 of 2 examples have no label"),
        (lambda: split_from_torch([(picture(0), -1)]), "got -1: some labels are missing or withheld"),
        (lambda: split_from_torch([(picture(0), 0.0)]), r"whole numbers from 0 up, got 0\.0"),
        (lambda: split_from_torch([(picture(0), "")]), "whole numbers from 0 up, got ''"),
        (lambda: split_from_torch([(picture(0), "cat")]), "got 'cat': number the classes first"),
        (lambda: split_from_torch([(picture(0), 0.5)]), "got 0.5: number the classes first"),
        (lambda: split_from_torch([{"image": picture(0), "label": 0}]), r"item 0 .*\(input, label\), got a dict"),
        (lambda: split_from_torch([(picture(0), 0), (picture(1, size=(9, 8)), 0)]), "2 different shapes.*image_size"),
        (lambda: divide(Split(torch.zeros(4, 1), torch.zeros(4).long()), (0.5, 0.6, 0.1)), "sum to 1"),
    ],
)
def test_what_cannot_be_used_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- what a node refuses before the first round ---


def split(x, y=(0, 1, 2)):
    return Split(x, torch.tensor(y))


TOKENS = torch.tensor([[1, 2, 0], [3, 4, 0], [5, 6, 7]])
IMAGES = torch.zeros(3, 3, 8, 8)


def text_network(context):
    return TextTransformer(10, 4, 3, features=4, width=4, heads=1, blocks=2)


def image_network(context):
    return ResNet18((3, 8, 8), 3, features=4, width=2)


@pytest.mark.parametrize(
    ("build", "train", "message"),
    [
        (text_network, split(TOKENS + 3), r"tokens are 3\.\.10, the network knows 0\.\.9"),
        (text_network, split(TOKENS - 1), r"tokens are -1\.\.6"),
        (text_network, split(torch.ones(3, 5, dtype=torch.int64)), "texts have 5 tokens, the network takes 4"),
        (text_network, split(TOKENS.float()), "texts must be tokens, .* int64; got torch.float32"),
        (image_network, split(TOKENS), r"images must be \(N, 3, height, width\).* got torch.int64 of shape \(3, 3\)"),
        (image_network, split(IMAGES[:, :1]), r"got torch.float32 of shape \(3, 1, 8, 8\)"),
        (image_network, split(IMAGES, (0, 1, -1)), r"labels -1\.\.1, expected 0\.\.2"),
        (image_network, split(IMAGES, (0, 1, 3)), r"labels 0\.\.3, expected 0\.\.2"),
        (image_network, split(IMAGES, (0, 1)), "every input needs one label"),
        (image_network, split(IMAGES.double()), "must be float32 .*got torch.float64"),
    ],
)
@pytest.mark.parametrize("where", ["train", "test"])
def test_a_client_whose_data_do_not_fit_is_named_before_the_first_round(
    tmp_path, flower_log, build, train, message, where
):
    good = split(TOKENS if build is text_network else IMAGES)
    splits = {"train": good, "calibration": good, "test": good} | {where: train}
    if where == "test" and train.x.dtype == torch.float64:
        message = r"images must be .*got torch.float64"
    app = make_client_app(build, lambda client, context: ClientData(**splits))
    grid = WatchedGrid(app, 1, node_config={"state-dir": str(tmp_path)})
    with pytest.raises(RuntimeError):
        CafeDistill(num_rounds=1, wait_seconds=0.0).start(grid)
    assert not grid.of_type("train")
    assert re.search(f"client 0 is left out: .*{message}", flower_log.text())
