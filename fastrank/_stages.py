"""What a factored layer tells the counters about itself: the convolutions it stands for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvStage:
    """One plain convolution inside a factored layer.

    name: what the stage is called inside its layer ("w_in", "vertical", ...).
    in_channels, out_channels, kernel (kh, kw), groups: as of `torch.nn.Conv2d`.
    bias: whether the stage adds a bias of O values by itself. A bias that is added after a sum over stages, as in
        a CP block, belongs to no stage.
    out_size: height and width of the stage's output map.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    groups: int
    bias: bool
    out_size: tuple[int, int]

    @property
    def weights(self) -> int:
        """Weights, kh·kw·I·O/groups, without the bias."""
        return self.kernel[0] * self.kernel[1] * (self.in_channels // self.groups) * self.out_channels

    @property
    def params(self) -> int:
        """Weights and bias."""
        return self.weights + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image, without the bias: weights·H'·W'."""
        return self.weights * self.out_size[0] * self.out_size[1]

    @property
    def bias_adds(self) -> int:
        """Additions of the bias for one image, O·H'·W' or 0."""
        return self.out_channels * self.out_size[0] * self.out_size[1] if self.bias else 0
