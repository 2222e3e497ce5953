"""Recipes carried out: they run, resume and repeat; what only the network can refuse is refused before the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import write_coco
from safetensors.torch import save_file

import fastrank
from fastrank import models, recipe
from fastrank.recipe import _run
from fastrank.regularize import GramTrace, LowRankProjection, NuclearNorm

ROOT = Path(__file__).resolve().parents[2]
DIGITS = sorted((ROOT / "recipes").glob("*_digits.yaml"))
TRAIN = {"epochs": 1, "batch_size": 64, "lr": 0.01}
SMALL: dict[str, Any] = {
    "model": {"name": "lenet5_nrmf"},
    "data": {"name": "digits", "held_out": 0.9},
    "train": TRAIN,
    "regularize": {"method": "nrmf", "alpha": 0.01},
    "compress": {"method": "nrmf", "energy": 0.5},
    "finetune": TRAIN,
}


def changed(**sections: Any) -> dict[str, Any]:
    return {key: value for key, value in {**SMALL, **sections}.items() if value is not None}


@pytest.mark.parametrize("path", DIGITS, ids=lambda path: path.stem)
def test_every_digits_recipe_runs_quickly(path: Path, tmp_path: Path) -> None:
    summary = recipe.run(recipe.load(path).quick(), tmp_path, progress=False)
    assert summary["speed_up"] >= 1
    model = fastrank.load(tmp_path / "model.safetensors")
    shape = tuple(int(n) for n in torch.zeros(1, *_run.load_data(recipe.load(path).data, None)[1].shape).shape[1:])
    assert fastrank.complexity.count(model, shape).macs == summary["finetuned"]["macs"]


def test_a_recipe_runs_and_resumes(tmp_path: Path) -> None:
    parsed = recipe.parse(SMALL)
    summary = recipe.run(parsed, tmp_path, progress=False)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["compressed"]["params"] < summary["dense"]["params"]
    assert summary["speed_up"] == summary["dense"]["macs"] / summary["finetuned"]["macs"]
    model = fastrank.load(tmp_path / "model.safetensors")
    assert model.fastrank_plan == fastrank.Plan.load(tmp_path / "plan.json")
    assert fastrank.complexity.count(model, (1, 8, 8)).macs == summary["finetuned"]["macs"]
    # Both trainings are finished: a second run reads their checkpoints and changes nothing.
    assert recipe.run(parsed, tmp_path, progress=False) == summary


def test_a_recipe_is_deterministic_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = recipe.run(recipe.parse(SMALL), tmp_path / "a", progress=False)
    after = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(after, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert recipe.run(recipe.parse(SMALL), tmp_path / "b", progress=False) == first


def test_regularizers_by_name() -> None:
    model = fastrank.models.build("lenet5_nrmf")
    assert recipe.regularizers(model, None) == []
    assert isinstance(recipe.regularizers(model, {"method": "nrmf"})[0], NuclearNorm)
    assert isinstance(recipe.regularizers(model, {"method": "nrmf", "mode": "gram"})[0], GramTrace)
    found = recipe.regularizers(model, {"method": "trp", "nuclear": 3e-4})
    assert [type(r) for r in found] == [NuclearNorm, LowRankProjection]


def test_a_donor_gives_its_ranks_and_nothing_else(tmp_path: Path) -> None:
    """NRMF's cross combinations: the ranks of one training in the weights of the other."""
    regularised = {"method": "nrmf", "alpha": 1.0}
    own = recipe.run(recipe.parse(changed(regularize=regularised)), tmp_path / "own", progress=False)
    crossed = recipe.parse(
        changed(regularize=None, compress={**SMALL["compress"], "donor": {"regularize": regularised}})
    )
    found = recipe.run(crossed, tmp_path / "crossed", progress=False)
    plain = recipe.run(recipe.parse(changed(regularize=None)), tmp_path / "plain", progress=False)
    assert found["dense"] == plain["dense"]
    assert found["compressed"]["params"] == own["compressed"]["params"] != plain["compressed"]["params"]
    assert (tmp_path / "crossed" / "donor").is_dir()


