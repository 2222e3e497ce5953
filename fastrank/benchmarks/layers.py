"""The convolutions that benchmarks run: their ranks, their places in networks, their floors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastrank._backends import ConvWork

Pair = tuple[int, int]
# The most important first.
FORWARD_BATCHES, TRAINED_BATCHES = (32, 1, 128, 8), (128, 32)
# FLOP/s in bfloat16 and bytes/s that floors are counted with: 80 % and 90 % of what the maker states, not measured.
PEAKS = {"H200": (790e12, 4.3e12)}


@dataclass(frozen=True)
class Layer:
    """A 3×3 convolution with padding 1 of square maps. counts: how often it stands in each stack of a network."""

    name: str
    in_channels: int
    out_channels: int
    stride: int
    size: int
    ranks: Pair
    counts: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def takes_residual(self) -> bool:
        """Whether a block of a ResNet adds its input behind this layer: the maps are of one shape."""
        return self.stride == 1 and self.in_channels == self.out_channels and "VGG-16" not in self.counts

    @property
    def macs(self) -> int:
        """Multiply-adds of one image through the three factors."""
        (rank_in, rank_out), after = self.ranks, self.out_size**2
        core = 9 * rank_in * rank_out + rank_out * self.out_channels
        return self.in_channels * rank_in * self.size**2 + core * after

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of one image through the dense kernel."""
        return 9 * self.in_channels * self.out_channels * self.out_size**2

    def elements(self, batch: int, residual: bool) -> int:
        """What has to be read and written once: maps and factors, no intermediate map."""
        rank_in, rank_out = self.ranks
        out = batch * self.out_channels * self.out_size**2
        factors = self.in_channels * rank_in + 9 * rank_in * rank_out + rank_out * self.out_channels
        return batch * self.in_channels * self.size**2 + out * (2 if residual else 1) + factors

    def work(self, batch: int, channels_last: bool, call: str) -> ConvWork:
        """The layer as the dispatcher knows it."""
        return ConvWork(
            batch=batch,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            size=(self.size, self.size),
            kernel=(3, 3),
            ranks=self.ranks,
            stride=(self.stride, self.stride),
            padding=(1, 1),
            dilation=(1, 1),
            channels_last=channels_last,
            call=call,
        )


def peaks() -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of the GPU that is there, where they are known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((value for key, value in PEAKS.items() if key in name), None)


def floor_us(layer: Layer, batch: int, itemsize: int, residual: bool, rates: tuple[float, float]) -> float:
    """What no kernel is faster than: all multiply-adds at full speed, or all bytes once, whichever takes longer."""
    flops, bandwidth = rates
    compute = 2 * batch * layer.macs / flops
    return 1e6 * max(compute, layer.elements(batch, residual) * itemsize / bandwidth)


STACKS = {"r18": "ResNet-18", "half": "ResNet-18, half ranks", "r50": "ResNet-50", "vgg": "VGG-16"}


