"""Gates: where they start, what closing them does, and that a gated layer with closed gates is the pruned layer.

That the gated layers stand in for nn.Conv2d in every geometry, dtype and layout is shown in test_layers.py.
"""

from __future__ import annotations

import copy
import math
from fnmatch import fnmatchcase

import pytest
import torch
from helpers import EPS, l2_relative, max_relative, randn
from torch import nn

from fastrank import complexity
from fastrank.nn import FusedTucker2Conv, GatedCPConv, GatedSVDConv, GatedTucker2Conv, LayerCPConv, SVDConv, layer_cp
from fastrank.nn._gated import split
from fastrank.nn.gated_cp import default_rank

GATED = {GatedTucker2Conv: FusedTucker2Conv, GatedSVDConv: SVDConv, GatedCPConv: LayerCPConv}
GEOMETRY = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}


def convolution(i=5, o=6, kernel=(3, 2), dtype=torch.float64, **geometry):
    torch.manual_seed(0)
    return nn.Conv2d(i, o, kernel, **{**GEOMETRY, **geometry}).to(dtype)


def hand_made(kind, dtype=torch.float64):
    """A gated layer of ranks 4 and 5 with random directions and uneven gates, some negative."""
    layer = kind(5, 6, (3, 2), {GatedTucker2Conv: (4, 5)}.get(kind, 5), **GEOMETRY, dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed, dtype=dtype))
        for gate in layer.penalized():
            gate.copy_(torch.tensor([0.1, -0.5, 0.9, 1.3, -0.2])[: len(gate)])
    return layer


