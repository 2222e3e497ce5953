"""Attached to any optimizer: around each step, unscaled, not in a skipped one, on what the optimizer moves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import randn
from torch import nn
from torch.amp import GradScaler

from fastrank.methods import trp
from fastrank.nn import GatedTucker2Conv
from fastrank.regularize import Funnel, LowRankProjection, NuclearNorm, Regularizer

OPTIMIZERS = {
    "sgd": lambda p, **o: torch.optim.SGD(p, 0.1, momentum=0.9, **o),
    "adam": lambda p, **o: torch.optim.Adam(p, 0.01, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, 0.01, **o),
    "rmsprop": lambda p, **o: torch.optim.RMSprop(p, 0.01, **o),
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), GatedTucker2Conv(6, 8, 3, (5, 6)), nn.ReLU(), nn.Conv2d(8, 7, 3), nn.Flatten()
    return nn.Sequential(*layers).to(dtype)


def regularizers(model):
    """One of each kind: gradients of weights, a projection every second step, gates by either step."""
    return [
        *trp.regularizers(model, every=2, energy=0.7, nuclear=0.01),
        Funnel(model, 0.05),
        Funnel(model, 0.05, step="subgradient"),
    ]


def loss(model, step, count=4):
    x = randn(count, 3, 8, 8, seed=step, dtype=next(model.parameters()).dtype)
    return model(x).square().mean()


def by_hand(model, optimizer, steps, own=None):
    """The loop that `attach` stands for."""
    own = regularizers(model) if own is None else own
    for regularizer in own:
        regularizer.bind(optimizer)
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        for regularizer in own:
            regularizer.add_gradients()
        optimizer.step()
        for regularizer in own:
            regularizer.after_step()
    return own


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_around_every_step_until_removed(name):
    model, twin = network(), network()
    optimizer, other = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    attached = regularizers(model)
    handles = [regularizer.attach(optimizer) for regularizer in attached]
    for step in range(4):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    own = by_hand(twin, other, range(4))
    assert same(model, twin)
    assert attached[1].steps == own[1].steps == 4
    for handle in handles:
        handle.remove()
        handle.remove()
    by_hand(twin, other, [4], [])
    optimizer.zero_grad()
    loss(model, 4).backward()
    optimizer.step()
    assert same(model, twin)
    assert attached[1].steps == 4


def test_attaching_again_moves_it():
    model = network()
    first, second = (OPTIMIZERS["sgd"](model.parameters()) for _ in range(2))
    regularizer = LowRankProjection(model, every=1, energy=0.5)
    regularizer.attach(first)
    regularizer.attach(second)
    loss(model, 0).backward()
    first.step()
    assert regularizer.steps == 0
    second.step()
    assert regularizer.steps == 1


def test_gradient_accumulation_counts_steps_and_not_passes():
    model, twin = network(torch.float64), network(torch.float64)
    optimizer, other = (OPTIMIZERS["sgd"](m.parameters()) for m in (model, twin))
    attached = regularizers(model)
    for regularizer in attached:
        regularizer.attach(optimizer)
    for start in (0, 3):
        optimizer.zero_grad()
        for step in range(start, start + 3):
            (loss(model, step) / 3).backward()
        optimizer.step()
    own = regularizers(twin)
    for regularizer in own:
        regularizer.bind(other)
    for start in (0, 3):
        other.zero_grad()
        (sum(loss(twin, step) for step in range(start, start + 3)) / 3).backward()
        for regularizer in own:
            regularizer.add_gradients()
        other.step()
        for regularizer in own:
            regularizer.after_step()
    assert attached[1].steps == 2
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_gradient_scaler(name, fused, explicit):
    """A scale that is a power of two rounds nothing, so a scaled run equals the plain one bit for bit.

    Its third step meets an infinite gradient, is skipped and halves the scale.
    """
    model, twin = network(), network()
    optimizer, other = (OPTIMIZERS[name](m.parameters(), fused=fused) for m in (model, twin))
    attached = regularizers(model)
    for regularizer in attached:
        regularizer.attach(optimizer)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in (0, 1, None, 2, 3):
        optimizer.zero_grad()
        before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
        scaler.scale(loss(model, step or 0)).backward()
        if step is None:
            model[0].weight.grad[0] = math.inf
        if explicit:
            scaler.unscale_(optimizer)
        counted = attached[1].steps
        scaler.step(optimizer)
        scaler.update()
        assert attached[1].steps == counted + (step is not None)
        assert not hasattr(optimizer, "found_inf")
        if step is None:
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
            for index, own in optimizer.state_dict()["state"].items():
                assert all(torch.equal(state[index][key], value) for key, value in own.items())
    own = by_hand(twin, other, range(4))
    assert scaler.get_scale() == 2.0**9
    assert attached[1].steps == own[1].steps == 4
    assert same(model, twin)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_scale_that_the_user_gave_a_fused_optimizer_stays_his(name):
    model, twin = network(), network()
    optimizer, other = (OPTIMIZERS[name](m.parameters(), fused=True) for m in (model, twin))
    optimizer.grad_scale = torch.tensor(8.0)
    for regularizer in regularizers(model):
        regularizer.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        (8 * loss(model, step)).backward()
        optimizer.step()
    assert float(optimizer.grad_scale) == 8
    by_hand(twin, other, range(3))
    assert same(model, twin)


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_closure_is_evaluated_before_the_penalty_is_added(name, positional):
    model, twin = network(), network()
    optimizer, other = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    own = regularizers(twin)
    for regularizer in regularizers(model):
        regularizer.attach(optimizer)
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            found = loss(model, step)
            found.backward()
            return found

        returned = optimizer.step(closure) if positional else optimizer.step(closure=closure)
        assert torch.equal(returned, loss(twin, step))
        by_hand(twin, other, [step], own)
    assert same(model, twin)


def test_a_schedule_of_learning_rates_reaches_the_proximal_step():
    """The scheduler wraps ``step``; the gate moves by the rate of its own group at that moment."""
    layer = GatedTucker2Conv(2, 2, 1, (1, 1)).double()
    with torch.no_grad():
        layer.gate_in.fill_(1.0)
    others = [p for p in layer.parameters() if p is not layer.gate_in]
    optimizer = torch.optim.SGD([{"params": others}, {"params": [layer.gate_in], "lr": 0.5}], 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    Funnel(layer, 0.2, penalty="l1").attach(optimizer)
    for wanted in (0.9, 0.89, 0.889):
        optimizer.step()
        scheduler.step()
        assert layer.gate_in.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("wrapped", ["compiled", "layer compiled", "data parallel"])
def test_wrapped_models_share_their_parameters(wrapped):
    model, twin = network(), network()
    if wrapped == "compiled":
        outer = torch.compile(model, backend="eager")
    elif wrapped == "layer compiled":
        outer = model
        model[1] = torch.compile(model[1], backend="eager")
    else:
        outer = nn.DataParallel(model)
    optimizer, other = OPTIMIZERS["sgd"](outer.parameters()), OPTIMIZERS["sgd"](twin.parameters())
    for regularizer in regularizers(model if wrapped == "data parallel" else outer):
        regularizer.attach(optimizer)
    for step in range(2):
        optimizer.zero_grad()
        loss(outer, step).backward()
        optimizer.step()
    by_hand(twin, other, range(2))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model, twin = network(), network()
        outer = nn.parallel.DistributedDataParallel(model)
        optimizer, other = OPTIMIZERS["sgd"](outer.parameters()), OPTIMIZERS["sgd"](twin.parameters())
        for regularizer in regularizers(outer.module):
            regularizer.attach(optimizer)
        assert [len(r.governed()) for r in regularizers(outer)] == [len(r.governed()) for r in regularizers(twin)]
        for step in range(3):
            optimizer.zero_grad()
            loss(outer, step).backward()
            optimizer.step()
        by_hand(twin, other, range(3))
        assert same(model, twin)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda m: NuclearNorm(m, 1.0), "3"),
        (lambda m: LowRankProjection(m), "3"),
        (lambda m: Funnel(m), "1.gate_core"),
    ],
)
def test_a_parameter_that_the_optimizer_lacks_is_named_unless_it_is_frozen(make, name):
    model = network()
    regularizer = make(model)
    missing = model[3].weight if name == "3" else model[1].gate_core
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p is not missing])
    kind = type(regularizer).__name__
    message = rf"^optimizer must be one that holds .* {kind} governs, got SGD without that of '{name}'$"
    for meet in (regularizer.attach, regularizer.bind):
        with pytest.raises(ValueError, match=message):
            meet(optimizer)
    missing.requires_grad_(False)
    regularizer.attach(optimizer)
    before = missing.detach().clone()
    loss(model, 0).backward()
    optimizer.step()
    assert torch.equal(missing, before)
    assert missing.grad is None


def test_a_gate_thawed_behind_the_optimizers_back_is_named():
    model = network()
    model[1].gate_in.requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad])
    model[1].gate_in.requires_grad_(True)
    regularizer = Funnel(model)
    model[1].gate_in.requires_grad_(False)
    regularizer.attach(optimizer)
    model[1].gate_in.requires_grad_(True)
    loss(model, 0).backward()
    with pytest.raises(ValueError, match=r"got SGD without that of '1\.gate_in'"):
        optimizer.step()


def test_what_cannot_be_attached_is_refused():
    model = network()
    with pytest.raises(ValueError, match=r"^optimizer must be one that does not search along the loss, got LBFGS$"):
        NuclearNorm(model, 1.0).attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"^optimizer must be a torch.optim.Optimizer, got list$"):
        NuclearNorm(model, 1.0).attach(list(model.parameters()))
    with pytest.raises(RuntimeError, match="Funnel must meet its optimizer before a proximal step"):
        Funnel(model).after_step()


def test_a_regulariser_of_few_words_attaches():
    class Push(Regularizer):
        def __init__(self, parameter):
            self.parameter = parameter

        def add_gradients(self):
            self.parameter.grad += 1

        def value(self):
            return self.parameter.detach().sum()

    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], 0.5)
    handle = Push(parameter).attach(optimizer)
    parameter.grad = torch.zeros(2)
    optimizer.step()
    assert parameter.tolist() == [-0.5, -0.5]
    before, after = handle
    assert before.id in optimizer._optimizer_step_pre_hooks
    assert after.id in optimizer._optimizer_step_post_hooks


def test_a_loop_goes_on_where_it_stopped():
    """States of model, optimizer and regularisers are all that a loop of one's own has to keep."""
    whole, cut = network(), network()
    optimizer = OPTIMIZERS["adam"](whole.parameters())
    for regularizer in (own := regularizers(whole)):
        regularizer.attach(optimizer)
    kept = None
    for step in range(6):
        for regularizer in own:
            regularizer.start_epoch(step // 3)
        optimizer.zero_grad()
        loss(whole, step).backward()
        optimizer.step()
        if step == 2:
            kept = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), [r.state_dict() for r in own]))
    cut.load_state_dict(kept[0])
    second = OPTIMIZERS["adam"](cut.parameters())
    for regularizer, state in zip(restored := regularizers(cut), kept[2], strict=True):
        regularizer.load_state_dict(state)
        regularizer.attach(second)
    second.load_state_dict(kept[1])  # makes new groups, so learning rates must not be remembered from before
    for step in range(3, 6):
        for regularizer in restored:
            regularizer.start_epoch(1)
        second.zero_grad()
        loss(cut, step).backward()
        second.step()
    assert same(whole, cut)
