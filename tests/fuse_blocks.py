"""A block of a convolution, a normalisation and an activation, to be put together in every way, and its fused form."""

from __future__ import annotations

import torch
from helpers import max_relative, randn
from torch import nn

from fastrank import convert
from fastrank.fuse import fuse_for_inference
from fastrank.nn import FusedCPConv, FusedTucker2Conv, LayerCPConv, SVDConv

LAYERS = {
    "tucker2": lambda **options: FusedTucker2Conv(4, 4, 3, (3, 2), padding=1, **options),
    "cp": lambda **options: FusedCPConv(4, 4, 3, 2, padding=1, **options),
    "layer-cp": lambda **options: LayerCPConv(4, 4, 3, 5, padding=1, **options),
    "channel": lambda **options: SVDConv(4, 4, 3, 3, scheme="channel", padding=1, **options),
    "spatial": lambda **options: SVDConv(4, 4, 3, 3, scheme="spatial", padding=1, **options),
    "decoupled": lambda **options: SVDConv(4, 4, 3, 2, scheme="decoupled", padding=1, **options),
    "dense": lambda **options: nn.Conv2d(4, 4, 3, padding=1, **options),
    "grouped": lambda **options: nn.Conv2d(4, 4, 3, padding=1, groups=2, **options),
}


def norm(**options):
    layer = nn.BatchNorm2d(4, **options)
    for name, low in (("running_mean", -1.0), ("running_var", 0.5), ("weight", -1.5), ("bias", -1.0)):
        if getattr(layer, name) is not None:
            nn.init.uniform_(getattr(layer, name), low, low + 2)
    return layer


class Block(nn.Module):
    """conv, bn and relu, put together by `body(self, x)`."""

    def __init__(self, body, conv=None, bn=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.conv = LAYERS["tucker2"]() if conv is None else conv
        self.bn = norm() if bn is None else bn
        self.relu = nn.ReLU(inplace=True)
        self.other = LAYERS["tucker2"]()
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.randn(1, 4, 5, 5))

    def forward(self, x):
        return self.body(self, x)


def fused_of(model, shape=(1, 4, 5, 5), **options):
    """The fused form, equal to the model on another batch in float64 too; the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    fused = fuse_for_inference(model, randn(*shape), **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert not any(module.training for module in fused.modules())
    exact = fuse_for_inference(convert.copy_with(model, {}).double(), randn(*shape, dtype=torch.float64))
    x = randn(3, *shape[1:], seed=5, dtype=torch.float64)
    plain = convert.copy_with(model, {}).double().eval()
    assert max_relative(exact(x.clone()), plain(x.clone())) <= 1e-12
    assert exact.fusion_report == fused.fusion_report
    return fused


def row(fused, name="conv"):
    return next(r for r in fused.fusion_report if r.layer == name)