def closed(layer, threshold):
    """A copy of the layer in which every penalised gate below the threshold is 0."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for gate in twin.penalized():
            gate[gate.abs() < threshold] = 0
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 5, 3, 2), (20, 2, 3, 3), (2, 20, 1, 3), (7, 7, 1, 1)])
def test_tucker2_gates_start_at_one_and_at_the_mode_4_singular_values(shape, dtype):
    conv = convolution(shape[1], shape[0], shape[2:], dtype)
    layer = GatedTucker2Conv.from_conv(conv)
    sigma = torch.linalg.svdvals(conv.weight.detach().double().flatten(1))
    bound = EPS[dtype] * math.sqrt(conv.weight[0].numel())  # the roundings of one slice
    assert layer.ranks == (min(shape[1], shape[0] * shape[2] * shape[3]), len(sigma))
    assert max_relative(layer.gate_in, torch.ones_like(layer.gate_in)) <= bound
    assert max_relative(layer.gate_core, sigma) <= bound
    # The last factor has orthonormal columns: where it is square, its rows have norm 1 too.
    assert float(layer.gate_out.detach().double().square().sum()) == pytest.approx(len(sigma), rel=2 * bound)
    if len(sigma) == shape[0]:
        assert max_relative(layer.gate_out, torch.ones_like(layer.gate_out)) <= bound


@pytest.mark.parametrize("algorithm", ["hosvd", "hooi"])
def test_truncated_tucker2_is_that_of_the_plain_layer(algorithm):
    conv = convolution()
    layer = GatedTucker2Conv.from_conv(conv, (3, 4), algorithm=algorithm)
    plain = FusedTucker2Conv.from_conv(conv, (3, 4), algorithm=algorithm)
    for name, factor in layer.fold().named_parameters():
        assert max_relative(factor, getattr(plain, name)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [None, 3])
def test_svd_gates_start_at_the_singular_values(rank, dtype):
    conv = convolution(5, 6, 1, dtype)
    layer = GatedSVDConv.from_conv(conv, rank)
    sigma = torch.linalg.svdvals(conv.weight.detach().double().flatten(1))[:rank]
    assert max_relative(layer.gate_first, sigma) <= 5 * EPS[dtype]
    second = layer.fold().second.flatten(1)
    assert max_relative(second.T @ second, torch.eye(len(sigma), dtype=dtype)) <= 5 * EPS[dtype]
    if rank is not None:
        assert l2_relative(layer.to_dense().weight, SVDConv.from_conv(conv, rank).to_dense().weight) <= 9 * EPS[dtype]


def test_cp_gates_hold_the_size_of_a_component_at_one_place():
    conv = convolution()
    layer, plain = GatedCPConv.from_conv(conv, 4), LayerCPConv.from_conv(conv, 4)
    sizes = plain.w_in.norm(dim=1) * plain.depthwise.flatten(1).norm(dim=1) * plain.w_out.norm(dim=0)
    assert torch.equal(layer.gate_in, torch.ones_like(sizes))
    assert max_relative(layer.gate_depthwise, sizes) <= 1e-14
    assert max_relative(layer.fold().w_out.norm(dim=0), torch.ones_like(sizes)) <= 1e-14
    assert l2_relative(layer.to_dense().weight, plain.to_dense().weight) <= 1e-13


@pytest.mark.parametrize(
    "shape", [(64, 64, 3, 3), (512, 256, 3, 3), (8, 3, 5, 1), (16, 16, 1, 1), (1, 1, 1, 1), (2, 9, 1, 3)]
)
def test_the_default_cp_rank_is_the_largest_that_does_not_grow(shape):
    o, i, kh, kw = shape
    rank, each = default_rank(shape), i + o + kh * kw
    assert 1 <= rank <= layer_cp.max_rank(shape)
    assert rank * each <= o * i * kh * kw or rank == 1
    assert (rank + 1) * each > o * i * kh * kw or rank == layer_cp.max_rank(shape)


def test_the_default_cp_rank_is_what_from_conv_takes():
    conv = convolution(6, 5, 3)
    assert GatedCPConv.from_conv(conv).rank == default_rank((5, 6, 3, 3)) == 13


@pytest.mark.parametrize("kind", GATED)
def test_a_factor_is_its_directions_times_its_gates(kind):
    layer = hand_made(kind)
    for name, factor in layer.factors().items():
        direction, gate = getattr(layer, name), getattr(layer, layer.GATES[name])
        assert max_relative(factor.flatten(1).norm(dim=1), gate.abs()) <= 1e-14
        assert (
            max_relative(
                factor, (gate / direction.flatten(1).norm(dim=1)).view(-1, *[1] * (factor.dim() - 1)) * direction
            )
            <= 1e-14
        )
    before = layer.to_dense().weight
    with torch.no_grad():
        for name in layer.GATES:
            getattr(layer, name).mul_(7.3)
    assert max_relative(layer.to_dense().weight, before) <= 1e-13


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("threshold", [0, 0.4, 0.8, 1.1])
def test_pruned_is_the_layer_with_the_small_gates_at_zero(kind, threshold):
    layer = hand_made(kind)
    x, before = randn(2, 5, 9, 8, dtype=torch.float64), copy.deepcopy(layer.state_dict())
    pruned, twin = layer.eval().pruned(threshold), closed(layer, threshold)
    assert type(pruned) is GATED[kind]
    assert not pruned.training
    kept = [int((gate.abs() >= threshold).sum()) for gate in layer.penalized()]
    assert set(kept) <= ({4, 5} if threshold == 0 else {3, 2, 1})
    assert (list(pruned.ranks) if kind is GatedTucker2Conv else [pruned.rank]) == kept
    for form in (pruned, pruned.to_dense(), twin.fold(), twin.to_dense(), twin.to_sequential()):
        assert max_relative(form(x), twin(x)) <= 1e-13
    # The layer itself, and what is rebuilt from it, keep all gates.
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert max_relative(layer.to_dense()(x), layer(x)) <= 1e-13
    if threshold:
        assert l2_relative(pruned(x), layer(x)) > 0.01


@pytest.mark.parametrize("kind", GATED)
def test_gates_count_by_magnitude_and_stay_at_the_threshold_itself(kind):
    layer = hand_made(kind)
    with torch.no_grad():
        layer.penalized()[-1].copy_(torch.tensor([-0.5, 0.25, -0.25, 0.125, 0.0]))
    pruned = layer.pruned(0.25)
    assert layer.pruned(math.nextafter(0.25, 1)).config() != pruned.config()
    assert (pruned.ranks[1] if kind is GatedTucker2Conv else pruned.rank) == 3


@pytest.mark.parametrize("kind", GATED)
def test_the_largest_gate_stays_where_all_are_below(kind):
    layer = hand_made(kind)
    largest = max(float(gate.detach().abs().max()) for gate in layer.penalized())
    pruned = layer.pruned(2 * largest)
    assert (pruned.ranks if kind is GatedTucker2Conv else (pruned.rank,)) == (1,) * len(layer.penalized())
    with torch.no_grad():
        for gate in layer.penalized():
            gate[gate.abs() < gate.abs().max()] = 0
    assert max_relative(pruned.to_dense().weight, layer.to_dense().weight) <= 1e-14
    with torch.no_grad():
        for gate in layer.penalized():
            gate.zero_()
    assert float(layer.pruned(0.1).to_dense().weight.detach().abs().max()) == 0


@pytest.mark.parametrize("kind", GATED)
def test_dead_channels_give_no_nan_and_can_come_alive(kind):
    conv = convolution(o=6, i=5, kernel=3)
    with torch.no_grad():
        conv.weight[2] = 0
        conv.weight[:, 3] = 0
    rank = layer_cp.max_rank(tuple(conv.weight.shape)) if kind is GatedCPConv else None
    x = randn(2, 5, 9, 8, dtype=torch.float64)
    for weight in (conv.weight.detach().clone(), torch.zeros_like(conv.weight)):
        with torch.no_grad():
            conv.weight.copy_(weight)
        layer = kind.from_conv(conv, rank)
        assert float((layer(x) - conv(x)).detach().abs().max()) <= 1e-12
        layer(x).square().sum().backward()
        assert all(bool(p.isfinite().all()) and bool(p.grad.isfinite().all()) for p in layer.parameters())
        for name in layer.GATES:
            assert (
                max_relative(getattr(layer, name).flatten(1).norm(dim=1), torch.ones(len(getattr(layer, name))))
                <= 1e-14
            )


@pytest.mark.parametrize("kind", GATED)
def test_a_direction_of_zero_is_a_slice_of_zero(kind):
    layer = hand_made(kind)
    with torch.no_grad():
        for name in layer.GATES:
            getattr(layer, name)[1] = 0
    x = randn(2, 5, 9, 8, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert max_relative(layer.pruned(0)(x), layer(x)) <= 1e-13


@pytest.mark.parametrize("dtype", EPS)
def test_split_undoes_gated_factor(dtype):
    factor = randn(4, 3, 2, 2, dtype=dtype)
    factor[1] = 0
    direction, gate = split(factor)
    assert torch.equal(gate[1], torch.zeros((), dtype=torch.float64))
    assert max_relative(direction.flatten(1).norm(dim=1), torch.ones(4)) <= 1e-15
    assert max_relative(direction * gate[:, None, None, None], factor) <= 1e-15


@pytest.mark.parametrize("kind", GATED)
def test_the_pattern_of_the_gates_matches_all_gates_and_nothing_else(kind):
    model = nn.Sequential(hand_made(kind))
    matched = {name for name, _ in model.named_parameters() if fnmatchcase(name, "*.gate_*")}
    assert matched == {f"0.{gate}" for gate in kind.GATES.values()}
    penalized = model[0].penalized()
    assert all(p is getattr(model[0], name) for p, name in zip(penalized, kind.PENALIZED, strict=True))
    assert {name for name, _ in model[0].named_parameters()} == {*kind.GATES, *kind.GATES.values(), "bias"}


@pytest.mark.parametrize("kind", GATED)
def test_it_counts_as_the_folded_layer_besides_the_gates(kind):
    layer = hand_made(kind, torch.float32)
    folded, gates = layer.fold(), sum(getattr(layer, name).numel() for name in layer.GATES.values())
    assert layer.conv_stages((9, 8)) == folded.conv_stages((9, 8))
    found, wanted = (complexity.count(model, (5, 9, 8)) for model in (layer, folded))
    assert found.macs == wanted.macs
    assert found.params == wanted.params + gates


def test_the_backend_is_handed_to_the_folded_layer():
    assert GatedTucker2Conv(5, 6, 3, 2, backend="sequence").pruned(0).backend == "sequence"


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("frozen", [False, True])
def test_flags_are_carried_into_the_pruned_layer(kind, frozen):
    layer = hand_made(kind).requires_grad_(not frozen)
    layer.bias.requires_grad_(frozen)
    for name, parameter in layer.pruned(0.4).named_parameters():
        assert parameter.requires_grad == (frozen if name == "bias" else not frozen)
        assert parameter.is_leaf
    assert layer.pruned(0.4).bias is not layer.bias
    layer.penalized()[0].data[1] = math.nan
    with pytest.raises(ValueError, match=rf"^{kind.PENALIZED[0]} must be finite, got 1 NaN or infinite values out of"):
        layer.pruned(0.4)


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize(
    ("threshold", "error", "message"),
    [
        (-0.1, ValueError, "threshold must be a finite number at least 0, got -0.1"),
        (math.nan, ValueError, "threshold must be a finite number at least 0, got nan"),
        (math.inf, ValueError, "threshold must be a finite number at least 0, got inf"),
        ("0.1", TypeError, "threshold must be a number, got str"),
        (None, TypeError, "threshold must be a number, got NoneType"),
    ],
)
def test_wrong_thresholds_are_refused(kind, threshold, error, message):
    with pytest.raises(error, match=f"^{message}"):
        hand_made(kind).pruned(threshold)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GatedTucker2Conv(3, 4, 3, (4, 4)), ValueError, r"ranks\[0\] must be an int between 1 and 3, got 4"),
        (lambda: GatedTucker2Conv.from_conv(nn.Conv2d(3, 4, 3), (3, 5)), ValueError, r"ranks\[1\] must be an int betw"),
        (lambda: GatedTucker2Conv(3, 4, 3, 2, backend="fast"), ValueError, r"backend must be one of"),
        (lambda: GatedSVDConv(3, 4, 3, 5), ValueError, r"rank must be an int between 1 and 4, got 5"),
        (lambda: GatedSVDConv.from_conv(nn.Conv2d(3, 4, 3), 0), ValueError, r"rank must be an int between 1 and 4, g"),
        (lambda: GatedSVDConv.from_conv(nn.Conv2d(3, 4, 3), 2.0), TypeError, r"rank must be an int, got float"),
        (lambda: GatedCPConv(3, 4, 3, 28), ValueError, r"rank must be an int between 1 and 27, got 28"),
        (lambda: GatedCPConv.from_conv(nn.Conv2d(3, 4, 3), 28), ValueError, r"rank must be an int between 1 and 27, g"),
        (lambda: GatedCPConv(3, 4, 3, True), TypeError, r"rank must be an int, got bool"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
