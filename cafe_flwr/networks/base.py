"""What an early-exit network is: stages that can be stepped through, and an exit after each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn


class Exit(nn.Module):
    """An exit: a projection to the common feature width, and a linear classifier (the head).

    The projection belongs to the shared backbone, the head is personal (docs/method.md).

    Parameters
    ----------
    projection
        Maps a stage's output to features, (B, …) → (B, width).
    width
        Feature width, the same at every exit of a network, so that heads can be compared.
    num_classes
        C.
    """

    def __init__(self, projection: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.projection = projection
        self.head = nn.Linear(width, num_classes)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, width) and logits (B, C) of this exit."""
        features = self.projection(h)
        return features, self.head(features)


class EarlyExitNetwork(nn.Module):
    """A network with an exit after every stage.

    ``forward(x)`` computes all exits. To compute no further than needed, step with ``stage(k, h)`` and look with
    ``exit(k, h)``; k counts from 0 as Python does, so exit k = 1..m of the papers is ``k − 1`` here.

    Parameters
    ----------
    stages
        Modules applied one after the other; the first takes the input.
    exits
        One :class:`Exit` per stage. All heads must have the same shape.

    Attributes
    ----------
    offset
        (C,), added to the logits of every exit, e.g. a client's log-prior; None: nothing. No parameter: it is neither
        trained nor in the state dict.

    Examples
    --------
    >>> import torch
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
        shapes = {tuple(e.head.weight.shape) for e in exits}
        if len(shapes) != 1:
            raise ValueError(f"all heads must have the same (classes, width), got {sorted(shapes)}")
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleList(exits)
        self.offset: Tensor | None = None

    @property
    def num_exits(self) -> int:
        """m, the number of exits."""
        return len(self.exits)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self._head(0).out_features

    def stage(self, k: int, h: Tensor) -> Tensor:
        """Output of stage k from that of stage k − 1 (from the input, if k is 0)."""
        return self.stages[k](h)

    def exit(self, k: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, width) and logits (B, C) of exit k from the output of stage k."""
        features, logits = self.exits[k](h)
        return features, logits if self.offset is None else logits + self.offset

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits of all exits, (B, C) each."""
        logits = []
        for k in range(self.num_exits):
            x = self.stage(k, x)
            logits.append(self.exit(k, x)[1])
        return logits

    def _head(self, k: int) -> nn.Linear:
        return cast(Exit, self.exits[k]).head

    def head_names(self, k: int) -> list[str]:
        """State-dict names of the classifier of exit k (weight and bias)."""
        return [f"exits.{k}.head.{name}" for name in self._head(k).state_dict()]

    def personal_names(self) -> list[str]:
        """State-dict names that stay on the client: the classifiers of all exits."""
        return [name for k in range(self.num_exits) for name in self.head_names(k)]

    def shared_names(self) -> list[str]:
        """State-dict names that are averaged over clients: the stages and the exits' projections."""
        personal = set(self.personal_names())
        return [name for name in self.state_dict() if name not in personal]
