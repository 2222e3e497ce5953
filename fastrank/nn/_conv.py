"""What all factored convolutions share: the geometry of the `nn.Conv2d` they replace, and who may be replaced."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank import _checks
from fastrank._stages import ConvStage
from fastrank.ops._conv import same_padding
from fastrank.ops._register import memory_format

Pair = tuple[int, int]
Layer = TypeVar("Layer", bound="FactoredConv2d")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def why_not_factorable(module: nn.Module) -> str:
    """Empty where `module` is a convolution that can be factored without changing its meaning, else the reason."""
    if type(module) is not nn.Conv2d:
        if isinstance(module, nn.Conv2d):
            return f"{type(module).__name__} is a subclass of nn.Conv2d and may compute its weight in forward"
        return f"{type(module).__name__} is not an nn.Conv2d"
    if module.groups != 1:
        return f"groups must be 1, got {module.groups}"
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"its {name} is computed in forward (weight_norm, pruning mask or parametrization)"
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return "it carries hooks, which a replacement would lose"
    if "forward" in vars(module):
        return "its forward is replaced by another function"
    if module.weight.is_meta:
        return "its weight is on the meta device, which holds no values"
    if not module.weight.dtype.is_floating_point:
        return f"its weight is of dtype {module.weight.dtype}, which is no floating-point one"
    return ""


class FactoredConv2d(nn.Module, ABC):
    """A convolution held as factors: geometry, padding and bias as in `nn.Conv2d`, with groups fixed at 1."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype}")
        self.in_channels = _checks.integer("in_channels", in_channels, 1)
        self.out_channels = _checks.integer("out_channels", out_channels, 1)
        self.kernel_size = _checks.pair("kernel_size", kernel_size, 1)
        self.stride = _checks.pair("stride", stride, 1)
        self.dilation = _checks.pair("dilation", dilation, 1)
        self.padding_mode = _checks.choice("padding_mode", padding_mode, PADDING_MODES)
        self.padding: Pair | str
        if isinstance(padding, str):
            self.padding = _checks.choice("padding", padding, ("same", "valid"))
            if padding == "same" and self.stride != (1, 1):
                raise _checks.fail("stride", "1 with padding='same'", self.stride)
        else:
            self.padding = _checks.pair("padding", padding, 0)
        if not isinstance(bias, bool):
            raise _checks.fail_type("bias", "a bool", bias)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the factors anew."""

    @abstractmethod
    def to_dense(self) -> nn.Conv2d:
        """One `nn.Conv2d` with the merged kernel: the same function to rounding."""

    @abstractmethod
    def to_sequential(self) -> nn.Sequential:
        """The same as plain modules, for export and comparison."""

    @abstractmethod
    def conv_stages(self, in_size: Pair) -> list[ConvStage]:
        """The plain convolutions that this layer stands for on an (H, W) map, for counting."""

    def _init_bias(self) -> None:
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
            nn.init.uniform_(self.bias, -bound, bound)

    def _sides(self) -> tuple[Pair, Pair]:
        """Padding as ((before, after) along H, (before, after) along W)."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            return same_padding(self.kernel_size, self.dilation)
        assert isinstance(self.padding, tuple)
        return (self.padding[0], self.padding[0]), (self.padding[1], self.padding[1])

    def _padded(self, x: Tensor) -> tuple[Tensor, Pair]:
        """x and the zero padding left to the operator; what zeros on both sides cannot express is applied here."""
        (top, bottom), (left, right) = self._sides()
        if self.padding_mode == "zeros" and top == bottom and left == right:
            return x, (top, left)
        if self.padding_mode == "zeros":
            return F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.pad(x, (left, right, top, bottom), mode=self.padding_mode), (0, 0)

    def _batched(self, x: Tensor) -> Tensor:
        """x as (N, I, H, W); like `nn.Conv2d`, a single (I, H, W) image is accepted."""
        _checks.tensor("x", x)
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise _checks.fail(
                "x", f"of shape (N, {self.in_channels}, H, W) or ({self.in_channels}, H, W)", tuple(x.shape)
            )
        return x if x.dim() == 4 else x[None]

    def _out_size(self, in_size: Pair) -> Pair:
        (top, bottom), (left, right) = self._sides()
        padded = in_size[0] + top + bottom, in_size[1] + left + right
        return _checks.conv_output_size(padded, self.kernel_size, self.stride, (0, 0), self.dilation)

    def _plain(self, weight: Tensor, *, where: str = "both", bias: bool = False, groups: int = 1) -> nn.Conv2d:
        """A plain convolution of the given weight (O, I/groups, kh, kw).

        `where` tells which of this layer's stride, padding and dilation it carries: "both" axes, "vertical",
        "horizontal" or "none".
        """
        kernel = (weight.shape[2], weight.shape[3])
        on_h, on_w = where in ("both", "vertical"), where in ("both", "horizontal")

        def pick(value: Pair, default: int) -> Pair:
            return value[0] if on_h else default, value[1] if on_w else default

        mode: Any = self.padding_mode if where != "none" else "zeros"
        conv = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            kernel,
            pick(self.stride, 1),
            self.padding if isinstance(self.padding, str) else pick(self.padding, 0),
            pick(self.dilation, 1),
            groups,
            bias,
            mode,
            device="meta",
            dtype=weight.dtype,
        )
        needs = any(p.requires_grad for name, p in self.named_parameters() if name != "bias")
        conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=needs)
        if bias:
            assert self.bias is not None
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows; subclasses append their ranks."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0, 0):
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values: what a saved file needs to rebuild this layer."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            "bias": self.bias is not None,
            "padding_mode": self.padding_mode,
        }


