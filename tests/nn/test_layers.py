"""Every factored layer stands in for nn.Conv2d: same outputs at full rank in every geometry, same manners."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
from helpers import EPS, LAYOUTS, l2_relative, lay_out, max_relative, randn
from torch import nn
from torch.nn.utils import parametrize, prune

from fastrank.decompose.tucker import max_ranks
from fastrank.nn import (
    FusedCPConv,
    FusedTucker2Conv,
    GatedCPConv,
    GatedSVDConv,
    GatedTucker2Conv,
    LayerCPConv,
    SVDConv,
    layer_cp,
)
from fastrank.nn.svd import max_rank

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:Using padding='same'")]

GATED = {"gated-tucker2": GatedTucker2Conv, "gated-svd": GatedSVDConv, "gated-cp": GatedCPConv}
KINDS = ("tucker2", "cp", "channel", "spatial", "decoupled", "cp-layer", *GATED)
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3), "padding_mode": "reflect"},
    {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (2, 1), "dilation": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "stride": (1, 2), "padding": "valid", "padding_mode": "replicate"},
    {"kernel_size": 5, "stride": 3, "padding": 2, "padding_mode": "replicate"},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (1, 3), "padding": (0, 1), "dilation": (1, 2)},
]
SMALL = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}


def convolution(i=5, o=6, dtype=torch.float32, **geometry):
    torch.manual_seed(0)
    return nn.Conv2d(i, o, **geometry).to(dtype)


def factored(kind, conv, rank=None):
    """The layer of `kind` for `conv`, at full rank unless one is given."""
    shape = tuple(conv.weight.shape)
    if kind == "tucker2":
        return FusedTucker2Conv.from_conv(conv, max_ranks(shape) if rank is None else rank)
    if kind == "cp":
        return FusedCPConv.from_conv(conv, shape[2] * shape[3] if rank is None else rank)
    if kind in ("cp-layer", "gated-cp"):
        layer = GatedCPConv if kind == "gated-cp" else LayerCPConv
        return layer.from_conv(conv, layer_cp.max_rank(shape) if rank is None else rank)
    if kind in GATED:
        return GATED[kind].from_conv(conv, rank)
    return SVDConv.from_conv(conv, max_rank(kind, shape) if rank is None else rank, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_full_rank_is_the_convolution_and_all_forms_agree(geometry, kind):
    for bias, (dtype, bound) in itertools.product((True, False), ((torch.float32, 1e-5), (torch.float64, 1e-12))):
        conv = convolution(bias=bias, dtype=dtype, **geometry)
        layer = factored(kind, conv)
        x = randn(3, 5, 11, 9, seed=1, dtype=dtype)
        wanted = conv(x)
        dense, sequence = layer.to_dense(), layer.to_sequential()
        for form in (layer, dense, sequence):
            assert max_relative(form(x), wanted) <= bound
        assert type(dense) is nn.Conv2d
        assert repr(dense) == repr(conv)
        assert l2_relative(dense.weight, conv.weight) <= bound
        assert all(type(m).__module__ in ("torch.nn.modules.conv", "fastrank.nn._conv") for m in sequence)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_forms_agree_at_rank_one_too(geometry, kind):
    layer = factored(kind, convolution(dtype=torch.float64, **geometry), 1)
    x = randn(2, 5, 10, 12, dtype=torch.float64)
    for form in (layer.to_dense(), layer.to_sequential()):
        assert max_relative(form(x), layer(x)) <= 1e-12
    stages, out = layer.conv_stages((10, 12)), layer(x).shape[2:]
    assert stages[-1].out_size == tuple(out)
    assert sum(s.weights for s in stages) == sum(
        p.numel() for n, p in layer.named_parameters() if n[:4] not in ("bias", "gate")
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EPS)
def test_every_layout_and_dtype(dtype, layout, kind):
    conv = convolution(dtype=dtype, **SMALL)
    layer = factored(kind, conv)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    for batch in (0, 1, 5):
        x = lay_out(randn(batch, 5, 9, 7, dtype=dtype), layout)
        wanted = copy.deepcopy(conv).double()(x.double())
        found = layer(x)
        assert found.dtype == dtype
        # Three rounded factors, two rounded maps and the output: √6 roundings of eps/2 between near-orthogonal factors.
        assert l2_relative(found, wanted) <= {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * EPS[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_memory_format_is_kept(kind):
    for geometry in (
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (4, 3), "padding": "same"},
        GEOMETRIES[6],
        SMALL,
    ):
        layer = factored(kind, convolution(**geometry))
        for memory_format in (torch.channels_last, torch.contiguous_format):
            out = layer(randn(2, 5, 9, 9).contiguous(memory_format=memory_format))
            assert out.is_contiguous(memory_format=memory_format)
        layer.to(memory_format=torch.channels_last)
        x = randn(2, 5, 9, 9).contiguous(memory_format=torch.channels_last)
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_image_is_accepted_like_by_conv2d(kind):
    conv = convolution(**SMALL)
    x = randn(5, 9, 7)
    found = factored(kind, conv)(x)
    assert found.shape == conv(x).shape
    assert max_relative(found, conv(x)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("training", "needs_weight", "needs_bias"), [(True, True, False), (False, False, True), (False, False, False)]
)
def test_mode_gradients_flags_and_device_are_carried_both_ways(kind, training, needs_weight, needs_bias):
    conv = convolution(**SMALL).train(training)
    conv.weight.requires_grad_(needs_weight)
    conv.bias.requires_grad_(needs_bias)
    before = copy.deepcopy(conv.state_dict())
    layer = factored(kind, conv)
    for form in (layer, layer.to_dense(), *layer.to_sequential()):
        assert form.training == training
        for name, parameter in form.named_parameters():
            assert parameter.requires_grad == (needs_bias if name.endswith("bias") else needs_weight)
            assert parameter.is_leaf
            assert parameter.device == conv.weight.device
    assert layer.bias is not conv.bias
    with torch.no_grad():
        for parameter in (*layer.parameters(), *layer.to_dense().parameters(), *layer.to_sequential().parameters()):
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    layer = factored(kind, convolution(**SMALL))
    x = randn(2, 5, 9, 7)
    with torch.autocast("cpu", dtype):
        out = layer(x)
        dense = layer.to_dense()
    assert out.dtype == dtype
    assert l2_relative(out, layer(x)) <= 4 * EPS[dtype]
    assert torch.equal(dense.weight, layer.to_dense().weight)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_values_give_shapes(kind):
    layer = factored(kind, convolution(**SMALL), 2)
    wanted = layer(randn(2, 5, 9, 7)).shape
    layer.to("meta")
    assert layer(torch.empty(2, 5, 9, 7, device="meta")).shape == wanted
    assert layer.to_dense().weight.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts_round_trip(kind):
    layer = factored(kind, convolution(**SMALL), 2)
    x = randn(2, 5, 9, 7)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = type(layer)(**{**layer.config(), "dtype": torch.float32})
    assert not torch.equal(fresh(x), layer(x))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(layer), fresh):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
        assert twin.config() == layer.config()
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_training_follows_the_dense_gradient(kind):
    """d loss / d factors by the layer is what autograd gives through the merged kernel in float64."""
    layer = factored(kind, convolution(dtype=torch.float64, **SMALL), 1)
    x = randn(3, 5, 9, 7, dtype=torch.float64)
    found = torch.autograd.grad(layer(x).cos().sum(), list(layer.parameters()))
    for parameter, gradient in zip(layer.parameters(), found, strict=True):
        direction, step, values = randn(*parameter.shape, dtype=torch.float64), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(float(layer.to_dense()(x).detach().cos().sum()))
                parameter.sub_(sign * step * direction)
        assert float((gradient * direction).sum()) == pytest.approx(
            (values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
def test_initial_outputs_have_the_variance_of_conv2d(kind):
    torch.manual_seed(0)
    shape, geometry = (64, 64, 3), {"bias": False}
    layer = {
        "tucker2": lambda: FusedTucker2Conv(*shape, (20, 40), **geometry),
        "cp": lambda: FusedCPConv(*shape, 4, **geometry),
        "cp-layer": lambda: LayerCPConv(*shape, 200, **geometry),
        "gated-tucker2": lambda: GatedTucker2Conv(*shape, (20, 40), **geometry),
        "gated-svd": lambda: GatedSVDConv(*shape, 9, **geometry),
        "gated-cp": lambda: GatedCPConv(*shape, 200, **geometry),
    }.get(kind, lambda: SVDConv(*shape, 9, scheme=kind, **geometry))()
    x = torch.randn(8, 64, 10, 10)
    with torch.no_grad():
        assert float(layer(x).var()) == pytest.approx(float(nn.Conv2d(*shape, **geometry)(x).var()), rel=0.35)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    torch._dynamo.reset()
    layer = factored(kind, convolution(kernel_size=(2, 3), padding="same"), 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (randn(2, 5, 9, 7), randn(3, 5, 8, 8).contiguous(memory_format=torch.channels_last)):
        out = compiled(x)
        assert max_relative(out, layer(x)) <= 1e-6
        out.square().sum().backward()
        grads = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert all(l2_relative(g, p.grad) <= 1e-5 for g, p in zip(grads, layer.parameters(), strict=True))
        layer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_exports_with_a_free_batch(kind):
    layer = factored(kind, convolution(kernel_size=3, padding=1), 2).eval()
    program = torch.export.export(layer, (randn(4, 5, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    x = randn(7, 5, 8, 8, seed=3)
    assert max_relative(program.module()(x), layer(x)) <= 1e-6


class Standardised(nn.Conv2d):
    """As timm's StdConv2d: the weight is re-shaped in forward."""


