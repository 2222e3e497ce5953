"""VGG-16 with batch normalisation for 32×32 images, as the pruning literature trains it on CIFAR-10."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastrank.models._blocks import Widths, conv3x3, initialise

_CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_POOL_BEHIND = (1, 3, 6, 9)


class VGG16BN(nn.Module):
    """Input (N, 3, H, W) with H, W ≥ 16 -> (N, num_classes).

    rates: one a convolution (13); with 12 the last convolution keeps its 512 channels.
    """

    def __init__(self, num_classes: int, rank: int, rates: Sequence[float]) -> None:
        super().__init__()
        width = Widths([*rates, 0.0][:13])
        features: OrderedDict[str, nn.Module] = OrderedDict()
        before = 3
        for i, channels in enumerate(_CHANNELS):
            after = width(i, channels)
            features[f"conv{i}"] = conv3x3(before, after, rank=rank, bias=True)
            features[f"norm{i}"] = nn.BatchNorm2d(after)
            features[f"relu{i}"] = nn.ReLU(inplace=True)
            if i in _POOL_BEHIND:
                features[f"pool{i}"] = nn.MaxPool2d(2)
            before = after
        self.features = nn.Sequential(features)
        self.classifier = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(before, 512),
                norm1=nn.BatchNorm1d(512),
                relu1=nn.ReLU(inplace=True),
                linear2=nn.Linear(512, num_classes),
            )
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, num_classes)."""
        pooled = F.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(pooled.flatten(1))
        return logits
