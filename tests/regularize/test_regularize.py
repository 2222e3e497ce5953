"""What the rank regularisers add to gradients and do to weights: values, directions, cadence, resumption, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import EPS, randn
from torch import nn

from fastrank.decompose import unfold
from fastrank.decompose.unfold import fold_all, unfold_all
from fastrank.methods import nrmf, trp
from fastrank.regularize import GramTrace, LowRankProjection, NuclearNorm

MODES = ("mode3", "mode4", "channel", "spatial", "decoupled")


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, (3, 2)), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 7, 3, bias=False)
    ).to(dtype)


def kernels(model):
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}


def spectra(weight, matricization):
    """σ² of the matrices of a kernel, one row a matrix."""
    return torch.stack([torch.linalg.svdvals(matrix).square() for matrix in unfold_all(weight.detach(), matricization)])


def set_gradients(model):
    for n, p in enumerate(model.parameters()):
        p.grad = randn(*p.shape, seed=n, dtype=p.dtype)
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("modes", [("mode3", "mode4"), *[(mode,) for mode in MODES], MODES])
def test_nuclear_norm_is_the_derivative_of_its_value(modes):
    model = network()
    regularizer = NuclearNorm(model, 0.3, matricization=modes)
    nuclear = sum(
        torch.linalg.matrix_norm(matrix, "nuc")
        for w in kernels(model).values()
        for m in modes
        for matrix in unfold_all(w.detach(), m)
    )
    assert float(regularizer.value()) == pytest.approx(0.3 * float(nuclear), rel=1e-12)
    regularizer.add_gradients()
    for weight in kernels(model).values():
        direction = randn(*weight.shape, seed=5, dtype=torch.float64)
        slope = float((weight.grad * direction).sum())
        step, values = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step * direction)
                values.append(float(regularizer.value()))
                weight.sub_(sign * step * direction)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("modes", [("mode3", "mode4"), "decoupled"])
@pytest.mark.parametrize("energy", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nuclear_gradients_are_the_folded_products_of_leading_singular_vectors(dtype, energy, modes):
    model = network(dtype)
    before = dict(zip(model.parameters(), set_gradients(model), strict=True))
    NuclearNorm(model, 0.5, energy=energy, matricization=modes).add_gradients()
    for weight in kernels(model).values():
        wanted = before[weight].clone()
        for mode in (modes,) if isinstance(modes, str) else modes:
            products = []
            for matrix in unfold_all(weight.detach(), mode):
                u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
                share = s.square().cumsum(0) / s.square().sum()
                k = len(s) if energy is None else int((share < energy).sum()) + 1
                products.append(u[:, :k] @ vh[:k])
            wanted += 0.5 * fold_all(products, mode, tuple(weight.shape))
        torch.testing.assert_close(weight.grad, wanted, rtol=100 * EPS[dtype], atol=100 * EPS[dtype])
    others = [p for p in model.parameters() if all(p is not w for w in kernels(model).values())]
    assert others
    assert all(torch.equal(p.grad, before[p]) for p in others)


def test_gram_trace_is_weight_decay_as_published():
    model = network()
    weights = list(kernels(model).values())
    regularizer = nrmf.regularizer(model, 0.6, mode="gram")
    traces = sum(
        torch.trace(unfold(w.detach(), m) @ unfold(w.detach(), m).T) for w in weights for m in ("mode3", "mode4")
    )
    assert float(regularizer.value()) == pytest.approx(0.6 * float(traces) / (2 * len(weights)), rel=1e-6)
    assert float(regularizer.value()) == pytest.approx(
        0.6 * sum(float(w.detach().square().sum()) for w in weights) / len(weights), rel=1e-6
    )
    regularizer.add_gradients()
    for weight in weights:
        torch.testing.assert_close(weight.grad, 2 * 0.6 * weight.detach() / len(weights))


def test_the_nuclear_mode_of_nrmf_has_singular_values_in_place_of_traces():
    model = network()
    weights = [weight.detach() for weight in kernels(model).values()]
    wanted = sum(float(torch.linalg.matrix_norm(unfold(w, m), "nuc")) for w in weights for m in ("mode3", "mode4"))
    assert float(nrmf.regularizer(model, 0.6).value()) == pytest.approx(0.6 * wanted / (2 * len(weights)), rel=1e-12)


@pytest.mark.parametrize("make", [lambda m: NuclearNorm(m, 0.0), lambda m: GramTrace(m, 0.0)])
def test_weight_zero_touches_nothing(make):
    model = network()
    make(model).add_gradients()
    assert all(p.grad is None for p in model.parameters())
    before = set_gradients(model)
    make(model).add_gradients()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    assert float(make(model).value()) == 0


def test_frozen_pointwise_grouped_and_factored_layers_are_left_out():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3).requires_grad_(False)
    )
    assert list(NuclearNorm(model, 1.0).kernels) == ["0"]
    shared = nn.Conv2d(4, 4, 3)
    assert list(GramTrace(nn.Sequential(shared, shared), 1.0).kernels) == ["0"]


@pytest.mark.parametrize(
    "make", [lambda m: NuclearNorm(m, 1.0), lambda m: GramTrace(m, 1.0), lambda m: LowRankProjection(m, energy=0.5)]
)
def test_what_is_frozen_later_is_left_alone_from_then_on(make):
    model = network()
    regularizer = make(model)
    model[2].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    regularizer.add_gradients()
    if isinstance(regularizer, LowRankProjection):
        regularizer.project()
        assert list(regularizer.ranks) == ["4"]
    assert model[2].weight.grad is None
    assert torch.equal(model[2].weight, before["2.weight"])
    assert model[4].weight.grad is not None or not torch.equal(model[4].weight, before["4.weight"])


@pytest.mark.parametrize("every", [1, 3])
def test_projection_keeps_its_cadence_and_skips_what_the_scaler_skipped(every):
    model = network()
    regularizer = LowRankProjection(model, every=every, energy=0.5, keep_first=False)
    wanted, steps = [w.detach().clone() for w in kernels(model).values()], 0
    for stepped in (True, False, True, True, False, True, True, True):
        with torch.no_grad():
            for n, w in enumerate(kernels(model).values()):
                w.add_(0.01)
                wanted[n] = w.detach().clone()
        regularizer.after_step(stepped)
        steps += stepped
        due = stepped and steps % every == 0
        changed = [not torch.equal(w, before) for w, before in zip(kernels(model).values(), wanted, strict=True)]
        assert changed == [due] * 3
    assert regularizer.steps == 6


@pytest.mark.parametrize("matricization", ["channel", "spatial", "decoupled"])
def test_projection_truncates_in_place_to_the_energy_and_leaves_the_optimizer_alone(matricization):
    model = network()
    addresses = [w.data_ptr() for w in kernels(model).values()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    set_gradients(model)
    optimizer.step()
    momentum = [copy.deepcopy(optimizer.state[w]["momentum_buffer"]) for w in kernels(model).values()]
    before = {name: spectra(weight, matricization) for name, weight in kernels(model).items()}
    regularizer = LowRankProjection(model, energy=0.8, matricization=matricization)
    first = model[0].weight.detach().clone()
    regularizer.project()
    assert torch.equal(model[0].weight, first)
    assert list(regularizer.ranks) == ["2", "4"]
    for name, rank in regularizer.ranks.items():
        ranks = [int((squares.cumsum(0) < 0.8 * squares.sum()).sum()) + 1 for squares in before[name]]
        assert rank == max(ranks) < before[name].shape[1]
        after = spectra(kernels(model)[name], matricization)
        kept = torch.arange(after.shape[1]) < torch.tensor(ranks)[:, None]
        torch.testing.assert_close(after, torch.where(kept, before[name], 0.0))
    assert [w.data_ptr() for w in kernels(model).values()] == addresses
    assert all(
        torch.equal(optimizer.state[w]["momentum_buffer"], m)
        for w, m in zip(kernels(model).values(), momentum, strict=True)
    )
    regularizer.add_gradients()
    assert float(regularizer.value()) == 0


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
def test_trp_takes_each_of_its_schemes(scheme):
    penalty, projection = trp.regularizers(network(), scheme=scheme, every=5, energy=0.9, nuclear=3e-4)
    assert (penalty.matricization, penalty.energy, penalty.weight) == ((scheme,), 0.9, 3e-4)
    assert (projection.matricization, projection.energy, projection.every) == (scheme, 0.9, 5)
    (projection,) = trp.regularizers(network())
    assert (projection.matricization, projection.energy, projection.every) == ("channel", 0.98, 20)


@pytest.mark.parametrize(
    ("scheme", "ranks"),
    [("channel", {"2": 8, "4": 7}), ("spatial", {"2": 16, "4": 15}), ("decoupled", {"2": 6, "4": 5})],
)
def test_projection_at_energy_one_does_not_touch_a_bit(scheme, ranks):
    model = network(torch.float32)
    before = copy.deepcopy(model.state_dict())
    regularizer = LowRankProjection(model, every=1, energy=1.0, matricization=scheme)
    regularizer.after_step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert regularizer.ranks == ranks


def test_projection_counter_survives_a_resume():
    model = network()
    first = LowRankProjection(model, every=3, energy=0.5)
    first.after_step()
    first.after_step()
    second = LowRankProjection(copy.deepcopy(model), every=3, energy=0.5)
    second.load_state_dict(first.state_dict())
    second.after_step()
    assert (second.steps, set(second.ranks)) == (3, {"2", "4"})
    for wrong, error in (({}, TypeError), ({"steps": -1}, ValueError), ({"steps": 1.5}, TypeError)):
        with pytest.raises(error, match=r"^state\['steps'\] must be an int"):
            second.load_state_dict(wrong)
    assert GramTrace(model, 1.0).state_dict() == {}
    with pytest.raises(ValueError, match="state must be empty for GramTrace, got keys"):
        GramTrace(model, 1.0).load_state_dict({"steps": 1})


def test_autocast_around_a_regulariser_does_not_lower_its_precision():
    results = []
    for enabled in (False, True):
        model = network(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            NuclearNorm(model, 1.0).add_gradients()
            LowRankProjection(model, energy=0.7).project()
        results.append([t for w in kernels(model).values() for t in (w, w.grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "act",
    [
        lambda m: NuclearNorm(m, 1.0).add_gradients(),
        lambda m: NuclearNorm(m, 1.0).value(),
        lambda m: LowRankProjection(m, energy=0.5).project(),
    ],
)
def test_a_kernel_that_is_not_finite_is_named(act, value):
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"^the kernel of layer '2' must be finite, got 1 NaN or infinite values out of 288"
    ):
        act(model)
    assert all(torch.equal(v.isnan(), before[k].isnan()) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: NuclearNorm(m, -1.0), ValueError, r"weight must be a finite number at least 0, got -1"),
        (lambda m: NuclearNorm(m, math.nan), ValueError, r"weight must be a finite number at least 0, got nan"),
        (lambda m: NuclearNorm(m, "1"), TypeError, r"weight must be a number, got str"),
        (lambda m: NuclearNorm(m, 1.0, energy=0.0), ValueError, r"energy must be a finite number in \(0, 1\]"),
        (lambda m: NuclearNorm(m, 1.0, matricization="mode5"), ValueError, r"matricization must be one of .*mode3"),
        (lambda m: NuclearNorm(m, 1.0, matricization=()), ValueError, r"matricization must be at least one of"),
        (
            lambda m: NuclearNorm(nn.Linear(2, 2), 1.0),
            ValueError,
            r"model must be a model with a trainable convolution larger than 1×1, got Linear",
        ),
        (lambda m: NuclearNorm("resnet", 1.0), TypeError, r"model must be a torch.nn.Module, got str"),
        (lambda m: LowRankProjection(None), TypeError, r"model must be a torch.nn.Module, got NoneType"),
        (lambda m: GramTrace(m, math.inf), ValueError, r"weight must be a finite number"),
        (lambda m: LowRankProjection(m, every=0), ValueError, r"every must be an int at least 1, got 0"),
        (lambda m: LowRankProjection(m, every=2.0), TypeError, r"every must be an int, got float"),
        (lambda m: LowRankProjection(m, energy=2), ValueError, r"energy must be a finite number in \(0, 1\], got 2"),
        (
            lambda m: LowRankProjection(m, matricization="chanel"),
            ValueError,
            r"matricization must be one of .*did you mean 'channel'",
        ),
        (lambda m: nrmf.regularizer(m, mode="l2"), ValueError, r"mode must be one of \['nuclear', 'gram'\], got 'l2'"),
        (lambda m: nrmf.regularizer(m, -1), ValueError, r"alpha must be a finite number at least 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(network())
