"""ResNet-50 for ImageNet, under torchvision's module names so that its weights fit (rank 0, no rates)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastrank.models._blocks import Widths, conv3x3, initialise

# Blocks, output channels and stride of each stage.
_STAGES = ((3, 256, 1), (4, 512, 2), (6, 1024, 2), (3, 2048, 2))


class Bottleneck(nn.Module):
    """1×1 → 3×3 (stride, and the CP block where a rank is given) → 1×1, and a shortcut."""

    def __init__(self, in_channels: int, mid: int, out_channels: int, stride: int, rank: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv3x3(mid, mid, stride=stride, rank=rank)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if project:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class ResNet50(nn.Module):
    """Input (N, 3, H, W) -> (N, num_classes).

    rates (20): the stem, the outputs of stages 1–3 (stage 4 keeps its 2048), then the middle width of each of the 16
    bottlenecks.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, num_classes: int, rank: int, rates: Sequence[float]) -> None:
        super().__init__()
        width = Widths(rates)
        before = width(0, 64)
        self.conv1 = nn.Conv2d(3, before, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        position = 4
        for stage, (blocks, base, stride) in enumerate(_STAGES):
            after = width(1 + stage, base) if stage < 3 else base
            layer = nn.Sequential()
            for block in range(blocks):
                first = block == 0
                mid = width(position, base // 4)
                layer.append(Bottleneck(before, mid, after, stride if first else 1, rank, project=first))
                before, position = after, position + 1
            self.add_module(f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits
