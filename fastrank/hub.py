"""Models as folders, in the manner of Hugging Face: weights with their architecture, a configuration and a card."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastrank import _checks, complexity, convert, io, models
from fastrank._atomic import write_atomically
from fastrank._version import __version__

FORMAT = "fastrank-hub"
VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
Size = tuple[int, int, int]


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    input_size: Size | None = None,
    metrics: Mapping[str, float | str] | None = None,
) -> None:
    """Write `model` into a folder: model.safetensors (as `fastrank.save`), config.json and README.md, a model card.

    A folder that is there keeps its other files. The three files are written whole beside it before the first one
    takes its place. config.json tells people and other programs what the model is; `from_pretrained` takes everything
    from the weights' own header.

    Args:
        model: what `fastrank.save` takes, and refuses.
        folder: lies in an existing folder.
        input_size: (C, H, W) that the model is made for; see `fastrank.save`. The costs in the card are for it.
        metrics: what was measured, by name, for the card: {"accuracy on the test split": 0.931}.

    Raises TypeError or ValueError, naming the argument, and OSError where the folder cannot be written.
    """
    place = Path(os.path.abspath(folder))
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"folder must be a folder, got the file {place}")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"folder must lie in an existing folder, got {place}")
    config = _config(model, input_size, _measured(metrics))
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        io.save(model, temporary / WEIGHTS, input_size=input_size)
        config["bytes"] = (temporary / WEIGHTS).stat().st_size
        write_atomically(temporary / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        write_atomically(temporary / CARD, _card(config, place.name).encode())
        if place.is_dir():
            for name in (WEIGHTS, CONFIG, CARD):
                os.replace(temporary / name, place / name)
            temporary.rmdir()
        else:
            temporary.rename(place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def from_pretrained(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save_pretrained` wrote into a local folder, as `fastrank.load` gives it. Nothing is downloaded.

    model: the dense network, for networks that fastrank cannot build by name.
    Raises FileNotFoundError where there is no such folder or a file of it is missing, and ValueError with one sentence
    for a broken, foreign or newer one.
    """
    place = Path(folder)
    if not place.is_dir():
        asked = os.fspath(folder)
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", asked):
            hint = f" (of a model on a hub, download it first: huggingface_hub.snapshot_download({asked!r}))"
        raise FileNotFoundError(f"folder must be a local folder that save_pretrained wrote, got {asked!r}{hint}")
    missing = [name for name in (CONFIG, WEIGHTS) if not (place / name).is_file()]
    if missing:
        raise FileNotFoundError(f"folder must hold {CONFIG} and {WEIGHTS}, got {place} without {missing[0]}")
    _check_config(place / CONFIG)
    return io.load(place / WEIGHTS, model)


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _checks.fail("folder", "what save_pretrained wrote", f"{path}, which is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT or type(config.get("version")) is not int:
        raise _checks.fail("folder", "what save_pretrained wrote", f"{path}, which is not of {FORMAT}")
    if config["version"] != VERSION:
        found = f"{path} of version {config['version']}"
        if config["version"] > VERSION:
            found += ", which a newer fastrank wrote: update this one (pip install -U fastrank)"
        raise _checks.fail("folder", f"of {FORMAT} version {VERSION}", found)


def _measured(metrics: Any) -> dict[str, float | str]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise _checks.fail_type("metrics", "a mapping of names to numbers or texts", metrics)
    found: dict[str, float | str] = {}
    for name, value in (metrics or {}).items():
        if not isinstance(name, str):
            raise _checks.fail_type("metrics", "named by strings", name)
        found[name] = value if isinstance(value, str) else _checks.number(f"metrics[{name!r}]", value, -float("inf"))
    return found


def _config(model: nn.Module, input_size: Size | None, metrics: dict[str, float | str]) -> dict[str, Any]:
    """The content of config.json but the size of the weights."""
    said = io.describe(model, input_size)
    origin, plan = said["origin"], said["plan"]
    size: Any = said.get("input_size")
    if size is None and origin is not None and origin["name"] in models.NAMES:
        size = list(models.default_input_size(origin["name"]))
    return {
        "format": FORMAT,
        "version": VERSION,
        "fastrank": __version__,
        "class": type(model).__name__,
        "architecture": origin,
        "input_size": size,
        "costs": _costs(model, size),
        "convolutions": sum(isinstance(module, nn.Conv2d) for module in model.modules()) + len(said["layers"]),
        "layers": said["layers"],
        "plan": None if plan is None else {"method": plan["method"], "options": plan["options"]},
        "metrics": metrics,
    }


def _costs(model: nn.Module, size: list[int] | None) -> dict[str, dict[str, int]]:
    """Parameters, and multiply-adds for one image where its size is known, of the model and of its dense form.

    Layers with an activation of their own have no dense form.
    """
    networks = {"compressed": model}
    if all(getattr(module, "activation", "none") == "none" for module in model.modules()):
        networks["dense"] = convert.decompress(model)
    found: dict[str, dict[str, int]] = {}
    for name, network in networks.items():
        found[name] = {"parameters": sum(parameter.numel() for parameter in network.parameters())}
        if size is not None:
            found[name]["multiply-adds"] = complexity.count(network, tuple(size)).macs
    return found


def _card(config: dict[str, Any], title: str) -> str:
    """README.md: what the model is, what it costs, how to load it."""
    origin, size, layers = config["architecture"], config["input_size"], config["layers"]
    what = f"`{origin['name']}` with {origin['num_classes']} outputs" if origin else f"a `{config['class']}`"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(e["type"] for e in layers.values()).items()))
    forms = f"{len(layers)} of {config['convolutions']} convolutions in factored form ({kinds})" if layers else "dense"
    made = f" Plan: {config['plan']['method']}." if config["plan"] else ""
    image = f"\n\nInput: images of {'×'.join(map(str, size))} (channels, height, width)." if size else ""
    costs = config["costs"]
    known = [name for name in ("dense", "compressed") if name in costs]
    rows = [[kind, *(f"{costs[name][kind]:,}" for name in known)] for kind in costs["compressed"]]
    parts = [
        "---\nlibrary_name: fastrank\ntags:\n- low-rank\n- model-compression\n---",
        f"# {title}",
        f"This is {what}, {forms}.{made}{image}",
        "## Costs",
        _table(["", *known], rows) + f"\n\nThe weights take {config['bytes']:,} bytes on disk.",
    ]
    if config["metrics"]:
        parts += ["## Measured", _table(["", "value"], [[k, str(v)] for k, v in config["metrics"].items()])]
    if layers:
        ranks = [[name, entry["type"], _ranks(entry["config"])] for name, entry in layers.items()]
        parts += ["## Layers", _table(["layer", "form", "ranks"], ranks)]
    dense = "" if origin else ", dense_network"
    note = "" if origin else "\n\n`dense_network` is the network before compression, which this file has no name for."
    call = f'from fastrank import hub\n\nmodel = hub.from_pretrained("{title}"{dense}).eval()'
    parts += ["## Loading", f"```python\n{call}\n```{note}"]
    return "\n\n".join(parts) + "\n"


def _ranks(config: dict[str, Any]) -> str:
    ranks = config.get("ranks", config.get("rank"))
    return "×".join(map(str, ranks)) if isinstance(ranks, list) else str(ranks)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a name cannot break out of its cell."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"[|\s]+", " ", cell) for cell in line) + " |" for line in lines)
