"""The epilogue of the fused layers: activation(conv(x) + bias + residual), in every geometry and form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import max_relative, randn
from torch import nn

from fastrank import io as model_io
from fastrank.nn import FusedCPConv, FusedTucker2Conv

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:Using padding='same'")]

LAYERS = {"tucker2": (FusedTucker2Conv, (3, 4)), "cp": (FusedCPConv, 2)}
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3), "padding_mode": "reflect"},
    {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 1, "bias": False},
]
kinds = pytest.mark.parametrize("kind", LAYERS)


def layer_of(kind, activation="none", **geometry):
    torch.manual_seed(0)
    layer, rank = LAYERS[kind]
    if kind == "cp" and geometry["kernel_size"] == 1:
        rank = 1
    size = geometry.pop("kernel_size")
    return layer(5, 6, size, rank, activation=activation, dtype=torch.float64, **geometry)


@kinds
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_epilogue_is_what_stands_behind_the_convolution(geometry, activation, kind):
    layer, plain = layer_of(kind, activation, **geometry), layer_of(kind, **geometry)
    plain.load_state_dict(layer.state_dict())
    x = randn(2, 5, 9, 11, dtype=torch.float64)
    before = plain.to_dense()(x)
    residual = randn(*before.shape, seed=1, dtype=torch.float64)
    after = ACTIVATIONS[activation]
    assert max_relative(layer(x), after(before)) <= 1e-12
    assert max_relative(layer(x, residual), after(before + residual)) <= 1e-12
    assert max_relative(layer(x[0], residual[0]), after(before + residual)[0]) <= 1e-12
    assert max_relative(layer(x[0]), after(before)[0]) <= 1e-12


@kinds
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_gradients_reach_the_residual(activation, kind):
    layer = layer_of(kind, activation, kernel_size=3, padding=1)
    x = randn(2, 5, 4, 4, dtype=torch.float64).requires_grad_()
    residual = randn(2, 6, 4, 4, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, residual))


@kinds
def test_forms_of_a_layer_with_an_activation(kind):
    layer = layer_of(kind, "silu", kernel_size=3, padding=1).eval()
    x = randn(2, 5, 6, 6, dtype=torch.float64)
    sequence = layer.to_sequential()
    assert type(sequence[-1]) is nn.SiLU
    assert not any(module.training for module in sequence)
    assert max_relative(sequence(x), layer(x)) <= 1e-12
    with pytest.raises(ValueError, match=r"^activation must be 'none' for to_dense \(to_sequential .*\), got 'silu'$"):
        layer.to_dense()
    assert "activation='silu'" in repr(layer)
    assert "activation" not in repr(layer_of(kind, kernel_size=3))
    twin = type(layer)(**layer.config(), dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


@kinds
def test_an_activation_is_saved(kind, tmp_path):
    layer = layer_of(kind, "relu", kernel_size=3)
    network = nn.Sequential(layer, nn.Conv2d(6, 2, 1, dtype=torch.float64))
    model_io.save(network, tmp_path / "m.safetensors")
    dense = nn.Sequential(nn.Conv2d(5, 6, 3), nn.Conv2d(6, 2, 1))
    loaded = model_io.load(tmp_path / "m.safetensors", dense)
    x = randn(1, 5, 6, 6, dtype=torch.float64)
    assert loaded[0].activation == "relu"
    assert torch.equal(loaded(x), network(x))


@kinds
def test_bad_epilogues_are_refused(kind):
    with pytest.raises(ValueError, match=r"^activation must be one of .*, got 'rellu' \(did you mean 'relu'\?\)$"):
        layer_of(kind, "rellu", kernel_size=3)
    with pytest.raises(TypeError, match=r"^activation must be one of .*, got NoneType$"):
        layer_of(kind, None, kernel_size=3)
    layer = layer_of(kind, kernel_size=3, padding=1)
    x = randn(2, 5, 4, 4, dtype=torch.float64)
    bad = {
        r"^residual must be of shape \(2, 6, 4, 4\) = the output's shape, got \(1, 6, 4, 4\)$": (
            x,
            x.new_ones(1, 6, 4, 4),
        ),
        r"^residual must be of shape \(any, any, any\) = \(O, H', W'\), got \(1, 6, 4, 4\)$": (
            x[0],
            x.new_ones(1, 6, 4, 4),
        ),
        r"^residual must be a torch.Tensor, got int$": (x[0], 1),
        r"^residual must be of the dtype of x, torch.float64, got torch.float32$": (x, torch.ones(2, 6, 4, 4)),
    }
    for message, arguments in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            layer(*arguments)
