"""Programs of torch.export and packages of AOTInductor: they run where fastrank is not, and give the same outputs."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from export_cases import EveryForm, small_lenet
from helpers import randn
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import fastrank
from fastrank import export
from fastrank.export import _trace
from fastrank.nn import FusedCPConv, FusedTucker2Conv

TOLERANCE = 1e-4

STRANGER = """
import sys, torch
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "fastrank":
            raise ImportError("no fastrank here")
sys.meta_path.insert(0, Blocker())
kind, path, batches, found = sys.argv[1:]
run = torch.export.load(path).module() if kind == "pt2" else torch._inductor.aoti_load_package(path)
torch.save([run(x) for x in torch.load(batches)], found)
assert "fastrank" not in sys.modules
"""


def elsewhere(kind, path, inputs, folder):
    """What the file gives in a process that cannot import fastrank."""
    torch.save(inputs, folder / "inputs")
    command = [sys.executable, "-c", STRANGER, kind, path, folder / "inputs", folder / "outputs"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "outputs")


def assert_same(found, model, inputs):
    model.eval()
    for own, x in zip(found, inputs, strict=True):
        with torch.no_grad():
            wanted = _trace.leaves_of(model(x))
        for value, true in zip(_trace.leaves_of(own), wanted, strict=True):
            assert value.shape == true.shape
            assert not value.requires_grad
            assert float((value - true).abs().max()) <= TOLERANCE * float(true.abs().max())


def test_export_program_runs_without_fastrank(tmp_path, capfd):
    model, path = EveryForm(), tmp_path / "m.pt2"
    export.program(model, path, randn(1, 4, 8, 7))
    assert capfd.readouterr() == ("", "")
    inputs = [randn(batch, 4, 8, 7, seed=batch) for batch in (1, 2, 5)]
    assert_same(elsewhere("pt2", path, inputs, tmp_path), model, inputs)
    called = [node.target for node in torch.export.load(path).graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in called if hasattr(target, "namespace")} == {"aten"}


def test_export_program_of_a_network_fused_for_inference_with_a_fixed_batch(tmp_path):
    model, path = small_lenet(), tmp_path / "m.pt2"
    fused = fastrank.fuse_for_inference(model, randn(2, 1, 8, 8))
    export.program(fused, path, randn(3, 1, 8, 8), dynamic_batch=False)
    run = torch.export.load(path).module()
    assert_same([run(randn(3, 1, 8, 8, seed=1))], model, [randn(3, 1, 8, 8, seed=1)])
    with pytest.raises(AssertionError, match="Guard failed"):
        run(randn(2, 1, 8, 8))


class Two(nn.Module):
    """Two inputs, of which the second has no batch."""

    def __init__(self):
        super().__init__()
        self.conv = FusedTucker2Conv(3, 4, 3, 2, padding=1)

    def forward(self, x, scale):
        return self.conv(x) * scale


def test_export_program_of_several_inputs(tmp_path):
    model = Two()
    export.program(model, tmp_path / "m.pt2", (randn(2, 3, 6, 6), randn(1)))
    run, x, scale = torch.export.load(tmp_path / "m.pt2").module(), randn(5, 3, 6, 6), randn(1, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(run(x, scale), model(x, scale), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow  # half a minute of C++ compiler
def test_export_package_runs_without_fastrank(tmp_path, capfd):
    model, path = FusedTucker2Conv(3, 4, 3, (2, 3), padding=1, activation="relu"), tmp_path / "m.pt2"
    export.package(model, path, randn(2, 3, 6, 6))
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    inputs = [randn(batch, 3, 6, 6, seed=batch) for batch in (1, 2, 5)]
    assert_same(elsewhere("aoti", path, inputs, tmp_path), model, inputs)


def test_export_package_without_a_compiler_is_one_sentence(tmp_path):
    message = r"^export.package needs a C\+\+ compiler, got none: install g\+\+"
    nothing = torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",))
    with nothing, pytest.raises(RuntimeError, match=message):
        export.package(FusedCPConv(4, 6, 3, 2), tmp_path / "m.pt2", randn(1, 4, 5, 5))
    assert not list(tmp_path.iterdir())


class Reads(nn.Module):
    """A network whose way depends on the values."""

    def forward(self, x):
        return x + 1 if float(x.sum()) > 0 else x


class Answers(nn.Module):
    """A network whose output is no tensor."""

    def forward(self, x):
        return x, "yes"


@pytest.mark.parametrize("write", [export.program, export.package])
def test_export_refuses_bad_input_and_writes_nothing(write, tmp_path):
    path, x, layer = tmp_path / "m.pt2", randn(1, 4, 5, 5), FusedCPConv(4, 6, 3, 2)
    for error, message, *arguments in (
        (ValueError, r"^path must end in .pt2, got", layer, tmp_path / "m.onnx", x),
        (FileNotFoundError, r"^path must lie in an existing folder, got", layer, tmp_path / "no" / "m.pt2", x),
        (ValueError, r"^example_input must be an input that the model accepts, got shapes", layer, path, x[:, :3]),
        (TypeError, r"^example_input must be a tensor or a tuple", layer, path, (x, 3)),
        (
            ValueError,
            r"^model must be a network whose outputs are tensors, .*, got \['Tensor', 'str'\]",
            Answers(),
            path,
            x,
        ),
        (ValueError, r"^model must be a network that torch.export can trace .*, got Reads: ", Reads(), path, x),
        (ValueError, r"^model must be a network that torch.export .*dynamic_batch=False", layer, path, randn(4, 5, 5)),
        (
            ValueError,
            r"^model must be a network from tensors .*, got the detector GeneralizedRCNN",
            GeneralizedRCNN(*[nn.Identity()] * 4),
            path,
            randn(1, 3, 64, 64),
        ),
    ):
        with pytest.raises(error, match=message) as caught:
            write(*arguments)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_export_whose_file_gives_something_else_is_not_written(tmp_path, monkeypatch):
    loaded = torch.export.load

    def wrong(file):
        program = loaded(file)
        with torch.no_grad():
            next(iter(program.state_dict.values())).mul_(1.01)
        return program

    monkeypatch.setattr(torch.export, "load", wrong)
    with pytest.raises(RuntimeError, match=r"^the exported program gives outputs that differ .*: nothing was written"):
        export.program(FusedCPConv(4, 6, 3, 2), tmp_path / "m.pt2", randn(1, 4, 5, 5))
    assert not list(tmp_path.iterdir())
    export.program(FusedCPConv(4, 6, 3, 2), tmp_path / "m.pt2", randn(1, 4, 5, 5), check=False)
    assert (tmp_path / "m.pt2").stat().st_size > 0


def test_export_of_half_precision_is_compared_by_half_of_its_digits(tmp_path):
    layer = FusedCPConv(4, 6, 3, 2).to(torch.bfloat16)
    export.program(layer, tmp_path / "m.pt2", randn(1, 4, 5, 5).to(torch.bfloat16))
    data = io.BytesIO((tmp_path / "m.pt2").read_bytes())
    assert torch.export.load(data).module()(randn(3, 4, 5, 5).to(torch.bfloat16)).dtype == torch.bfloat16