def require_factorable(conv: nn.Module) -> nn.Conv2d:
    """`conv`, or an error with the reason why it cannot be factored."""
    reason = why_not_factorable(conv)
    if reason:
        error = TypeError if type(conv) is not nn.Conv2d else ValueError
        raise error(f"conv must be a plain nn.Conv2d with groups=1: {reason}")
    assert isinstance(conv, nn.Conv2d)
    return conv


def geometry_of(conv: nn.Conv2d) -> dict[str, Any]:
    """The keyword arguments that give a factored layer the geometry of `conv`."""
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
        "device": "meta",
        "dtype": conv.weight.dtype,
    }


def adopt(layer: Layer, conv: nn.Conv2d, **factors: Tensor) -> Layer:
    """Give `layer` the factors, and the bias, mode and requires_grad of `conv`."""
    for name, factor in factors.items():
        value = factor.to(device=conv.weight.device, dtype=conv.weight.dtype).contiguous()
        setattr(layer, name, nn.Parameter(value, requires_grad=conv.weight.requires_grad))
    if conv.bias is not None:
        layer.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=conv.bias.requires_grad)
    return layer.train(conv.training)


def init_uniform(parameter: Tensor, variance: float) -> None:
    """Uniform values of mean 0 and the given variance."""
    bound = math.sqrt(3 * variance)
    nn.init.uniform_(parameter, -bound, bound)


class RankSum(nn.Module):
    """(N, R·O, H, W) -> (N, O, H, W): the sum over R, and the bias once."""

    bias: nn.Parameter | None

    def __init__(self, rank: int, out_channels: int, bias: Tensor | None) -> None:
        super().__init__()
        self.rank, self.out_channels = rank, out_channels
        copied = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", copied)

    def forward(self, z: Tensor) -> Tensor:
        """Sum the R maps of each output channel."""
        return rank_sum(z, self.rank, self.out_channels, self.bias)


def rank_sum(z: Tensor, rank: int, out_channels: int, bias: Tensor | None) -> Tensor:
    """(N, R·O, H, W) -> (N, O, H, W) in z's dtype and memory format: the sum over R, and the bias once."""
    out = torch.unflatten(z, 1, (rank, out_channels)).sum(1)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.contiguous(memory_format=memory_format(z))
