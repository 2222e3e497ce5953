"""tucker2_conv2d is one convolution with the merged kernel: values, derivatives, layouts, dtypes, refusals."""

from __future__ import annotations

import pytest
import torch
from helpers import FactoredConvSuite, randn
from hypothesis import given
from hypothesis import strategies as st

from fastrank import ops
from fastrank.nn import FusedTucker2Conv
from fastrank.ops import tucker2_conv2d

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:Using padding='same'")]


class TestTucker2(FactoredConvSuite):
    op = staticmethod(tucker2_conv2d)

    @staticmethod
    def overload():
        return torch.ops.fastrank.tucker2_conv2d.default

    def factors(self, i, o, kernel, rank, dtype, seed=0):
        rank_in, rank_out = rank, rank + 1  # unequal, so that a swap of the two shows
        sizes = ((rank_in, i), (rank_out, rank_in, *kernel), (o, rank_out))
        return [randn(*size, seed=seed + n + 1, dtype=dtype) for n, size in enumerate(sizes)]

    def merge(self, w_in, core, w_out):
        return (
            w_out[:, :, None, None, None, None]
            * core[None, :, :, None]
            * w_in.T[None, None].transpose(2, 3)[..., None, None]
        ).sum((1, 2))

    def layer(self):
        return FusedTucker2Conv(5, 6, (3, 2), (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2))


SUITE = TestTucker2()


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
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
def test_any_tucker2_convolution(sizes, kernel, stride, dilation, padding, extra, batch, bias, double, backend, seed):
    i, o, rank_in, rank_out = sizes
    dtype = torch.float64 if double else torch.float32
    stride = (1, 1) if padding == "same" else stride
    height, width = (d * (k - 1) + 1 + e for d, k, e in zip(dilation, kernel, extra, strict=True))
    shapes = ((rank_in, i), (rank_out, rank_in, *kernel), (o, rank_out))
    factors = [randn(*shape, seed=seed + n, dtype=dtype) for n, shape in enumerate(shapes)]
    x = randn(batch, i, height, width, seed=seed + 3, dtype=dtype)
    added = randn(o, seed=seed + 4, dtype=dtype) if bias else None
    SUITE.compare(x, factors, added, backend, stride=stride, padding=padding, dilation=dilation)


X, W_IN, CORE, W_OUT, BIAS = (
    torch.zeros(2, 3, 8, 8),
    torch.zeros(2, 3),
    torch.zeros(4, 2, 3, 3),
    torch.zeros(5, 4),
    torch.zeros(5),
)
GOOD = {"x": X, "w_in": W_IN, "core": CORE, "w_out": W_OUT, "bias": BIAS}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, r"x must be a torch.Tensor, got list"),
        ({"x": X[0]}, ValueError, r"x must be of shape \(any, any, any, any\) = \(N, I, H, W\), got \(3, 8, 8\)"),
        ({"x": X.long()}, TypeError, r"x must be a floating-point tensor, got dtype torch.int64"),
        ({"x": X.to(torch.complex64)}, TypeError, r"x must be a floating-point tensor, got dtype torch.complex64"),
        ({"x": X.to_sparse()}, TypeError, r"x must be a dense \(strided\) tensor"),
        ({"x": X.double()}, TypeError, r"w_in must be of the dtype of x, torch.float64, got torch.float32"),
        ({"bias": BIAS.half()}, TypeError, r"bias must be of the dtype of x"),
        ({"w_in": W_IN.to("meta")}, ValueError, r"w_in must be on the device of x, cpu, got meta"),
        ({"w_in": torch.zeros(2, 4)}, ValueError, r"w_in must be of shape \(2, 3\) = \(R_in, I\), got \(2, 4\)"),
        ({"core": torch.zeros(4, 3, 3, 3)}, ValueError, r"w_in must be of shape \(3, 3\)"),
        ({"w_out": torch.zeros(5, 3)}, ValueError, r"w_out must be of shape \(any, 4\) = \(O, R_out\), got \(5, 3\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be of shape \(5\) = \(O,\), got \(4,\)"),
        ({"stride": 0}, ValueError, r"stride\[0\] must be an int at least 1, got 0"),
        ({"stride": True}, TypeError, r"stride must be an int or a pair of ints, got bool"),
        ({"stride": (1, 2, 3)}, TypeError, r"stride must be an int or a pair of ints"),
        ({"stride": 1.0}, TypeError, r"stride must be an int or a pair of ints, got float"),
        ({"padding": -1}, ValueError, r"padding\[0\] must be an int at least 0, got -1"),
        ({"padding": "sane"}, ValueError, r"padding must be one of .*did you mean 'same'"),
        ({"padding": "same", "stride": 2}, ValueError, r"stride must be 1 with padding='same', got \(2, 2\)"),
        ({"dilation": (1, 0)}, ValueError, r"dilation\[1\] must be an int at least 1, got 0"),
        (
            {"dilation": 4},
            ValueError,
            r"x must be at least as large as the dilated kernel after padding \(9\), got a padded size of 8",
        ),
        ({"backend": "dens"}, ValueError, r"backend must be one of .*did you mean 'dense'"),
        ({"backend": None}, TypeError, r"backend must be one of"),
        (
            {"backend": "gram"},
            ValueError,
            r"backend='gram' cannot run tucker2_conv2d here: tucker2_conv2d has no gram backend",
        ),
        ({"x": X[:, :, :0], "padding": 2}, ValueError, r"x must be a map of at least 1×1, got 0×8"),
        (
            {"x": X[:, :0], "w_in": W_IN[:, :0]},
            ValueError,
            r"w_in must be of sizes \(R_in, I\) of at least 1, got \(2, 0\)",
        ),
        ({"w_in": W_IN[:0], "core": CORE[:, :0]}, ValueError, r"core must .*got \(4, 0, 3, 3\)"),
        ({"core": CORE[:0], "w_out": W_OUT[:, :0]}, ValueError, r"core must .*got \(0, 2, 3, 3\)"),
        ({"core": CORE[:, :, :0]}, ValueError, r"core must .*got \(4, 2, 0, 3\)"),
        ({"w_out": W_OUT[:0], "bias": BIAS[:0]}, ValueError, r"w_out must .*got \(0, 4\)"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(wrong, error, message):
    assert tucker2_conv2d(**GOOD).shape == (2, 5, 6, 6)
    with pytest.raises(error, match=f"^{message}") as caught:
        tucker2_conv2d(**{**GOOD, **wrong})
    assert "\n" not in str(caught.value)


def test_the_schema_here_and_in_the_binary_are_one():
    from fastrank.ops._register import SCHEMAS

    for name in (
        "tucker2_conv2d",
        "cp_conv2d",
        "tucker2_conv2d_backward",
        "cp_conv2d_backward",
        "nuclear_norm",
        "nuclear_subgradient",
    ):
        built = getattr(torch.ops.fastrank, name).default._schema
        assert str(built) == str(torch._C.parse_schema(f"fastrank::{SCHEMAS[name]}"))


def test_every_public_operator_is_exported():
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
