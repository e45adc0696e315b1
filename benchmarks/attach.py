"""attach_exits on classifiers of torchvision and timm: where each is cut, whether its logits stay, how long it takes.

python -m benchmarks.attach [NAME …]
"""

from __future__ import annotations

import re
import sys
import time
import warnings

import timm
import torch
from torch import nn
from torchvision import models

from cafe_flwr.networks import attach_exits

TIMM = [
    "resnet10t",
    "resnetv2_50",
    "resnext50_32x4d",
    "seresnet18",
    "ecaresnet26t",
    "regnetx_002",
    "regnety_002",
    "efficientnet_lite0",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mnasnet_050",
    "ghostnet_050",
    "densenet121",
    "convnext_atto",
    "convnextv2_atto",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "poolformer_s12",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "repvgg_a0",
    "fbnetc_100",
    "hrnet_w18_small",
    "lcnet_050",
    "tinynet_e",
    "efficientformerv2_s0",
    "fastvit_t8",
    "levit_128s",
    "pit_ti_224",
    "cait_xxs24_224",
    "beit_base_patch16_224",
]
TORCHVISION = [
    "alexnet",
    "vgg11",
    "vgg11_bn",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "vit_b_32",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
    "squeezenet1_0",
]
SIZES = {"inception_v3": 96, "maxvit_t": 224}
CONTAINERS = ("features", "blocks", "stages", "layers", "encoder.layers", "trunk_output", "network")


def built(family: str, name: str) -> tuple[nn.Module, int]:
    """A classifier of ten classes, its weights at random, and the smallest images it takes of 64, 224, …"""
    if family == "timm":
        for options in ({"img_size": 64}, {}):
            try:
                network = timm.create_model(name, num_classes=10, **options)
                break
            except TypeError:
                continue
        size = 64
    else:
        size = SIZES.get(name, 64)
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        options |= {"image_size": 64} if name.startswith("vit") else {}
        network = models.get_model(name, num_classes=10, **options)
    network.eval()
    for side in (size, 224, 256):
        try:
            with torch.no_grad():
                network(torch.rand(1, 3, side, side))
        except Exception:
            continue
        return network, side
    raise ValueError(f"{name} takes no images of 64, 224 or 256 pixels")


def blocks_of(network: nn.Module) -> list[str]:
    """Two blocks in the first and in the second half of the network, after which there may be exits."""
    names = [name for name, _ in network.named_modules() if name]
    top = [n for n in names if "." not in n and re.search(r"(layer|stage|Mixed|inception|block)\w*\d|s\d$", n)]
    inside = [[n for n in names if n.startswith(f"{d}.") and n.count(".") == d.count(".") + 1] for d in CONTAINERS]
    found = max([top, *inside], key=len)
    found = found if len(found) > 1 else [n for n, _ in network.named_children()][:-1]
    return [found[len(found) // 3], found[2 * len(found) // 3]]


@torch.no_grad()
def row(family: str, name: str) -> str:
    """What came of it, a line of the table."""
    torch.manual_seed(0)
    network, size = built(family, name)
    at = blocks_of(network)
    start = time.perf_counter()
    try:
        attached = attach_exits(network, at, input_shape=(3, size, size)).eval()
    except ValueError as error:
        return f"{family:11} {name:30} {size:4} {', '.join(at):40} refused: {error}"
    seconds = time.perf_counter() - start
    equal = []
    for batch in (1, 2, 5):
        x = torch.rand(batch, 3, size, size)
        equal.append(torch.allclose(attached(x)[-1], network(x), rtol=1e-3, atol=1e-5))
    with torch.enable_grad():
        attached(torch.rand(2, 3, size, size))[-1].sum().backward()
    equal.append(all(p.grad is not None for p in attached.stages[0].parameters()))
    return (
        f"{family:11} {name:30} {size:4} {', '.join(at):40} {'equal' if all(equal) else 'NOT EQUAL'} {seconds:6.2f} s"
    )


def main() -> None:
    """The table, and ResNet-18 at 224 pixels, for which 3 s are promised."""
    warnings.simplefilter("ignore")
    wanted = sys.argv[1:]
    cases = [("torchvision", n) for n in TORCHVISION] + [("timm", n) for n in TIMM]
    print(f"{'library':11} {'network':30} {'size':>4} {'cut after':40} logits for batches of 1, 2, 5, and gradients")
    for family, name in cases:
        if not wanted or name in wanted:
            print(row(family, name), flush=True)
    backbone = models.resnet18()
    start = time.perf_counter()
    attach_exits(backbone, ["layer1", "layer2", "layer3"])
    print(f"attach_exits on ResNet-18 at 224 pixels: {time.perf_counter() - start:.2f} s (bound: 3 s)")


if __name__ == "__main__":
    main()
