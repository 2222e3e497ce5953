"""A recipe: one YAML file that says which network is trained on what, regularised, compressed and fine-tuned how.

    model: {name: lenet5_nrmf}
    data: {name: digits, size: 16}
    train: {epochs: 30, batch_size: 64, lr: 0.05}
    regularize: {method: nrmf, alpha: 0.01}          # optional
    compress: {method: nrmf, energy: 0.95}           # optional
    finetune: {epochs: 10, batch_size: 64, lr: 0.005}  # optional, after compress

Every key is checked before any training starts; an unknown one is named with its nearest known neighbour.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fastrank import _atomic, _checks, complexity, convert, data, io, models, train
from fastrank.methods import make_plan, nrmf, trp
from fastrank.regularize import Regularizer
from fastrank.train import TrainConfig

MAX_BYTES = 2**20
SECTIONS = ("model", "data", "train", "regularize", "compress", "finetune")
REGULARIZERS: dict[str, tuple[str, ...]] = {
    "nrmf": ("alpha", "mode"),
    "trp": ("scheme", "every", "energy", "nuclear"),
}


@dataclass(frozen=True)
class Recipe:
    """The sections of a recipe file, checked; see the module's docstring."""

    model: dict[str, Any]
    data: dict[str, Any]
    train: TrainConfig
    regularize: dict[str, Any] | None = None
    compress: dict[str, Any] | None = None
    finetune: TrainConfig | None = None

    def quick(self) -> Recipe:
        """The same with one epoch of each training, to see that it runs."""
        tuned = None if self.finetune is None else _one_epoch(self.finetune)
        return replace(self, train=_one_epoch(self.train), finetune=tuned)


