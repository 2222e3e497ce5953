"""Decompositions for given inputs: never worse on them than the plain ones, and as good where inputs are white."""

from __future__ import annotations

import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrank.decompose import channel_svd, spatial_svd, tucker2
from fastrank.decompose.weighted import output_error
from fastrank.nn import FusedTucker2Conv, SVDConv

FORMS = ("channel", "spatial", "tucker2")


def moment_of(side: int, seed: int = 0, decay: float = 1.5) -> Tensor:
    """A second moment whose directions differ in size by 10^decay, as those of images do."""
    samples = randn(4 * side, side, seed=seed, dtype=torch.float64) * torch.logspace(0, -decay, side).double()
    mixed = samples @ torch.linalg.qr(randn(side, side, seed=seed + 1, dtype=torch.float64)).Q
    return mixed.T @ mixed / len(mixed)


def approximated(form: str, weight: Tensor, rank: int, moment: Tensor | None) -> Tensor:
    if form == "tucker2":
        return tucker2(weight, (min(rank, weight.shape[1]), min(rank, weight.shape[0])), moment=moment).weight()
    first, second = (channel_svd if form == "channel" else spatial_svd)(weight, rank, moment=moment)
    if form == "channel":
        return torch.einsum("or,riyx->oiyx", second[:, :, 0, 0], first)
    return torch.einsum("orx,riy->oiyx", second[:, :, 0], first[..., 0])


@pytest.mark.parametrize("form", FORMS)
@given(
    out_channels=st.integers(1, 9),
    in_channels=st.integers(1, 7),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 10**6),
)
def test_the_outputs_are_kept_at_least_as_well_as_by_the_plain_form(
    form, out_channels, in_channels, kernel, share, seed
):
    weight = randn(out_channels, in_channels, *kernel, seed=seed, dtype=torch.float64)
    moment = moment_of(weight[0].numel(), seed)
    limit = min(out_channels, weight[0].numel())
    if form == "spatial":
        limit = min(in_channels * kernel[0], out_channels * kernel[1])
    rank = max(1, round(share * limit))
    own = output_error(weight, approximated(form, weight, rank, moment), moment)
    plain = output_error(weight, approximated(form, weight, rank, None), moment)
    # The ridge of 1e-6 is all that the choice between the two may be off by, in units of the outputs' energy.
    assert own <= plain * (1 + 1e-6) + 1e-5


def test_the_channel_form_has_the_least_error_there_is():
    """Eckart and Young for W M^½: the tail of its squared singular values."""
    weight, rank = randn(8, 5, 3, 3, dtype=torch.float64), 3
    moment = moment_of(45)
    values, vectors = torch.linalg.eigh(moment)
    sigma = torch.linalg.svdvals(weight.flatten(1) @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T)
    least = float(sigma[rank:].square().sum() / sigma.square().sum())
    assert output_error(weight, approximated("channel", weight, rank, moment), moment) == pytest.approx(least, 1e-9)
    plain = output_error(weight, approximated("channel", weight, rank, None), moment)
    assert least < 0.8 * plain


@pytest.mark.parametrize("form", FORMS)
def test_white_inputs_give_the_plain_error(form):
    weight = randn(12, 8, 3, 3, dtype=torch.float64)
    white = torch.eye(72, dtype=torch.float64)
    own, plain = (approximated(form, weight, 4, moment) for moment in (white, None))
    lost = [float((weight - found).square().sum()) for found in (own, plain)]
    assert lost[0] <= lost[1] * (1 + 1e-5)
    if form != "tucker2":  # where the plain form is the best one there is
        torch.testing.assert_close(own, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_full_ranks_are_exact_and_dead_inputs_do_no_harm(form):
    weight = randn(6, 4, 3, 2, dtype=torch.float64)
    moment = moment_of(24)
    moment[:12], moment[:, :12] = 0, 0  # two of the four channels were never anything but 0
    full = 12 if form == "spatial" else 6
    found = approximated(form, weight, full, moment)
    assert output_error(weight, found, moment) <= 1e-10
    assert bool(found.isfinite().all())
    nothing = approximated(form, weight, 2, torch.zeros(24, 24, dtype=torch.float64))
    assert bool(nothing.isfinite().all())
    assert output_error(weight, nothing, torch.zeros(24, 24, dtype=torch.float64)) == 0.0


def test_the_error_is_that_of_outputs_on_samples():
    """tr(Δ M Δᵀ) over the samples' own moment is the mean squared difference of the outputs, exactly."""
    weight = randn(5, 3, 3, 3)
    samples = randn(400, 27, seed=3)
    moment = samples.T @ samples / len(samples)
    near = weight + 0.1 * randn(5, 3, 3, 3, seed=4)
    outputs, changed = (samples.double() @ w.double().flatten(1).T for w in (weight, near))
    wanted = float((outputs - changed).square().sum() / outputs.square().sum())
    # Float32 sums of 27 products, relative to an error of a hundredth: 27 · 6e-8 / 1e-2.
    assert output_error(weight, near, moment) == pytest.approx(wanted, rel=2e-4)


def test_layers_take_the_moment_and_keep_their_dtype():
    conv = torch.nn.Conv2d(6, 8, 3, padding=1).half()
    moment = moment_of(54).float()
    for layer in (
        FusedTucker2Conv.from_conv(conv, (3, 4), moment=moment),
        SVDConv.from_conv(conv, 4, moment=moment),
        SVDConv.from_conv(conv, 4, "spatial", moment=moment),
    ):
        assert all(p.dtype == torch.float16 for p in layer.parameters())
        assert output_error(conv.weight.float(), layer.to_dense().weight.float(), moment) < 0.5
    plain = SVDConv.from_conv(conv, 2, "decoupled")
    same = SVDConv.from_conv(conv, 2, "decoupled", moment=moment)
    assert torch.equal(plain.first, same.first)


@pytest.mark.parametrize("form", FORMS)
def test_a_moment_of_another_layer_is_refused(form):
    with pytest.raises(ValueError, match=r"^moment must be of shape \(36, 36\) = \(I·kh·kw, I·kh·kw\), got \(27, 27\)"):
        approximated(form, randn(4, 4, 3, 3), 2, torch.eye(27))
