"""Small random networks for the lifecycle: whatever a convolution can be, and how several stand to each other."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

CLASSES = 3
Pair = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """One convolution and what follows it. kind: "plain", "twice" (one module at two places), "residual"."""

    kind: str
    options: dict[str, Any]
    norm: bool
    activation: str
    pool: bool


@dataclass(frozen=True)
class Spec:
    """A network from its first value to its last; `build` makes the same one every time."""

    channels: int
    size: Pair
    blocks: tuple[Block, ...]
    dtype: torch.dtype
    channels_last: bool
    seed: int

    def build(self) -> nn.Module:
        """The network, with weights and batch statistics drawn by `seed`; random numbers are the caller's again."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            model = nn.Sequential(*(_module(block) for block in self.blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            model.append(nn.Linear(self.blocks[-1].options["out_channels"], CLASSES))
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
        return model.to(
            self.dtype, memory_format=torch.channels_last if self.channels_last else torch.contiguous_format
        )

    def images(self, count: int = 2, seed: int = 7) -> Tensor:
        """A batch (N, C, H, W) of the network's dtype and layout."""
        x = torch.randn(count, self.channels, *self.size, generator=torch.Generator().manual_seed(seed))
        return x.to(self.dtype, memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


class Residual(nn.Module):
    """inner(x) + x."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        out: Tensor = self.inner(x) + x
        return out


def _module(block: Block) -> nn.Module:
    conv = nn.Conv2d(**block.options)
    parts: list[nn.Module] = [conv]
    if block.kind == "twice":
        parts += [nn.ReLU(), conv]
    if block.norm:
        parts.append(nn.BatchNorm2d(conv.out_channels))
    inner: nn.Module = nn.Sequential(*parts)
    if block.kind == "residual":
        inner = Residual(inner)
    activations: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "none": nn.Identity}
    rest: list[nn.Module] = [activations[block.activation]()]
    if block.pool:
        rest.append(nn.MaxPool2d(2))
    return nn.Sequential(inner, *rest)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Networks of one to three convolutions on images of at most nine pixels a side."""
    channels = draw(st.integers(1, 4))
    size = first = draw(st.tuples(st.integers(5, 9), st.integers(5, 9)))
    blocks, have = [], channels
    for _ in range(draw(st.integers(1, 3))):
        block, size = draw(_blocks(have, size))
        blocks.append(block)
        have = block.options["out_channels"]
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    return Spec(channels, first, tuple(blocks), dtype, draw(st.booleans()), draw(st.integers(0, 5)))


@st.composite
def _blocks(draw: st.DrawFn, channels: int, size: Pair) -> tuple[Block, Pair]:
    kind = draw(st.sampled_from(("plain", "plain", "twice", "residual")))
    kernel = draw(st.sampled_from(((3, 3), (3, 3), (1, 1), (1, 3), (2, 2), (3, 2), (5, 1))))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (2, 1), (2, 2))))
    options: dict[str, Any] = {"in_channels": channels, "kernel_size": kernel, "bias": draw(st.booleans())}
    options["padding_mode"] = draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if kind != "plain":  # the map keeps its size and the channels their number
        options |= {"out_channels": channels, "padding": "same", "dilation": dilation}
        out = size
    else:
        options |= {"out_channels": draw(st.integers(2, 9)), "dilation": dilation}
        stride, padding = (
            draw(st.sampled_from(((1, 1), (2, 1), (2, 2)))),
            draw(st.sampled_from((0, 1, (1, 0), "valid"))),
        )
        options |= {"stride": stride, "padding": padding}
        sides = {"valid": (0, 0), 0: (0, 0), 1: (1, 1)}.get(padding, padding)  # type: ignore[call-overload]
        steps = zip(size, sides, reach, stride, strict=True)
        out = tuple((n + 2 * p - r) // s + 1 for n, p, r, s in steps)
    if min(out) < 2 or any(r > n for r, n in zip(reach, size, strict=True)):
        options |= {"kernel_size": (1, 1), "stride": 1, "padding": 0, "dilation": (1, 1), "padding_mode": "zeros"}
        out = size
    divisors = [n for n in range(2, 5) if channels % n == 0 and options["out_channels"] % n == 0]
    if divisors and draw(st.integers(0, 3)) == 0:
        options["groups"] = divisors[0]
    pool = min(out) >= 4 and draw(st.booleans())
    block = Block(kind, options, draw(st.booleans()), draw(st.sampled_from(("relu", "silu", "none"))), pool)
    return block, ((out[0] // 2, out[1] // 2) if pool else out)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything the model holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether both hold the same names, dtypes and bits (NaN as NaN)."""
    return list(first) == list(second) and all(
        tensor.dtype == second[name].dtype and torch.equal(_bits(tensor), _bits(second[name]))
        for name, tensor in first.items()
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What the model gives in eval mode; its flags are as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            found: Tensor = model.eval()(x)
        return found
    finally:
        for module, mode in modes.items():
            module.training = mode


def chance() -> tuple[bytes, Any, bytes]:
    """The state of every generator of random numbers that belongs to the caller."""
    numbers = numpy.random.get_state()[1]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numbers.tobytes()  # type: ignore[union-attr]


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Of convolutions and linear layers, counted at their outputs."""
    total = 0

    def hook(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * module.weight[0].numel()  # type: ignore[index,operator]

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    outputs(model, x)
    for handle in handles:
        handle.remove()
    return total
