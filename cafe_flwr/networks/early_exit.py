"""Early-exit networks: stages that can be run one by one, and an exit after each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self, cast, get_args

import torch
from torch import Tensor, nn

from cafe_flwr.core.numbers import check_counts
from cafe_flwr.networks.preprocessing import SYMMETRIC
from cafe_flwr.networks.statistics import Statistics, batch_norm_names, drop_statistics
from cafe_flwr.networks.weights import kept_names, leading, names_of_each, once, tied_names, weight_names


class Exit(nn.Module):
    """An exit: a projection to features, (B, …) → (B, width), and a linear classifier to C classes (the head).

    The projection belongs to the shared backbone, the head is personal (docs/method.md). Heads of different exits can
    only be compared if their feature widths are equal.
    """

    def __init__(self, projection: nn.Module, width: int, num_classes: int) -> None:
        check_counts(width=width, num_classes=num_classes)
        super().__init__()
        self.projection = projection
        self.head = nn.Linear(width, num_classes)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, width) and logits (B, C) of this exit."""
        features = self.projection(h)
        return features, self.head(features)


class EarlyExitNetwork(nn.Module):
    """A network with an exit after every stage.

    Stages pass on one tensor whose first dimension is the batch, so that rows which have left can be dropped from it.

    ``forward(x)`` computes all exits. To compute no further than needed, call ``stage(k, h)`` and ``exit(k, h)`` in
    turn; k counts from 0, so exit k = 1..m of the papers is ``k − 1`` here.

    Parameters
    ----------
    stages
        Modules applied one after the other; the first takes the input.
    exits
        One :class:`Exit` per stage, with the same classes. If their widths differ, methods that compare heads of
        different exits raise an error.

    Attributes
    ----------
    offset
        (C,), added to the logits of every exit, e.g. a client's log-prior; None: nothing. It is neither trained nor in
        the state dict.
    statistics
        What happens to the running statistics of batch norms (docs/networks.md): ``"average"`` (the default): averaged
        like the weights; ``"personal"``: kept on the client; ``"drop"``: none, every batch is normalised by its own
        statistics, in evaluation too, which cannot be undone. The counters ``num_batches_tracked`` are neither shared
        nor personal: they start anew. All other buffers stay as the network was built with them.
    pixels
        How images that come as pixels (uint8) are normalised; other inputs are taken as they are.
    autocast
        Type for matrix products and convolutions, ``torch.bfloat16`` or ``torch.float16``; features and logits are
        float32 all the same. None: the type of the weights.

    Examples
    --------
    >>> from cafe_flwr.networks import ConvNet
    >>> network = ConvNet(input_shape=(1, 16, 16), num_classes=10)
    >>> [tuple(z.shape) for z in network(torch.zeros(4, 1, 16, 16))]
    [(4, 10), (4, 10), (4, 10)]
    >>> h = network.stage(0, torch.zeros(4, 1, 16, 16))  # stop after the first stage
    >>> features, logits = network.exit(0, h)
    >>> network.personal_names()[:2]
    ['exits.0.head.weight', 'exits.0.head.bias']
    """

    def __init__(self, stages: Sequence[nn.Module], exits: Sequence[Exit]) -> None:
        super().__init__()
        if not stages or len(stages) != len(exits):
            raise ValueError(f"one exit per stage is needed, got {len(stages)} stages and {len(exits)} exits")
        classes = {e.head.out_features for e in exits}
        if len(classes) != 1:
            raise ValueError(f"all heads must have the same classes, got {', '.join(map(str, sorted(classes)))}")
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleList(exits)
        self.offset: Tensor | None = None
        self.pixels = SYMMETRIC
        self.autocast: torch.dtype | None = None
        self._statistics: Statistics = "average"

    @property
    def num_exits(self) -> int:
        """m, the number of exits."""
        return len(self.exits)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self._head(0).out_features

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Width of the features at every exit, (m,).

        Examples
        --------
        >>> from cafe_flwr.networks import ConvNet, PublishedResNet18
        >>> ConvNet((1, 16, 16), num_classes=10).feature_widths
        (24, 24, 24)
        >>> PublishedResNet18((3, 32, 32), num_classes=10).feature_widths
        (64, 128, 256, 512)
        """
        return tuple(self._head(k).in_features for k in range(self.num_exits))

    @property
    def statistics(self) -> Statistics:
        """What happens to the running statistics of batch norms, see above."""
        return self._statistics

    @statistics.setter
    def statistics(self, policy: Statistics) -> None:
        if policy not in get_args(Statistics):
            raise ValueError(f"statistics must be one of {', '.join(get_args(Statistics))}; got {policy!r}")
        if self._statistics == "drop" != policy:
            raise ValueError(f"the running statistics of this network are dropped: build it anew for {policy!r}")
        if policy == "drop":
            drop_statistics(self)
        self._statistics = policy

    def inputs(self, x: Tensor) -> Tensor:
        """The inputs as the first stage takes them: pixels (uint8) normalised, others as they are."""
        return self.pixels(x) if x.dtype == torch.uint8 else x

    def check_inputs(self, x: Tensor) -> None:
        """Raise ValueError if the network cannot take these inputs, (N, …); here it takes any."""

    def stage(self, k: int, h: Tensor) -> Tensor:
        """Output of stage k from that of stage k − 1 (from the input, if k is 0)."""
        h = h if k else self.inputs(h)
        if self.autocast is None:
            return self.stages[k](h)
        with torch.autocast(h.device.type, self.autocast):
            return self.stages[k](h)

    def exit(self, k: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, width) and logits (B, C) of exit k from the output of stage k."""
        if self.autocast is None:
            features, logits = self.exits[k](h)
        else:
            with torch.autocast(h.device.type, self.autocast):
                features, logits = (t.float() for t in self.exits[k](h))
        return features, logits if self.offset is None else logits + self.offset

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits of all exits, (B, C) each."""
        logits = []
        for k in range(self.num_exits):
            x = self.stage(k, x)
            logits.append(self.exit(k, x)[1])
        return logits

    def truncated(self, depth: int) -> Self:
        """The network up to an exit: its first ``depth`` stages and exits, shared with this network, not copied.

        Tensors keep their names. A subclass with more than ``stages`` and ``exits`` must override this if it has to
        leave out more. ValueError if there is no such exit.

        Examples
        --------
        >>> from cafe_flwr.networks import ConvNet
        >>> network = ConvNet((1, 16, 16), num_classes=10)
        >>> short = network.truncated(2)
        >>> short.num_exits, short.head_names(1)[0], short.exits[1] is network.exits[1]
        (2, 'exits.1.head.weight', True)
        """
        if not 1 <= depth <= self.num_exits:
            raise ValueError(f"this network has exits 1 to {self.num_exits}, there is no exit {depth}")
        if depth == self.num_exits:
            return self
        short = copy.copy(self)
        short._modules = {
            **self._modules,
            "stages": nn.ModuleList(self.stages[:depth]),
            "exits": nn.ModuleList(self.exits[:depth]),
        }
        return short

    def narrowed(self, share: float) -> EarlyExitNetwork:
        """The network at a share of its width, above 0 and at most 1: fewer channels, features and exits as they are.

        Its tensors have the same names, and are the first rows, columns, … of this network's. ValueError for another
        share, or if the network does not define :meth:`at_width`.

        Examples
        --------
        >>> from cafe_flwr.networks import ConvNet
        >>> network = ConvNet((1, 16, 16), num_classes=10)
        >>> narrow = network.narrowed(0.5)
        >>> tuple(network.stages[1][0].weight.shape), tuple(narrow.stages[1][0].weight.shape)
        ((16, 8, 3, 3), (8, 4, 3, 3))
        """
        if not 0 < share <= 1:
            raise ValueError(f"a width is a share above 0 and at most 1, got {share:g}")
        if share == 1:
            return self
        with torch.random.fork_rng(devices=[]):
            narrow = self.at_width(share).truncated(self.num_exits)
        narrow.pixels, narrow.statistics, narrow.autocast = self.pixels, self.statistics, self.autocast
        narrow.load_state_dict(leading(self.state_dict(), narrow.state_dict()), strict=False)
        return narrow.to(next(self.parameters()).device)

    def at_width(self, share: float) -> EarlyExitNetwork:
        """A new network of the same build with about this share of the width; subclasses define it."""
        raise ValueError(f"{type(self).__name__} does not say what it is at a share of its width: limit its exits only")

    def _head(self, k: int) -> nn.Linear:
        return cast(Exit, self.exits[k]).head

    def head_names(self, k: int) -> list[str]:
        """State-dict names of the classifier of exit k (weight and bias)."""
        return [f"exits.{k}.head.{name}" for name in self._head(k).state_dict()]

    def classifier_names(self) -> list[str]:
        """State-dict names of the classifiers of all exits; of tied tensors the last exit's."""
        names = [name for k in range(self.num_exits) for name in self.head_names(k)]
        return once(self, reversed(names))[::-1]

    def tied_classifiers(self) -> list[str]:
        """Those of :meth:`classifier_names` that are tied to a tensor outside of the classifiers."""
        every, groups = {name for k in range(self.num_exits) for name in self.head_names(k)}, names_of_each(self)
        return [name for name in self.classifier_names() if not every.issuperset(groups[name])]

    def personal_names(self) -> list[str]:
        """State-dict names that stay on the client: all classifiers, and ``"personal"`` running statistics."""
        return self.classifier_names() + self.statistics_names()

    def shared_names(self) -> list[str]:
        """State-dict names that are averaged over clients: the weights of the stages and the exits' projections.

        A tensor that is tied to a classifier belongs to the classifier.
        """
        tied = tied_names(self)
        others = {tied.get(name, name) for name in self.personal_names()}
        return [name for name in weight_names(self) if name not in others]

    def whole_names(self) -> list[str]:
        """State-dict names that are averaged with the whole network: all weights but personal statistics."""
        others = self.statistics_names()
        return [name for name in weight_names(self) if name not in others]

    def kept_names(self) -> list[str]:
        """State-dict names that a client with a network of its own keeps: all weights, and counters of norms."""
        return kept_names(self)

    def statistics_names(self) -> list[str]:
        """State-dict names of the running statistics that stay on the client: none, unless they are ``"personal"``."""
        if self._statistics != "personal":
            return []
        weights = set(weight_names(self))
        return [name for name in batch_norm_names(self) if name in weights]
