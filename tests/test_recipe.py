"""Recipes: every shipped file parses, a small one runs and resumes, a wrong one is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastrank
from fastrank import recipe
from fastrank.regularize import GramTrace, LowRankProjection, NuclearNorm

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {
    "model": {"name": "lenet5_nrmf"},
    "data": {"name": "digits", "held_out": 0.9},
    "train": {"epochs": 1, "batch_size": 64, "lr": 0.01},
    "regularize": {"method": "nrmf", "alpha": 0.01},
    "compress": {"method": "nrmf", "energy": 0.5},
    "finetune": {"epochs": 1, "batch_size": 64, "lr": 0.01},
}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_builds(path: Path) -> None:
    found = recipe.load(path)
    model = fastrank.models.build(**found.model)
    assert found.regularize is None or recipe.regularizers(model, found.regularize)
    if found.compress is not None:
        assert fastrank.make_plan(model, **found.compress).layers
    quick = found.quick()
    assert quick.train.epochs == 1
    assert quick.train.lr == found.train.lr


def test_a_recipe_runs_and_resumes(tmp_path: Path) -> None:
    parsed = recipe.parse(SMALL)
    summary = recipe.run(parsed, tmp_path, progress=False)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["compressed"]["params"] < summary["dense"]["params"]
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


def changed(**sections: Any) -> dict[str, Any]:
    return {**SMALL, **sections}


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no mapping": ([1, 2], TypeError, "recipe must be a mapping"),
    "unknown section": (changed(trian={}), ValueError, "did you mean 'train'"),
    "missing section": ({"model": {"name": "lenet5_nrmf"}}, ValueError, "'data'"),
    "unknown key": (
        changed(train={"epochs": 1, "batch_size": 1, "lr": 0.1, "momentun": 0.9}),
        ValueError,
        "did you mean 'momentum'",
    ),
    "missing key": (changed(train={"epochs": 1, "lr": 0.1}), ValueError, "batch_size"),
    "wrong value": (changed(train={"epochs": -1, "batch_size": 1, "lr": 0.1}), ValueError, "train.epochs"),
    "wrong type": (changed(train={"epochs": "many", "batch_size": 1, "lr": 0.1}), TypeError, "train.epochs"),
    "unknown data": (changed(data={"name": "mnist"}), ValueError, "data.name"),
    "unknown regulariser": (changed(regularize={"method": "nmrf"}), ValueError, "did you mean 'nrmf'"),
    "option of another regulariser": (changed(regularize={"method": "nrmf", "every": 3}), ValueError, "every"),
    "finetune without compress": ({k: v for k, v in SMALL.items() if k != "compress"}, ValueError, "finetune"),
    "model without a name": (changed(model={"rank": 2}), ValueError, "model.name"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_recipes_are_refused_when_parsed(case: str) -> None:
    document, kind, expected = BAD[case]
    with pytest.raises(kind, match="must be") as caught:
        recipe.parse(document)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"compress": {"method": "nrmf", "enregy": 0.9}}, "did you mean 'energy'"),
        ({"compress": {"method": "cp"}}, "method"),
        ({"model": {"name": "lenet_5"}}, "lenet5_nrmf"),
        ({"data": {"name": "digits", "side": 3}}, "side"),
    ],
)
def test_what_only_the_network_can_refuse_is_refused_before_training(
    section: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=expected):
        recipe.run(recipe.parse(changed(**section)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["model: [", "a: !!python/object/apply:os.system ['true']", "\x00", "[" * 10_000])
def test_files_that_are_not_recipes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="recipe must be YAML"):
        recipe.load(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "x" * recipe.MAX_BYTES}))
    with pytest.raises(ValueError, match="at most"):
        recipe.load(path)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"data": {"name": "digits", "held_out": 0.9, "size": 12}}, "data.size None where this recipe has 12"),
        ({"compress": {"method": "nrmf", "energy": 0.6}}, "compress.energy 0.5 where this recipe has 0.6"),
        ({"train": {"epochs": 1, "batch_size": 64, "lr": 0.02}}, "train.lr 0.01 where this recipe has 0.02"),
    ],
)
def test_a_folder_of_another_recipe_is_refused(section: dict[str, Any], expected: str, tmp_path: Path) -> None:
    recipe._claim(tmp_path, recipe.parse(SMALL), resume=True)
    other = recipe.parse(changed(**section))
    with pytest.raises(ValueError, match=expected):
        recipe.run(other, tmp_path, progress=False)
    recipe._claim(tmp_path, other, resume=False)


def test_a_network_that_refuses_the_images_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="input_size must be a size that the model accepts"):
        recipe.run(recipe.parse(changed(data={"name": "digits", "size": 2})), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"^out must be a folder with a whole recipe.json"):
        recipe._claim(tmp_path, recipe.parse(SMALL), resume=True)
