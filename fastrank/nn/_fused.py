"""What the layers that run as one operator share: the backend, and the epilogue behind the convolution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastrank import _checks
from fastrank.nn._conv import FactoredConv2d, Pair
from fastrank.nn._forms import Form
from fastrank.nn._prepared import Prepared
from fastrank.ops._conv import BACKEND_NAMES
from fastrank.reference.conv import ACTIVATIONS

Layer = TypeVar("Layer", bound="FusedConv2d")
# What inference makes plans from, besides the parameters.
PLANNED = ("stride", "padding", "dilation", "padding_mode", "activation", "backend")
_MODULES = {"relu": nn.ReLU, "silu": nn.SiLU}


class FusedConv2d(FactoredConv2d):
    """A factored convolution that is one operator with its epilogue: activation(conv(x) + bias + residual)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        activation: str = "none",
        backend: str = "auto",
        **geometry: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **geometry)
        self.activation = _checks.choice("activation", activation, ACTIVATIONS)
        self.backend = _checks.choice("backend", backend, BACKEND_NAMES)
        self._prepared = Prepared()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(conv(x) + residual): x (N, I, H, W), residual (N, O, H', W') -> (N, O, H', W'); or without N."""
        if residual is not None:
            _checks.tensor("residual", residual)
        out = None if torch.compiler.is_compiling() else self._prepared(self, x, residual)
        return self._operate(x, residual) if out is None else out

    @property
    @abstractmethod
    def form(self) -> Form:
        """What kind of factors the layer has."""

    @abstractmethod
    def _operate(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """`forward` by the operator."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PLANNED and "_prepared" in self.__dict__:
            self._prepared.drop()
        super().__setattr__(name, value)

    def train(self: Layer, mode: bool = True) -> Layer:
        """`nn.Module.train`, which is also when what inference keeps of the factors is dropped."""
        self._prepared.drop()
        return super().train(mode)

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        self._prepared.drop()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _require_no_activation(self) -> None:
        """An `nn.Conv2d` has no place for one."""
        if self.activation != "none":
            raise _checks.fail("activation", "'none' for to_dense (to_sequential keeps it)", repr(self.activation))

    def _activated(self, *modules: nn.Module) -> nn.Sequential:
        """The modules, and the activation behind them where there is one."""
        last = [] if self.activation == "none" else [_MODULES[self.activation]().train(self.training)]
        return nn.Sequential(*modules, *last)

    def extra_repr(self) -> str:
        """What `nn.Conv2d` shows, and the activation."""
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation!r}")

    def config(self) -> dict[str, Any]:
        """See `FactoredConv2d.config`."""
        return {**super().config(), "activation": self.activation}


def like_batch(x: Tensor, residual: Tensor | None) -> Tensor | None:
    """`residual` with a batch of 1 where x (I, H, W) is a single image: (O, H', W') -> (1, O, H', W')."""
    if residual is None or x.dim() == 4:
        return residual
    return _checks.tensor("residual", residual, (None, None, None), "(O, H', W')")[None]
