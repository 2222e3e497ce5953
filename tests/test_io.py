"""Saved models come back bit for bit with their architecture; broken, foreign and hostile files are refused in time."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import tracemalloc

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import Spare, randn
from torch import nn

from fastrank import LayerPlan, Plan, _files, compress, make_plan, models
from fastrank import io as model_io
from fastrank.models import identify
from fastrank.nn import (
    FusedCPConv,
    FusedTucker2Conv,
    GatedCPConv,
    GatedSVDConv,
    GatedTucker2Conv,
    LayerCPConv,
    SVDConv,
)
from fastrank.nn._conv import FactoredConv2d

load, save = model_io.load, model_io.save


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    return all(torch.equal(v, second[k]) and v.dtype == second[k].dtype for k, v in first.items())


def zoo(name, **options):
    return lambda: models.build(name, **options)


NETWORKS = {
    "lenet": (zoo("lenet5_nrmf"), (1, 8, 8)),
    "resnet_20": (zoo("resnet_20", num_classes=7), (3, 32, 32)),
    "resnet_20 of rank 2": (zoo("resnet_20", rank=2, compress_rate="[0.]+[0.25]*11"), (3, 32, 32)),
    "torchvision, built by the user": (lambda: torchvision.models.resnet18(num_classes=6), (3, 64, 64)),
    "timm, built by the user": (lambda: timm.create_model("resnet18", num_classes=4), (3, 64, 64)),
    "torchvision by name": (zoo("torchvision:squeezenet1_1", num_classes=3), (3, 64, 64)),
}


@pytest.mark.parametrize("method", ["dense", "nrmf", "trp-spatial", "norton"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_round_trip(kind, method, tmp_path):
    build, size = NETWORKS[kind]
    torch.manual_seed(3)
    model = build()
    if method != "dense":
        model = compress(model, make_plan(model, method, **({"rank": 1} if method == "norton" else {"energy": 0.3})))
        assert any(isinstance(m, FactoredConv2d) for m in model.modules()) or kind == "resnet_20 of rank 2"
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    save(model.eval(), tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert type(again) is type(model)
    assert repr(again) == repr(model)
    assert same(again, model)
    assert not again.training
    assert not any(m.training for m in again.modules())
    assert getattr(again, "fastrank_plan", None) == getattr(model, "fastrank_plan", None)
    x = randn(2, *size)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    save(again, tmp_path / "again.safetensors")
    files = [_files.load_tensors(tmp_path / f"{name}.safetensors") for name in ("model", "again")]
    assert files[0][1] == files[1][1]  # the header too: what was loaded saves as what was saved


LAYERS = [
    FusedTucker2Conv(4, 6, (3, 2), (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),
    FusedTucker2Conv(4, 6, 3, 2, padding="same", padding_mode="reflect"),
    FusedCPConv(4, 6, (2, 3), 4, padding="valid", bias=False),
    FusedCPConv(4, 6, 3, 9, padding=(1, 2), padding_mode="circular"),
    *(SVDConv(4, 6, (3, 2), 2, scheme=scheme, stride=2, padding=1) for scheme in ("channel", "spatial", "decoupled")),
    LayerCPConv(4, 6, (3, 2), 7, stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),
    GatedTucker2Conv(4, 6, (3, 2), (2, 3), padding="same", padding_mode="reflect"),
    GatedSVDConv(4, 6, 1, 3, stride=2),
    GatedCPConv(4, 6, (2, 3), 7, padding="valid", bias=False),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_every_layer_inside_a_network_and_alone(layer, dtype, tmp_path):
    for model, dense in (
        (nn.Sequential(nn.ReLU(), copy.deepcopy(layer)), nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1))),
        (copy.deepcopy(layer), nn.Conv2d(1, 1, 1)),
    ):
        model.to(dtype)
        save(model, tmp_path / "m")
        again = load(tmp_path / "m", dense)
        assert repr(again) == repr(model)
        assert same(again, model)
        assert again.training
        assert all(p.requires_grad for p in again.parameters())
        with pytest.raises(
            ValueError, match=r"^model must be the dense network, since .* is of one that has no name here, got None"
        ):
            load(tmp_path / "m")


def test_a_model_of_unknown_origin_with_shared_layers_needs_the_dense_network(tmp_path):
    model = compress(Spare(), Plan({"twice": LayerPlan("tucker2", (2, 2)), "down": LayerPlan("cp", (2,))}))
    save(model, tmp_path / "m")
    dense = Spare()
    again = load(tmp_path / "m", dense)
    assert again is dense
    assert again.twice is again.again
    assert same(again, model)
    assert again.fastrank_plan == model.fastrank_plan


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "fc", nn.Linear(64, 3)),
        lambda m: setattr(m, "relu", nn.GELU()),
        lambda m: setattr(m.layer1[0].conv1, "stride", (2, 2)),
        lambda m: setattr(m.bn1, "eps", 0.5),
    ],
)
def test_a_changed_network_is_not_taken_for_the_published_one(change, tmp_path):
    for build in (zoo("resnet_20"), lambda: torchvision.models.resnet18()):
        model = build()
        assert identify(model) is not None
        change(model)
        assert identify(model) is None
        if not isinstance(model.fc, nn.Linear) or model.fc.out_features != 3:
            save(model, tmp_path / "m")
            with pytest.raises(ValueError, match=r"^model must be the dense network"):
                load(tmp_path / "m")


def test_torchvision_networks_that_differ_in_geometry_alone_are_told_apart():
    plain, dilated = (
        torchvision.models.resnet50(replace_stride_with_dilation=[False, False, d]) for d in (False, True)
    )
    assert identify(plain)["name"] == "torchvision:resnet50"
    assert identify(dilated) is None


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_recognised_and_built_again(name):
    with torch.device("meta"):
        for aux_logits in (True, False):
            model = torchvision.models.get_model(name, num_classes=7, aux_logits=aux_logits, init_weights=False)
            origin = identify(model)
            assert origin.get("aux_logits", False) == aux_logits
            again = models.build(**origin)
            assert list(again.state_dict()) == list(model.state_dict())
            assert again.fastrank_origin == origin
            assert identify(again) == origin
        with pytest.raises(ValueError, match=r"^aux_logits must be left out for torchvision:resnet18, which has no"):
            models.build("torchvision:resnet18", aux_logits=True)
        with pytest.raises(TypeError, match=r"^aux_logits must be a bool, got int"):
            models.build(f"torchvision:{name}", aux_logits=1)


def test_the_training_flag_is_kept_and_random_numbers_are_left_alone(tmp_path):
    model = models.build("lenet5_nrmf").train()
    save(model, tmp_path / "m")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert load(tmp_path / "m").training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m"
    model = models.build("lenet5_nrmf")
    save(model, path)
    before = path.read_bytes()
    with torch.device("meta"):
        empty = models.build("lenet5_nrmf")
    with pytest.raises(ValueError, match=r"^tensors\['conv1.weight'\] must be a dense tensor with values"):
        save(empty, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(model.double(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got OrderedDict"):
        save(model.state_dict(), path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small compressed network's file: its path, header and tensors."""
    path = tmp_path_factory.mktemp("io") / "lenet"
    model = models.build("lenet5_nrmf", num_classes=4)
    save(compress(model, Plan({"conv3": LayerPlan("tucker2", (4, 5))})), path)
    tensors, metadata = _files.load_tensors(path)
    return path, json.loads(metadata[model_io.KEY]), tensors


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bits_and_cut_files_are_refused(saved, tmp_path, seed):
    data, draw = bytearray(saved[0].read_bytes()), random.Random(seed)
    # Every other time in the header, where a flip could change the meaning.
    at = draw.randrange(8 + int.from_bytes(data[:8], "little") if seed % 2 else len(data))
    data[at] ^= 1 << draw.randrange(8)
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(ValueError, match=r"^path must be a") as caught:
        load(tmp_path / "m")
    assert "\n" not in str(caught.value)
    (tmp_path / "m").write_bytes(saved[0].read_bytes()[: draw.randrange(len(data))])
    with pytest.raises(ValueError, match=r"^path must be a"):
        load(tmp_path / "m")


