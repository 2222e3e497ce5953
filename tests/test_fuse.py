"""Fused networks: their proof, their manners, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fuse_blocks import LAYERS, Block, fused_of, row
from helpers import max_relative, randn
from torch import nn

import fastrank
from fastrank import convert
from fastrank import io as model_io
from fastrank.fuse import FusedModel, _prove, _rewrite, fuse_for_inference

ROOT = Path(__file__).resolve().parents[1]


def full(m, x):
    return m.relu(m.bn(m.conv(x)) + x)


def short(m, x):
    return m.relu(m.bn(m.conv(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_judged_by_its_own_rounding(dtype):
    model = Block(full).to(dtype)
    fused = fuse_for_inference(model, randn(2, 4, 9, 9, dtype=dtype))
    assert row(fused).folded == ("bn", "add", "relu")
    assert fused.conv.w_out.dtype == dtype


def test_a_fold_that_overflows_is_not_made():
    model = Block(short, LAYERS["tucker2"](bias=False)).half()
    with torch.no_grad():
        model.bn.weight.fill_(6e4)
        model.bn.running_var.fill_(1e-4)
        model.bn.running_mean.zero_()
        model.conv.w_in.mul_(1e-2)
    fused = fuse_for_inference(model, 1e-2 * randn(2, 4, 5, 5, dtype=torch.float16))
    assert row(fused).left == "bn: folded, the weights are not finite in torch.float16"


def test_compiles_in_one_graph_and_survives_a_copy():
    fused = fused_of(Block(full))
    x = randn(2, 4, 6, 6)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert max_relative(compiled(x), fused(x)) <= 1e-6
    twin = convert.copy_with(fused, {})
    assert isinstance(twin, FusedModel)
    assert twin.fusion_report == fused.fusion_report
    assert torch.equal(twin(x), fused(x))


def test_defaults_of_forward_and_inputs_in_a_tuple():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LAYERS["tucker2"]()

        def forward(self, x, y, mask=None, flag=True):
            out = self.conv(x) + y
            return {"out": F.relu(out) if mask is None and flag else out, "size": x.shape[0]}

    model, x, y = Two(), randn(2, 4, 5, 5), randn(2, 4, 5, 5, seed=1)
    fused = fuse_for_inference(model, (x, y))
    assert row(fused).folded == ("add", "relu")
    assert max_relative(fused(x, y)["out"], model(x, y)["out"]) <= 1e-5


def test_inputs_that_the_network_writes_into_are_copied():
    model = Block(lambda m, x: m.conv(m.relu(x)))
    x = randn(1, 4, 5, 5)
    fuse_for_inference(model, x)
    assert torch.equal(x, randn(1, 4, 5, 5))


def test_a_wrong_fold_is_found_and_named(monkeypatch):
    right = _rewrite.fold

    def wrong(layer, bn):
        right(layer, bn)
        layer.bias.data[0] += 1e-3
        return ""

    monkeypatch.setattr(_rewrite, "fold", wrong)
    model = Block(lambda m, x: m.relu(m.bn(m.conv(m.other(x)))))
    message = r"^model must be equal to its fused form on example_input to 1.5e-08, got a largest .* first at conv$"
    with pytest.raises(ValueError, match=message):
        fuse_for_inference(model, randn(1, 4, 5, 5))


def test_the_bound_of_the_own_dtype_is_checked_too(monkeypatch):
    """An error that float64 does not show: the fold rounded more coarsely than the dtype."""
    right = _rewrite.fold

    def coarse(layer, bn):
        reason = right(layer, bn)
        if layer.w_out.dtype == torch.float32:
            layer.w_out.data = layer.w_out.data.half().float()
        return reason

    monkeypatch.setattr(_rewrite, "fold", coarse)
    model, x = Block(short), randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match="^model must be equal to its fused form on example_input to .*first at conv"):
        fuse_for_inference(model, x)
    assert row(fuse_for_inference(model, x, tolerance=0.01)).folded == ("bn", "relu")
    with pytest.raises(ValueError, match=r"to 0\.0e\+00, got"):
        fuse_for_inference(model, x, tolerance=0)


def test_a_network_with_a_dtype_of_its_own_is_compared_in_it():
    model = Block(lambda m, x: m.relu(m.bn(m.conv(x.float()))))
    fused = fuse_for_inference(model, randn(2, 4, 5, 5))
    assert row(fused).folded == ("bn", "relu")
    with pytest.raises(ValueError, match=r"^model must be equal"):
        fuse_for_inference(model, randn(2, 4, 5, 5), tolerance=1e-12)


def test_networks_that_are_no_fixed_function_are_refused():
    noisy = Block(lambda m, x: m.conv(x) + torch.randn(x.shape))
    with pytest.raises(ValueError, match="^model must be equal .* first at randn"):
        fuse_for_inference(noisy, randn(2, 4, 5, 5))
    unlike = Block(lambda m, x: m.conv(x) if isinstance(x, torch.Tensor) else m.conv(x * 2))
    with pytest.raises(ValueError, match="already in the traced graph: its forward depends on values or chance"):
        fuse_for_inference(unlike, randn(2, 4, 5, 5))


def test_bad_arguments_are_refused():
    model, x = Block(short), randn(2, 4, 5, 5)
    hooked = Block(short)
    hooked.register_forward_hook(lambda module, args, out: None)
    branching = Block(lambda m, x: m.conv(x) if x.sum() > 0 else x)
    asserting = Block(lambda m, x: [m.conv(x)][int(isinstance(x, torch.fx.Proxy)) :][0])
    bad = {
        r"^model must be a torch.nn.Module, got function$": (lambda x: x, x),
        r"^example_input must be a tensor or a tuple of the model's inputs, got NoneType$": (model, None),
        r"^example_input must be a tensor or a tuple of the model's inputs, got list$": (model, [x]),
        r"^example_input must be on the device of the model, cpu, got meta$": (model, x.to("meta")),
        r"^model must be on a device that holds values, got .* meta device$": (
            model.__class__(model.body).to("meta"),
            x,
        ),
        r"^example_input must be an input that the model accepts, got shapes \[\(2, 3, 5, 5\)\]: x must": (
            model,
            x[:, :3],
        ),
        r"^example_input must be an input that the model accepts, got shapes \[\]: ": (model, ()),
        r"^example_input must be an input of which the model makes finite outputs": (model, x / 0),
        r"^model must be a network to trace, got Block: it carries hooks$": (hooked, x),
        r"^model must be traceable by torch.fx \(a part of it may be: .*\), got Block: symbolically": (branching, x),
        r"^model must be traceable by torch.fx .*, got Block: list index out of range$": (asserting, x),
    }
    for message, arguments in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            fuse_for_inference(*arguments)
    with pytest.raises(TypeError, match="^tolerance must be a number, got str$"):
        fuse_for_inference(model, x, tolerance="low")
    with pytest.raises(ValueError, match="^tolerance must be a finite number at least 0, got -1$"):
        fuse_for_inference(model, x, tolerance=-1)


def test_errors_tell_nan_and_shapes():
    one = torch.ones(2)
    assert _prove.errors([one], [one]) == [0.0]
    assert _prove.errors([one * torch.nan], [one]) == [torch.inf]
    assert _prove.errors([one[:1]], [one]) == [torch.inf]
    assert _prove.errors([1.5 * one], [one]) == [0.5]
    assert _prove.errors([one[:0]], [one[:0]]) == [0.0]


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential])
def test_a_fused_network_is_not_saved(wrap, tmp_path):
    model = wrap(fuse_for_inference(fastrank.models.build("lenet5_nrmf"), randn(1, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"^model must be as it was before fuse_for_inference \(save that .*\), got a"):
        model_io.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_page_runs(tmp_path):
    page = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    code = "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("conv1 ")
