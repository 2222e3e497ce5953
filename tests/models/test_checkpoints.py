"""Weights from other programs' files: NORTON's naming, torchvision's, prefixes and wrappers, and what is refused."""

from __future__ import annotations

import collections
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastrank.models import build, load_weights
from fastrank.models.checkpoints import norton_layout
from fastrank.nn import FusedCPConv

SMALL = {
    "vgg_16_bn": "[0.9]*13",
    "resnet_56": "[0.75]*30",
    "resnet_110": "[0.75]*57",
    "densenet_40": "[0.75]*39",
    "resnet_50": "[0.75]*20",
}
VGG_CONFIGURATION = "cc p cc p ccc p ccc p ccc".replace(" ", "")


def randomised(name, seed=1, **options):
    """A network whose every tensor is random, running statistics included, in evaluation mode."""
    torch.manual_seed(seed)
    model = build(name, **options).eval()
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(7)
        elif value.dim() == 1:
            value.uniform_(0.5, 1.5)
    return model


def as_norton(model, name):
    """The state dict of a zoo network as the NORTON repository writes it, put together from the layers' own factors."""
    renamed = {}
    blocks = {key: module for key, module in model.named_modules() if isinstance(module, FusedCPConv)}
    for key, value in model.state_dict().items():
        layer, _, leaf = key.rpartition(".")
        if layer in blocks and leaf != "bias":
            axes = {"pointwise": (-1, 1, 1), "vertical": (1, -1, 1), "horizontal": (1, 1, -1)}[leaf]
            # Term r of filter o becomes channel r·O+o.
            key, value = f"{layer}.feature.{leaf}.weight", value.flatten(0, 1).unflatten(1, axes)
        renamed[key] = value.clone()
    if name == "vgg_16_bn":
        numbers = [i for i, kind in enumerate(VGG_CONFIGURATION) if kind == "c"]
        for i in reversed(range(13)):
            for key in [k for k in renamed if re.match(rf"features\.(conv|norm){i}\.", k)]:
                renamed[key.replace(str(i), str(numbers[i]), 1)] = renamed.pop(key)
    if name == "densenet_40":
        inner = [k for k in renamed if k.startswith(("dense", "trans"))]
        for key in inner:
            renamed[key.replace(".bn.", ".bn1.").replace(".conv.", ".conv1.")] = renamed.pop(key)
    if name == "resnet_110":
        for leaf in ("weight", "bias"):
            renamed[f"linear.{leaf}"] = renamed.pop(f"fc.{leaf}")
    return renamed


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", sorted(SMALL))
def test_norton_checkpoints_give_the_same_outputs(name, rank, tmp_path):
    options = {"rank": rank, "compress_rate": SMALL[name]}
    source = randomised(name, **options)
    path = tmp_path / f"{name}_[0.5]_2_90.32.pt"
    torch.save({"state_dict": as_norton(source, name), "rank": rank, "compress_rate": SMALL[name]}, path)
    model = build(name, pretrained=path, **options).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))
    assert {place.name: place.shape for place in norton_layout(source).values()} == {
        key: tuple(value.shape) for key, value in as_norton(source, name).items()
    }


def test_the_names_are_those_of_the_published_files():
    def names(name, **options):
        with torch.device("meta"):
            return {place.name: place.shape for place in norton_layout(build(name, **options)).values()}

    vgg = names("vgg_16_bn", rank=1, compress_rate="[0.6]*6+[0.8]*7")
    assert vgg["features.conv16.feature.pointwise.weight"] == (102, 102, 1, 1)
    assert vgg["features.conv6.feature.vertical.weight"] == (102, 1, 3, 1)
    assert vgg["features.conv0.feature.horizontal.weight"] == (25, 1, 1, 3)
    assert vgg["features.conv14.bias"] == (102,)
    assert "features.norm15.running_var" in vgg
    assert not any(key.startswith("features.conv2.") for key in vgg)
    assert "layer3.8.conv2.feature.vertical.weight" in names("resnet_56", rank=7)
    assert {"linear.weight", "layer1.17.bn2.weight"} < set(names("resnet_110"))
    dense = names("densenet_40", rank=8)
    assert {"conv1.feature.pointwise.weight", "dense2.11.conv1.feature.vertical.weight"} < set(dense)
    assert {"trans1.bn1.weight", "trans2.conv1.weight", "bn.weight", "fc.weight"} < set(dense)
    assert "layer4.2.conv2.feature.horizontal.weight" in names("resnet_50", rank=1)
    assert "backbone.body.layer1.0.conv2.feature.vertical.weight" in names("fasterrcnn_CPresnet50_fpn", rank=1)