def hooked(register, hook):
    conv = nn.Conv2d(3, 4, 3)
    getattr(conv, register)(hook)
    return conv


def patched():
    conv = nn.Conv2d(3, 4, 3)
    conv.forward = lambda x: x
    return conv


REFUSED = [
    (lambda: None, TypeError, "NoneType is not an nn.Conv2d"),
    (lambda: nn.Linear(2, 2), TypeError, "Linear is not an nn.Conv2d"),
    (lambda: nn.ConvTranspose2d(3, 4, 3), TypeError, "ConvTranspose2d is not an nn.Conv2d"),
    (lambda: Standardised(3, 4, 3), TypeError, "Standardised is a subclass of nn.Conv2d"),
    (lambda: nn.LazyConv2d(4, 3), TypeError, "LazyConv2d is a subclass of nn.Conv2d"),
    (lambda: nn.Conv2d(4, 4, 3, groups=2), ValueError, "groups must be 1, got 2"),
    (lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5), ValueError, "its weight is computed in forward"),
    (lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "bias", 0.5), ValueError, "its bias is computed in forward"),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), TypeError, "ParametrizedConv2d is a subclass"),
    (
        lambda: parametrize.register_parametrization(nn.Conv2d(3, 4, 3), "bias", nn.ReLU()),
        TypeError,
        "ParametrizedConv2d is a subclass",
    ),
    (lambda: hooked("register_forward_hook", print), ValueError, "it carries hooks"),
    (lambda: hooked("register_forward_pre_hook", print), ValueError, "it carries hooks"),
    (lambda: hooked("register_full_backward_hook", print), ValueError, "it carries hooks"),
    (lambda: hooked("register_full_backward_pre_hook", print), ValueError, "it carries hooks"),
    (patched, ValueError, "its forward is replaced"),
    (lambda: nn.Conv2d(3, 4, 3, device="meta"), ValueError, "its weight is on the meta device"),
    (lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64), ValueError, "its weight is of dtype torch.complex64"),
]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("make", "error", "reason"), REFUSED)
def test_what_cannot_be_factored_is_refused_with_the_reason(make, error, reason):
    for layer in (FusedTucker2Conv, FusedCPConv, SVDConv, LayerCPConv, *GATED.values()):
        with pytest.raises(error, match=f"^conv must be a plain nn.Conv2d with groups=1: {reason}"):
            layer.from_conv(make(), 1)


