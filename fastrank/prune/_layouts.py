"""Which layers write and which read each group of channels, for the architectures of the zoo.

A group is a set of channels that can only be removed together. It bears the name of the convolution that writes it,
or of the residual stage whose blocks all add to it. What a layer reads is a list of groups: none for the image, one as
a rule, many behind the concatenations of DenseNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from fastrank.models.densenet import DenseNet40
from fastrank.models.resnet_cifar import CifarResNet
from fastrank.models.resnet_imagenet import ResNet50
from fastrank.models.vgg import VGG16BN


@dataclass(frozen=True)
class Conv:
    """The convolution `name` makes the channels of one group from those of `reads`."""

    name: str
    reads: tuple[str, ...]
    writes: str


@dataclass(frozen=True)
class Shortcut:
    """The module `name`, without weights, adds the channels of one group to those of another."""

    name: str
    source: str
    target: str


@dataclass
class Layout:
    """The convolutions in the order in which they run, the other layers with channels, and the bare shortcuts."""

    convs: list[Conv] = field(default_factory=list)
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shortcuts: list[Shortcut] = field(default_factory=list)

    def conv(self, name: str, reads: Sequence[str], norm: str = "", *, writes: str = "") -> str:
        """Add a convolution and the normalisation behind it; returns the group that they write."""
        group = writes or name
        self.convs.append(Conv(name, tuple(reads), group))
        if norm:
            self.readers[norm] = (group,)
        return group


def layout(model: nn.Module) -> Layout | None:
    """The layout of a network of the zoo; None for other modules and for LeNet-5, whose widths are fixed."""
    if isinstance(model, VGG16BN):
        return _vgg(model)
    if isinstance(model, CifarResNet | ResNet50):
        return _resnet(model)
    if isinstance(model, DenseNet40):
        return _densenet(model)
    return None


def _vgg(model: VGG16BN) -> Layout:
    found, group = Layout(), ""
    for name, _ in model.features.named_children():
        if name.startswith("conv"):
            norm = name.replace("conv", "norm")
            group = found.conv(f"features.{name}", (group,) if group else (), f"features.{norm}")
    found.readers["classifier.linear1"] = (group,)
    return found


def _resnet(model: CifarResNet | ResNet50) -> Layout:
    found = Layout()
    group = found.conv("conv1", (), "bn1")
    for stage, blocks in model.named_children():
        if not stage.startswith("layer"):
            continue
        for block, parts in blocks.named_children():
            at, inner = f"{stage}.{block}", group
            convs = [name for name, _ in parts.named_children() if name.startswith("conv")]
            for conv in convs:
                last = conv == convs[-1]
                inner = found.conv(f"{at}.{conv}", (inner,), f"{at}.bn{conv[4:]}", writes=stage if last else "")
            side = "shortcut" if isinstance(model, CifarResNet) else "downsample"
            if isinstance(getattr(parts, side), nn.Sequential):
                found.conv(f"{at}.{side}.0", (group,), f"{at}.{side}.1", writes=stage)
            elif group != stage:
                found.shortcuts.append(Shortcut(f"{at}.{side}", group, stage))
            group = stage
    found.readers["fc"] = (group,)
    return found


def _densenet(model: DenseNet40) -> Layout:
    found = Layout()
    groups = [found.conv("conv1", ())]
    for name, child in model.named_children():
        if name.startswith("dense"):
            for layer, _ in child.named_children():
                found.readers[f"{name}.{layer}.bn"] = tuple(groups)
                groups.append(found.conv(f"{name}.{layer}.conv", groups))
        elif name.startswith("trans"):
            found.readers[f"{name}.bn"] = tuple(groups)
            groups = [found.conv(f"{name}.conv", groups)]
    found.readers.update({"bn": tuple(groups), "fc": tuple(groups)})
    return found
