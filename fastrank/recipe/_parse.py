"""A recipe file read and checked; nothing is built here.

    experiment: {source: "NRMF README", published: {top1: 93.91}, ours: [train.lr]}   # optional, for readers
    model: {name: lenet5_nrmf}
    data: {name: digits, size: 16}
    train: {epochs: 30, batch_size: 64, lr: 0.05}      # may be left out where the model brings weights
    regularize: {method: nrmf, alpha: 0.01}            # optional
    compress: {method: nrmf, energy: 0.95}             # optional
    finetune: {epochs: 10, batch_size: 64, lr: 0.005}  # optional, after compress

`extends: other.yaml` takes another file of the same folder and overrides it, mapping by mapping; null removes a
section, and published figures are never inherited. Every key is checked before any training starts; an unknown one is
named with its nearest known neighbour.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fastrank import _checks, data, models
from fastrank.methods import METHODS, check_options
from fastrank.methods.systems import SYSTEMS, check
from fastrank.train import TrainConfig

MAX_BYTES = 2**20
MAX_DEPTH = 4
MAX_SCALAR = 64
SECTIONS = ("experiment", "model", "data", "train", "regularize", "compress", "finetune")
MODEL_KEYS = ("name", "num_classes", "rank", "compress_rate", "pretrained", "transfer", *models.DETECTOR_OPTIONS)
REGULARIZERS: dict[str, tuple[str, ...]] = {
    "nrmf": ("alpha", "mode"),
    "trp": ("scheme", "every", "energy", "nuclear"),
}
# Besides the options of its method, a plan may take its ranks from a twin that was trained otherwise (donor), and be
# decomposed for what the layers see of so many training images (calibrate).
PLAN_KEYS = ("budget", "allocation", "skip", "donor", "calibrate")


@dataclass(frozen=True)
class Recipe:
    """The sections of a recipe file, checked; see the module's docstring. phases: the trainings within `compress`."""

    model: dict[str, Any]
    data: dict[str, Any]
    train: TrainConfig | None
    regularize: dict[str, Any] | None = None
    compress: dict[str, Any] | None = None
    finetune: TrainConfig | None = None
    phases: dict[str, TrainConfig] = field(default_factory=dict)
    experiment: dict[str, Any] = field(default_factory=dict)

    def quick(self) -> Recipe:
        """The same with one epoch of each training, to see that it runs."""
        return replace(
            self,
            train=_one_epoch(self.train),
            finetune=_one_epoch(self.finetune),
            phases={name: _one_epoch(config) for name, config in self.phases.items()},
        )


class _Loader(yaml.SafeLoader):
    """YAML in which every value is written out once.

    No aliases, by which a short text can stand for a huge document; no key twice in a mapping; no long numbers, which
    take quadratic time.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name); what recipes share stands in a file that they extend")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(f"the key {key.value!r} stands twice in one mapping")
                seen.add((key.tag, key.value))
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if len(node.value) > MAX_SCALAR and not node.tag.endswith(":str"):
            raise yaml.YAMLError(f"a value that is no text has {len(node.value)} characters")
        return node


# What PyYAML raises for a value that does not fit its tag, such as "!!int ''"; it promises no list.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def load(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML file; FileNotFoundError, ValueError or TypeError with one sentence where that fails."""
    return parse(_document(Path(path), MAX_DEPTH))


