"""LeNet-5 with the inserted 128→256 convolution of the NRMF README."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fastrank.models._blocks import conv3x3


def lenet5_nrmf(num_classes: int, rank: int, rates: Sequence[float]) -> nn.Module:
    """Input (N, 1, H, W) with H, W ≥ 4 -> (N, num_classes).

    conv2 is widened from 16 to 128 channels so that the inserted conv3 fits. A rank above 0 factors conv3, the only
    3×3 convolution; no rate changes a width.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 128, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=conv3x3(128, 256, rank=rank, bias=True),
            relu3=nn.ReLU(),
            pool3=nn.AdaptiveAvgPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(1024, 120),
            relu4=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu5=nn.ReLU(),
            fc3=nn.Linear(84, num_classes),
        )
    )