def _layer(name: str, i: int, o: int, stride: int, size: int, ranks: Pair | None = None, **counts: int) -> Layer:
    named = {STACKS[key]: count for key, count in counts.items()}
    return Layer(name, i, o, stride, size, ranks or (i // 2, o // 2), named)


# The sixteen 3×3 convolutions of ResNet-18 at 224², at the ranks of the model behind the goals: about half the
# channels, and those of the NRMF paper in the layers that it compresses.
RESNET18 = (
    _layer("64, 56x56", 64, 64, 1, 56, r18=4, half=4, r50=3),
    _layer("64-128, 56x56 s2", 64, 128, 2, 56, (32, 72), r18=1),
    _layer("128, 28x28", 128, 128, 1, 28, (72, 72), r18=3),
    _layer("128-256, 28x28 s2", 128, 256, 2, 28, (72, 144), r18=1),
    _layer("NRMF conv1", 256, 256, 1, 14, (144, 141), r18=3),
    _layer("NRMF conv2", 256, 512, 2, 14, (222, 299), r18=1),
    _layer("NRMF conv3", 512, 512, 1, 7, (292, 212), r18=1),
    _layer("NRMF conv4", 512, 512, 1, 7, (160, 69), r18=1),
    _layer("NRMF conv5", 512, 512, 1, 7, (31, 39), r18=1),
)
# ResNet-18's others at half ranks, what ResNet-50 and VGG-16 have besides, and wide layers of VGG-16 at low ranks.
OTHERS = (
    _layer("128, 28x28, half", 128, 128, 1, 28, half=3, r50=3),
    _layer("256, 14x14, half", 256, 256, 1, 14, half=3, r50=5),
    _layer("512, 7x7, half", 512, 512, 1, 7, half=3, r50=2),
    _layer("64, 224x224", 64, 64, 1, 224, vgg=1),
    _layer("128, 112x112", 128, 128, 1, 112, vgg=1),
    _layer("256, 56x56", 256, 256, 1, 56, vgg=2),
    _layer("512, 28x28", 512, 512, 1, 28, vgg=2),
    _layer("128, 112x112, quarter", 128, 128, 1, 112, (32, 32)),
    _layer("256, 56x56, quarter", 256, 256, 1, 56, (64, 64)),
    _layer("512, 28x28, quarter", 512, 512, 1, 28, (128, 128)),
    _layer("64-128, 56x56 s2, half", 64, 128, 2, 56, half=1),
    _layer("128-256, 28x28 s2, half", 128, 256, 2, 28, half=1),
    _layer("256-512, 14x14 s2, half", 256, 512, 2, 14, half=1),
    _layer("128, 56x56 s2", 128, 128, 2, 56, r50=1),
    _layer("256, 28x28 s2", 256, 256, 2, 28, r50=1),
    _layer("512, 14x14 s2", 512, 512, 2, 14, r50=1),
    _layer("64-128, 112x112", 64, 128, 1, 112, vgg=1),
    _layer("128-256, 56x56", 128, 256, 1, 56, vgg=1),
    _layer("256-512, 28x28", 256, 512, 1, 28, vgg=1),
    _layer("512, 14x14", 512, 512, 1, 14, vgg=3),
)
# (channels in and out, size of the map) of the 3×3 convolutions as CP filters, and their ranks.
CP_LAYERS = ((64, 56), (128, 28), (256, 14))
CP_RANKS = (1, 2, 4)
# (O, I, kernel) of all convolutions of a network.
RESNET18_CONVS = (
    (64, 3, 7),
    *((64, 64, 3),) * 4,
    *((128, 64, 3), (128, 64, 1), *((128, 128, 3),) * 3),
    *((256, 128, 3), (256, 128, 1), *((256, 256, 3),) * 3),
    *((512, 256, 3), (512, 256, 1), *((512, 512, 3),) * 3),
)
RESNET50_CONVS = (
    (64, 3, 7),
    *(
        shape
        for width, blocks, before in ((64, 3, 64), (128, 4, 256), (256, 6, 512), (512, 3, 1024))
        for block in range(blocks)
        for shape in (
            (width, before if block == 0 else 4 * width, 1),
            (width, width, 3),
            (4 * width, width, 1),
            *(((4 * width, before, 1),) if block == 0 else ()),
        )
    ),
)
# Lists of tensors of one shape, told by their bytes: where the bandwidth of a kernel shows.
MEBIBYTE = 2**20 // 4
LARGE_LISTS = {
    f"{size} MB of rows of {row}": [(MEBIBYTE * size // 8 // row, row)] * 8
    for size in (64, 256, 1024)
    for row in (64, 576, 4608)
}


def gated_shapes(convs: Sequence[tuple[int, int, int]]) -> list[tuple[int, ...]]:
    """The three factors of every 3×3 convolution (O, I, 3) as a full-rank Tucker-2."""
    return [shape for o, i, k in convs if k == 3 for shape in ((i, i), (o, i, 3, 3), (o, o))]
