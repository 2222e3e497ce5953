"""DenseNet-40 with growth 12 for 32×32 images (Huang et al. 2017): no bottlenecks, no narrowing transitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank.models._blocks import Widths, conv3x3, initialise

_GROWTH = 12
_LAYERS = 12


class DenseLayer(nn.Module):
    """Batch normalisation, ReLU and a 3×3 convolution whose `growth` maps are appended to the input."""

    def __init__(self, in_channels: int, growth: int, rank: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = conv3x3(in_channels, growth, rank=rank)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, I + growth, H, W)."""
        return torch.cat((x, self.conv(self.relu(self.bn(x)))), 1)


class Transition(nn.Module):
    """Batch normalisation, ReLU, a 1×1 convolution and 2×2 average pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H/2, W/2)."""
        return F.avg_pool2d(self.conv(self.relu(self.bn(x))), 2)


class DenseNet40(nn.Module):
    """Input (N, 3, H, W) with H, W ≥ 4 -> (N, num_classes).

    rates (39): the first is not used (the stem keeps 24 channels); 1–12, 14–25 and 27–38 set the growths, 13 and 26
    the channels behind the transitions.
    """

    dense1: nn.Sequential
    trans1: Transition
    dense2: nn.Sequential
    trans2: Transition
    dense3: nn.Sequential

    def __init__(self, num_classes: int, rank: int, rates: Sequence[float]) -> None:
        super().__init__()
        width = Widths(rates)
        channels, position = 2 * _GROWTH, 1
        self.conv1 = conv3x3(3, channels, rank=rank)
        for block in (1, 2, 3):
            layers = nn.Sequential()
            for _ in range(_LAYERS):
                growth = width(position, _GROWTH)
                layers.append(DenseLayer(channels, growth, rank))
                channels, position = channels + growth, position + 1
            self.add_module(f"dense{block}", layers)
            if block < 3:
                kept = width(position, channels)
                self.add_module(f"trans{block}", Transition(channels, kept))
                channels, position = kept, position + 1
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        logits: Tensor = self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))
        return logits