class PublishedBlock(nn.Module):
    """The block as it is described: three convolutions, the sum over the rank of an (N, R, O, H, W) view, the bias."""

    def __init__(self, in_channels, out_channels, rank, stride):
        super().__init__()
        channels = rank * out_channels
        self.rank, self.bias = rank, nn.Parameter(torch.zeros(out_channels))
        self.feature = nn.Sequential(
            collections.OrderedDict(
                pointwise=nn.Conv2d(in_channels, channels, 1, bias=False),
                vertical=nn.Conv2d(channels, channels, (3, 1), (stride, 1), (1, 0), groups=channels, bias=False),
                horizontal=nn.Conv2d(channels, channels, (1, 3), (1, stride), (0, 1), groups=channels, bias=False),
            )
        )

    def forward(self, x):
        return self.feature(x).unflatten(1, (self.rank, -1)).sum(1) + self.bias[:, None, None]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_published_block_computes_what_ours_does(stride, tmp_path):
    torch.manual_seed(0)
    theirs, ours = PublishedBlock(5, 4, 3, stride).double(), FusedCPConv(5, 4, 3, 3, stride=stride, padding=1).double()
    nn.init.normal_(theirs.bias)
    torch.save(theirs.state_dict(), tmp_path / "block.pt")
    assert load_weights(ours, tmp_path / "block.pt") == "norton"
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    # 3·(5 + 3 + 3) products of numbers of order 1 a value, in two orders of summation.
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=64 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [("bare", "module."), ("state_dict", "_orig_mod.module."), ("model", ""), ("model_state_dict", ""), ("net", "")],
)
def test_prefixes_and_wrappers(wrap, prefix, tmp_path):
    source = randomised("resnet_20", compress_rate="[0.5]*12")
    state = {prefix + key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    best, optimizer = torch.tensor(90.0), {"state": {}, "param_groups": [{"lr": 0.1}]}
    content = state if wrap == "bare" else {"epoch": 3, wrap: state, "best": best, "optimizer": optimizer}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    loaded = build("resnet_20", compress_rate="[0.5]*12", pretrained=tmp_path / "checkpoint.pth.tar").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), source(x))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "torchvision:densenet121", "resnet_50"])
def test_state_dicts_of_the_libraries(name, tmp_path):
    source = build({"resnet_50": "torchvision:resnet50"}.get(name, name), num_classes=3)
    state = source.state_dict()
    if "densenet" in name:  # as the published files spell it
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value for key, value in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "weights.pth")
    loaded = build(name, num_classes=3, pretrained=tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())


