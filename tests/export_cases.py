"""Networks for the tests of exports: every factored form, geometry and epilogue in one."""

from __future__ import annotations

import torch
from helpers import randn
from torch import Tensor, nn

from fastrank import LayerPlan, Plan, compress, models
from fastrank.nn import (
    FusedCPConv,
    FusedTucker2Conv,
    GatedCPConv,
    GatedSVDConv,
    GatedTucker2Conv,
    LayerCPConv,
    SVDConv,
)


def forms() -> dict[str, nn.Module]:
    """Layers (N, 4, H, W) -> (N, 4, H, W), drawn anew from one seed."""
    torch.manual_seed(5)
    return {
        "tucker2": FusedTucker2Conv(4, 4, (3, 2), (2, 3), padding="same", padding_mode="reflect"),
        "cp": FusedCPConv(4, 4, 3, 2, padding=1, activation="relu"),
        "svd-channel": SVDConv(4, 4, 3, 2, padding=2, dilation=2, bias=False),
        "svd-spatial": SVDConv(4, 4, 3, 2, scheme="spatial", padding="same", padding_mode="circular"),
        "svd-decoupled": SVDConv(4, 4, 3, 2, scheme="decoupled", padding=1, activation="silu"),
        "cp-layer": LayerCPConv(4, 4, 3, 5, padding=1, padding_mode="replicate"),
        "gated-tucker2": GatedTucker2Conv(4, 4, 3, (2, 3), padding=1),
        "gated-svd": GatedSVDConv(4, 4, 3, 2, padding=1),
        "gated-cp": GatedCPConv(4, 4, 3, 2, padding=1),
    }


def small_lenet() -> nn.Module:
    """LeNet of the 8×8 digits, compressed."""
    torch.manual_seed(5)
    plan = Plan({"conv2": LayerPlan("tucker2", (3, 9)), "conv3": LayerPlan("svd-spatial", (20,))})
    return compress(models.build("lenet5_nrmf"), plan)


class EveryForm(nn.Module):
    """All of `forms` in a row, one with a residual, and a stride at the end: (N, 4, H, W) -> a map and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.forms = nn.ModuleDict(forms())
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.copy_(randn(4))
        self.last = FusedTucker2Conv(4, 6, 3, 2, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for name, layer in self.forms.items():
            x = layer(x, x) if name in ("cp", "svd-decoupled") else layer(x)
        x = self.norm(x)
        return {"map": x, "pooled": self.last(x).mean((2, 3))}
