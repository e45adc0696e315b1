"""Attach exits to any image classifier, such as torchvision's and timm's, after named modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cafe_flwr.core.numbers import check_counts
from cafe_flwr.networks.cutting import cut
from cafe_flwr.networks.early_exit import EarlyExitNetwork, Exit

HeadKind = Literal["safe-kd", "linear"]


def attach_exits(
    backbone: nn.Module,
    at: Sequence[str],
    num_classes: int | None = None,
    *,
    features: int | None = None,
    head: HeadKind = "safe-kd",
    example: Tensor | None = None,
    input_shape: Sequence[int] | None = None,
) -> EarlyExitNetwork:
    """Make an image classifier an :class:`EarlyExitNetwork`, with an exit after each of the named modules.

    The last exit is the backbone's own classifier and gives the backbone's logits. If there are multiply-adds between
    the last named module and the classifier, they become a further stage, with the classifier as its exit; otherwise
    the classifier is the exit of the last named module (ResNet-18: ``at=["layer2", "layer3"]`` and ``at=["layer2",
    "layer3", "layer4"]`` give the same three exits).

    The projection of an early exit pools its module's output (maps: the mean over positions; tokens: the class token
    where the backbone has one, else the mean) and maps it to the width of the last exit's features.

    Parameters
    ----------
    backbone
        Takes a batch of images and returns the logits (B, C) of its last linear layer. It is copied, not changed.
    at
        Names of modules (``backbone.named_modules()``) in the order in which they run.
    num_classes
        C. None keeps the backbone's classifier; another number than the backbone's gives the last exit a new one.
    features
        Feature width at every exit. None: the input width of the backbone's classifier. With another width, the last
        exit gets a linear layer to it and a new classifier.
    head
        ``"safe-kd"``: pool, layer norm, linear (SAFE-KD, arXiv 2602.03043); ``"linear"``: without the norm.
    example
        A batch that the backbone takes, to measure sizes with.
    input_shape
        (channels, height, width) of an example, instead. Without either, the backbone's own attributes decide.

    Raises
    ------
    ValueError
        If a module does not exist (the candidates are listed) or cannot be cut after, the order is wrong, the backbone
        does not end in a linear classifier, or torch.fx cannot trace it.

    Examples
    --------
    >>> from torchvision.models import resnet18
    >>> backbone = resnet18(num_classes=10)
    >>> network = attach_exits(backbone, at=["layer1", "layer2", "layer3"], input_shape=(3, 32, 32))
    >>> network.num_exits, network.exits[0].head
    (4, Linear(in_features=512, out_features=10, bias=True))
    >>> x = torch.rand(2, 3, 32, 32)
    >>> torch.equal(network.eval()(x)[-1], backbone.eval()(x))
    True
    """
    if head not in get_args(HeadKind):
        raise ValueError(f"head must be one of {', '.join(get_args(HeadKind))}; got {head!r}")
    check_counts(**{n: v for n, v in {"num_classes": num_classes, "features": features}.items() if v is not None})
    check_counts(input_shape=input_shape or ())
    if example is not None and not isinstance(example, Tensor):
        raise ValueError(f"example must be a tensor, a batch that the backbone takes; not a {type(example).__name__}")
    at = [at] if isinstance(at, str) else list(at)
    model = copy.deepcopy(backbone).eval()
    example = _example(model, input_shape) if example is None else example
    name, classifier, logits = _classifier(model, example)
    pieces = cut(model, at, name, example)
    outputs, macs = _run(pieces, example)
    _check_logits(model, nn.Sequential(*pieces, classifier), (at, example, logits))

    classes = classifier.out_features if num_classes is None else num_classes
    width = classifier.in_features if features is None else features
    tail = pieces.pop()
    if macs[-1]:
        pieces.append(tail)
        tail = nn.Identity()
    if width != classifier.in_features:
        tail = nn.Sequential(tail, nn.Linear(classifier.in_features, width))
    projections = [_projection(model, example, h, width, head) for h in outputs[: len(pieces) - 1]]
    exits = nn.ModuleList(Exit(projection, width, classes) for projection in (*projections, tail))
    network = EarlyExitNetwork(pieces, list(exits.to(classifier.weight)))  # type: ignore[arg-type]
    if (classes, width) == (classifier.out_features, classifier.in_features):
        network.load_state_dict(
            dict(zip(network.head_names(len(pieces) - 1), _weights(classifier), strict=True)), False
        )
    return network.train(backbone.training)


class Pool(nn.Module):
    """The mean over some dimensions of (B, …), without the first ``skip`` tokens; over none, (B, channels) itself."""

    def __init__(self, over: tuple[int, ...], skip: int = 0) -> None:
        super().__init__()
        self.over = over
        self.skip = skip

    def forward(self, h: Tensor) -> Tensor:
        """(B, channels)."""
        return h[:, self.skip :].mean(dim=self.over) if self.over else h


class ClassToken(nn.Module):
    """The first token of (B, tokens, channels)."""

    def forward(self, h: Tensor) -> Tensor:
        """(B, channels)."""
        return h[:, 0]


def _projection(model: nn.Module, example: Tensor, h: Tensor, width: int, head: HeadKind) -> nn.Module:
    """From a module's output, (B, …), to the features of its exit."""
    channels = h.shape[-1]
    pool: nn.Module
    if h.dim() == 2:
        pool = Pool(())
    elif h.dim() == 3:
        pool = _token_pool(model)
    elif h.dim() == 4 and _channels_last(model, example, h):
        pool = Pool((1, 2))
    elif h.dim() == 4:
        pool, channels = Pool((2, 3)), h.shape[1]
    else:
        raise ValueError(
            f"an exit needs maps (B, channels, height, width), tokens (B, tokens, channels) or (B, channels), got "
            f"{tuple(h.shape)} from a module of {type(model).__name__}"
        )
    norm = [nn.LayerNorm(channels)] if head == "safe-kd" else []
    return nn.Sequential(pool, *norm, nn.Linear(channels, width))


