"""Network and data."""

from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner
from sklearn.datasets import load_digits
from torch import nn

from cafe_flwr.data import ClientData, Split
from cafe_flwr.networks import EarlyExitNetwork, Exit


class Net(EarlyExitNetwork):
    """A small CNN for images (B, 1, 8, 8), with an exit after each of its three stages."""

    def __init__(self) -> None:
        conv1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        conv2 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        fc1 = nn.Sequential(nn.Flatten(), nn.Linear(32 * 2 * 2, 64), nn.ReLU())
        projections = [to_features(16), to_features(32), nn.Identity()]
        super().__init__([conv1, conv2, fc1], [Exit(projection, 64, 10) for projection in projections])


def to_features(channels: int) -> nn.Sequential:
    """From maps (B, channels, …) to features (B, 64), as the last stage gives them."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 64), nn.ReLU())


partitioner = None  # made once per process


def load_data(partition_id: int, num_partitions: int) -> ClientData:
    """A client's own data: 64 % to train with, 16 % to calibrate thresholds with, 20 % to test with."""
    global partitioner
    if partitioner is None:
        images, labels = load_digits(return_X_y=True)
        partitioner = DirichletPartitioner(num_partitions, partition_by="label", alpha=1.0, seed=0)
        partitioner.dataset = Dataset.from_dict({"image": images.reshape(-1, 1, 8, 8) / 16, "label": labels})
    partition = partitioner.load_partition(partition_id).with_format("torch")
    parts = partition.train_test_split(test_size=0.2, seed=42)
    own = parts["train"].train_test_split(test_size=0.2, seed=42)
    splits = (own["train"], own["test"], parts["test"])
    return ClientData(*(Split(part["image"][:], part["label"][:]) for part in splits))
