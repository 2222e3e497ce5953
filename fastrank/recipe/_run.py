"""A recipe carried out: train, compress, fine-tune, and leave everything in one folder."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrank import _atomic, _checks, complexity, convert, data, io, models, report, train
from fastrank._version import __version__
from fastrank.calibration import calibrate
from fastrank.distributed import Parallel
from fastrank.methods import make_plan, nrmf, trp
from fastrank.methods.systems import SYSTEMS, Phase
from fastrank.plan import Plan
from fastrank.recipe._parse import Recipe
from fastrank.regularize import Regularizer
from fastrank.train import TrainConfig

NOT_OF_PLANS = ("method", "donor", "calibrate")
Logger = Callable[[Path, nn.Module], Callable[[train.EpochRow], object]]


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
    pretrained: str | None = None,
    resume: bool = True,
    progress: bool | None = None,
    parallel: str | None = None,
    logger: Logger | None = None,
) -> dict[str, Any]:
    """Train, compress and fine-tune as the recipe says; everything lands in the folder `out`.

    pretrained: the weights of the network, for recipes that start from a trained one (model.pretrained: true).
    Writes checkpoints under train/, the phases of the compression and finetune/ (a killed run goes on from the newest),
    recipe.json, plan.json, model.safetensors and summary.json, which is also returned. A folder that holds a run of
    another recipe is refused unless `resume` is False. The initial weights come from the training seed.
    parallel: "ddp" or "fsdp", where all ranks of a process group call this alike; rank 0 writes.
    logger: called with a folder and the model before each training, gives what is called with every epoch's row, such
    as `fastrank.integrations.tensorboard.epoch_logger`.
    """
    return _Run(recipe, Path(out), root, pretrained, resume, progress, Parallel(parallel), logger).all()


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        root: str | None,
        pretrained: str | None,
        resume: bool,
        progress: bool | None,
        ranks: Parallel,
        logger: Logger | None,
    ) -> None:
        self.recipe, self.out, self.resume, self.progress, self.ranks = recipe, out, resume, progress, ranks
        self.logger = logger
        self.train_set, self.test_set = load_data(recipe.data, root)
        self.example = torch.zeros(1, *self.train_set.shape)
        self.task = "detection" if isinstance(self.test_set, data.CocoSet) else "classification"
        self.arguments = {"num_classes": self.train_set.classes, **recipe.model}
        if pretrained is not None:
            self.arguments["pretrained"] = pretrained

    def all(self) -> dict[str, Any]:
        recipe, out = self.recipe, self.out
        model = build(self.arguments, 0 if recipe.train is None else recipe.train.seed)
        complexity.count(model, self.train_set.shape)  # a network that refuses these images shows before the training
        penalties = regularizers(model, recipe.regularize)
        if recipe.compress is not None and recipe.compress["method"] not in SYSTEMS:
            self.plan(model)  # a wrong option shows before the training
        if self.ranks.main:
            _claim(out, recipe, self.resume)
        self.ranks.wait()
        if recipe.train is not None:
            self.fit(model, recipe.train, penalties, "train")
        summary: dict[str, Any] = {
            "model": self.arguments,
            "data": recipe.data,
            "input_size": list(self.train_set.shape),
            "fastrank": __version__,
            "machine": {"platform": platform.platform(), "torch": torch.__version__},
            "dense": self.measure(model),
        }
        if recipe.experiment:
            summary["experiment"] = recipe.experiment
        if recipe.compress is not None:
            model = self.compressed(model)
            plan = getattr(model, "fastrank_plan", None)
            if isinstance(plan, Plan) and self.ranks.main:
                plan.save(out / "plan.json")
            summary["compressed"] = self.measure(model)
            if recipe.finetune is not None:
                self.fit(model, recipe.finetune, [], "finetune")
                summary["finetuned"] = self.measure(model)
            last = summary.get("finetuned", summary["compressed"])
            summary["speed_up"] = summary["dense"]["macs"] / last["macs"]
        if self.ranks.main:
            io.save(model, out / "model.safetensors", input_size=self.train_set.shape)
            _atomic.write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        return summary

    def compressed(self, model: nn.Module) -> nn.Module:
        section = self.recipe.compress
        assert section is not None
        if section["method"] in SYSTEMS:
            options = {key: value for key, value in section.items() if key != "method"}
            system = SYSTEMS[section["method"]]
            phases = {name: self.phase(config) for name, config in self.recipe.phases.items()}
            return system.run(model, self.example, phases, {**system.options, **options})
        ranks_of = model
        if "donor" in section:
            # The ranks come from a twin: the same start and training, but another regulariser (or none).
            assert self.recipe.train is not None
            ranks_of = build(self.arguments, self.recipe.train.seed)
            twin = regularizers(ranks_of, (section["donor"] or {}).get("regularize"))
            self.fit(ranks_of, self.recipe.train, twin, "donor")
        images = section.get("calibrate")
        calibration = None if images is None else calibrate(model, self.train_set, images=images)
        return convert.compress(model, self.plan(ranks_of), calibration=calibration)

    def plan(self, model: nn.Module) -> Plan:
        assert self.recipe.compress is not None
        options = {key: value for key, value in self.recipe.compress.items() if key not in NOT_OF_PLANS}
        made = make_plan(model, self.recipe.compress["method"], example_input=self.example, **options)
        # Measured times differ from rank to rank: one plan counts.
        return Plan.from_json(self.ranks.decide(made.to_json()))

    def phase(self, config: TrainConfig) -> Phase:
        return lambda model, penalties, label: self.fit(model, config, penalties, label)

    def fit(self, model: nn.Module, config: TrainConfig, penalties: list[Regularizer], label: str) -> None:
        train.fit(
            model,
            self.train_set,
            self.test_set,
            config,
            regularizers=penalties,
            run_dir=self.out / label,
            resume=self.resume,
            label=label,
            progress=self.progress,
            task=self.task,
            parallel=self.ranks.kind,
            on_epoch=self.recorder(model, label),
        )

    def recorder(self, model: nn.Module, label: str) -> Callable[[train.EpochRow], object] | None:
        """What keeps the spectra of every epoch, and shows them; none for sharded networks, of which rank 0, which
        alone is called, holds only a part."""
        if self.ranks.kind == "fsdp" or not self.ranks.main:
            return None
        recorder = report.Recorder(model, self.out / label, resume=self.resume)
        if self.logger is None:
            return recorder
        log = self.logger(self.out / "tensorboard" / label, model)

        def both(row: train.EpochRow) -> None:
            recorder(row)
            log(row)

        return both

    def measure(self, model: nn.Module) -> dict[str, Any]:
        cost = complexity.count(model, self.test_set.shape)
        if self.task == "classification":
            found: Any = train.evaluate(model, self.test_set, parallel=self.ranks)
        else:
            found = train.evaluate_detection(model, self.test_set)
        return {**asdict(found), "macs": cost.macs, "params": cost.params}


def build(arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """The network of a recipe's model section, its fresh weights drawn from `seed`.

    pretrained: the file of its weights; true stands for one that the caller has to give. transfer: the file is of the
    network for 1000 classes, whose classifier is left behind. backbone: true stands for a ResNet-50 that
    `fastrank.save` wrote, compressed or not, given in place of pretrained weights.
    """
    options = {key: value for key, value in arguments.items() if key != "transfer"}
    if options.get("pretrained") is True or (options.get("backbone") is True and "pretrained" not in options):
        what = "a file saved by fastrank as its backbone" if "backbone" in options else "a file with trained weights"
        raise _checks.fail("pretrained", f"{what}, of {options['name']} (--pretrained FILE)", "none")
    if options.get("backbone") is True:
        options["backbone"] = io.load(options.pop("pretrained"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not arguments.get("transfer"):
            return models.build(**options)
        model = models.build(**{**options, "pretrained": None})
        trained = models.build(**{**options, "num_classes": 1000}).state_dict()
    state = {
        key: trained[key] if trained[key].shape == value.shape else value for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


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
    for name in ("recipe.json", "plan.json", "model.safetensors", "summary.json"):
        _atomic.remove_leftovers(out / name)
    if recipe.compress is None:
        (out / "plan.json").unlink(missing_ok=True)
    _atomic.write_atomically(record, (json.dumps(wanted, indent=2) + "\n").encode())


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for inner, v in value.items() for key, leaf in _flat(v, f"{name}.{inner}".lstrip(".")).items()}