def _token_pool(model: nn.Module) -> nn.Module:
    """Pool tokens as the backbone does: timm names it in ``global_pool``, torchvision's has a class token."""
    tokens = [getattr(model, name, None) is not None for name in ("cls_token", "class_token")]
    if any(tokens) and getattr(model, "global_pool", "token") in ("token", ""):
        return ClassToken()
    return Pool((1,), skip=int(getattr(model, "num_prefix_tokens", any(tokens))))


def _channels_last(model: nn.Module, example: Tensor, h: Tensor) -> bool:
    """Whether maps are (B, height, width, channels), as Swin's are, judged by the aspect ratio of the image."""
    if example.dim() != 4:
        return False
    ratio = math.log(example.shape[2] / example.shape[3])
    first, last = (abs(math.log(h.shape[i] / h.shape[i + 1]) - ratio) for i in (2, 1))
    if math.isclose(first, last):
        return getattr(model, "output_fmt", "NCHW") == "NHWC"
    return last < first


def _example(model: nn.Module, input_shape: Sequence[int] | None) -> Tensor:
    """Two random images of the given shape, or of the one in the attributes of torchvision's and timm's models."""
    weight = next(model.parameters(), torch.empty(0))
    if input_shape is None:
        config = getattr(model, "pretrained_cfg", {})
        size = getattr(model, "image_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = size or tuple(config.get("input_size", (3, 224, 224)))[1:]
        height, width = (size, size) if isinstance(size, int) else size
        convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
        input_shape = (next(convolutions, 3), height, width)
    noise = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    return noise.to(weight)


@torch.no_grad()
def _classifier(model: nn.Module, example: Tensor) -> tuple[str, nn.Linear, Tensor]:
    """Name of the linear layer whose output the backbone returns, the layer, and that output."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    given: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: given.update({name: output})

    handles = [module.register_forward_hook(note(name)) for name, module in linear.items()]
    try:
        logits = model(example)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not take an input of shape {tuple(example.shape)} ({error}): say with "
            "input_shape=(channels, height, width) or example= what it takes"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(logits, Tensor) and logits.dim() == 2:
        for name, output in reversed(given.items()):
            if output.shape == logits.shape and torch.equal(output, logits):
                return name, linear[name], logits
    raise ValueError(
        f"{type(model).__name__} does not end in a linear classifier that gives its logits (B, classes), so there is "
        "no head for the last exit: build it with one (in timm, num_classes above 0), or build an EarlyExitNetwork "
        "from stages and exits of your own"
    )


@torch.no_grad()
def _run(pieces: Sequence[nn.Module], example: Tensor) -> tuple[list[Tensor], list[int]]:
    """Outputs of the pieces, and the floating-point operations of each."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes a tenth of a second

    outputs, macs, h = [], [], example
    trained = {p for piece in pieces for p in piece.parameters() if p.requires_grad}
    for p in trained:
        p.requires_grad_(False)  # a counter of torch's stops at weights that are an argument of a module
    for piece in pieces:
        with FlopCounterMode(display=False) as counter:
            h = piece(h)
        if not isinstance(h, Tensor) or len(h) != len(example):
            raise ValueError(
                "the output of a module with an exit must be one tensor whose first dimension is the batch"
            )
        outputs.append(h)
        macs.append(counter.get_total_flops())
    for p in trained:
        p.requires_grad_(True)
    return outputs, macs


@torch.no_grad()
def _check_logits(backbone: nn.Module, pieces: nn.Module, known: tuple[Sequence[str], Tensor, Tensor]) -> None:
    """ValueError unless the pieces give the backbone's logits, for batches of several sizes."""
    at, example, logits = known
    why = "its forward depends on more than it is called with"
    for batch in (example, example[:1], torch.cat([example, example[:1]])):
        try:
            expected = logits if batch is example else backbone(batch)
        except Exception:
            continue  # the backbone itself does not take a batch of this size
        try:
            same = torch.allclose(pieces(batch), expected, rtol=1e-3, atol=1e-5)
        except Exception:
            same = False
        if not same:
            raise ValueError(
                f"{type(backbone).__name__}, cut after {', '.join(at)}, does not give the logits it gives as a whole: "
                f"{why}. Build an EarlyExitNetwork from stages and exits of your own"
            )
        why = "its forward depends on the number of examples in the batch"


def _weights(classifier: nn.Linear) -> list[Tensor]:
    """Weight and bias; a classifier without a bias gets one of zeros, as the other exits have one."""
    bias = classifier.bias
    return [classifier.weight, classifier.weight.new_zeros(classifier.out_features) if bias is None else bias]