def test_auxiliary_classifiers_are_left_behind(tmp_path):
    googlenet = pytest.importorskip("torchvision.models").googlenet
    source = googlenet(weights=None, num_classes=3, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    loaded = build("torchvision:googlenet", num_classes=3, pretrained=tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(source.state_dict()[key], value) for key, value in loaded.items())


def test_safetensors_in_either_naming(tmp_path):
    source = randomised("resnet_110", rank=1, compress_rate="[0.5]*57")
    for state, kind in ((source.state_dict(), "own"), (as_norton(source, "resnet_110"), "norton")):
        save_file(state, tmp_path / "weights.safetensors")
        model = build("resnet_110", rank=1, compress_rate="[0.5]*57")
        assert load_weights(model, tmp_path / "weights.safetensors") == kind
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_in_a_file_is_run(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "bad.pt"
    torch.save({"state_dict": build("resnet_20").state_dict(), "extra": Hostile(str(trace))}, path)
    with pytest.raises(ValueError, match=r"tensors and plain values, got .*names io\.open and is ther") as caught:
        build("resnet_20", pretrained=path)
    assert not trace.exists()
    assert "\n" not in str(caught.value)
    torch.save(build("resnet_20"), path)  # a whole module, as some programs save it
    with pytest.raises(ValueError, match=r"which names fastrank\.models\.resnet_cifar\.CifarResNet"):
        build("resnet_20", pretrained=path)


def misfit(name, content, expected, tmp_path, **options):
    torch.save(content, tmp_path / "x.pt")
    model = build(name, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=expected) as caught:
        load_weights(model, tmp_path / "x.pt", name="--ckpt")
    assert str(caught.value).startswith("--ckpt must be ")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_the_first_misfit_is_named(tmp_path):
    vgg, resnet = as_norton(build("vgg_16_bn", rank=1), "vgg_16_bn"), build("resnet_56").state_dict()
    misfit("resnet_56", {"state_dict": vgg}, r"no tensor 'conv1.weight' \(its first is 'classifier.*'\)", tmp_path)
    wrong = r"'features.conv0.feature.pointwise.weight' of shape \(64, 3, 1, 1\) in place of \(128, 3, 1, 1\), written "
    content = {"state_dict": vgg, "rank": 1, "compress_rate": "[0.]*100"}
    misfit("vgg_16_bn", content, wrong + r"with rank 1, written with compress_rate '\[0.\]\*100'", tmp_path, rank=2)
    misfit("resnet_56", {**resnet, "spare": torch.zeros(1)}, "a tensor 'spare' that the network does not", tmp_path)
    misfit("resnet_56", {**resnet, "fc.bias": torch.zeros(10, dtype=torch.int8)}, "'fc.bias' of torch.int8", tmp_path)
    misfit("resnet_56", {**resnet, "fc.bias": torch.zeros(10).to_sparse()}, "'fc.bias' of .*sparse", tmp_path)
    misfit("resnet_56", {**resnet, "fc.bias": torch.empty(10, device="meta")}, "'fc.bias' of .*on meta", tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(1)], "a file that holds a state dict, got .* which holds a list"),
        ({"epoch": 3}, r"alone or under one of \['state_dict', .* which holds 'epoch'"),
        ({"state_dict": {}}, "which holds 'nothing'"),
        ({"state_dict": {"a": 3}}, "which holds 'a'"),
    ],
)
def test_files_without_a_state_dict(content, expected, tmp_path):
    misfit("lenet5_nrmf", content, expected, tmp_path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "empty", "text", "numpy"])
def test_damaged_files_are_one_sentence(kind, tmp_path):
    state, path = build("lenet5_nrmf").state_dict(), tmp_path / "x.pt"
    torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    data = path.read_bytes()
    if kind in ("zip", "legacy"):
        assert all(torch.equal(v, state[k]) for k, v in build("lenet5_nrmf", pretrained=path).state_dict().items())
    content = {"empty": b"", "text": b"hello world", "numpy": b"\x93NUMPY\x01\x00"}.get(kind, data[: len(data) // 2])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pretrained must be a (readable torch file|file of tensors)") as caught:
        build("lenet5_nrmf", pretrained=path)
    assert "\n" not in str(caught.value)


def test_flipped_bytes_raise_one_kind_of_error_or_load(tmp_path):
    model, path = build("resnet_20", compress_rate="[0.9]*12"), tmp_path / "x.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    good, draws = path.read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(60):
        content = bytearray(good)
        place, bit = (int(torch.randint(0, high, (1,), generator=draws)) for high in (6000, 8))
        content[place] ^= 1 << bit
        path.write_bytes(content)
        try:
            load_weights(model, path)
        except ValueError as error:
            assert str(error).startswith("pretrained must be ")  # noqa: PT017  (some flips change a number alone)
