"""The fast path of inference: the same results as the operator, never from factors that are no longer there."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from helpers import EPS, max_relative, randn
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from fastrank import _backends
from fastrank.nn import FusedCPConv, FusedTucker2Conv, _forms, _prepared

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]

KINDS = {"tucker2": FusedTucker2Conv, "cp": FusedCPConv}


@pytest.fixture(params=["sequence", "dense"])
def chosen(request, auto_takes):
    """What `auto` chooses."""
    auto_takes(request.param)
    return request.param


@pytest.fixture
def dense(auto_takes):
    auto_takes("dense")


def layer_of(kind="tucker2", dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1, **options}
    size = options.pop("kernel_size")
    ranks = 2 if size != 1 or kind != "cp" else 1
    return KINDS[kind](5, 6, size, ranks, dtype=dtype, **options).eval().requires_grad_(False)


def fast(layer, x, residual=None):
    """What the fast path gives; it must be the one that serves the call."""
    out = layer._prepared(layer, x, residual)
    assert out is not None
    return out


def served_by_the_operator(layer, x, residual=None):
    return layer._prepared(layer, x, residual) is None


def test_the_merged_kernel_is_rounded_once(dense):
    layer = layer_of(dtype=torch.bfloat16)
    fast(layer, randn(1, 5, 8, 8, dtype=torch.bfloat16))
    (((stage,),),) = layer._prepared._kept.stages.values()
    factors = [getattr(layer, name).double() for name in ("w_in", "core", "w_out")]
    exact = _forms.TUCKER2.merge(*factors)
    assert bool(((stage.weight.double() - exact).abs() <= 0.51 * EPS[torch.bfloat16] * exact.abs() + 1e-12).all())


def test_the_module_call_takes_the_fast_path_and_only_without_gradients(chosen, monkeypatch):
    layer = layer_of().requires_grad_(True)
    x = randn(2, 5, 8, 8)
    wanted = layer(x)
    assert wanted.requires_grad
    assert layer._prepared._kept is None
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            first = layer(x.clone())  # in inference mode one that keeps no count of writes
            monkeypatch.setattr(layer, "_operate", None)
            second = layer(x)
        monkeypatch.undo()
        assert max_relative(first, wanted) <= 1e-5
        assert torch.equal(first, second)
        assert not second.requires_grad
        assert second.grad_fn is None


def test_what_needs_a_gradient_goes_to_the_operator_and_drops_what_was_kept(chosen):
    layer, x = layer_of(), randn(2, 5, 8, 8)
    fast(layer, x)
    assert served_by_the_operator(layer, x.clone().requires_grad_())
    assert layer._prepared._kept is None
    fast(layer, x)
    assert served_by_the_operator(layer, x, randn(2, 6, 8, 8).requires_grad_())
    layer.bias.requires_grad_()
    assert served_by_the_operator(layer, x)
    with torch.no_grad():
        fast(layer, x)


def optimiser_step(layer):
    layer.requires_grad_(True)
    optimiser = torch.optim.SGD(layer.parameters(), 0.5)
    layer(randn(2, 5, 8, 8, seed=4)).square().sum().backward()
    optimiser.step()
    layer.requires_grad_(False)


def reuse_freed_storage(layer):
    """New values where the old ones lay, if the allocator were let."""
    value = layer.core.data * 3
    layer.core.data = torch.empty(0)
    layer.core.data = value.clone()


def swap(layer):
    torch.utils.swap_tensors(layer.core, nn.Parameter(layer.core.detach() * 2, requires_grad=False))


def quiet(change):
    """`change` with nothing recorded, as people write it."""

    def run(layer):
        with torch.no_grad():
            change(layer)

    return run


CHANGES = {
    "optimiser step": optimiser_step,
    "in place": quiet(lambda layer: layer.w_in.mul_(2)),
    "of a view": quiet(lambda layer: layer.core[0].zero_()),
    "of the alias": lambda layer: layer.w_out.detach().add_(1),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "assigned state": lambda layer: layer.load_state_dict(
        {k: v + 1 for k, v in layer.state_dict().items()}, assign=True
    ),
    "data": lambda layer: setattr(layer.core, "data", layer.core.data + 1),
    "data, transposed": lambda layer: setattr(layer.core, "data", layer.core.data.mT),
    "data, freed": reuse_freed_storage,
    "parameter": lambda layer: setattr(layer, "w_out", nn.Parameter(layer.w_out.detach() + 1, requires_grad=False)),
    "bias in place": quiet(lambda layer: layer.bias.add_(1)),
    "bias data": lambda layer: setattr(layer.bias, "data", layer.bias.data + 1),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "swapped": swap,
    "reset": lambda layer: layer.reset_parameters(),
    "train, through data": lambda layer: (layer.core.data.mul_(2), layer.train(), layer.eval()),
    "geometry": lambda layer: (setattr(layer, "padding", (2, 2)), setattr(layer, "dilation", (2, 2))),
    "padding mode": lambda layer: setattr(layer, "padding_mode", "circular"),
    "activation": lambda layer: setattr(layer, "activation", "relu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_layer_is_seen(chosen, change):
    layer, x = layer_of(), randn(2, 5, 8, 8)
    before = fast(layer, x).clone()
    CHANGES[change](layer)
    wanted = layer._operate(x, None).detach()
    assert max_relative(fast(layer, x), wanted) <= 1e-5
    assert wanted.shape != before.shape or max_relative(before, wanted) > 1e-3


def test_inference_of_a_layer_that_moved(chosen):
    layer, x = layer_of(), randn(2, 5, 8, 8)
    fast(layer, x)
    layer.double()
    assert layer._prepared._kept is None
    assert max_relative(fast(layer, x.double()), layer._operate(x.double(), None)) <= 1e-13
    with pytest.raises(TypeError, match=r"^w_in must be of the dtype of x"):
        layer(x)
    with pytest.raises(ValueError, match=r"^w_in must be on the device of x"):
        layer(x.double().to("meta"))


def test_copies_and_files_hold_nothing_of_it(dense):
    layer, x = layer_of(), randn(2, 5, 8, 8)
    wanted = fast(layer, x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert twin._prepared is not layer._prepared
        assert twin._prepared._kept is None
        assert torch.equal(fast(twin, x), wanted)
    assert layer._prepared._kept is not None
    assert set(layer.state_dict()) == {"w_in", "core", "w_out", "bias"}
    assert len(list(layer.buffers())) == 0


def test_memory_is_kept_only_where_it_is_needed_and_goes_with_the_layer(chosen):
    layer = layer_of()
    for x in (randn(2, 5, 8, 8), randn(1, 5, 6, 6), randn(5, 6, 6)):
        fast(layer, x)
    kept = layer._prepared._kept
    assert [backend for backend, *_ in kept.stages] == [chosen]
    own = {getattr(layer, name).data_ptr() for name in ("w_in", "core", "w_out")}
    ((branch,),) = kept.stages.values()
    weights = [stage.weight for stage in branch]
    assert ({weight.data_ptr() for weight in weights} == own) == (chosen == "sequence")
    watched = [weakref.ref(weight) for weight in weights]
    del weights, branch, kept
    layer.eval()
    assert [ref() for ref in watched] == [None] * len(watched)
    fast(layer, randn(2, 5, 8, 8))
    gc.collect()
    gc.disable()
    try:
        watched = [weakref.ref(layer), weakref.ref(layer._prepared._kept.aliases[0])]
        del layer
        assert [ref() for ref in watched] == [None, None]
    finally:
        gc.enable()


def test_shapes_are_not_kept_without_end(chosen, monkeypatch):
    monkeypatch.setattr(_prepared, "MAX_PLANS", 3)
    layer = layer_of()
    for size in range(4, 12):
        x = randn(1, 5, size, 4)
        assert max_relative(fast(layer, x), layer._operate(x, None)) <= 1e-5
        assert len(layer._prepared._kept.plans) <= 3


def test_the_number_of_threads_is_part_of_a_choice(auto_takes):
    asked = []
    auto_takes(lambda facts: asked.append(facts.threads) or "sequence")
    layer, x, before = layer_of(), randn(1, 5, 6, 6), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            fast(layer, x)
    finally:
        torch.set_num_threads(before)
    assert [threads for threads in asked if threads] == asked
    assert set(asked) == {1, 2}


def test_the_work_it_asks_about(auto_takes):
    asked = []
    auto_takes(lambda facts: asked.append(facts) or "sequence")
    layer = layer_of(stride=2, padding_mode="reflect")
    fast(layer, randn(2, 5, 8, 7).contiguous(memory_format=torch.channels_last))
    (facts,) = [facts for facts in asked if facts.work.call == "inference"]
    assert facts.op == "tucker2_conv2d"
    assert facts.work == _backends.ConvWork(2, 5, 6, (10, 9), (3, 3), (2, 2), (2, 2), (0, 0), (1, 1), True, "inference")


def test_a_kernel_that_is_chosen_runs_as_the_operator(auto_takes):
    auto_takes("reference")
    layer, x = layer_of(), randn(2, 5, 8, 8)
    assert served_by_the_operator(layer, x)
    assert served_by_the_operator(layer, x)
    assert layer._prepared._kept.stages == {}


def test_a_backend_by_name_goes_to_the_operator():
    layer = layer_of(backend="dense")
    assert served_by_the_operator(layer, randn(2, 5, 8, 8))


def test_empty_batches_go_to_the_operator(chosen):
    layer = layer_of()
    assert served_by_the_operator(layer, randn(0, 5, 8, 8))
    assert layer(randn(0, 5, 8, 8)).shape == (0, 6, 8, 8)


def test_transformations_of_torch_see_the_operator(chosen):
    layer, x = layer_of(), randn(2, 5, 8, 8)
    wanted = fast(layer, x)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * sum(stage.macs for stage in layer.conv_stages((8, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert served_by_the_operator(layer, x)
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x).graph
    assert any("fastrank.tucker2_conv2d" in str(node.target) for node in graph.nodes)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert "tucker2_conv2d" in str(traced.inlined_graph)

    class Marked(torch.Tensor):
        pass

    assert served_by_the_operator(layer, x.as_subclass(Marked))
    called = torch.func.functional_call(layer, {"core": layer.core * 2}, (x,))
    assert max_relative(called, wanted) > 1e-3

    def seen(image):
        assert served_by_the_operator(layer, image)
        return image

    torch.func.vmap(seen)(x)


def test_parameters_that_are_computed_or_not_counted_go_to_the_operator(chosen):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    x = randn(2, 5, 8, 8)
    doubled = layer_of()
    parametrize.register_parametrization(doubled, "core", Double())
    assert served_by_the_operator(doubled, x)
    pruned = layer_of()
    prune.l1_unstructured(pruned, "core", 0.5)
    with torch.no_grad():
        pruned(x)
        assert served_by_the_operator(pruned, x)
    with torch.inference_mode():
        uncounted = layer_of()
        assert served_by_the_operator(uncounted, x)


def test_a_residual_that_does_not_fit_is_refused_by_the_operators_sentence(chosen):
    layer, x = layer_of(), randn(2, 5, 8, 8)
    fast(layer, x, randn(2, 6, 8, 8))
    with pytest.raises(ValueError, match=r"^residual must be of shape"):
        layer(x, randn(2, 6, 8, 7))
    with pytest.raises(TypeError, match=r"^residual must be of the dtype of x"):
        layer(x, randn(2, 6, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^x must be of shape"):
        layer(randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"^x must be at least as large as the dilated kernel"):
        layer_of(padding=0)(randn(2, 5, 2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_is_one_graph_of_the_operator(chosen, kind, monkeypatch):
    layer = layer_of(kind)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        wanted = [layer(randn(n, 5, size, 8)) for n, size in ((2, 8), (3, 9))]
        monkeypatch.setattr(_prepared.Prepared, "__call__", None)
        found = [compiled(randn(n, 5, size, 8)) for n, size in ((2, 8), (3, 9))]
    for a, b in zip(found, wanted, strict=True):
        assert max_relative(a, b) <= 1e-5


def test_a_layer_on_meta_gives_shapes_every_time():
    layer = layer_of().to("meta")
    for _ in range(2):
        assert layer(torch.empty(2, 5, 9, 8, device="meta")).shape == (2, 6, 9, 8)


@pytest.mark.parametrize("change", [{"activation": "relu"}, {"backend": "reference"}, {"padding": (0, 0)}])
def test_what_is_set_anew_counts_from_the_next_call(dense, change):
    layer, x = layer_of(), randn(2, 5, 9, 8)
    with torch.inference_mode():
        for _ in range(2):
            before = layer(x)
        for name, value in change.items():
            setattr(layer, name, value)
        assert max_relative(layer(x), layer._operate(x, None)) <= 1e-6
        assert change == {"backend": "reference"} or not torch.equal(layer(x), before)
