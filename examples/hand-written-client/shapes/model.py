"""The network: three stages of convolutions, and an exit after each."""

from torch import Tensor, nn

from shapes.data import NUM_CLASSES

WIDTH = 24
HEAD = (WIDTH, NUM_CLASSES)


def stage(channels: int) -> nn.Sequential:
    """Half the height and width, ``WIDTH`` channels."""
    return nn.Sequential(nn.Conv2d(channels, WIDTH, 3, stride=2, padding=1), nn.GroupNorm(4, WIDTH), nn.ReLU())


def pool() -> nn.Sequential:
    """Mean over all positions, (B, WIDTH)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ShapeNet(nn.Module):
    """A small CNN for pictures (B, 1, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(1), stage(WIDTH), stage(WIDTH)])
        self.pool = pool()
        self.classifier = nn.Linear(*HEAD)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C)."""
        for each in self.stages:
            x = each(x)
        return self.classifier(self.pool(x))


class ExitNet(nn.Module):
    """The stages of :class:`ShapeNet` and an exit after each. The names of its tensors are part of the contract."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = ShapeNet().stages
        self.exits = nn.ModuleList(nn.ModuleDict({"head": nn.Linear(*HEAD)}) for _ in self.stages)
        self.pool = pool()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits (B, C) of every exit."""
        result = []
        for stage_k, exit_k in zip(self.stages, self.exits, strict=True):
            x = stage_k(x)
            result.append(exit_k["head"](self.pool(x)))
        return result

    @staticmethod
    def head_names(k: int) -> list[str]:
        """Names of the tensors of a classifier."""
        return [f"exits.{k}.head.weight", f"exits.{k}.head.bias"]
