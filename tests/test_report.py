"""Tables and plots: numbers are formatted as a reader expects, pictures hold every curve."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from fastrank import report
from fastrank.models import build
from fastrank.nn import FusedCPConv


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1234, "1.23K"), (448_666, "449K"), (6_120_000, "6.12M"), (4.1e9, "4.1G")],
)
def test_short(value: float, text: str) -> None:
    assert report.short(value) == text


def test_ranks_text() -> None:
    assert report.ranks_text((144, 141)) == "144×141"
    assert report.ranks_text((7,)) == "7"
    assert report.ranks_text(()) == "dense"


def test_tables_hold_their_cells_and_leave_none_empty() -> None:
    console = Console(width=60)
    with console.capture() as captured:
        console.print(
            report.table(["layer", "weights"], [["conv1", report.thousands(1234567)], ["conv2", None]], title="T")
        )
    text = captured.get()
    assert "1,234,567" in text
    assert "None" not in text


def test_plots_are_pngs_of_what_they_were_given(tmp_path: Path) -> None:
    report.plot_spectra(tmp_path / "a.png", {"one": {"x": [3.0, 1.0], "y": [2.0, 1.9]}, "two": {"x": [1.0]}}, title="σ")
    panels = {f"p{i}": {"x": [1, 2], "y": [2, 2]} for i in range(4)}
    report.plot_ranks(tmp_path / "b.png", panels, ["r", "s"], dict.fromkeys(panels, 3), title="ranks")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_zero_spectrum_can_be_drawn(tmp_path: Path) -> None:
    report.plot_spectra(tmp_path / "zero.png", {"dead layer": {"x": [0.0, 0.0]}}, title="σ")
    assert (tmp_path / "zero.png").stat().st_size > 0


def checkpoint(folder: Path, losses: list[float], age: int, **tensors: torch.Tensor) -> None:
    """What a training of `age` seconds ago leaves, as far as a report reads it."""
    folder.mkdir(parents=True)
    rows = [{"epoch": i + 1, "loss": loss, "test_top1": 50.0, "metrics": {}} for i, loss in enumerate(losses)]
    state = {f"model/{name.replace('_of_', '.')}": value for name, value in tensors.items()}
    metadata = {"fastrank.checkpoint": json.dumps({"history": rows})}
    save_file({"totals": torch.zeros(1), **state}, folder / "checkpoint.safetensors", metadata)
    os.utime(folder / "checkpoint.safetensors", (0, 1e9 - age))


def test_a_run_is_read_in_the_order_of_its_trainings(tmp_path: Path) -> None:
    gates = {"a_of_gate_in": torch.tensor([0.0, 2.0]), "b_of_gate_in": torch.tensor([3.0])}
    checkpoint(tmp_path / "train", [2.0, 1.0], 9)
    checkpoint(tmp_path / "gates" / "1", [0.5], 8, **gates, b_of_weight=torch.ones(2), b_of_gate_core=torch.zeros(1))
    checkpoint(tmp_path / "finetune", [], 7)
    found = report.read_run(tmp_path)
    assert {name: [row["loss"] for row in rows] for name, rows in found.history.items()} == {
        "train": [2.0, 1.0],
        "gates/1": [0.5],
        "finetune": [],
    }
    assert list(found.history) == ["train", "gates/1", "finetune"]
    assert {kind: sorted(values.tolist()) for kind, values in found.gates.items()} == {
        "gate_in": [0.0, 2.0, 3.0],
        "gate_core": [0.0],
    }
    assert (found.summary, found.stages) == ({}, {})
    summary = {"dense": {"params": 1, "macs": 2}, "data": {"name": "digits"}, "speed_up": 2}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert report.read_run(tmp_path).stages == {"dense": {"params": 1, "macs": 2}}


def test_a_run_of_several_ranks_is_read_by_its_pointer(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "checkpoint-000000004-0123abcd"
    folder.mkdir(parents=True)
    (folder / "header.json").write_text(json.dumps({"history": [{"epoch": 1, "loss": 0.5}]}))
    pointer = tmp_path / "train" / "checkpoint.json"
    pointer.write_text(json.dumps({"folder": folder.name, "step": 4}))
    assert report.read_run(tmp_path).history == {"train": [{"epoch": 1, "loss": 0.5}]}
    for broken in ('{"folder": "../elsewhere"}', '{"folder": "gone"}', "[]", '{"step": 4}'):
        pointer.write_text(broken)
        with pytest.raises(ValueError, match="^run must be a folder with whole checkpoints, got .*checkpoint.json"):
            report.read_run(tmp_path)


def test_metrics_of_other_tasks_are_drawn(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "loss": 1.0, "train_top1": None, "bbox_ap": 0.3}, {"epoch": 2, "loss": 1.0, "bbox_ap": 0.4}]
    report.plot_history(tmp_path / "a.png", {"train": rows, "empty": []}, title="t")
    report.plot_gates(tmp_path / "b.png", {"gate_in": torch.zeros(3), "gate_out": torch.rand(9)}, title="t")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))
    with pytest.raises(ValueError, match="at least one finished epoch"):
        report.plot_history(tmp_path / "c.png", {"train": []}, title="t")
    with pytest.raises(ValueError, match="at least one kind"):
        report.plot_gates(tmp_path / "c.png", {}, title="t")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("summary.json", b"{", "whole summary.json, got .*summary.json, which is no JSON"),
        ("summary.json", b"[1]", "summary.json that holds a mapping"),
        ("train/checkpoint.safetensors", b"x" * 99, "whole checkpoints, got .*train.checkpoint.safetensors"),
        ("train/checkpoint.safetensors", b"\x02\0\0\0\0\0\0\0{}", "whole checkpoints"),
    ],
)
def test_damaged_runs_are_named(tmp_path: Path, file: str, content: bytes, expected: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"run must be a folder with a? ?{expected}"):
        report.read_run(tmp_path)


class OneMap(nn.Module):
    """Logits are sums over the maps of one convolution, so that Grad-CAM can be worked out by hand."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.last = conv, nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x)
        return torch.cat([maps.sum((2, 3)), self.last(maps.mean((2, 3), keepdim=True)).flatten(1) - 99], 1)


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_activation_map_is_what_grad_cam_says(kind: str) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="activation maps need grad-cam")
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, padding=1) if kind == "dense" else FusedCPConv(2, 4, 3, 2, padding=1)
    model, image = OneMap(conv).train(), torch.randn(2, 9, 9)
    model.conv.requires_grad_(False)
    model.last.weight.grad = torch.full_like(model.last.weight, 7)
    found = report.activation_map(model, image, target=1)
    # The logit of class 1 is the sum of map 1: its gradient is 1 there and 0 elsewhere. `last` sees one pixel alone.
    want = model.conv(image[None])[0, 1].detach().relu()
    want = (want - want.min()) / (want.max() - want.min())
    torch.testing.assert_close(found.heat, want, rtol=0, atol=1e-5)  # the library adds 1e-7 to the largest value
    logits = model(image[None])[0].detach().softmax(0)
    assert (found.layer, found.predicted) == ("conv", int(logits.argmax()))
    assert found.probability == pytest.approx(float(logits.max()))
    assert model.training
    assert model.conv.training
    assert torch.equal(model.last.weight.grad, torch.full_like(model.last.weight, 7))
    assert report.activation_map(model, image, target=0).heat.shape == (9, 9)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet_20", "layer3.2.conv2"), ("vgg_16_bn", "features.conv12"), ("densenet_40", "dense3.11.conv")],
)
def test_the_last_convolution_is_found(name: str, layer: str) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="activation maps need grad-cam")
    length = {"resnet_20": 12, "vgg_16_bn": 13, "densenet_40": 39}[name]
    model = build(name, rank=1, compress_rate=[0.75] * length)
    assert report.activation_map(model, torch.randn(3, 32, 32)).layer == layer


def test_activation_maps_refuse_what_they_cannot_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="activation maps need grad-cam")
    model, image = build("lenet5_nrmf"), torch.randn(1, 16, 16)
    with pytest.raises(ValueError, match=r"layer must be a module whose output .* got 'conv9' \(did you mean 'conv"):
        report.activation_map(model, image, layer="conv9")
    with pytest.raises(ValueError, match="layer must be a module whose output"):
        report.activation_map(model, image, layer="fc1")
    with pytest.raises(ValueError, match="target must be an int between 0 and 9, got 10"):
        report.activation_map(model, image, target=10)
    with pytest.raises(ValueError, match=r"image must be of shape"):
        report.activation_map(model, image[None])
    with pytest.raises(ValueError, match=r"model must be a classifier with an output of shape \(1, classes\)"):
        report.activation_map(nn.Conv2d(1, 2, 3), image)
    with pytest.raises(ValueError, match="model must be a network with a convolution"):
        report.activation_map(nn.Sequential(nn.Flatten(), nn.Linear(256, 2)), image)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match=r"grad-cam, which is absent: pip install 'fastrank\[cam\]'"):
        report.activation_map(model, image)
