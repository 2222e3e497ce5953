"""The kernels that rank regularisers act on, as they are at the moment: also replaced, pruned and sharded ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastrank import _checks
from fastrank.nn._conv import why_not_factorable

MASK = (1 << 62) - 1
"""Keeps a checksum, and its negative, within int64."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def spatial_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The layers that rank regularisers act on: trainable plain convolutions larger than 1×1, by name.

    Raises TypeError where `model` is no module, ValueError where it has no such layer.
    """
    if not isinstance(model, nn.Module):
        raise _checks.fail_type("model", "a torch.nn.Module", model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and _is_plain(module)
        and module.weight.shape[2] * module.weight.shape[3] > 1
        and module.weight.requires_grad
    }
    if not layers:
        raise _checks.fail("model", "a model with a trainable convolution larger than 1×1", type(model).__name__)
    return layers


def spatial_kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    """The kernels of `spatial_layers`, by layer name."""
    return {name: cast(nn.Parameter, layer.weight) for name, layer in spatial_layers(model).items()}


def _is_plain(module: nn.Conv2d) -> bool:
    """Whether the kernel is all that the layer computes with; `fully_shard` leaves it so, but changes its class."""
    if is_fsdp(module) and type(module).__mro__[2:3] == (nn.Conv2d,):
        return module.groups == 1 and module._parameters.get("weight") is not None
    return not why_not_factorable(module)


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on the module; its class is then FSDPModule and the one before, mixed."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


class Kernels:
    """The kernels of some layers, looked up at every use: pruning and sharding put other parameters in their place.

    A layer whose weight is computed from a parameter later on (a pruning mask, a parametrization) keeps that parameter.
    """

    def __init__(self, layers: Mapping[str, nn.Conv2d]) -> None:
        self._layers = dict(layers)
        self._last: dict[str, nn.Parameter] = {}
        self.current()

    def current(self) -> dict[str, nn.Parameter]:
        """The kernels, by layer name."""
        for name, layer in self._layers.items():
            found = layer._parameters.get("weight")
            # While a layer computes, FSDP lends it a gathered copy of the sharded kernel. No optimizer moves that one.
            lent = name in self._last and is_sharded(self._last[name]) and found is not None and not is_sharded(found)
            if found is not None and not lent:
                self._last[name] = found
        return dict(self._last)


def shape_of(kernel: Tensor) -> tuple[int, int, int, int]:
    """(O, I, kh, kw)."""
    out_channels, in_channels, kh, kw = kernel.shape
    return out_channels, in_channels, kh, kw


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which a rank holds a part."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def whole(name: str, kernel: Tensor) -> Tensor:
    """The detached kernel of layer `name` with all its entries; of a DTensor they are gathered from its whole mesh."""
    value: Any = kernel.detach()
    if not is_sharded(value):
        return cast(Tensor, value)
    try:
        return cast(Tensor, value.full_tensor())
    except (RuntimeError, ValueError) as error:
        raise _unusable(name, kernel, error) from error


def laid_out_as(name: str, kernel: Tensor, full: Tensor) -> Tensor:
    """`full`, which every rank holds alike, as this rank's part of a DTensor laid out as `kernel`, if that is one."""
    if not is_sharded(kernel):
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = kernel
    try:
        return distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=None)
    except (RuntimeError, ValueError) as error:
        raise _unusable(name, kernel, error) from error


def _unusable(name: str, kernel: Any, error: Exception) -> ValueError:
    wanted = "a tensor or a DTensor that can be gathered and sharded again"
    got = f"a DTensor of placements {kernel.placements}: {error}"
    return _checks.fail(f"the kernel of layer {name!r}", wanted, got)


def finite(values: Sequence[Tensor]) -> Tensor:
    """Which of the tensors hold no NaN and no infinity: bool (K,). Reads each once and waits for no device."""
    extremes = [torch.stack(torch.aminmax(value)).double().to(values[0].device) for value in values]
    return torch.stack(extremes).isfinite().all(1)


def checksum(values: Sequence[Tensor]) -> int:
    """An int that tells replicas of these tensors from others, bit by bit."""
    total = 0
    for place, value in enumerate(values):
        bits = value.contiguous().view(BITS[value.element_size()])
        total += (2 * place + 1) * int(bits.sum(dtype=torch.int64))
    return total & MASK


@contextmanager
def named(values: Mapping[str, Tensor]) -> Iterator[None]:
    """Where an operator refuses a matrix of these kernels, say which layer it came from."""
    try:
        yield
    except ValueError:
        for name, value in values.items():
            _checks.finite(f"the kernel of layer {name!r}", value)
        raise
