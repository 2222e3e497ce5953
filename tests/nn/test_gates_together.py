"""`gates_together`: the same bits as layer by layer, factors that are never stale, and every way a model is called."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import randn
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastrank import ops
from fastrank.methods import funnel
from fastrank.nn import GatedConv2d, GatedCPConv, GatedSVDConv, GatedTucker2Conv, gates_together
from fastrank.train import TrainConfig, fit

X = randn(2, 3, 8, 8)


def network(dtype=torch.float32):
    """Three gated layers of 3, 2 and 3 factors."""
    torch.manual_seed(0)
    tucker2 = GatedTucker2Conv.from_conv(nn.Conv2d(3, 6, 3, padding=1))
    svd = GatedSVDConv.from_conv(nn.Conv2d(6, 6, 1))
    cp = GatedCPConv.from_conv(nn.Conv2d(6, 4, 3))
    return nn.Sequential(tucker2, nn.ReLU(), svd, nn.BatchNorm2d(6), cp).to(dtype)


class Deep(nn.Module):
    """A network whose later layers are checkpointed, or that fails before them."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.net, self.reentrant, self.error = network(), reentrant, None

    def forward(self, x):
        x = self.net[1](self.net[0](x))
        if self.error is not None:
            raise self.error
        tail = self.net[2:]
        return tail(x) if self.reentrant is None else checkpoint(tail, x, use_reentrant=self.reentrant)