def test_other_formats_are_refused_unopened(tmp_path, saved):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    path = tmp_path / "m"
    torch.save({"a": torch.ones(2)}, tmp_path / "zip")
    for data in (
        pickle.dumps(Bomb()),
        (tmp_path / "zip").read_bytes(),
        b"",
        b"{}",
        b"\x7fELF" + bytes(100),
        bytes(8) + b"{}",
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^path must be a"):
            load(path)
    assert not (tmp_path / "boom").exists()
    _files.save_tensors(path, saved[2], {"note": "no model"})
    with pytest.raises(
        ValueError, match=r"^path must be a model saved by fastrank.save, got .*whose header holds no model"
    ):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"^path must be a safetensors file, got .*does not exist"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="which is not a file"):
        load(tmp_path)
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module or None, got str"):
        load(saved[0], "resnet_20")


def layer(**changes):
    def change(header):
        header["layers"]["conv3"]["config"].update(changes)

    return change


def named(name):
    def change(header):
        header["layers"][name] = header["layers"].pop("conv3")

    return change


HOSTILE = {
    "huge rank": (layer(ranks=[2**40, 5]), "layer 'conv3' cannot be built: ranks"),
    "huge ranks that fit the channels": (
        layer(ranks=[2**19] * 2, in_channels=2**20, out_channels=2**20),
        "whose tensor 'conv3.bias' is",
    ),
    "huge channels": (layer(in_channels=2**62), "layer 'conv3' cannot be built"),
    "more than an integer": (layer(out_channels=10**30), "layer 'conv3' cannot be built"),
    "negative": (layer(in_channels=-1), "layer 'conv3' cannot be built: in_channels must be an int at least 1"),
    "of another type": (layer(kernel_size="3"), "layer 'conv3' cannot be built: kernel_size"),
    "unknown argument": (layer(device="cpu"), "layer 'conv3' cannot be built"),
    "unknown layer": (lambda h: h["layers"]["conv3"].update(type="os.system"), "layer 'conv3' cannot be built"),
    "no layer": (lambda h: h["layers"].update(conv3=3), "layer 'conv3' cannot be built"),
    "a path": (named("../../etc/passwd"), "layer '../../etc/passwd' cannot be built"),
    "a dunder": (named("__class__"), "layer '__class__' cannot be built"),
    "a missing place": (named("conv9"), "layer 'conv9' cannot be built"),
    "a layer that is no convolution": (named("fc1"), "layer 'fc1' stands for a Linear"),
    "another place": (named("conv2"), "whose tensor"),
    "no layers": (lambda h: h["layers"].clear(), "tensor 'conv3.weight' is None where"),
    "huge classes": (lambda h: h["origin"].update(num_classes=2**40), "tensor 'fc3.weight' is"),
    "classes beyond any memory": (lambda h: h["origin"].update(num_classes=2**62), "network cannot be built"),
    "classes of another type": (
        lambda h: h["origin"].update(num_classes="4"),
        "network cannot be built: num_classes must be an int, got str",
    ),
    "another network": (lambda h: h["origin"].update(name="resnet_56"), "whose"),
    "an unknown network": (lambda h: h["origin"].update(name="lenet6"), "network cannot be built: name must be one of"),
    "a download": (lambda h: h["origin"].update(name="timm:hf-hub:a/b"), "network cannot be built: name must be"),
    "pretrained": (lambda h: h["origin"].update(pretrained="/etc/passwd"), "whose origin has keys"),
    "other rates": (lambda h: h["origin"].update(compress_rate="[0.]*9999"), "network cannot be built: compress_rate"),
    "no flag": (lambda h: h.update(training=1), "whose header has a wrong 'training'"),
    "an extra key": (lambda h: h.update(extra=1), "whose header has a wrong"),
    "another version": (lambda h: h.update(version=2), "fastrank-model version 2"),
    "another format": (lambda h: h.update(format="other"), "other version 1"),
    "layers of another type": (lambda h: h.update(layers=[]), "whose header has a wrong 'layers'"),
    "a broken plan": (lambda h: h["plan"].update(version=9), "plan.version must be 1, got 9"),
    "a plan of another type": (lambda h: h.update(plan="x"), "whose header has a wrong 'plan'"),
}