def _document(path: Path, depth: int) -> Any:
    """What the file says, laid over the file that it extends."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe must be an existing YAML file, got {os.fspath(path)!r}")
    if path.stat().st_size > MAX_BYTES:
        raise _checks.fail("recipe", f"at most {MAX_BYTES} bytes", path.stat().st_size)
    with open(path, "rb") as file:
        try:
            document = yaml.load(file, _Loader)
        except _YAML_ERRORS as error:
            first = str(error).partition("\n")[0]
            raise _checks.fail("recipe", "YAML", f"{os.fspath(path)}, which is not: {first}") from error
    if not isinstance(document, dict) or "extends" not in document:
        return document
    base = document.pop("extends")
    if not isinstance(base, str) or Path(base).name != base:
        raise _checks.fail("extends", "the name of a file in the same folder", repr(base))
    if depth == 0:
        raise _checks.fail("extends", f"a chain of at most {MAX_DEPTH} files", f"a longer one at {path}")
    below = _document(path.parent / base, depth - 1)
    if isinstance(below, dict) and isinstance(below.get("experiment"), dict):
        below["experiment"].pop("published", None)  # what was reported for another experiment
    return _over(below, document)


def _over(base: Any, top: Any) -> Any:
    """`top` laid over `base`: mappings key by key, everything else replaced, null removes."""
    if not isinstance(base, dict) or not isinstance(top, dict):
        return top
    merged = {**base, **{key: _over(base.get(key), value) for key, value in top.items()}}
    return {key: value for key, value in merged.items() if not (key in top and value is None)}


def parse(document: Any) -> Recipe:
    """The recipe in a parsed YAML document."""
    sections = mapping("recipe", document, SECTIONS)
    for name in ("model", "data"):
        if name not in sections:
            raise _checks.fail("recipe", f"a mapping with the section {name!r}", sorted(sections))
    model = mapping("model", sections["model"], MODEL_KEYS)
    source = mapping("data", sections["data"])
    for name, section in (("model", model), ("data", source)):
        if not isinstance(section.get("name"), str):
            raise _checks.fail(f"{name}.name", "a str", repr(section.get("name")))
    _checks.choice("data.name", source["name"], data.NAMES)
    if not isinstance(model.get("transfer", False), bool):
        raise _checks.fail_type("model.transfer", "a bool", model["transfer"])
    if "train" not in sections and not model.get("pretrained"):
        raise _checks.fail("recipe", "a mapping with the section 'train' or with model.pretrained", sorted(sections))
    regularize, compress = sections.get("regularize"), sections.get("compress")
    phases: dict[str, TrainConfig] = {}
    if regularize is not None:
        check_regularize("regularize", regularize)
        if "train" not in sections:
            raise _checks.fail("regularize", "left out where nothing is trained", "a section")
    if compress is not None:
        compress, phases = _compress(mapping("compress", compress))
    if sections.get("finetune") is not None and compress is None:
        raise _checks.fail("finetune", "left out where nothing is compressed", "a section")
    return Recipe(
        model,
        source,
        _config("train", sections.get("train")),
        regularize,
        compress,
        _config("finetune", sections.get("finetune")),
        phases,
        _experiment(sections.get("experiment"), sections),
    )


def check_regularize(name: str, section: Any) -> None:
    """A regularize section: its method and keys."""
    method = mapping(name, section).get("method")
    known = REGULARIZERS[_checks.choice(f"{name}.method", method, REGULARIZERS)]
    mapping(name, section, ("method", *known))


def _compress(section: dict[str, Any]) -> tuple[dict[str, Any], dict[str, TrainConfig]]:
    """The compress section without its trainings, and those."""
    method = _checks.choice("compress.method", section.get("method"), dict.fromkeys((*METHODS, *SYSTEMS)))
    options = {key: value for key, value in section.items() if key != "method"}
    if method in SYSTEMS:
        check(method, options)
        phases = {
            name: config
            for name in SYSTEMS[method].phases
            if (config := _config(f"compress.{name}", options.pop(name, None))) is not None
        }
        return {"method": method, **options}, phases
    check_options(method, {key: value for key, value in options.items() if key not in PLAN_KEYS})
    if options.get("calibrate") is not None:
        _checks.integer("compress.calibrate", options["calibrate"], 1)
    donor = options.get("donor")
    if donor is not None and mapping("compress.donor", donor, ("regularize",)).get("regularize") is not None:
        check_regularize("compress.donor.regularize", donor["regularize"])
    return section, {}


def _experiment(section: Any, sections: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to know: source, published figures, and which values of this recipe are ours."""
    if section is None:
        return {}
    found = mapping("experiment", section, ("source", "published", "ours"))
    if not isinstance(found.get("source", ""), str):
        raise _checks.fail_type("experiment.source", "a str", found["source"])
    mapping("experiment.published", found.get("published", {}))
    ours = found.get("ours", [])
    if not isinstance(ours, list) or not all(isinstance(key, str) for key in ours):
        raise _checks.fail_type("experiment.ours", "a list of keys such as train.lr", ours)
    for key in ours:
        place: Any = sections
        for part in key.split("."):
            if not isinstance(place, dict) or part not in place:
                raise _checks.fail("experiment.ours", "keys that the recipe has", repr(key))
            place = place[part]
    return found


def mapping(name: str, value: Any, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    """`value` as a mapping of no other keys than the known ones."""
    if not isinstance(value, dict):
        raise _checks.fail_type(name, "a mapping", value)
    for key in value:
        if known is not None:
            _checks.choice(f"key of {name}", key, known)
    return value


def _config(name: str, section: Any) -> TrainConfig | None:
    if section is None:
        return None
    known = tuple(f.name for f in fields(TrainConfig))
    options = mapping(name, section, known)
    for key in ("epochs", "batch_size", "lr"):
        if key not in options:
            raise _checks.fail(name, f"a mapping with the key {key!r}", sorted(options))
    try:
        return TrainConfig(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}.{error}") from error


def _one_epoch(config: Any) -> Any:
    if config is None:
        return None
    # One epoch has no room for milestones.
    schedule = "constant" if config.schedule == "steps" else config.schedule
    epochs = min(config.epochs, 1)
    return replace(
        config, epochs=epochs, warmup_epochs=min(config.warmup_epochs, epochs), schedule=schedule, milestones=()
    )
