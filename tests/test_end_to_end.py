"""From a torchvision network to a deployed file: plan, compress, fine-tune, save, load elsewhere, export, compare."""

from __future__ import annotations

import subprocess
import sys

import onnxruntime
import pytest
import torch
import torchvision
from helpers import randn
from torch import nn

import fastrank

TOLERANCE = 1e-4
BUDGET = {"latency": 0.5}
SIZE = (192, 192)

ELSEWHERE = """
import sys, torch, fastrank
from fastrank import export
model = fastrank.load(sys.argv[1])
images = torch.load(sys.argv[2])
assert model.fastrank_input_size == (3, 192, 192)
with torch.no_grad():
    torch.save(model(images), sys.argv[3])
export.onnx(model, sys.argv[4], images[:1])
"""


@pytest.mark.slow
def test_a_torchvision_network_is_planned_compressed_tuned_saved_loaded_and_exported(tmp_path, one_thread):
    torch.manual_seed(0)
    images, labels = randn(2, 3, *SIZE), torch.arange(2)
    dense = torchvision.models.resnet18(num_classes=10)
    plan = fastrank.make_plan(dense, "auto", example_input=images, budget=BUDGET, remember=False)
    assert plan.options["measured"]["latency"] <= 0.5
    model = fastrank.compress(dense, plan)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        wanted = model.eval()(images)
    scale = float(wanted.abs().max())

    files = {name: tmp_path / name for name in ("m.safetensors", "images", "outputs", "m.onnx")}
    fastrank.save(model, files["m.safetensors"], input_size=(3, 192, 192))
    torch.save(images, files["images"])
    command = [sys.executable, "-c", ELSEWHERE, *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float((torch.load(files["outputs"]) - wanted).abs().max()) <= TOLERANCE * scale

    session = onnxruntime.InferenceSession(str(files["m.onnx"]), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": images.numpy()})
    assert float((torch.from_numpy(found) - wanted).abs().max()) <= TOLERANCE * scale
