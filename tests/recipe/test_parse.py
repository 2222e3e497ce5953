"""Recipe files: every shipped one is whole and says what its figures are; a wrong one is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastrank import complexity, models, recipe
from fastrank.methods import METHODS
from fastrank.methods.systems import SYSTEMS
from fastrank.recipe import _parse

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
PUBLISHED = {
    "top1", "top5", "params", "macs", "speed_up", "macs_fewer", "params_fewer", "pruned_percent",
    "top1_epoch_1", "top1_epoch_50", "ap", "ap50", "ap75",
}  # fmt: skip
SMALL: dict[str, Any] = {
    "model": {"name": "lenet5_nrmf"},
    "data": {"name": "digits", "held_out": 0.9},
    "train": {"epochs": 1, "batch_size": 64, "lr": 0.01},
    "regularize": {"method": "nrmf", "alpha": 0.01},
    "compress": {"method": "nrmf", "energy": 0.5},
    "finetune": {"epochs": 1, "batch_size": 64, "lr": 0.01},
}
CLOSE = {"epochs": 1, "batch_size": 64, "lr": 0.001}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_whole(path: Path) -> None:
    found = recipe.load(path)
    assert found.experiment["source"]
    assert set(found.experiment.get("published", {})) <= PUBLISHED
    with torch.device("meta"):
        arguments = {k: v for k, v in found.model.items() if k not in ("pretrained", "transfer") and v is not True}
        models.build(**arguments)
    assert found.regularize is None or recipe.regularizers(models.build("lenet5_nrmf"), found.regularize)
    if found.train is None or found.model.get("pretrained"):
        assert "--pretrained" in path.read_text() or "extends" in path.read_text()
    quick = found.quick()
    for config in (quick.train, quick.finetune, *quick.phases.values()):
        assert config is None or config.epochs == 1


def test_there_is_a_recipe_for_every_family_and_a_twin_on_the_digits() -> None:
    families = {"trp", "nrmf", "funnel", "norton", "vbmf", "musco"}
    assert {path.name.partition("_")[0] for path in SHIPPED} == families
    assert {path.name.partition("_")[0] for path in SHIPPED if path.stem.endswith("digits")} == families
    assert (ROOT / "recipes" / "trp_resnet56_cifar10.yaml").is_file()


NORTON = [path for path in SHIPPED if path.name.startswith("norton") and "coco" not in path.stem]
PRINTED = [path for path in NORTON if "macs" in recipe.load(path).experiment.get("published", {})]


@pytest.mark.parametrize("path", PRINTED, ids=lambda path: path.stem)
def test_the_counts_that_a_norton_recipe_publishes_are_what_it_makes(path: Path) -> None:
    found = recipe.load(path)
    assert found.compress is not None
    name, rates = found.model["name"], found.compress.get("compress_rate")
    with torch.device("meta"):
        model = models.build(name, rank=found.compress["rank"], compress_rate=rates)
    count = complexity.count(model.to_empty(device="cpu"), models.default_input_size(name), convention="ptflops")
    published = found.experiment["published"]
    if isinstance(published["macs"], int):
        assert published["macs"] == count.macs
        assert published["params"] in (count.params, count.params_without_block_biases)
    else:
        # Printed in two decimals of a million (or of a billion), some rounded and some cut off: one in the last digit.
        step = 1e7 if published["macs"] >= 1e9 else 1e4
        assert abs(published["macs"] - count.macs) <= step
        assert min(abs(published["params"] - n) for n in (count.params, count.params_without_block_biases)) <= 1e4


def changed(**sections: Any) -> dict[str, Any]:
    return {**SMALL, **sections}


def without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in SMALL.items() if key not in names}


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no mapping": ([1, 2], TypeError, "recipe must be a mapping"),
    "unknown section": (changed(trian={}), ValueError, "did you mean 'train'"),
    "missing section": ({"model": {"name": "lenet5_nrmf"}}, ValueError, "'data'"),
    "nothing to start from": (without("train", "regularize"), ValueError, "'train' or with model.pretrained"),
    "regularizer without training": (
        {**without("train"), "model": {"name": "lenet5_nrmf", "pretrained": True}},
        ValueError,
        "regularize must be left out",
    ),
    "unknown key": (
        changed(train={"epochs": 1, "batch_size": 1, "lr": 0.1, "momentun": 0.9}),
        ValueError,
        "did you mean 'momentum'",
    ),
    "missing key": (changed(train={"epochs": 1, "lr": 0.1}), ValueError, "batch_size"),
    "wrong value": (changed(train={"epochs": -1, "batch_size": 1, "lr": 0.1}), ValueError, "train.epochs"),
    "wrong type": (changed(train={"epochs": "many", "batch_size": 1, "lr": 0.1}), TypeError, "train.epochs"),
    "unknown data": (changed(data={"name": "mnits"}), ValueError, "data.name"),
    "unknown regulariser": (changed(regularize={"method": "nmrf"}), ValueError, "did you mean 'nrmf'"),
    "option of another regulariser": (changed(regularize={"method": "nrmf", "every": 3}), ValueError, "every"),
    "finetune without compress": (without("compress"), ValueError, "finetune"),
    "model without a name": (changed(model={"rank": 2}), ValueError, "model.name"),
    "transfer that is no bool": (changed(model={"name": "lenet5_nrmf", "transfer": 1}), TypeError, "model.transfer"),
    "unknown method": (changed(compress={"method": "funel"}), ValueError, "did you mean 'funnel'"),
    "unknown option of a plan": (changed(compress={"method": "nrmf", "enregy": 1}), ValueError, "mean 'energy'"),
    "unknown option of a system": (
        changed(compress={"method": "funnel", "treshold": 0.1, "close": CLOSE}),
        ValueError,
        "did you mean 'threshold'",
    ),
    "system without its training": (changed(compress={"method": "funnel"}), ValueError, "'close'"),
    "wrong training of a system": (
        changed(compress={"method": "musco", "between": {**CLOSE, "epochs": -1}}),
        ValueError,
        "compress.between.epochs",
    ),
    "wrong schedule": (
        changed(compress={"method": "funnel", "close": CLOSE, "schedule": {"kind": "liner"}}),
        ValueError,
        "did you mean 'linear'",
    ),
    "wrong key of a schedule": (
        changed(compress={"method": "funnel", "close": CLOSE, "schedule": {"kind": "linear", "strat": 1.0}}),
        ValueError,
        "did you mean 'start'",
    ),
    "missing key of a schedule": (
        changed(compress={"method": "funnel", "close": CLOSE, "schedule": {"kind": "constant"}}),
        TypeError,
        "schedule",
    ),
    "wrong weaken": (changed(compress={"method": "musco", "weaken": 1.5}), ValueError, "weaken"),
    "wrong rank": (changed(compress={"method": "norton", "rank": 0}), ValueError, "rank"),
    "no images to calibrate on": (changed(compress={"method": "nrmf", "calibrate": 0}), ValueError, "calibrate"),
    "unknown key of the donor": (changed(compress={"method": "vbmf", "donor": {"regularise": 1}}), ValueError, "donor"),
    "unknown regulariser of the donor": (
        changed(compress={"method": "vbmf", "donor": {"regularize": {"method": "l1"}}}),
        ValueError,
        "donor.regularize.method",
    ),
    "ours that is not there": (changed(experiment={"ours": ["train.lrr"]}), ValueError, "experiment.ours"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_recipes_are_refused_when_parsed(case: str) -> None:
    document, kind, expected = BAD[case]
    with pytest.raises(kind) as caught:
        recipe.parse(document)
    assert expected in str(caught.value)


def test_every_method_of_a_recipe_has_one_meaning() -> None:
    # "norton" is both: as a system it decomposes and prunes, as a plan it only decomposes.
    assert set(METHODS) & set(SYSTEMS) == {"norton"}


def test_extends_lays_one_file_over_another(tmp_path: Path) -> None:
    experiment = {"source": "there", "published": {"top1": 1.0}, "ours": ["train.lr"]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**SMALL, "experiment": experiment}))
    top = {"extends": "base.yaml", "train": {"lr": 0.5}, "regularize": None, "compress": {"energy": 0.7}}
    (tmp_path / "top.yaml").write_text(yaml.safe_dump(top))
    found, base = recipe.load(tmp_path / "top.yaml"), recipe.load(tmp_path / "base.yaml")
    assert (found.train.lr, found.train.batch_size) == (0.5, 64)
    assert found.regularize is None
    assert found.compress == {"method": "nrmf", "energy": 0.7}
    assert found.experiment == {"source": "there", "ours": ["train.lr"]}
    assert (found.model, found.data, found.finetune) == (base.model, base.data, base.finetune)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("../base.yaml", "extends must be the name of a file in the same folder"),
        ("/etc/passwd", "extends must be the name of a file in the same folder"),
        (3, "extends must be the name"),
        ("absent.yaml", "recipe must be an existing YAML file"),
        ("top.yaml", "a chain of at most"),
    ],
)
def test_extends_stays_in_its_folder_and_ends(base: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text(yaml.safe_dump({"extends": base}))
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        recipe.load(tmp_path / "top.yaml")


@pytest.mark.parametrize("text", ["model: [", "a: !!python/object/apply:os.system ['true']", "\x00", "[" * 10_000])
def test_files_that_are_not_recipes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="recipe must be YAML"):
        recipe.load(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "x" * _parse.MAX_BYTES}))
    with pytest.raises(ValueError, match="at most"):
        recipe.load(path)
