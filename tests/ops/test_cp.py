"""cp_conv2d is one convolution whose filters are sums of rank-1 terms: values, derivatives, layouts, refusals."""

from __future__ import annotations

import pytest
import torch
from helpers import FactoredConvSuite, randn
from hypothesis import given
from hypothesis import strategies as st

from fastrank.nn import FusedCPConv
from fastrank.ops import cp_conv2d

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:Using padding='same'")]


class TestCP(FactoredConvSuite):
    op = staticmethod(cp_conv2d)

    @staticmethod
    def overload():
        return torch.ops.fastrank.cp_conv2d.default

    def factors(self, i, o, kernel, rank, dtype, seed=0):
        return [randn(rank, o, n, seed=seed + n, dtype=dtype) for n in (i, *kernel)]

    def merge(self, pointwise, vertical, horizontal):
        return (pointwise[..., None, None] * vertical[:, :, None, :, None] * horizontal[:, :, None, None, :]).sum(0)

    def layer(self):
        return FusedCPConv(5, 6, (3, 2), 2, stride=(2, 1), padding=(1, 0), dilation=(1, 2))


SUITE = TestCP()


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])),
    extra=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    batch=st.integers(0, 3),
    bias=st.booleans(),
    double=st.booleans(),
    backend=st.sampled_from(["auto", "dense"]),
    seed=st.integers(0, 1000),
)
def test_any_cp_convolution(sizes, kernel, stride, dilation, padding, extra, batch, bias, double, backend, seed):
    i, o, rank = sizes
    dtype = torch.float64 if double else torch.float32
    stride = (1, 1) if padding == "same" else stride
    height, width = (d * (k - 1) + 1 + e for d, k, e in zip(dilation, kernel, extra, strict=True))
    factors = SUITE.factors(i, o, kernel, rank, dtype, seed)
    x = randn(batch, i, height, width, seed=seed + 30, dtype=dtype)
    added = randn(o, seed=seed + 40, dtype=dtype) if bias else None
    SUITE.compare(x, factors, added, backend, stride=stride, padding=padding, dilation=dilation)


X, P, V, H, BIAS = (
    torch.zeros(2, 3, 8, 8),
    torch.zeros(2, 5, 3),
    torch.zeros(2, 5, 3),
    torch.zeros(2, 5, 2),
    torch.zeros(5),
)
GOOD = {"x": X, "pointwise": P, "vertical": V, "horizontal": H, "bias": BIAS}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": None}, TypeError, r"x must be a torch.Tensor, got NoneType"),
        ({"x": X[0]}, ValueError, r"x must be of shape \(any, any, any, any\) = \(N, I, H, W\), got \(3, 8, 8\)"),
        ({"x": X.int()}, TypeError, r"x must be a floating-point tensor, got dtype torch.int32"),
        ({"vertical": V.double()}, TypeError, r"vertical must be of the dtype of x, torch.float32, got torch.float64"),
        ({"horizontal": H.to("meta")}, ValueError, r"horizontal must be on the device of x, cpu, got meta"),
        (
            {"pointwise": P[..., :2]},
            ValueError,
            r"pointwise must be of shape \(any, any, 3\) = \(R, O, I\), got \(2, 5, 2\)",
        ),
        ({"vertical": V[:1]}, ValueError, r"vertical must be of shape \(2, 5, any\) = \(R, O, kh\), got \(1, 5, 3\)"),
        (
            {"horizontal": H[:, :4]},
            ValueError,
            r"horizontal must be of shape \(2, 5, any\) = \(R, O, kw\), got \(2, 4, 2\)",
        ),
        ({"bias": torch.zeros(5, 1)}, ValueError, r"bias must be of shape \(5\) = \(O,\), got \(5, 1\)"),
        ({"padding": (1,)}, TypeError, r"padding must be an int or a pair of ints, got tuple"),
        ({"padding": "same", "stride": (1, 2)}, ValueError, r"stride must be 1 with padding='same'"),
        ({"dilation": 9}, ValueError, r"x must be at least as large as the dilated kernel"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda' cannot run cp_conv2d here: cp_conv2d has no cuda backend"),
        ({"x": X[:, :, :0], "padding": 2}, ValueError, r"x must be a map of at least 1×1, got 0×8"),
        (
            {"x": X[:, :0], "pointwise": P[..., :0]},
            ValueError,
            r"pointwise must be of sizes \(R, O, I\) of at least 1, got \(2, 5, 0\)",
        ),
        ({"pointwise": P[:0], "vertical": V[:0], "horizontal": H[:0]}, ValueError, r"pointwise must .*got \(0, 5, 3\)"),
        ({"vertical": V[..., :0]}, ValueError, r"vertical must .*got \(2, 5, 0\)"),
        ({"horizontal": H[..., :0]}, ValueError, r"horizontal must .*got \(2, 5, 0\)"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(wrong, error, message):
    assert cp_conv2d(**GOOD).shape == (2, 5, 6, 7)
    with pytest.raises(error, match=f"^{message}") as caught:
        cp_conv2d(**{**GOOD, **wrong})
    assert "\n" not in str(caught.value)
