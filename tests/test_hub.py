"""Folders in the manner of Hugging Face: what was saved comes back, whole or not at all."""

from __future__ import annotations

import json
import os

import pytest
import torch
from export_cases import small_lenet
from helpers import randn
from torch import nn

from fastrank import LayerPlan, Plan, _files, compress, fuse_for_inference, hub
from fastrank import io as model_io
from fastrank.nn import FusedTucker2Conv

FILES = {"config.json", "model.safetensors", "README.md"}


def names(folder):
    return {entry.name for entry in folder.iterdir()}


def test_hub_folder_comes_back_with_its_architecture(tmp_path):
    model, folder = small_lenet().eval(), tmp_path / "lenet"
    hub.save_pretrained(model, folder, input_size=(1, 8, 8), metrics={"accuracy | test": 0.93})
    assert names(tmp_path) == {"lenet"}
    assert names(folder) == FILES
    again = hub.from_pretrained(folder)
    assert repr(again) == repr(model)
    assert not again.training
    assert again.fastrank_input_size == (1, 8, 8)
    x = randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.fastrank_plan == model.fastrank_plan
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == {"name": "lenet5_nrmf", "num_classes": 10, "rank": 0, "compress_rate": None}
    assert set(config["layers"]) == {"conv2", "conv3"}
    assert config["convolutions"] == 3
    assert config["metrics"] == {"accuracy | test": 0.93}
    assert config["costs"]["compressed"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert config["costs"]["compressed"]["multiply-adds"] < config["costs"]["dense"]["multiply-adds"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: fastrank\n")
    assert "`lenet5_nrmf` with 10 outputs, 2 of 3 convolutions in factored form (1 FusedTucker2Conv, 1 SVDConv)" in card
    assert "| accuracy test | 0.93 |" in card
    assert f"| parameters | {config['costs']['dense']['parameters']:,} |" in card
    assert 'hub.from_pretrained("lenet")' in card


def test_hub_folder_that_is_there_keeps_its_other_files(tmp_path):
    hub.save_pretrained(small_lenet(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = small_lenet()
    with torch.no_grad():
        model.fc3.bias.fill_(2.0)
    hub.save_pretrained(model, tmp_path)
    assert names(tmp_path) == FILES | {"notes.txt"}
    assert torch.equal(hub.from_pretrained(tmp_path).fc3.bias, model.fc3.bias)


def test_hub_model_without_a_name_comes_back_into_the_dense_network(tmp_path):
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    model = compress(dense, Plan({"0": LayerPlan("tucker2", (1, 2))}))
    hub.save_pretrained(model, tmp_path / "m", input_size=(3, 6, 6))
    assert "is the network before compression" in (tmp_path / "m" / "README.md").read_text()
    again = hub.from_pretrained(tmp_path / "m", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    assert torch.equal(again(torch.ones(1, 3, 6, 6)), model(torch.ones(1, 3, 6, 6)))
    with pytest.raises(ValueError, match=r"^model must be the dense network"):
        hub.from_pretrained(tmp_path / "m")
    own = nn.Sequential(FusedTucker2Conv(3, 8, 3, 2, activation="relu"))  # has no dense form to count
    hub.save_pretrained(own, tmp_path / "own")
    assert list(json.loads((tmp_path / "own" / "config.json").read_text())["costs"]) == ["compressed"]


def test_hub_saving_that_fails_leaves_nothing(tmp_path, monkeypatch):
    hub.save_pretrained(small_lenet(), tmp_path / "m")
    before = {name: (tmp_path / "m" / name).read_bytes() for name in FILES}
    write = hub.write_atomically

    def full(path, data):
        if path.name == "README.md":
            raise OSError("disk full")
        write(path, data)

    monkeypatch.setattr(hub, "write_atomically", full)
    for folder in ("m", "new"):
        with pytest.raises(OSError, match="disk full"):
            hub.save_pretrained(small_lenet(), tmp_path / folder)
    assert names(tmp_path) == {"m"}
    assert {name: (tmp_path / "m" / name).read_bytes() for name in FILES} == before


def test_hub_refuses_bad_input_with_one_sentence(tmp_path):
    model, folder = small_lenet(), tmp_path / "m"
    (tmp_path / "file").write_text("")
    fused = fuse_for_inference(model, randn(2, 1, 8, 8))
    for error, message, arguments, options in (
        (TypeError, r"^model must be a torch.nn.Module, got int", (3, folder), {}),
        (ValueError, r"^model must be as it was before fuse_for_inference", (fused, folder), {}),
        (NotADirectoryError, r"^folder must be a folder, got the file", (model, tmp_path / "file"), {}),
        (FileNotFoundError, r"^folder must lie in an existing folder", (model, tmp_path / "no" / "m"), {}),
        (TypeError, r"^input_size must be three ints \(C, H, W\), got int", (model, folder), {"input_size": 8}),
        (ValueError, r"^input_size\[1\] must be an int at least 1, got 0", (model, folder), {"input_size": (1, 0, 8)}),
        (TypeError, r"^metrics must be a mapping", (model, folder), {"metrics": [1]}),
        (ValueError, r"^metrics\['loss'\] must be a finite", (model, folder), {"metrics": {"loss": float("nan")}}),
    ):
        with pytest.raises(error, match=message):
            hub.save_pretrained(*arguments, **options)
    assert names(tmp_path) == {"file"}
    with pytest.raises(FileNotFoundError, match=r"^folder must be a local folder .*, got 'no-such-folder'$"):
        hub.from_pretrained("no-such-folder")
    with pytest.raises(FileNotFoundError, match=r"download it first: huggingface_hub.snapshot_download\('org/name'\)"):
        hub.from_pretrained("org/name")
    with pytest.raises(FileNotFoundError, match=r"^folder must hold config.json and model.safetensors, got .* without"):
        hub.from_pretrained(tmp_path)


def test_hub_refuses_broken_and_newer_folders(tmp_path):
    hub.save_pretrained(small_lenet(), tmp_path)
    config, text = tmp_path / "config.json", (tmp_path / "config.json").read_text()
    for changed, message in (
        (text[:-20], "which is no JSON"),
        ("[]", "which is not of fastrank-hub"),
        (text.replace('"version": 1', '"version": 2'), r"of version 2, which a newer fastrank wrote: update this one"),
        (text.replace('"version": 1', '"version": 0'), r"got .* of version 0$"),
    ):
        config.write_text(changed)
        with pytest.raises(ValueError, match=message) as caught:
            hub.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
    config.write_text(text)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-3])
    with pytest.raises(ValueError, match=r"^path must be a whole safetensors file"):
        hub.from_pretrained(tmp_path)


def test_files_carry_the_input_size_and_those_without_it_load(tmp_path):
    model, path = small_lenet(), tmp_path / "m"
    model_io.save(model, path)
    assert not hasattr(model_io.load(path), "fastrank_input_size")
    model_io.save(model, path, input_size=(1, 16, 12))
    again = model_io.load(path)
    assert again.fastrank_input_size == (1, 16, 12)
    model_io.save(again, path)  # passed on
    assert model_io.load(path).fastrank_input_size == (1, 16, 12)
    tensors, metadata = _files.load_tensors(path)
    header = json.loads(metadata[model_io.KEY])
    for changes, message in (
        ({"input_size": [1, 16]}, "wrong 'input_size': input_size must be three ints"),
        ({"input_size": [1, -1, 2]}, r"wrong 'input_size': input_size\[1\] must be an int at least 1, got -1"),
        ({"version": 2, "more": 3}, r"version 1, got .* version 2, which a newer fastrank wrote: update this one"),
        ({"version": 0}, r"of fastrank-model version 0$"),
    ):
        _files.save_tensors(path, tensors, {model_io.KEY: json.dumps({**header, **changes})})
        with pytest.raises(ValueError, match=message):
            model_io.load(os.fspath(path))