@pytest.fixture
def allocated(monkeypatch):
    """The sizes of the parameters that got memory, as they come."""
    real, sizes = torch.empty, []

    def watched(*size, **options):
        made = real(*size, **options)
        sizes.extend([] if made.is_meta else [made.numel()])
        return made

    monkeypatch.setattr(torch, "empty", watched)
    return sizes


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused_before_anything_is_allocated(kind, saved, tmp_path, allocated):
    change, message = HOSTILE[kind]
    header = copy.deepcopy(saved[1])
    change(header)
    path = tmp_path / "m"
    _files.save_tensors(path, saved[2], {model_io.KEY: json.dumps(header)})
    tracemalloc.start()
    with pytest.raises((ValueError, TypeError)) as caught:
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert allocated == []
    assert peak < 64 * 2**20
    load(saved[0])
    assert sum(allocated) > 1e5  # the watch does see what a good file allocates


@pytest.mark.parametrize(
    "bad",
    [
        lambda t: t.pop("fc1.bias"),
        lambda t: t.update({"fc1.bias": torch.ones(3)}),
        lambda t: t.update({"x": torch.ones(1)}),
        lambda t: t.update({"fc1.bias": torch.ones(120, dtype=torch.int64)}),
    ],
)
def test_a_file_that_does_not_fit_leaves_the_given_model_alone(bad, saved, tmp_path):
    tensors = dict(saved[2])
    bad(tensors)
    _files.save_tensors(tmp_path / "m", tensors, {model_io.KEY: json.dumps(saved[1])})
    for model in (models.build("lenet5_nrmf", num_classes=4), models.build("resnet_20")):
        before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
        with pytest.raises(ValueError, match=r"^path must be a"):
            load(tmp_path / "m", model)
        assert list(model.modules()) == modules
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not hasattr(model, "fastrank_plan")
    with pytest.raises(ValueError, match=r"^path must be a file whose tensors fit its architecture"):
        load(tmp_path / "m")


def test_saving_does_not_change_the_model(tmp_path):
    model = compress(models.build("lenet5_nrmf"), Plan({"conv3": LayerPlan("cp", (2,))})).to(
        memory_format=torch.channels_last
    )
    before, strides = copy.deepcopy(model.state_dict()), [p.stride() for p in model.parameters()]
    save(model, tmp_path / "m")
    assert [p.stride() for p in model.parameters()] == strides
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = load(os.fspath(tmp_path / "m"))
    again(torch.zeros(2, 1, 8, 8)).sum().backward()
    assert all(p.is_leaf and p.grad is not None for p in again.parameters())
