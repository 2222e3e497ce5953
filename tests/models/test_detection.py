"""Detectors: published sizes to the digit, backbones of several kinds, origins that rebuild them, and refusals."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import Tiny, lighten
from torch import Tensor, nn

from fastrank import load, save
from fastrank.complexity import Complexity, count
from fastrank.models import DETECTORS, build, default_input_size, identify
from fastrank.nn import FusedTucker2Conv

RATES = "[0.]+[0.1]*2+[0.4]*5+[0.75]*12"
NORM = 53_120
"""Scales and shifts of the batch normalisations of ResNet-50."""

# name, with the compressed backbone or not, parameters, what the NORTON README prints in millions.
PUBLISHED = [
    ("fasterrcnn", False, 41_808_406, 41.81),
    ("fasterrcnn", True, 22_012_182, 22.01),
    ("maskrcnn", False, 44_454_513, 44.46),
    ("maskrcnn", True, 24_658_289, 24.65),
    ("keypointrcnn", False, 59_190_378, 59.19),
    ("keypointrcnn", True, 39_394_154, 39.39),
]
# Multiply-adds at 3×800×800 by "ptflops" and the README's figure in thousand millions. It gives Keypoint R-CNN 137.42:
# torchvision's figure, which has the keypoint head on one detection, see below.
MACS = [
    ("fasterrcnn", False, 134_853_830_154, 134.85),
    ("fasterrcnn", True, 93_397_750_154, 93.39),
    ("maskrcnn", False, 134_853_830_154, 134.85),
    ("maskrcnn", True, 93_397_750_154, 93.39),
]


@functools.cache
def made(name: str, compressed: bool) -> nn.Module:
    """On the meta device, where nothing is computed."""
    options: dict[str, Any] = {"rank": 1, "compress_rate": RATES} if compressed else {}
    with torch.device("meta"):
        return build(name, **options)


@functools.cache
def counted(name: str, compressed: bool, convention: Any = "ptflops") -> Complexity:
    return count(made(name, compressed), default_input_size(name), convention=convention)


@pytest.mark.parametrize(("name", "compressed", "params", "printed"), PUBLISHED)
def test_published_parameters(name: str, compressed: bool, params: int, printed: float) -> None:
    found = counted(name, compressed)
    assert found.params == sum(p.numel() for p in made(name, compressed).parameters()) == params
    # The README rounds 44.4545 up and 24.6583 down.
    assert found.params / 1e6 == pytest.approx(printed, abs=0.01)


@pytest.mark.parametrize(("name", "compressed", "macs", "printed"), MACS)
def test_published_multiply_adds(name: str, compressed: bool, macs: int, printed: float) -> None:
    found = counted(name, compressed)
    assert found.macs == macs
    assert int(found.macs / 1e7) / 100 == printed


def test_multiply_adds_do_not_depend_on_the_weights_or_on_the_size_before_resizing() -> None:
    torch.manual_seed(0)
    for weights in (0.0, 1.0):
        network = lighten(build("keypointrcnn", backbone=Tiny(), min_size=64, max_size=128))
        nn.init.constant_(network.get_parameter("rpn.head.cls_logits.bias"), weights)
        flags = [module.training for module in network.modules()]
        assert len({count(network, size).macs for size in (64, 800, (1, 3, 64, 64))}) == 1
        assert [module.training for module in network.modules()] == flags
        assert count(network, 64).per_layer["roi_heads.box_head.fc7"].macs == 50 * 1024 * 1024
        network.rpn._post_nms_top_n["testing"] = 1000
        network.transform.min_size = (32,)
        # Levels of 8², 4², 2², 1² and 1² positions with 3 boxes each have no more to propose.
        rows = count(network, 64).per_layer
        assert rows["roi_heads.box_head.fc7"].macs == 3 * (64 + 16 + 4 + 1 + 1) * 1024 * 1024


def test_the_published_figure_of_keypoints_has_one_detection() -> None:
    """137.42 G is conv_fc, the eight convolutions of the head on 14×14, and its transposed one, 4×4 of 512→17."""
    head = 9 * 14**2 * (256 * 512 + 7 * 512 * 512) + 14**2 * 16 * 512 * 17
    assert (counted("keypointrcnn", False, "conv_fc").macs + head) / 1e9 == pytest.approx(137.42, abs=0.005)


def test_names_are_those_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models.detection")
    for name in DETECTORS:
        with torch.device("meta"):
            theirs = getattr(models, f"{name}_resnet50_fpn")(weights=None, weights_backbone=None)
        own = {key: value.shape for key, value in made(name, False).state_dict().items()}
        assert own == {key: value.shape for key, value in theirs.state_dict().items()}
        with torch.device("meta"):
            alias = build(f"{name}_CPresnet50_fpn", rank=1)
        assert alias.fastrank_origin["name"] == name
    assert default_input_size("maskrcnn_CPresnet50_fpn") == (3, 800, 800)


@pytest.mark.parametrize("trainable", [0, 3, 5])
def test_frozen_parts_are_those_of_the_recipe(trainable: int) -> None:
    models = pytest.importorskip("torchvision.models.detection")
    with torch.device("meta"):
        own = build("fasterrcnn", frozen_norm=True, trainable_layers=trainable)
        body = models.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, trainable_layers=trainable
        )
    wanted = {f"backbone.{key}": value.requires_grad for key, value in body.named_parameters()}
    found = {key: value.requires_grad for key, value in own.named_parameters() if key.startswith("backbone.")}
    assert found == wanted
    assert sum(p.numel() for p in own.parameters()) == 41_808_406 - NORM == 41_755_286
    assert all(value.requires_grad for key, value in own.named_parameters() if not key.startswith("backbone.body"))


def test_frozen_norms_keep_their_values() -> None:
    body = Tiny()
    nn.init.uniform_(body.bn1.weight, 0.5, 2)
    nn.init.uniform_(body.bn1.running_var, 0.5, 2)
    wanted = body.bn1.eval()
    own = build("fasterrcnn", backbone=body, frozen_norm=True, num_classes=3)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(own.get_submodule("backbone.body.bn1").train()(x), wanted(x))


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_in_training_and_findings_in_evaluation(name: str) -> None:
    torch.manual_seed(0)
    model = lighten(build(name, backbone=Tiny(), min_size=64, num_classes=3))
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    target: dict[str, Tensor] = {
        "boxes": torch.tensor([[4.0, 6, 40, 50]]),
        "labels": torch.tensor([2]),
        "masks": torch.ones(1, 64, 80, dtype=torch.uint8),
        "keypoints": torch.full((1, 17, 3), 20.0).index_fill(2, torch.tensor([2]), 2),
    }
    losses = model(images, [target, {**target, "masks": torch.ones(1, 72, 64, dtype=torch.uint8)}])
    assert len(losses) == {"fasterrcnn": 4, "maskrcnn": 5, "keypointrcnn": 5}[name]
    sum(losses.values()).backward()
    stem = model.get_parameter("backbone.body.conv1.weight")
    assert stem.grad is not None
    assert bool(torch.isfinite(stem.grad).all())
    with torch.no_grad():
        found = model.eval()(images)
    assert len(found) == 2
    assert {"boxes", "labels", "scores"} <= found[0].keys()
    assert not hasattr(model, "fastrank_origin"), "its backbone has no name"


ORIGINS: list[dict[str, Any]] = [
    {"name": "fasterrcnn", "rank": 1, "compress_rate": RATES, "num_classes": 4},
    {"name": "maskrcnn", "rank": 2, "frozen_norm": True, "trainable_layers": 3, "min_size": 64, "max_size": 96},
    {"name": "keypointrcnn", "backbone": "torchvision:resnet18", "min_size": [64, 96]},
]


@pytest.mark.parametrize("options", ORIGINS, ids=lambda options: options["name"])
def test_origins_build_again(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build(**options)
        origin = json.loads(json.dumps(model.fastrank_origin))
        assert origin.items() >= {key: value for key, value in options.items() if key != "compress_rate"}.items()
        again = build(**origin)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
    assert identify(model) == origin
    model.transform.min_size = (65,)
    assert identify(model) is None, "what images are resized to is a part of the network"


def test_saved_with_rank_and_rates_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"frozen_norm": True, "trainable_layers": 3, "min_size": 64, "max_size": 96}
    model = build("fasterrcnn", rank=1, compress_rate=RATES, num_classes=4, **options).eval()
    save(model, tmp_path / "detector.safetensors")
    again = load(tmp_path / "detector.safetensors")
    assert (again.training, repr(again.transform)) == (False, repr(model.transform))
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in again.named_parameters()} == wanted
    assert {False, True} == set(wanted.values())
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        maps, others = model.backbone(x), again.backbone(x)
    assert all(torch.equal(maps[level], others[level]) for level in maps)


def test_a_backbone_with_factored_layers(tmp_path: Path) -> None:
    body = build("torchvision:resnet18")
    layer = FusedTucker2Conv.from_conv(body.layer1[0].conv1, (8, 8))
    body.layer1[0].conv1 = layer
    model = build("fasterrcnn", backbone=body, num_classes=3)
    assert model.get_submodule("backbone.body.layer1.0.conv1") is layer
    origin = {"name": "fasterrcnn", "num_classes": 3, "rank": 0, "compress_rate": None}
    assert model.fastrank_origin == {**origin, "backbone": "torchvision:resnet18"}
    save(model, tmp_path / "detector.safetensors")
    again = load(tmp_path / "detector.safetensors")
    assert torch.equal(again.get_parameter("backbone.body.layer1.0.conv1.core"), layer.core)
    small = build("resnet_50", rank=1, compress_rate=RATES)
    with torch.device("meta"):
        by_name = build("fasterrcnn", rank=1, compress_rate=RATES)
    by_module = build("fasterrcnn", backbone=small)
    assert by_module.fastrank_origin == by_name.fastrank_origin
    assert sum(p.numel() for p in by_module.parameters()) == 22_012_182


def test_weights_under_the_names_of_published_files(tmp_path: Path) -> None:
    own = build("maskrcnn", backbone="torchvision:resnet18", num_classes=3)
    state = {key: value for key, value in own.state_dict().items() if not key.endswith("num_batches_tracked")}
    for new, old in (
        *((f"backbone.fpn.inner_blocks.{i}.0.", f"backbone.fpn.inner_blocks.{i}.") for i in range(4)),
        *((f"backbone.fpn.layer_blocks.{i}.0.", f"backbone.fpn.layer_blocks.{i}.") for i in range(4)),
        *((f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.") for i in range(4)),
        ("rpn.head.conv.0.0.", "rpn.head.conv."),
    ):
        for part in ("weight", "bias"):
            state[old + part] = state.pop(new + part)
    torch.save(state, tmp_path / "maskrcnn.pth")
    again = build("maskrcnn", backbone="torchvision:resnet18", num_classes=3, pretrained=tmp_path / "maskrcnn.pth")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in own.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "fasterrcn"}, ValueError, "did you mean 'fasterrcnn'"),
        ({"backbone": 3}, TypeError, r"backbone must be a ResNet \(a module\) or the name of one, got int"),
        ({"backbone": "vgg_16_bn"}, ValueError, "backbone must be a ResNet with the stages .* without layer1"),
        ({"backbone": "resnet_20"}, ValueError, "backbone must be a ResNet with .* got CifarResNet without layer4"),
        ({"backbone": Tiny((8, 8, 12, 16)), "rank": 1}, ValueError, "rank and compress_rate must be left out where"),
        ({"backbone": "torchvision:resnet18", "rank": 1}, ValueError, "rank must be left out for torchvision"),
        ({"compress_rate": "[0.1]"}, ValueError, "compress_rate must be 20 rates long for resnet_50"),
        ({"num_classes": 1}, ValueError, "num_classes, with the background, must be an int at least 2, got 1"),
        ({"trainable_layers": 6}, ValueError, "trainable_layers must be an int between 0 and 5, got 6"),
        ({"frozen_norm": 1}, TypeError, "frozen_norm must be a bool, got int"),
        ({"min_size": []}, TypeError, "min_size must be an int, got list"),
        ({"min_size": [64, 0]}, ValueError, r"min_size\[1\] must be an int at least 1, got 0"),
        ({"max_size": 0}, ValueError, "max_size must be an int at least 1"),
        ({"size": 3}, TypeError, r"options of models.build must be among \['backbone'.*got 'size'"),
        ({"name": "resnet_20", "min_size": 3}, ValueError, "min_size must be left out for resnet_20, which is no"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=message):
        build(**{"name": "fasterrcnn", **options})


def test_a_backbone_that_does_not_run_one_after_the_other_is_named() -> None:
    body = Tiny()
    body.layer3 = nn.Sequential(nn.Conv2d(99, 4, 3))
    with pytest.raises(ValueError, match=r"backbone must be a ResNet whose children run one after the other.*Tiny \("):
        build("fasterrcnn", backbone=body)
    assert body.training


def test_missing_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    with pytest.raises(ImportError, match=r"name 'fasterrcnn' needs torchvision: .*fastrank\[detection\]"):
        build("fasterrcnn")