def outcome(model, x=X, call=None):
    """Output and every gradient of one training step."""
    model.zero_grad()
    out = (model if call is None else call)(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def equal(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def idle(model):
    """Whether no layer holds on to factors."""
    return all(layer._ready is None for layer in model.modules() if isinstance(layer, GatedConv2d))


@pytest.fixture
def calls(monkeypatch):
    """How many factors each call of the operator computes."""
    seen, original = [], ops.gated_factors

    def counted(directions, gates):
        seen.append(len(directions))
        return original(directions, gates)

    monkeypatch.setattr(ops, "gated_factors", counted)
    return seen


def test_one_call_a_pass_and_the_same_bits(calls):
    model, twin = network(), network()
    want = outcome(model)
    assert calls == [3, 2, 3]
    calls.clear()
    handle = gates_together(twin)
    assert equal(outcome(twin), want)
    assert calls == [8]
    assert idle(twin)
    with torch.no_grad():
        assert torch.equal(twin.eval()(X), model.eval()(X))
    assert calls == [8, 8, 3, 2, 3]
    calls.clear()
    for _ in range(2):
        handle.remove()
        twin(X)
    assert calls == [3, 2, 3, 3, 2, 3]
    with gates_together(twin):
        twin(X)
    twin(X)
    assert calls[6:] == [8, 3, 2, 3]


def test_several_dtypes_take_a_call_each(calls):
    model = nn.ModuleList([network(), network(torch.float64)])

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = model

        def forward(self, x):
            return self.nets[0](x) + self.nets[1](x.double())

    both = Both()
    want = outcome(both)
    calls.clear()
    gates_together(both)
    assert equal(outcome(both), want)
    assert calls == [8, 8]


def test_training_uses_the_factors_of_now():
    """Also where parameters are replaced, changed in place, or changed between two passes without a step."""
    models = network(), network()
    gates_together(models[1])
    optimizers = [torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9) for model in models]
    for step in range(4):
        found = [outcome(model, randn(2, 3, 8, 8, seed=step)) for model in models]
        assert equal(*found)
        assert bool(found[0][0].isfinite().all())
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step()
            if step == 2:
                with torch.no_grad():
                    model[0].gate_in.data[0] = 3.0
                    model[2].first = nn.Parameter(2 * model[2].first.detach() + 1)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_a_layer_by_itself_computes_its_own(calls):
    model = network()
    gates_together(model)
    outcome(model)
    calls.clear()
    model[0](X)
    assert calls == [3]


@pytest.mark.parametrize("error", [KeyError("in the middle"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_pass_that_does_not_end_leaves_nothing_stale(error):
    """An interrupt runs no hooks: what is left behind is taken no more once a parameter has changed."""
    model, twin = Deep(), Deep()
    gates_together(model)
    model.error = error
    with pytest.raises(type(error)):
        model(X)
    model.error = None
    assert idle(model) == isinstance(error, Exception)
    copy.deepcopy(model)
    with torch.no_grad():
        for net in (model.net, twin.net):
            net[2].gate_first.mul_(2)
    x = randn(2, 6, 8, 8)
    assert torch.equal(model.net[2](x), twin.net[2](x))
    assert equal(outcome(model), outcome(twin))
    assert idle(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, twin = Deep(reentrant), Deep(reentrant)
    gates_together(twin)
    want = outcome(model)
    assert equal(outcome(twin), want)
    assert equal(want, outcome(Deep()))
    whole = network()
    gates_together(whole)
    again = outcome(whole, call=lambda x: checkpoint(whole, x, use_reentrant=False))
    assert equal(again, outcome(network()))
    assert idle(twin)
    assert idle(whole)


def test_gradients_within_a_pass_without():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            with torch.enable_grad():
                return self.net(x)

    model = Inner()
    gates_together(model)
    with torch.no_grad():
        out = model(X)
    out.square().sum().backward()
    assert equal([p.grad for p in model.parameters()], outcome(network())[1:])
    inferring = network().eval()
    gates_together(inferring)
    with torch.inference_mode():
        assert torch.equal(inferring(X), network().eval()(X))


def test_layers_that_a_pass_leaves_out_get_no_gradient():
    model = Deep()
    gates_together(model)
    model.net[0](X).sum().backward()
    skipping = nn.Sequential(model.net[0], model.net[1])
    skipping.rest = model.net[2]
    skipping.forward = lambda x: skipping[1](skipping[0](x))
    skipping.zero_grad()
    gates_together(skipping)
    skipping(X).sum().backward()
    assert skipping[0].gate_in.grad is not None
    assert all(p.grad is None for p in skipping.rest.parameters() if p is not skipping.rest.bias)


def test_shared_layers():
    def shared():
        layer = network()[2]
        return nn.Sequential(layer, nn.ReLU(), layer)

    model, x = shared(), randn(2, 6, 8, 8)
    gates_together(model)
    assert equal(outcome(model, x), outcome(shared(), x))


def test_copies_are_hooked_and_stand_alone(calls):
    model = network()
    handle = gates_together(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    handle.remove()
    with torch.no_grad():
        twin[0].gate_in.mul_(2)
    outcome(model)
    assert calls == [3, 2, 3]
    calls.clear()
    outcome(twin)
    outcome(loaded)
    assert calls == [8, 8]
    plain = network()
    with torch.no_grad():
        plain[0].gate_in.mul_(2)
    assert equal(outcome(twin), outcome(plain))


@pytest.mark.parametrize("reentrant", [None, False])
def test_compiles_to_one_graph(reentrant):
    model = Deep(reentrant)
    gates_together(model)
    torch.compiler.reset()
    alone, compiled = Deep(), torch.compile(model, fullgraph=True, backend="aot_eager")
    # Graphs hold operators, which sum the gradient of a bias apart: bits are those of another graph.
    want = outcome(alone, call=torch.compile(alone, fullgraph=True, backend="aot_eager"))
    for _ in range(2):
        assert equal(outcome(model, call=compiled), want)
        assert idle(model)
    assert equal(outcome(model), outcome(Deep())), "the model itself, by the same hooks"


def test_distributed_data_parallel():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        gates_together(model)
        assert equal(outcome(model, call=DistributedDataParallel(model)), outcome(network()))
        again = network()
        wrapped = DistributedDataParallel(again)
        gates_together(wrapped)
        assert equal(outcome(again, call=wrapped), outcome(network()))
    finally:
        distributed.destroy_process_group()


def test_pruned_and_folded_layers_leave_nothing_to_do():
    model = network().eval()
    gates_together(model)
    model[0], model[2], model[4] = model[0].fold(), model[2].pruned(0.0), model[4].to_dense()
    with torch.no_grad():
        torch.testing.assert_close(model(X), network().eval()(X))


def test_funnel_trains_with_it(calls):
    """`compress` hooks the network while it trains, takes the hooks off, and the result is that of plain layers."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 2))
    data = torch.utils.data.TensorDataset(randn(12, 3, 8, 8), torch.arange(12) % 2)
    config = TrainConfig(epochs=2, batch_size=4, lr=0.05)

    def close(network, penalties):
        fit(network, data, None, config, regularizers=penalties, progress=False)

    found = funnel.compress(dense, warm=None, close=close, form="svd")
    assert set(calls) == {2}
    assert not found._forward_pre_hooks
    assert not found._forward_hooks
    plain = funnel.factorize(dense, form="svd")
    close(plain, [funnel.regularizer(plain)])
    want = funnel.prune(plain, 0.02)
    for a, b in zip(found.state_dict().values(), want.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Conv2d(3, 4, 3), ValueError, "model must be a model with gated layers, got Conv2d"),
        ([network], TypeError, "model must be a torch.nn.Module, got list"),
    ],
)
def test_wrong_models_are_refused(model, error, message):
    with pytest.raises(error, match=f"^{message}"):
        gates_together(model)
