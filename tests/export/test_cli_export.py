"""`fastrank export`: one file, the sizes of the saved model, one sentence for what is wrong."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from export_cases import small_lenet
from helpers import randn

import fastrank
from fastrank import cli


@pytest.fixture
def command(capsys, monkeypatch):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fastrank", *map(str, args)])
        try:
            code = cli.main()
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return run


def test_export_command_takes_the_size_of_the_file(command, tmp_path):
    model, path, out = small_lenet().eval(), tmp_path / "m.safetensors", tmp_path / "m.pt2"
    fastrank.save(model, path, input_size=(1, 16, 16))
    code, text, errors = command("export", path, "--to", "pt2", "--out", out, "--json")
    assert (code, errors) == (0, "")
    document = json.loads(text)
    assert document["input"] == [1, 16, 16]
    assert document["batch"] is None
    assert document["bytes"] == out.stat().st_size
    x = randn(3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(out).module()(x), model(x), rtol=1e-4, atol=1e-5)
    code, text, _ = command("export", path, "--to", "pt2", "--out", out, "--input", "1,8,8", "--batch", 2, "--static")
    assert code == 0
    assert "torch.export program of" in text
    assert "batches of 2 of 1×8×8" in text
    assert torch.export.load(out).module()(randn(2, 1, 8, 8)).shape == (2, 10)


def test_export_command_says_what_is_wrong_in_one_sentence(command, tmp_path):
    out = tmp_path / "m.pt2"
    for args, message in (
        (("--to", "tflite", "--out", out), "--to must be one of ['onnx', 'pt2', 'aoti'], got 'tflite'"),
        (("--to", "pt2", "--out", out, "--opset", 18), "--opset must be left out for --to pt2, got 18"),
        (("--to", "onnx", "--out", tmp_path / "m.onnx", "--opset", 9), "opset must be an int between 18 and 23, got 9"),
        (("--to", "pt2", "--out", tmp_path / "m.onnx"), "path must end in .pt2"),
        (("--to", "pt2", "--out", tmp_path / "no" / "m.pt2"), "path must lie in an existing folder"),
        (("--to", "pt2", "--out", out, "--input", "3,8,8"), "example_input must be an input that the model accepts"),
    ):
        code, _, errors = command("export", "lenet5_nrmf", *args)
        assert code == 2
        assert errors.startswith(f"fastrank: {message}")
        assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())
