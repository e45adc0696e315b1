"""Forwards that people write: classifiers of images (B, 3, 8, 8) with a module ``first`` to cut after."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """Two convolutions, a linear layer, and whatever else a forward may use."""

    def __init__(self, forward: Callable[..., torch.Tensor], features: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.pool, self.flatten, self.relu = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU(inplace=True)
        self.norm, self.register = nn.BatchNorm2d(4), nn.Embedding(4, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("mask", torch.rand(4) > 0.3, persistent=False)
        self.plain = torch.rand(1, 4, 1, 1)
        self.fc = nn.Linear(features, 5)
        self.does = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.does(self, x)


def both(m, x):
    return m.second(m.first(x))


def sized_before(m, x):
    b, _, height, width = x.shape
    h = both(m, x)
    return m.fc(h.view(b, -1, height * width).mean(2))


def positions(m, x):
    h = both(m, x).flatten(2).transpose(1, 2)
    return m.fc((h + m.register(torch.arange(h.shape[1], device=x.device) % 4)).mean(1))


def token(m, x):
    b = x.size(0)
    h = both(m, x).flatten(2).transpose(1, 2)
    return m.fc(torch.cat([m.scale.expand(b, 1, -1), h], 1)[:, 0] + h.mean(1))


def assigned(m, x):
    h = both(m, x)
    padded = torch.zeros(h.size(0), 4, 9, 8, device=x.device)
    padded[:, :, :8] = h
    return m.fc(padded.mean((2, 3)))


def looped(m, x):
    h = both(m, x)
    total = torch.zeros(h.shape[0], h.shape[1])
    for i in range(h.shape[2]):
        total = total + h[:, :, i].mean(-1)
    return m.fc(total)


def asked(m, x):
    if x.dim() == 3:
        x = x.unsqueeze(0)
    h = both(m, x)
    if h.shape[-1] > 4 and h.shape[1] == 4:
        h = F.avg_pool2d(h, 2)
    return m.fc(h.mean((2, 3)))


def in_place(m, x):
    h = both(m, x)
    h.mul_(2)
    F.relu_(h)
    return m.fc(h.mean((2, 3)))


def tokens_to_map(m, x):
    h = both(m, x).flatten(2)
    side = int(math.sqrt(h.shape[2]))
    return m.fc(h.view(-1, 4, side, side).amax((2, 3)))


def parts_of(m, x):
    left, right = both(m, x).chunk(2, dim=1)
    return m.fc(torch.cat([right, left.tanh()], 1).mean((2, 3)))


def mode_noise(m, x):
    return m.fc(both(m, x).mean((2, 3)) * (0.9 if m.training else 1.0))


def only_training(m, x):
    h = both(m, x)
    if m.training:
        m.register(torch.zeros(1, dtype=torch.int64))  # such as an auxiliary loss: the logits do not depend on it
    return m.fc(h.mean((2, 3)))


# name: (forward, features)
CUT = {
    "constant buffer": (lambda m, x: m.fc(both(m, x - m.mean.view(1, 3, 1, 1)).mean((2, 3))), 4),
    "buffer sliced by a size": (lambda m, x: m.fc(both(m, x - m.mean[: x.shape[1], None, None]).mean((2, 3))), 4),
    "mask": (lambda m, x: m.fc(both(m, x).mean((2, 3)).masked_fill(~m.mask, 0.5)), 4),
    "tensor of a list": (lambda m, x: m.fc(both(m, x / torch.tensor([1.0, 2, 3])[:, None, None]).mean((2, 3))), 4),
    "tensor that is an attribute": (lambda m, x: m.fc((both(m, x) * m.plain).mean((2, 3))), 4),
    "parameter": (lambda m, x: m.fc((both(m, x) * m.scale.view(1, -1, 1, 1)).mean((2, 3))), 4),
    "arange": (lambda m, x: m.fc((both(m, x) * torch.arange(8)).mean((2, 3))), 4),
    "linspace": (lambda m, x: m.fc((both(m, x) * torch.linspace(0, 1, x.size(-1))).mean((2, 3))), 4),
    "arange of a size": (positions, 4),
    "zeros of the batch": (lambda m, x: m.fc(both(m, x).mean((2, 3)) + torch.zeros(x.shape[0], 4)), 4),
    "ones of a shape": (lambda m, x: m.fc(both(m, x).mean((2, 3)) + torch.ones((x.size(0), 4)).to(x.device)), 4),
    "zeros like": (lambda m, x: m.fc((h := both(m, x).mean((2, 3))) + torch.zeros_like(h)), 4),
    "class token": (token, 4),
    "view by shape[0]": (lambda m, x: m.fc(both(m, x).view(x.shape[0], -1)), 256),
    "view by size(0)": (lambda m, x: m.fc(both(m, x).view(x.size(0), -1)), 256),
    "view by size()[0]": (lambda m, x: m.fc(both(m, x).view(x.size()[0], -1)), 256),
    "view by len": (lambda m, x: m.fc(both(m, x).view(len(x), -1)), 256),
    "reshape": (lambda m, x: m.fc(both(m, x).reshape((*x.shape[:1], 256))), 256),
    "view -1": (lambda m, x: m.fc(both(m, x).view(-1, 4 * 8 * 8)), 256),
    "torch.flatten": (lambda m, x: m.fc(torch.flatten(both(m, x), 1)), 256),
    "flatten from a module": (lambda m, x: m.fc(m.flatten(both(m, x))), 256),
    "pool and squeeze": (lambda m, x: m.fc(m.pool(both(m, x)).squeeze(-1).squeeze(-1)), 4),
    "pool and slice": (lambda m, x: m.fc(m.pool(both(m, x))[:, :, 0, 0]), 4),
    "pool by size": (lambda m, x: m.fc(F.avg_pool2d(h := both(m, x), h.size()[2:]).flatten(1)), 4),
    "sizes before, used after": (sized_before, 4),
    "shape of all": (lambda m, x: m.fc(both(m, x).reshape(x.shape[0], 4, *x.shape[2:]).mean((2, 3))), 4),
    "tokens to map": (tokens_to_map, 4),
    "skip": (lambda m, x: m.fc((lambda h: (h + m.second(h)).mean((2, 3)))(m.first(x))), 4),
    "functional": (lambda m, x: m.fc(F.dropout(F.relu(both(m, x)), 0.5, m.training).mean((2, 3))), 4),
    "dropout2d": (lambda m, x: m.fc(F.dropout2d(both(m, x), p=0.5, training=m.training).mean((2, 3))), 4),
    "functional batch norm": (
        lambda m, x: m.fc(
            F.batch_norm(
                both(m, x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, training=m.training
            ).mean((2, 3))
        ),
        4,
    ),
    "another factor in training": (mode_noise, 4),
    "more in training": (only_training, 4),
    "set items": (assigned, 4),
    "loop over a size": (looped, 4),
    "decided by sizes": (asked, 4),
    "in place": (in_place, 4),
    "in place, a module": (lambda m, x: m.fc(m.relu(both(m, x)).mean((2, 3))), 4),
    "parts": (parts_of, 4),
    "einsum": (lambda m, x: m.fc(torch.einsum("bchw,c->bc", both(m, x), m.scale)), 4),
    "interpolate": (lambda m, x: m.fc(F.interpolate(both(m, x), size=x.shape[-2:], mode="nearest").mean((2, 3))), 4),
    "pad": (lambda m, x: m.fc(F.pad(both(m, x), (0, 8 - x.shape[3], 0, 1)).mean((2, 3))), 4),
}


def grad_off(m, x):
    with torch.no_grad():
        h = m.first(x)
    return m.fc(m.second(h).mean((2, 3)))


def by_data(m, x):
    h = both(m, x)
    return m.fc((h if h.mean() > 0 else -h).mean((2, 3)))


def by_weight(m, x):
    return m.fc((both(m, x) * float(m.scale[0])).mean((2, 3)))


def by_mode(m, x):
    h = m.first(x)
    return m.fc((m.second(h) if m.training else h).mean((2, 3)))


def by_batch(m, x):
    h = both(m, x)
    return m.fc(h.mean((2, 3)) * (2.0 if x.shape[0] > 1 else 1.0))


# name: (forward, the true reason)
REFUSED = {
    "data": (by_data, r"\(line \d+ of forwards.py: return .*\): it decides by values in its input or in its weights"),
    "a weight": (by_weight, "it decides by values in its input or in its weights"),
    "gradients": (grad_off, r"\(line \d+ of forwards.py: with torch.no_grad\(\):\): it turns gradients on or off"),
    "mode": (by_mode, "does different things in training and in evaluation"),
    "batch": (by_batch, "depends on the number of examples in the batch"),
    "the input": (
        lambda m, x: m.fc((both(m, x) + x.mean(1, keepdim=True)).mean((2, 3))),
        "needs more after 'first' than what comes out of it: the output of mean is used there",
    ),
}
