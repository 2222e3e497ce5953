"""ONNX files: ONNX Runtime gives what the model gives; what cannot be written is refused before anything is."""

from __future__ import annotations

import os
import sys

import onnx
import onnxruntime
import pytest
import torch
from export_cases import EveryForm, forms, small_lenet
from helpers import randn
from torch import nn

import fastrank
from fastrank import export
from fastrank.export import _onnx, _trace
from fastrank.nn import FusedCPConv
from fastrank.nn._conv import FactoredConv2d

TOLERANCE = 1e-4  # what the issue of this work asks for: far above rounding, far below any mistake


def outputs(path, *inputs):
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(value) for value in found]


def assert_same(path, model, x):
    """The file's outputs are those of the model in eval mode, relative to the largest."""
    with torch.no_grad():
        wanted = _trace.leaves_of(model.eval()(x))
    found = outputs(path, x)
    assert [value.shape for value in found] == [value.shape for value in wanted]
    for own, value in zip(found, wanted, strict=True):
        assert float((own - value).abs().max()) <= TOLERANCE * float(value.abs().max())


def test_onnx_gives_the_outputs_of_every_form(tmp_path, capfd):
    model, path = EveryForm(), tmp_path / "m.onnx"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export.onnx(model, path, randn(1, 4, 8, 7))
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for batch in (1, 2, 5):  # other images than those of the check, too
        assert_same(path, model, randn(batch, 4, 8, 7, seed=batch))
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert {node.domain for node in written.graph.node} == {""}  # operators of the standard alone
    assert [value.name for value in (*written.graph.input, *written.graph.output)] == ["input", "output_0", "output_1"]
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [entry.version for entry in written.opset_import] == [18]
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_onnx_of_a_network_fused_for_inference_and_the_newest_opset(tmp_path):
    model = small_lenet()
    fused = fastrank.fuse_for_inference(model, randn(2, 1, 8, 8))
    assert any(row.folded for row in fused.fusion_report)
    export.onnx(fused, tmp_path / "m.onnx", randn(3, 1, 8, 8), opset=23, dynamic_batch=False)
    assert_same(tmp_path / "m.onnx", model, randn(3, 1, 8, 8, seed=1))
    written = onnx.load(tmp_path / "m.onnx")
    assert [entry.version for entry in written.opset_import] == [23]
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert any(isinstance(module, FactoredConv2d) for module in fused.modules())  # as it was


@pytest.mark.parametrize("name", forms())
def test_lowered_layers_are_the_layers(name):
    layer = forms()[name].double()
    plain = export.lowered(layer)
    assert not any(isinstance(module, FactoredConv2d) for module in plain.modules())
    x = randn(2, 4, 6, 5, dtype=torch.float64)
    # Sums of under a hundred products of size one.
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(plain(x[0]), layer(x)[0], rtol=1e-12, atol=1e-13)
    if hasattr(layer, "activation"):
        residual = randn(2, 4, 6, 5, seed=1, dtype=torch.float64)
        torch.testing.assert_close(plain(x, residual), layer(x, residual), rtol=1e-12, atol=1e-13)


def refused(error, message, path, model=None, x=None, **options):
    with pytest.raises(error, match=message) as caught:
        export.onnx(FusedCPConv(4, 6, 3, 2) if model is None else model, path, randn(1, 4, 5, 5) if x is None else x,
                    **options)  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.fixture
def untraced(monkeypatch):
    """Fails where tracing, the long work, begins."""
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("work was begun"))


def test_onnx_refuses_bad_input_before_any_work(tmp_path, untraced, monkeypatch):
    path = tmp_path / "m.onnx"
    refused(ValueError, r"^opset must be an int between 18 and 23, got 17", path, opset=17)
    refused(ValueError, r"^opset must be an int between 18 and 23, got 24", path, opset=24)
    refused(ValueError, r"^path must end in .onnx, got .*m.pt$", tmp_path / "m.pt")
    refused(FileNotFoundError, r"^path must lie in an existing folder, got", tmp_path / "no" / "m.onnx")
    (tmp_path / "folder.onnx").mkdir()
    refused(IsADirectoryError, r"^path must be a file, got the folder", tmp_path / "folder.onnx")
    refused(TypeError, r"^model must be a torch.nn.Module, got int", path, model=3)
    refused(TypeError, r"^example_input must be a tensor or a tuple .*, got list", path, x=[randn(1, 4, 5, 5)])
    message = r"^example_input must be an input that the model accepts, got shapes \[\(1, 3, 5, 5\)\]: x must be"
    refused(ValueError, message, path, x=randn(1, 3, 5, 5))
    refused(ValueError, r"^example_input must be a batch of at least one image", path, x=randn(0, 4, 5, 5))
    refused(ValueError, r"^model must be on a device that holds values", path, model=nn.Conv2d(4, 4, 1, device="meta"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(PermissionError, r"^path must lie in a folder that may be written to", path)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_names_the_extra_that_is_missing(package, tmp_path, monkeypatch, untraced):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"^export.onnx needs {package}, which is absent: pip install 'fastrank\[onnx\]'"
    refused(ImportError, message, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_refuses_more_weights_than_one_file_holds(tmp_path, monkeypatch, untraced):
    monkeypatch.setattr(_onnx, "MAX_WEIGHTS", 100)
    refused(ValueError, r"^model must be of at most 100 bytes of weights for one ONNX file, got", tmp_path / "m.onnx")


def test_onnx_with_other_outputs_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def wrong(model):
        found = lowered(model)
        with torch.no_grad():
            next(found.parameters()).mul_(1.001)
        return found

    lowered = _trace.lowered
    monkeypatch.setattr(_trace, "lowered", wrong)
    refused(
        RuntimeError, r"^ONNX Runtime gives outputs that differ from the model's by \d.\de-0\d of the largest", path
    )
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_onnx_of_double_is_written_without_the_check(tmp_path):
    path, layer, x = tmp_path / "m.onnx", FusedCPConv(4, 6, 3, 2).double(), randn(1, 4, 5, 5, dtype=torch.float64)
    refused(ValueError, r"^check must be False for this network, got True, and ONNX Runtime cannot", path, layer, x)
    assert not list(tmp_path.iterdir())
    export.onnx(layer, path, x, check=False)
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