CONV = nn.Conv2d(3, 4, 3)
X = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FusedTucker2Conv.from_conv(CONV, 0), ValueError, r"ranks\[0\] must be an int at least 1, got 0"),
        (
            lambda: FusedTucker2Conv.from_conv(CONV, (3, 5)),
            ValueError,
            r"ranks\[1\] must be an int between 1 and 4, got 5",
        ),
        (
            lambda: FusedTucker2Conv.from_conv(CONV, True),
            TypeError,
            r"ranks must be an int or a pair of ints, got bool",
        ),
        (
            lambda: FusedTucker2Conv.from_conv(CONV, 2.0),
            TypeError,
            r"ranks must be an int or a pair of ints, got float",
        ),
        (lambda: FusedTucker2Conv(3, 4, 3, (4, 4)), ValueError, r"ranks\[0\] must be an int between 1 and 3, got 4"),
        (lambda: FusedCPConv.from_conv(CONV, 10), ValueError, r"rank must be an int between 1 and 9, got 10"),
        (lambda: FusedCPConv(3, 4, 3, False), TypeError, r"rank must be an int, got bool"),
        (lambda: SVDConv.from_conv(CONV, 5), ValueError, r"rank must be an int between 1 and 4, got 5"),
        (lambda: SVDConv.from_conv(CONV, 1, "chanel"), ValueError, r"scheme must be one of .*did you mean 'channel'"),
        (lambda: SVDConv(3, 4, 3, -1), ValueError, r"rank must be an int between 1 and 4, got -1"),
        (lambda: SVDConv(0, 4, 3, 1), ValueError, r"in_channels must be an int at least 1, got 0"),
        (lambda: SVDConv(3, 4.0, 3, 1), TypeError, r"out_channels must be an int, got float"),
        (lambda: SVDConv(3, 4, (3, 0), 1), ValueError, r"kernel_size\[1\] must be an int at least 1, got 0"),
        (lambda: FusedCPConv(3, 4, 3, 1, padding_mode="mirror"), ValueError, r"padding_mode must be one of"),
        (
            lambda: FusedCPConv(3, 4, 3, 1, padding="same", stride=2),
            ValueError,
            r"stride must be 1 with padding='same'",
        ),
        (lambda: FusedTucker2Conv(3, 4, 3, 1, backend="fast"), ValueError, r"backend must be one of"),
        (lambda: FusedTucker2Conv(3, 4, 3, 1, bias="no"), TypeError, r"bias must be a bool, got str"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, r"x must be a torch.Tensor, got list"),
        (X[0, 0], ValueError, r"x must be of shape \(N, 3, H, W\) or \(3, H, W\), got \(8, 8\)"),
        (X[:, :2], ValueError, r"x must be of shape \(N, 3, H, W\) or \(3, H, W\), got \(1, 2, 8, 8\)"),
        (X.long(), TypeError, r"x must be a floating-point tensor, got dtype torch.int64"),
        (X.double(), TypeError, r"\w+ must be of the dtype of x, torch.float64, got torch.float32"),
        (X.to("meta"), ValueError, r"\w+ must be on the device of x, meta, got cpu"),
        (
            X[..., :2],
            ValueError,
            r"x must be at least as large as the dilated kernel after padding \(3\), got a padded size of 2",
        ),
        (X[:, :, :0], ValueError, r"x must be a map of at least 1×1, got 0×8"),
    ],
)
def test_bad_inputs_are_refused_in_one_sentence(kind, x, error, message):
    with pytest.raises(error, match=f"^{message}"):
        factored(kind, CONV, 1)(x)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused(kind):
    for value in (math.nan, math.inf):
        conv = nn.Conv2d(3, 4, 3)
        with torch.no_grad():
            conv.weight[1, 1, 1, 1] = value
        with pytest.raises(ValueError, match=r"^weight must be finite, got 1 NaN or infinite values out of 108"):
            factored(kind, conv)
