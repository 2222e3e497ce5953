"""The operators behind SVDConv: each is one convolution; values, derivatives, layouts, refusals."""

from __future__ import annotations

import pytest
import torch
from helpers import FactoredConvSuite, lay_out, randn

from fastrank import ops
from fastrank.nn import SVDConv

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:Using padding='same'")]


class TestChannel(FactoredConvSuite):
    stages = 2
    op = staticmethod(ops.channel_svd_conv2d)

    @staticmethod
    def overload():
        return torch.ops.fastrank.channel_svd_conv2d.default

    def factors(self, i, o, kernel, rank, dtype, seed=0):
        return [randn(rank, i, *kernel, seed=seed + 1, dtype=dtype), randn(o, rank, 1, 1, seed=seed + 2, dtype=dtype)]

    def merge(self, first, second):
        return (second[:, :, :, :, None] * first[None].flatten(3).unsqueeze(3)).sum(1).squeeze(2).unflatten(
            -1, first.shape[2:]
        )  # fmt: skip

    def layer(self):
        return SVDConv(5, 6, (3, 2), 2, scheme="channel", stride=(2, 1), padding=(1, 0), dilation=(1, 2))


class TestSpatial(FactoredConvSuite):
    stages = 2
    op = staticmethod(ops.spatial_svd_conv2d)

    @staticmethod
    def overload():
        return torch.ops.fastrank.spatial_svd_conv2d.default

    def factors(self, i, o, kernel, rank, dtype, seed=0):
        kh, kw = kernel
        return [randn(rank, i, kh, 1, seed=seed + 1, dtype=dtype), randn(o, rank, 1, kw, seed=seed + 2, dtype=dtype)]

    def merge(self, first, second):
        return (first[None] * second[:, :, None]).sum(1)

    def layer(self):
        return SVDConv(5, 6, (3, 2), 2, scheme="spatial", stride=(2, 1), padding=(1, 0), dilation=(1, 2))


class TestDecoupled(FactoredConvSuite):
    stages = 3  # with the sum
    op = staticmethod(ops.decoupled_svd_conv2d)

    @staticmethod
    def overload():
        return torch.ops.fastrank.decoupled_svd_conv2d.default

    def factors(self, i, o, kernel, rank, dtype, seed=0):
        return [randn(rank, o, i, seed=seed + 1, dtype=dtype), randn(rank, o, *kernel, seed=seed + 2, dtype=dtype)]

    def merge(self, pointwise, depthwise):
        return (pointwise[..., None, None] * depthwise[:, :, None]).sum(0)

    def layer(self):
        return SVDConv(5, 6, (3, 2), 2, scheme="decoupled", stride=(2, 1), padding=(1, 0), dilation=(1, 2))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_one_rank_after_the_other(self, dtype, layout):
        x, factors = lay_out(randn(3, 5, 9, 7, dtype=dtype), layout), self.factors(5, 6, (3, 2), 3, dtype)
        geometry = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
        self.compare(x, factors, randn(6, seed=9, dtype=dtype), "depthwise", **geometry)

    @pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
    def test_gradients_of_one_rank_after_the_other(self, needs):
        inputs = [randn(2, 4, 6, 5, dtype=torch.float64), *self.factors(4, 3, (3, 2), 3, torch.float64)]
        grads = []
        for backend in ("sequence", "depthwise"):
            own = [i.clone().requires_grad_(bool(need)) for i, need in zip(inputs, needs, strict=True)]
            out = self.op(*own, stride=(1, 2), padding=(2, 1), backend=backend)
            grads.append(torch.autograd.grad(out.cos().sum(), [i for i in own if i.requires_grad]))
        for found, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


X, BIAS = torch.zeros(2, 3, 8, 8), torch.zeros(5)
CHANNEL = {"x": X, "first": torch.zeros(2, 3, 3, 2), "second": torch.zeros(5, 2, 1, 1), "bias": BIAS}
SPATIAL = {"x": X, "first": torch.zeros(2, 3, 3, 1), "second": torch.zeros(5, 2, 1, 2), "bias": BIAS}
DECOUPLED = {"x": X, "pointwise": torch.zeros(2, 5, 3), "depthwise": torch.zeros(2, 5, 3, 2), "bias": BIAS}


@pytest.mark.parametrize(
    ("op", "good", "wrong", "message"),
    [
        (ops.channel_svd_conv2d, CHANNEL, {"x": X[0]}, r"x must be of shape .* = \(N, I, H, W\), got \(3, 8, 8\)"),
        (
            ops.channel_svd_conv2d,
            CHANNEL,
            {"first": torch.zeros(2, 4, 3, 2)},
            r"first must be of shape \(any, 3, any, any\) = \(R, I, kh, kw\), got \(2, 4, 3, 2\)",
        ),
        (
            ops.channel_svd_conv2d,
            CHANNEL,
            {"second": torch.zeros(5, 2, 1, 3)},
            r"second must be of shape \(any, 2, 1, 1\) = \(O, R, 1, 1\), got \(5, 2, 1, 3\)",
        ),
        (ops.channel_svd_conv2d, CHANNEL, {"bias": BIAS[:4]}, r"bias must be of shape \(5\) = \(O,\), got \(4,\)"),
        (
            ops.channel_svd_conv2d,
            CHANNEL,
            {"backend": "depthwise"},
            r"backend='depthwise' cannot run channel_svd_conv2d",
        ),
        (
            ops.channel_svd_conv2d,
            CHANNEL,
            {"second": torch.zeros(0, 2, 1, 1), "bias": None},
            r"second must be of sizes",
        ),
        (
            ops.spatial_svd_conv2d,
            SPATIAL,
            {"first": torch.zeros(2, 3, 3, 2)},
            r"first must be of shape \(any, 3, any, 1\) = \(R, I, kh, 1\), got \(2, 3, 3, 2\)",
        ),
        (
            ops.spatial_svd_conv2d,
            SPATIAL,
            {"second": torch.zeros(5, 3, 1, 2)},
            r"second must be of shape \(any, 2, 1, any\) = \(O, R, 1, kw\), got \(5, 3, 1, 2\)",
        ),
        (ops.spatial_svd_conv2d, SPATIAL, {"dilation": 9}, r"x must be at least as large as the dilated kernel"),
        (
            ops.decoupled_svd_conv2d,
            DECOUPLED,
            {"pointwise": torch.zeros(2, 5, 4)},
            r"pointwise must be of shape \(any, any, 3\) = \(R, O, I\), got \(2, 5, 4\)",
        ),
        (
            ops.decoupled_svd_conv2d,
            DECOUPLED,
            {"depthwise": torch.zeros(1, 5, 3, 2)},
            r"depthwise must be of shape \(2, 5, any, any\) = \(R, O, kh, kw\), got \(1, 5, 3, 2\)",
        ),
        (
            ops.decoupled_svd_conv2d,
            DECOUPLED,
            {"padding": "same", "stride": 2},
            r"stride must be 1 with padding='same'",
        ),
        (ops.decoupled_svd_conv2d, DECOUPLED, {"residual": X}, r"residual must be of shape .*the output's shape"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(op, good, wrong, message):
    assert op(**good).shape == (2, 5, 6, 7)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        op(**{**good, **wrong})
    assert "\n" not in str(caught.value)