def load(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML file; FileNotFoundError, ValueError or TypeError with one sentence where that fails."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"recipe must be an existing YAML file, got {os.fspath(path)!r}")
    if os.path.getsize(path) > MAX_BYTES:
        raise _checks.fail("recipe", f"at most {MAX_BYTES} bytes", os.path.getsize(path))
    with open(path, "rb") as file:
        try:
            document = yaml.safe_load(file)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            first = str(error).partition("\n")[0]
            raise _checks.fail("recipe", "YAML", f"{os.fspath(path)}, which is not: {first}") from error
    return parse(document)


def parse(document: Any) -> Recipe:
    """The recipe in a parsed YAML document."""
    sections = _mapping("recipe", document, SECTIONS)
    for name in ("model", "data", "train"):
        if name not in sections:
            raise _checks.fail("recipe", f"a mapping with the section {name!r}", sorted(sections))
    model = _mapping("model", sections["model"], ("name", "num_classes", "rank", "compress_rate", "pretrained"))
    source = _mapping("data", sections["data"])
    for name, section in (("model", model), ("data", source)):
        if not isinstance(section.get("name"), str):
            raise _checks.fail(f"{name}.name", "a str", repr(section.get("name")))
    _checks.choice("data.name", source["name"], data.NAMES)
    regularize, compress, finetune = (sections.get(name) for name in ("regularize", "compress", "finetune"))
    if regularize is not None:
        method = _mapping("regularize", regularize).get("method")
        known = REGULARIZERS[_checks.choice("regularize.method", method, REGULARIZERS)]
        _mapping("regularize", regularize, ("method", *known))
    if compress is not None and not isinstance(_mapping("compress", compress).get("method"), str):
        raise _checks.fail("compress.method", "a str", repr(compress.get("method")))
    if finetune is not None and compress is None:
        raise _checks.fail("finetune", "left out where nothing is compressed", "a section")
    return Recipe(
        model,
        source,
        _config("train", sections["train"]),
        regularize,
        compress,
        None if finetune is None else _config("finetune", finetune),
    )


def load_data(section: Mapping[str, Any], root: str | None) -> tuple[Any, Any]:
    """The training and test sets that a recipe's data section names."""
    options = {key: value for key, value in section.items() if key not in ("name", "root")}
    where = root if root is not None else section.get("root")
    name = section["name"]
    return data.load(name, root=where, split="train", **options), data.load(name, root=where, split="test", **options)


def regularizers(model: nn.Module, section: Mapping[str, Any] | None) -> list[Regularizer]:
    """The regularisers that a recipe asks for."""
    if section is None:
        return []
    options = {key: value for key, value in section.items() if key != "method"}
    return [nrmf.regularizer(model, **options)] if section["method"] == "nrmf" else trp.regularizers(model, **options)


def run(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    root: str | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train, compress and fine-tune as the recipe says; everything lands in the folder `out`.

    Writes checkpoints under train/ and finetune/ (a killed run goes on from the newest), recipe.json, plan.json,
    model.safetensors and summary.json, which is also returned. A folder that holds a run of another recipe is refused
    unless `resume` is False. The initial weights come from the training seed.
    """
    out = Path(out)
    train_set, test_set = load_data(recipe.data, root)
    arguments = {"num_classes": train_set.classes, **recipe.model}
    with torch.random.fork_rng():
        torch.manual_seed(recipe.train.seed)
        model = models.build(**arguments)
    complexity.count(model, train_set.shape)  # a network that refuses these images shows before the training
    penalties = regularizers(model, recipe.regularize)
    example = torch.zeros(1, *train_set.shape)
    if recipe.compress is not None:
        make_plan(model, **{"example_input": example, **recipe.compress})  # a wrong option shows before the training
    _claim(out, recipe, resume)
    train.fit(
        model,
        train_set,
        test_set,
        recipe.train,
        regularizers=penalties,
        run_dir=out / "train",
        resume=resume,
        label="train",
        progress=progress,
    )
    summary: dict[str, Any] = {"model": arguments, "data": recipe.data, "dense": _measure(model, test_set)}
    if recipe.compress is not None:
        plan = make_plan(model, **{"example_input": example, **recipe.compress})
        plan.save(out / "plan.json")
        model = convert.compress(model, plan)
        summary["compressed"] = _measure(model, test_set)
        if recipe.finetune is not None:
            train.fit(
                model,
                train_set,
                test_set,
                recipe.finetune,
                run_dir=out / "finetune",
                resume=resume,
                label="fine-tune",
                progress=progress,
            )
            summary["finetuned"] = _measure(model, test_set)
    io.save(model, out / "model.safetensors")
    _atomic.write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _claim(out: Path, recipe: Recipe, resume: bool) -> None:
    """Make the folder this recipe's; ValueError where it holds the run of another one and is to be resumed."""
    record = out / "recipe.json"
    wanted = json.loads(json.dumps(asdict(recipe)))
    if resume and record.is_file():
        try:
            old, new = _flat(json.loads(record.read_bytes())), _flat(wanted)
        except (ValueError, RecursionError) as error:
            raise _checks.fail("out", "a folder with a whole recipe.json", f"{record}, which is no JSON") from error
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                found = f"{out} with {key} {old.get(key)!r} where this recipe has {new.get(key)!r}"
                raise _checks.fail("out", "free or a run of this recipe", f"{found}; --fresh starts over")
    out.mkdir(parents=True, exist_ok=True)
    if recipe.compress is None:
        (out / "plan.json").unlink(missing_ok=True)
    _atomic.write_atomically(record, (json.dumps(wanted, indent=2) + "\n").encode())


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for inner, v in value.items() for key, leaf in _flat(v, f"{name}.{inner}".lstrip(".")).items()}


def _measure(model: nn.Module, test_set: Any) -> dict[str, Any]:
    found = complexity.count(model, test_set.shape)
    return {**asdict(train.evaluate(model, test_set)), "macs": found.macs, "params": found.params}


def _mapping(name: str, value: Any, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _checks.fail_type(name, "a mapping", value)
    for key in value:
        if known is not None:
            _checks.choice(f"key of {name}", key, known)
    return value


def _config(name: str, section: Any) -> TrainConfig:
    known = tuple(field.name for field in fields(TrainConfig))
    options = _mapping(name, section, known)
    for key in ("epochs", "batch_size", "lr"):
        if key not in options:
            raise _checks.fail(name, f"a mapping with the key {key!r}", sorted(options))
    try:
        return TrainConfig(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}.{error}") from error


def _one_epoch(config: TrainConfig) -> TrainConfig:
    # One epoch has no room for milestones.
    schedule = "constant" if config.schedule == "steps" else config.schedule
    epochs = min(config.epochs, 1)
    return replace(
        config, epochs=epochs, warmup_epochs=min(config.warmup_epochs, epochs), schedule=schedule, milestones=()
    )