def test_layers_are_decomposed_for_the_training_images(tmp_path: Path) -> None:
    """At the same ranks, and with the weights that a calibration on these images gives."""
    trained = {"regularize": None, "finetune": None, "train": {"epochs": 6, "batch_size": 64, "lr": 0.1}}
    plan = {"method": "nrmf", "energy": 0.6}
    found, plain = (
        recipe.run(recipe.parse(changed(**trained, compress=section)), tmp_path / name, progress=False)
        for name, section in (("own", {**plan, "calibrate": 256}), ("plain", plan))
    )
    assert found["dense"] == plain["dense"]
    assert found["compressed"]["params"] == plain["compressed"]["params"]
    assert found["compressed"]["loss"] < plain["compressed"]["loss"]


def test_weights_given_with_the_run_are_the_start(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = models.build("lenet5_nrmf")
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    document = changed(model={"name": "lenet5_nrmf", "pretrained": True}, train=None, regularize=None, finetune=None)
    with pytest.raises(ValueError, match=r"pretrained must be a file with trained weights, of lenet5_nrmf"):
        recipe.run(recipe.parse(document), tmp_path / "out", progress=False)
    recipe.run(recipe.parse(document), tmp_path / "out", pretrained=str(path), progress=False)
    plan = fastrank.make_plan(network, "nrmf", energy=0.5, example_input=torch.zeros(1, 1, 8, 8))
    assert fastrank.Plan.load(tmp_path / "out" / "plan.json") == plan


def test_transfer_takes_everything_but_the_classifier(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = models.build("torchvision:resnet18")
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    arguments = {"name": "torchvision:resnet18", "num_classes": 10, "pretrained": str(path), "transfer": True}
    model, wanted = _run.build(arguments, 0), source.state_dict()
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, wanted[key])
    assert model.fc.out_features == 10
    assert torch.equal(_run.build(arguments, 0).fc.weight, model.fc.weight)


def test_a_detection_recipe_runs_over_a_saved_backbone(tmp_path: Path) -> None:
    for part in ("train2017", "val2017"):
        write_coco(tmp_path / "coco", part, count=2)
    backbone = models.build("resnet_50", rank=1, compress_rate="[0.5]*4+[0.75]*16")
    fastrank.save(backbone, tmp_path / "backbone.safetensors")
    document = {
        "model": {"name": "fasterrcnn", "backbone": True, "min_size": 64, "max_size": 96},
        "data": {"name": "coco"},
        "train": {"epochs": 1, "batch_size": 2, "lr": 0.001},
    }
    where: dict[str, Any] = {"root": str(tmp_path / "coco"), "progress": False}
    with pytest.raises(ValueError, match=r"pretrained must be a file saved by fastrank as its backbone"):
        recipe.run(recipe.parse(document), tmp_path / "out", **where)
    given = str(tmp_path / "backbone.safetensors")
    summary = recipe.run(recipe.parse(document), tmp_path / "out", pretrained=given, **where)
    assert summary["dense"]["kind"] == "bbox"
    assert summary["dense"]["count"] == 2
    model = fastrank.load(tmp_path / "out" / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == summary["dense"]["params"]
    assert model.backbone.body.layer1[0].conv2.rank == 1


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"model": {"name": "lenet_5"}}, "lenet5_nrmf"),
        ({"data": {"name": "digits", "side": 3}}, "side"),
        ({"data": {"name": "digits", "size": 2}}, "input_size must be a size that the model accepts"),
        ({"compress": {"method": "nrmf", "skip": ["conv9"]}}, "skip"),
    ],
)
def test_what_only_the_network_can_refuse_is_refused_before_training(
    section: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=expected):
        recipe.run(recipe.parse(changed(**section)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"data": {"name": "digits", "held_out": 0.9, "size": 12}}, "data.size None where this recipe has 12"),
        ({"compress": {"method": "nrmf", "energy": 0.6}}, "compress.energy 0.5 where this recipe has 0.6"),
        ({"train": {**TRAIN, "lr": 0.02}}, "train.lr 0.01 where this recipe has 0.02"),
    ],
)
def test_a_folder_of_another_recipe_is_refused(section: dict[str, Any], expected: str, tmp_path: Path) -> None:
    _run._claim(tmp_path, recipe.parse(SMALL), resume=True)
    other = recipe.parse(changed(**section))
    with pytest.raises(ValueError, match=expected):
        recipe.run(other, tmp_path, progress=False)
    _run._claim(tmp_path, other, resume=False)


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"^out must be a folder with a whole recipe.json"):
        _run._claim(tmp_path, recipe.parse(SMALL), resume=True)
