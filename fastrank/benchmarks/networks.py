"""Whole networks, dense and compressed, in the forms that are compared, and what each may be off from the truth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import fuse
from fastrank.benchmarks._peers import WAYS, missing, tltorch_tucker2
from fastrank.benchmarks.layers import RESNET18
from fastrank.nn import FusedTucker2Conv
from fastrank.nn._fused import FusedConv2d
from fastrank.plan import LayerPlan, Plan

Network = Callable[[Any], Any]
# ResNet-18's layers whose sizes do not tell their ranks, in the order of `layers.RESNET18`.
LAST = ("layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2")
_ROUNDINGS = 4  # of a layer: its weights, bias, products and sum, as in fastrank.fuse


def resnet18_plan(model: nn.Module) -> Plan:
    """The ranks of `layers.RESNET18` for all 3×3 convolutions of torchvision's ResNet-18."""
    by_name = dict(zip(LAST, RESNET18[-len(LAST) :], strict=True))
    by_size = {(each.in_channels, each.out_channels): each for each in RESNET18[: -len(LAST)]}
    planned = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            layer = by_name.get(name) or by_size[conv.in_channels, conv.out_channels]
            planned[name] = LayerPlan("tucker2", layer.ranks)
    return Plan(planned)


@torch.no_grad()
def alive(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` in eval mode with the statistics of the batch x, so that what it returns depends on all of its layers."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 0.9  # all of a new statistic makes deep networks chaotic
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    model.train()(x)
    return model.eval().requires_grad_(False)


def images(batch: int, size: int) -> Tensor:
    """Blots under noise, since of pure noise a deep network sees nothing but the mean; (batch, 3, size, size)."""
    chance = torch.Generator().manual_seed(batch)
    blots = torch.randn(batch, 3, 4, 4, generator=chance)
    noise = torch.randn(batch, 3, size, size, generator=chance)
    return nn.functional.interpolate(blots, (size, size), mode="bilinear") + noise / 4


def replaced(model: nn.Module, change: Callable[[Any], nn.Module]) -> nn.Module:
    """A copy of `model` whose compressed layers are what `change` makes of them."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, FusedConv2d):
            twin.set_submodule(name, change(layer))
    return twin


def forced(backend: str, layer: FusedConv2d) -> FusedConv2d:
    """The layer, whose backend is set."""
    layer.backend = backend
    return layer


def sequential(layer: Any) -> nn.Module:
    """The layer as plain convolutions."""
    found: nn.Module = layer.to_sequential()
    return found


def by_tltorch(way: str) -> Callable[[FusedTucker2Conv], nn.Module]:
    """The layer as tensorly-torch runs it."""

    def change(layer: FusedTucker2Conv) -> nn.Module:
        return tltorch_tucker2(
            layer.w_in, layer.core, layer.w_out, layer.bias, int(layer.stride[0]), int(layer.padding[0]), way
        )

    return change


def forms(dense: nn.Module, small: nn.Module, example: Tensor, kernels: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Contender -> network in float32 on the CPU, of a dense and a compressed one; `example` proves the fused ones.

    tensorly-torch's forms are there where it is installed and all compressed layers are Tucker-2.
    """
    fused = fuse.fuse_for_inference(small, example)
    found: dict[str, nn.Module] = {
        "dense": dense,
        "dense fused": fuse.fuse_for_inference(dense, example),
        "sequence": replaced(small, sequential),
        "auto": small,
        "fused": fused,
    }
    found |= {f"fused {name}": replaced(fused, partial(forced, name)) for name in kernels}
    compressed = [each for each in small.modules() if isinstance(each, FusedConv2d)]
    if {type(each) for each in compressed} == {FusedTucker2Conv} and not missing("tltorch"):
        found |= {f"tltorch {way}": replaced(small, by_tltorch(way)) for way in WAYS}
    return found


def tensors(found: Any) -> list[Tensor]:
    """What a network returns: a tensor, or the maps of a backbone by name."""
    return [found] if isinstance(found, Tensor) else list(found.values())


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative L2 error of a tensor; infinite where shapes differ or something is not finite."""
    if [each.shape for each in found] != [each.shape for each in wanted]:
        return math.inf
    errors = [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def ends(x: Tensor) -> list[int]:
    """The first and the last image of a batch, which errors are found on: float64 takes its time."""
    return [0, -1] if len(x) > 1 else [0]


def truth(network: nn.Module, x: Tensor) -> tuple[list[Tensor], float]:
    """What a network gives in float64 on the ends of x, and how far off another form of it may be.

    A contender may be off by four times what the network itself is off in the dtype of x (both are a draw of few
    numbers), and by the roundings of a fold in every layer.
    """
    wanted = tensors(copy.deepcopy(network).double()(x[ends(x)].double()))
    own = apart([each[ends(x)] for each in tensors(network(x))], wanted)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
    return wanted, 4 * own + _ROUNDINGS * math.sqrt(layers) * torch.finfo(x.dtype).eps
