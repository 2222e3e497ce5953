"""Tucker-2 convolutions against the dense layer that they replace, layer by layer, at the ranks of the NRMF paper.

    pytest bench/test_tucker2.py --benchmark-json=tucker2.json

dense: one library convolution of the original kernel, which has other weights but the same shape. sequence: three
library convolutions. merged: one library convolution of the kernel that the factors multiply to, merging included.
auto: what the dispatcher takes. On a CPU float32 and contiguous; on a GPU bfloat16 and channels_last, and in extra_info
the times inside a CUDA graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank import reference
from fastrank.nn import FusedTucker2Conv
from fastrank.ops import tucker2_conv2d

sys.path.insert(0, str(Path(__file__).parent))
import timing


class Layer(NamedTuple):
    """A 3×3 convolution of ResNet-18 at 224² and its ranks."""

    name: str
    in_channels: int
    out_channels: int
    stride: int
    size: int
    ranks: tuple[int, int]


LAYERS = [
    Layer("layer1, half ranks", 64, 64, 1, 56, (32, 32)),
    Layer("NRMF conv1", 256, 256, 1, 14, (144, 141)),
    Layer("NRMF conv2", 256, 512, 2, 14, (222, 299)),
    Layer("NRMF conv3", 512, 512, 1, 7, (292, 212)),
    Layer("NRMF conv4", 512, 512, 1, 7, (160, 69)),
    Layer("NRMF conv5", 512, 512, 1, 7, (31, 39)),
]
BATCHES = (1, 8, 32, 128) if timing.DEVICE == "cuda" else (1, 8)
CONTENDERS = ("dense", "sequence", "merged", "auto")
DTYPE = torch.bfloat16 if timing.DEVICE == "cuda" else torch.float32
FORMAT = torch.channels_last if timing.DEVICE == "cuda" else torch.contiguous_format


def call_by(contender: str, layer: Layer, w_in: Tensor, core: Tensor, w_out: Tensor) -> Callable[[Tensor], Tensor]:
    if contender == "dense":
        shape = (layer.out_channels, layer.in_channels, 3, 3)
        weight = torch.randn(shape, dtype=DTYPE, device=timing.DEVICE).to(memory_format=FORMAT)
        return lambda x: F.conv2d(x, weight, None, layer.stride, 1)
    backend = {"merged": "dense"}.get(contender, contender)
    return lambda x: tucker2_conv2d(x, w_in, core, w_out, stride=layer.stride, padding=1, backend=backend)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(
    ("layer", "batch"),
    [
        pytest.param(
            layer, n, id=f"{layer.name} N={n}", marks=pytest.mark.benchmark(group=f"tucker2 {layer.name}, N={n}")
        )
        for layer in LAYERS
        for n in BATCHES
    ],
)
def test_tucker2_forward(benchmark: Any, layer: Layer, batch: int, contender: str) -> None:
    torch.manual_seed(0)
    made = FusedTucker2Conv(
        layer.in_channels, layer.out_channels, 3, layer.ranks, stride=layer.stride, padding=1, bias=False
    ).to(timing.DEVICE, DTYPE)
    factors = [factor.detach() for factor in (made.w_in, made.core, made.w_out)]
    x = torch.randn(batch, layer.in_channels, layer.size, layer.size, dtype=DTYPE, device=timing.DEVICE)
    x = x.to(memory_format=FORMAT)
    function = call_by(contender, layer, *factors)
    if contender != "dense":
        # What is wrong is not timed: at most twice the error that the library's own convolutions make in this dtype,
        # the three small ones or the dense one of the exactly merged kernel (whose longer sums round more).
        wide = [factor.double() for factor in factors]
        wanted = tucker2_conv2d(x.double(), *wide, stride=layer.stride, padding=1)
        kernel = reference.conv.tucker2_weight(*wide).to(DTYPE)
        library = (
            tucker2_conv2d(x, *factors, stride=layer.stride, padding=1, backend="reference"),
            F.conv2d(x, kernel, None, layer.stride, 1),
        )
        own = max(float((out.double() - wanted).abs().max()) for out in library)
        error = float((function(x).double() - wanted).abs().max())
        assert error <= 2 * own, f"{contender} is wrong by {error:.2e}, the library by {own:.2e}"

    def call(inputs: Any) -> None:
        with torch.no_grad():
            function(inputs[0])

    macs = sum(stage.macs for stage in made.conv_stages((layer.size, layer.size)))
    dense_macs = 9 * layer.in_channels * layer.out_channels * (layer.size // layer.stride) ** 2
    timing.measure(benchmark, call, [x], macs=batch * macs, dense_macs=batch * dense_macs, ranks=list(layer.ranks))
