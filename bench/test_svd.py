"""Convolutions in the channel scheme, kh×kw I→R and 1×1 R→O, against the library, layer by layer (family tucker2).

    pytest bench/test_svd.py --full --benchmark-only

Contenders: the dense layer that was compressed, two library convolutions, and the fused Triton kernel over weights that
are packed before; with bias and ReLU. On a GPU: bfloat16, channels_last, cudnn.benchmark, times inside a CUDA graph
with cold inputs. On a CPU: float32, contiguous, wall time, and no Triton, whose interpreter is no contender.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrank import _backends, reference
from fastrank.benchmarks import timing
from fastrank.ops import _conv

GPU = timing.DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
FORMAT = torch.channels_last if GPU else torch.contiguous_format
GEOMETRY = (1, 1), (1, 1), (1, 1)
# 3×3 convolutions of ResNet-18: (channels in and out, size of the map, rank).
LAYERS = [(64, 56, 32), (128, 28, 64), (256, 14, 128), (512, 7, 128)]

if GPU:
    torch.backends.cudnn.benchmark = True


def made(channels: int, size: int, rank: int, batch: int, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    """x, first, second and bias, of values that keep their variance through the factors."""
    torch.manual_seed(0)
    drawn = [
        torch.randn(batch, channels, size, size),
        torch.randn(rank, channels, 3, 3) / math.sqrt(9 * channels),
        torch.randn(channels, rank, 1, 1) / math.sqrt(rank),
        torch.randn(channels),
    ]
    x, *others = (each.to(timing.DEVICE, dtype) for each in drawn)
    return [x.contiguous(memory_format=FORMAT), *others]


def sequence(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """Two library convolutions."""
    first, second = (each.contiguous(memory_format=FORMAT) for each in (first, second))
    return lambda x: torch.conv2d(torch.conv2d(x, first, None, *GEOMETRY), second, bias).relu_()


def dense(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """One, with the merged kernel."""
    weight = reference.svd_conv.channel_weight(first.float(), second.float()).to(first.dtype)
    weight = weight.contiguous(memory_format=FORMAT)
    return lambda x: torch.conv2d(x, weight, bias, *GEOMETRY).relu_()


def triton(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """The fused kernel, as inference calls it."""
    launch = _conv.KERNELS["channel_svd_conv2d"]["triton"].prepare(x, (first, second), bias, GEOMETRY)

    def call(x: Tensor) -> Tensor:
        shape = x.shape[0], second.shape[0], x.shape[2], x.shape[3]
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=FORMAT)
        launch(x, None, out, "relu")
        return out

    return call


CONTENDERS = {"dense": dense, "sequence": sequence, "triton": triton}


def able(x: Tensor, factors: list[Tensor]) -> dict[str, Callable[..., Callable[[Tensor], Tensor]]]:
    """The contenders that can run, and are any."""
    work = _conv.work_of("channel_svd_conv2d", x, factors, GEOMETRY, "inference")
    facts = _backends.facts("channel_svd_conv2d", x, work)
    runs = _backends.explain(facts)["triton"].ok and not facts.interpreter
    return {name: build for name, build in CONTENDERS.items() if name != "triton" or runs}


@pytest.mark.benchmark(group="channel scheme, forward")
@pytest.mark.parametrize("batch", [32, 1, 128] if GPU else [1])
@pytest.mark.parametrize(("channels", "size", "rank"), LAYERS if GPU else LAYERS[:2])
def test_forward(benchmark: Any, channels: int, size: int, rank: int, batch: int) -> None:
    tensors = made(channels, size, rank, batch)
    x, first, second, _ = tensors
    with torch.no_grad():
        calls = {name: build(*tensors) for name, build in able(x, [first, second]).items()}
        wide = torch.float32 if GPU else torch.float64
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            wanted = sequence(*(each.to(wide) for each in tensors))(x.to(wide))
        # z, the merged kernel and the result are rounded, each by half an eps of some times its size, and sums in
        # float32 lose at most an eps a term.
        lost = 8 * torch.finfo(DTYPE).eps + (9 * channels + rank) * torch.finfo(torch.float32).eps
        limit = lost * float(wanted.abs().max())
        assert {name for name, call in calls.items() if float((call(x) - wanted).abs().max()) > limit} == set()
        if GPU:
            ways = {name: lambda one, call=call: call(one[0]) for name, call in calls.items()}
            times = timing.graph_times(ways, [x], cold=True)
        else:
            thunks = {name: lambda call=call: call(x) for name, call in calls.items()}
            times = {name: timing.Quantiles.of(each) for name, each in timing.in_turns(thunks, 7).items()}
        benchmark.extra_info.update(
            op="channel_svd_conv2d", channels=channels, size=size, rank=rank, batch=batch,
            dtype=str(DTYPE).removeprefix("torch."), times={name: each.as_dict() for name, each in times.items()},
            environment=timing.environment(),
        )  # fmt: skip
        benchmark.pedantic(lambda: calls["sequence"](x), rounds=3)
