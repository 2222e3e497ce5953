"""What is folded, in every way it may be written, and what must stay."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from fuse_blocks import LAYERS, Block, fused_of, norm, row
from helpers import randn
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastrank.fuse import FusedLayer, fuse_for_inference
from fastrank.fuse._rewrite import Rewriter
from fastrank.fuse._trace import prepared, traced
from fastrank.nn import GatedTucker2Conv


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_batch_norm_is_folded_into_every_layer(kind, affine, bias):
    conv = LAYERS[kind](bias=bias)
    fused = fused_of(Block(lambda m, x: m.bn(m.conv(x)).mul(2), conv, norm(affine=affine)))
    assert fused.fusion_report == [
        FusedLayer("conv", type(conv).__name__, ("bn",), ""),
        FusedLayer("other", "FusedTucker2Conv", (), "it is never called"),
    ]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert fused.conv.bias is not None


def written_into(m, x):
    y = m.bn(m.conv(x))
    y += x
    return F.relu(y)


WAYS = {
    "module": (lambda m, x: m.relu(m.bn(m.conv(x))), ("bn", "relu")),
    "no norm": (lambda m, x: m.relu(m.conv(x)), ("relu",)),
    "F.relu": (lambda m, x: F.relu(m.bn(m.conv(x))), ("bn", "relu")),
    "F.relu in place": (lambda m, x: F.relu(m.bn(m.conv(x)), True), ("bn", "relu")),
    "torch.relu": (lambda m, x: torch.relu(m.conv(x)), ("relu",)),
    "method": (lambda m, x: m.bn(m.conv(x)).relu(), ("bn", "relu")),
    "method in place": (lambda m, x: m.bn(m.conv(x)).relu_(), ("bn", "relu_")),
    "F.silu": (lambda m, x: F.silu(m.bn(m.conv(x)), inplace=True), ("bn", "silu")),
    "dropout between": (lambda m, x: m.relu(m.drop(m.bn(m.drop(m.conv(x))))), ("bn", "relu")),
    "add, relu": (lambda m, x: m.relu(m.bn(m.conv(x)) + x), ("bn", "add", "relu")),
    "add on the left": (lambda m, x: F.relu(x + m.bn(m.conv(x))), ("bn", "add", "relu")),
    "+=": (written_into, ("bn", "add", "relu")),
    "torch.add": (lambda m, x: torch.add(m.conv(x), x, alpha=1).relu(), ("add", "relu")),
    "x.add": (lambda m, x: m.conv(x).add(x), ("add",)),
    "x.add_": (lambda m, x: F.silu(m.conv(x).add_(x)), ("add_", "silu")),
    "residual later": (lambda m, x: F.relu(m.conv(x) + m.bn(x)), ("add", "relu")),
    "relu, then add": (lambda m, x: F.relu(m.conv(x)) + x, ("relu",)),
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [*(("tucker2", way) for way in WAYS), ("cp", "module"), ("cp", "add, relu"), ("cp", "residual later")],
)
def test_every_way_to_write_it_becomes_the_layers_epilogue(way, kind):
    body, folded = WAYS[way]
    fused = fused_of(Block(body, LAYERS[kind]()))
    assert (row(fused).folded, row(fused).left) == (folded, "")
    names = {getattr(node.target, "__name__", node.target) for node in fused.graph.nodes}
    assert not names & {*folded, "drop"} - ({"bn"} if way == "residual later" else set())
    activation = {"silu": "silu", "add": "none"}.get(folded[-1], "relu")
    assert fused.conv.activation == activation


def read_twice(m, x):
    y = m.conv(x)
    return m.bn(y) + y.exp()


def hooked_between(m, x):
    y = m.conv(x)
    return y + m.relu(x)


def written_unseen(m, x):
    y = m.conv(x)
    y.relu_()
    return y


def normed_twice(m, x):
    y = m.bn(m.conv(x))
    return m.relu(y) + y.exp()


def shared(m, x):
    return m.bn(m.conv(m.relu(m.conv(x))))


def changed_input(m, x):
    y = m.conv(x)
    z = x.mul(1)
    x.mul_(-2)
    return y + z + x


def changed_residual(m, x):
    z = x.exp()
    y = m.conv(x)
    z.mul_(-2)
    return y + z


def into_the_other(m, x):
    z = x.exp()
    z.add_(m.conv(x))
    return z


def read_weight(m, x):
    return m.bn(m.conv(x)) + m.conv.w_out.sum()


def opaque_part(m, x):
    return m.bn(m.conv(x)) + F.conv2d(x, m.conv.w_in[:1, :, None, None])


LEFT = {
    "read twice": (read_twice, (), "its output is read 2 times"),
    "written where no reader sees": (written_unseen, (), "its output is read 2 times"),
    "norm read twice": (normed_twice, ("bn",), "its output is read 2 times"),
    "called twice": (shared, (), "it is called 2 times"),
    "added to itself": (lambda m, x: operator.add(*[m.conv(x)] * 2), (), ""),
    "input changed between": (changed_input, (), "add: what stands between may write into its input"),
    "residual changed between": (changed_residual, (), "add: what stands between may write into its input"),
    "written into the other": (into_the_other, (), "add_: it writes into the other addend"),
    "weight read elsewhere": (read_weight, (), "its parameters are read by something else too"),
    "weight read by a function": (opaque_part, (), "its parameters are read by something else too"),
    "broadcast over the batch": (lambda m, x: m.conv(x) + m.scale, (), "add: the addends may differ in shape or dtype"),
    "broadcast over the map": (
        lambda m, x: m.conv(x) + x.mean((2, 3), keepdim=True),
        (),
        "add: the addends may differ in shape or dtype",
    ),
    "a number": (lambda m, x: m.conv(x) + 1.5, (), ""),
    "a multiple": (lambda m, x: torch.add(m.conv(x), x, alpha=2), (), ""),
    "another activation": (lambda m, x: F.leaky_relu(m.bn(m.conv(x))), ("bn",), ""),
    "second norm": (lambda m, x: m.bn(F.relu(m.bn(m.conv(x)))), ("bn", "relu"), ""),
    "norm ahead": (lambda m, x: m.conv(m.relu(m.bn(x))), (), ""),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_still_needed_stays(case):
    body, folded, left = LEFT[case]
    found = row(fused_of(Block(body)))
    assert (found.folded, found.left) == (folded, left)


@pytest.mark.parametrize("swapped", [False, True])
def test_operator_iadd_counts_as_an_addition_into_its_first(swapped):
    """torch.fx traces `y += x` as operator.add today; a graph may hold operator.iadd all the same."""
    graph, whole = traced(prepared(Block(lambda m, x: m.conv(x) + x.exp())), (randn(1, 4, 5, 5),))
    for node in graph.graph.nodes:
        node.meta["kinds"] = {}
        if node.target is operator.add:
            node.target = operator.iadd
            node.args = node.args[::-1] if swapped else node.args
    found = Rewriter(graph, whole).run()[0]
    assert found.folded == (() if swapped else ("iadd",))
    assert found.left == ("iadd: it writes into the other addend" if swapped else "")


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 5, 5)])
def test_equal_shapes_by_accident_are_no_residual(shape):
    """On a 1×1 map and a batch of 1 everything has one shape."""
    body = LEFT["broadcast over the map"][0]
    fused = fused_of(Block(body), shape)
    x = randn(2, 4, 7, 6)
    assert row(fused).folded == ()
    assert fused(x).shape == (2, 4, 7, 6)


def test_two_convolutions_that_are_added_take_each_other_once():
    fused = fused_of(Block(lambda m, x: m.relu(m.bn(m.conv(x)) + m.other(x))))
    assert [(r.layer, r.folded) for r in fused.fusion_report] == [("conv", ("bn", "add", "relu")), ("other", ())]
    assert [str(n.target) for n in fused.graph.nodes if n.op == "call_module"] == ["other", "conv"]


def test_norms_that_are_no_constant_map_stay_with_the_reason():
    class Frozen(nn.BatchNorm2d):
        pass

    class Always(Block):
        def train(self, mode=True):
            super().train(mode)
            self.bn.train(True)
            return self

    reasons = {
        "it has no running statistics": Block(WAYS["module"][0], bn=norm(track_running_stats=False)),
        "it is of the class Frozen": Block(WAYS["module"][0], bn=Frozen(4)),
    }
    for reason, model in reasons.items():
        assert row(fuse_for_inference(model, randn(2, 4, 5, 5))) == FusedLayer(
            "conv", "FusedTucker2Conv", (), f"bn: {reason}"
        )
    fused = fuse_for_inference(Always(WAYS["module"][0]), randn(2, 4, 5, 5))
    assert row(fused).left == "bn: it stays in training mode"


def test_what_carries_hooks_or_parametrizations_is_left_alone():
    hooked, masked, reparametrized, replaced, container = (Block(WAYS["module"][0]) for _ in range(5))
    hooked.bn.register_forward_hook(lambda module, args, out: out * 3)
    masked.conv = prune.l1_unstructured(LAYERS["dense"](), "weight", 0.5)
    reparametrized.conv = parametrizations.orthogonal(LAYERS["dense"]())
    replaced.conv.forward = lambda x: x * 2
    container.conv = nn.Sequential(LAYERS["tucker2"](), norm(), nn.ReLU())
    container.conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    wanted = {
        hooked: ("conv", "bn: it carries hooks"),
        masked: ("conv", "it carries hooks"),
        reparametrized: ("conv", "it is parametrized"),
        replaced: ("conv", "its forward is replaced by another function"),
        container: ("conv.0", "inside a Sequential: it carries hooks"),
    }
    for model, (name, left) in wanted.items():
        found = row(fused_of(model), name)
        assert (found.folded, found.left) == ((), left)


def test_nothing_moves_past_what_may_write():
    model = Block(hooked_between)
    model.relu = nn.ReLU()
    assert row(fused_of(model)).folded == ("add",)
    model.relu.register_forward_pre_hook(lambda module, args: args[0].neg_().shape and None)
    assert row(fused_of(model)) == FusedLayer(
        "conv", "FusedTucker2Conv", (), "add: what stands between may write into its input"
    )


def test_modules_that_cannot_be_traced_stay_whole():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LAYERS["tucker2"]()

        def forward(self, x):
            return self.conv(x) if x.shape[-1] > 3 else x

    model = Block(lambda m, x: m.relu(m.bn(m.conv(m.drop(x)))))
    model.drop = Branching()
    fused = fused_of(model)
    assert row(fused).folded == ("bn", "relu")
    inside = row(fused, "drop.conv")
    assert inside.left.startswith("inside a Branching: torch.fx cannot trace it: symbolically traced variables")
    assert torch.equal(fused(randn(1, 4, 3, 3)), fuse_for_inference(model, randn(1, 4, 3, 3))(randn(1, 4, 3, 3)))


def test_gated_layers_and_layers_with_an_epilogue_are_left():
    gated = Block(WAYS["module"][0], GatedTucker2Conv(4, 4, 3, (2, 2), padding=1))
    assert row(fused_of(gated)).left == "nothing can be folded into a GatedTucker2Conv"
    fused = fused_of(Block(WAYS["add, relu"][0]))
    again = fuse_for_inference(fused, randn(1, 4, 5, 5))
    assert row(again) == FusedLayer("conv", "FusedTucker2Conv", (), "it has an epilogue already")
    x = randn(2, 4, 6, 6)
    assert torch.equal(again(x), fused(x))


def test_tied_weights_are_untied_not_changed():
    model = Block(lambda m, x: m.bn(m.conv(x)).exp() + m.other(x))
    model.other.w_out = model.conv.w_out
    fused = fused_of(model)
    assert torch.equal(fused.other.w_out, model.conv.w_out)
    assert not torch.equal(fused.conv.w_out, model.conv.w_out)
