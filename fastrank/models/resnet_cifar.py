"""ResNets of depth 6n+2 for 32×32 images (He et al. 2016, section 4.2), and one named alike of bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastrank.models._blocks import Widths, conv3x3, initialise
from fastrank.models.resnet_imagenet import Bottleneck

_STAGES = ((16, 1), (32, 2), (64, 2))


class PadShortcut(nn.Module):
    """Option A: subsample, then pad the channels evenly with zeros, or crop them evenly where a stage is narrower."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        missing = out_channels - in_channels
        self.stride, self.before = stride, missing // 2
        self.after = missing - self.before

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions of widths `mid` and `out_channels`, and a shortcut."""

    def __init__(self, in_channels: int, mid: int, out_channels: int, stride: int, rank: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, mid, stride=stride, rank=rank)
        self.bn1 = nn.BatchNorm2d(mid)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(mid, out_channels, rank=rank)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module
        if in_channels == out_channels and stride == 1:
            self.shortcut = nn.Identity()
        elif projection:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        else:
            self.shortcut = PadShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        out: Tensor = self.relu2(y)
        return out


class CifarResNet(nn.Module):
    """Input (N, 3, H, W) -> (N, num_classes).

    rates: the stem, the outputs of stages 1 and 2 (stage 3 keeps its 64), then the middle width of each block.
    projection: 1×1 convolutions with batch normalisation as shortcuts instead of option A.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self, depth: int, num_classes: int, rank: int, rates: Sequence[float], *, projection: bool = False
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        width = Widths(rates)
        before = width(0, 16)
        self.conv1 = conv3x3(3, before, rank=rank)
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        for stage, (base, stride) in enumerate(_STAGES):
            after = width(1 + stage, base) if stage < 2 else base
            layer = nn.Sequential()
            for block in range(blocks):
                mid = width(3 + stage * blocks + block, base)
                layer.append(BasicBlock(before, mid, after, stride if block == 0 else 1, rank, projection))
                before = after
            self.add_module(f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet_20(num_classes: int, rank: int, rates: Sequence[float]) -> nn.Module:
    """ResNet-20 with projection shortcuts, the 272,474 parameters of TRP's experiments (option A has 269,722)."""
    return CifarResNet(20, num_classes, rank, rates, projection=True)


def resnet_56(num_classes: int, rank: int, rates: Sequence[float]) -> nn.Module:
    """ResNet-56 with option-A shortcuts (853,018 parameters)."""
    return CifarResNet(56, num_classes, rank, rates)


def resnet_110(num_classes: int, rank: int, rates: Sequence[float]) -> nn.Module:
    """ResNet-110 with option-A shortcuts (1,727,962 parameters)."""
    return CifarResNet(110, num_classes, rank, rates)


class BottleneckCifarResNet(nn.Module):
    """Input (N, 3, H, W) -> (N, num_classes): bottlenecks of expansion 4 with 1×1 convolutions as shortcuts.

    A rank makes CP blocks of the stem and of the 3×3 convolution of each bottleneck; the widths are fixed.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, blocks: int, num_classes: int, rank: int) -> None:
        super().__init__()
        before = 16
        self.conv1 = conv3x3(3, before, rank=rank)
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        for stage, (mid, stride) in enumerate(_STAGES):
            layer = nn.Sequential()
            for block in range(blocks):
                first = block == 0
                layer.append(Bottleneck(before, mid, 4 * mid, stride if first else 1, rank, project=first))
                before = 4 * mid
            self.add_module(f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet_56_bottleneck(num_classes: int, rank: int, rates: Sequence[float]) -> nn.Module:
    """The "ResNet-56" of TRP's experiments (869,530 parameters); no rate changes a width.

    Its name counts two layers a block, as if 56 = 6n+2 were of basic blocks, but each of its 9 blocks a stage is a
    bottleneck of three. (TRP's code has no ReLU between the 3×3 convolution and the last; the usual block has.)
    """
    return BottleneckCifarResNet(9, num_classes, rank)
