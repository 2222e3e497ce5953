"""A compression as data: which layer becomes what, at which ranks, and why. Standard library only.

The JSON form is versioned and strict: unknown keys, wrong types and impossible ranks are refused by name, so that a
plan from elsewhere can be loaded without trust.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = "fastrank-plan"
VERSION = 1
MAX_BYTES = 16 * 2**20
MAX_RANK = 2**20
MAX_NUMBER = 1e300

# How many ranks each layer method takes.
LAYER_METHODS: dict[str, int] = {
    "dense": 0,
    "tucker2": 2,
    "cp": 1,
    "cp-layer": 1,
    "svd-channel": 1,
    "svd-spatial": 1,
    "svd-decoupled": 1,
}


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    method: "dense" (left alone), "tucker2", "cp" (of every filter), "cp-layer" (of the whole kernel), "svd-channel",
    "svd-spatial" or "svd-decoupled".
    ranks: (R_in, R_out) for tucker2, (R,) for the others, () for dense. reason: one sentence for a person.
    shape: of the kernel (O, I, kh, kw) that it was made for, or () where that is not known.
    estimate: what its maker expects, by name, such as "dense_latency_us", "latency_us" and "error".
    """

    method: str
    ranks: tuple[int, ...] = ()
    reason: str = ""
    shape: tuple[int, ...] = ()
    estimate: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise TypeError(f"method must be a str, got {type(self.method).__name__}")
        if self.method not in LAYER_METHODS:
            raise ValueError(
                f"method must be one of {list(LAYER_METHODS)}, got {self.method!r}{_near(self.method, LAYER_METHODS)}"
            )
        if not isinstance(self.ranks, tuple | list) or any(type(rank) is not int for rank in self.ranks):
            raise TypeError(f"ranks must be ints, got {self.ranks!r}")
        wanted = LAYER_METHODS[self.method]
        if len(self.ranks) != wanted:
            raise ValueError(f"ranks must be {wanted} ints for {self.method}, got {list(self.ranks)}")
        for rank in self.ranks:
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"ranks must be between 1 and {MAX_RANK}, got {rank}")
        if not isinstance(self.reason, str):
            raise TypeError(f"reason must be a str, got {type(self.reason).__name__}")
        if not isinstance(self.shape, tuple | list) or any(type(size) is not int for size in self.shape):
            raise TypeError(f"shape must be ints, got {self.shape!r}")
        if len(self.shape) not in (0, 4) or any(size < 1 for size in self.shape):
            raise ValueError(f"shape must be () or four sizes (O, I, kh, kw) of at least 1, got {list(self.shape)}")
        if not isinstance(self.estimate, Mapping) or not all(isinstance(name, str) for name in self.estimate):
            raise TypeError(f"estimate must be a mapping of names to numbers, got {type(self.estimate).__name__}")
        for name, value in self.estimate.items():
            if type(value) not in (int, float) or not -MAX_NUMBER < value < MAX_NUMBER:
                raise ValueError(f"estimate[{name!r}] must be a finite number, got {value!r}")
        object.__setattr__(self, "ranks", tuple(self.ranks))
        object.__setattr__(self, "shape", tuple(self.shape))


@dataclass(frozen=True)
class Plan:
    """Layer name -> `LayerPlan`, with the method and options that made it.

    Iterating over `compressed` gives the layers that change; everything else stays as it is.
    """

    layers: Mapping[str, LayerPlan]
    method: str = "manual"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers must be a mapping of layer name to LayerPlan, got {type(self.layers).__name__}")
        for name, layer in self.layers.items():
            if not isinstance(name, str) or not isinstance(layer, LayerPlan):
                raise TypeError(
                    f"layers must map str to LayerPlan, got {type(name).__name__} to {type(layer).__name__}"
                )
        if not isinstance(self.method, str):
            raise TypeError(f"method must be a str, got {type(self.method).__name__}")
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options must be a mapping, got {type(self.options).__name__}")

    @property
    def compressed(self) -> dict[str, LayerPlan]:
        """The layers that are not left dense."""
        return {name: layer for name, layer in self.layers.items() if layer.method != "dense"}

    def to_json(self) -> str:
        """The plan as JSON text; raises TypeError or ValueError where an option is no JSON."""
        layers = {name: _entry(layer) for name, layer in self.layers.items()}
        document = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "options": dict(self.options),
            "layers": layers,
        }
        try:
            return json.dumps(document, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"options must be JSON values, got one that is not: {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "plan") -> Plan:
        """The plan in JSON text; raises ValueError or TypeError with one sentence on anything else."""
        if not isinstance(text, str | bytes):
            raise TypeError(f"{source} must be JSON text, got {type(text).__name__}")
        if len(text) > MAX_BYTES:
            raise ValueError(f"{source} must be at most {MAX_BYTES} bytes, got {len(text)}")
        try:
            document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} must be JSON, got text that is not: {error}") from error
        _keys(source, document, ("format", "version", "layers"), ("method", "options"))
        if document["format"] != FORMAT:
            raise ValueError(f"{source}.format must be {FORMAT!r}, got {document['format']!r}")
        if type(document["version"]) is int and document["version"] > VERSION:
            found = f"{document['version']}, which a newer fastrank wrote: update fastrank to read it"
            raise ValueError(f"{source}.version must be {VERSION}, got {found}")
        if type(document["version"]) is not int or document["version"] != VERSION:
            raise ValueError(f"{source}.version must be {VERSION}, got {document['version']!r}")
        method, options = document.get("method", "manual"), document.get("options", {})
        if not isinstance(method, str):
            raise TypeError(f"{source}.method must be a str, got {type(method).__name__}")
        if not isinstance(options, dict):
            raise TypeError(f"{source}.options must be an object, got {type(options).__name__}")
        if not isinstance(document["layers"], dict):
            raise TypeError(f"{source}.layers must be an object, got {type(document['layers']).__name__}")
        layers = {}
        for name, entry in document["layers"].items():
            where = f"{source}.layers[{name!r}]"
            _keys(where, entry, ("method",), ("ranks", "reason", "shape", "estimate"))
            try:
                layers[name] = LayerPlan(
                    entry["method"],
                    _ints("ranks", entry.get("ranks", [])),
                    entry.get("reason", ""),
                    _ints("shape", entry.get("shape", [])),
                    entry.get("estimate", {}),
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from error
        return cls(layers, method, options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        from fastrank._atomic import write_atomically

        write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan; FileNotFoundError, ValueError or TypeError with one sentence where that fails."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"plan must be an existing JSON file, got {os.fspath(path)!r}")
        if os.path.getsize(path) > MAX_BYTES:
            raise ValueError(f"plan must be at most {MAX_BYTES} bytes, got {os.path.getsize(path)}")
        with open(path, "rb") as file:
            return cls.from_json(file.read(), source=os.fspath(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; JSON leaves open which of two equal keys counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _entry(layer: LayerPlan) -> dict[str, Any]:
    """A layer's part of the JSON document; what it does not know is left out."""
    entry: dict[str, Any] = {"method": layer.method, "ranks": list(layer.ranks), "reason": layer.reason}
    if layer.shape:
        entry["shape"] = list(layer.shape)
    if layer.estimate:
        entry["estimate"] = dict(layer.estimate)
    return entry


def _ints(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list of ints, got {type(value).__name__}")
    return tuple(value)


def _keys(where: str, value: Any, required: Iterable[str], optional: Iterable[str]) -> None:
    """`value` is an object with all required keys and no others but the optional ones."""
    if not isinstance(value, dict):
        raise TypeError(f"{where} must be an object, got {type(value).__name__}")
    known = [*required, *optional]
    for key in value:
        if key not in known:
            raise ValueError(f"{where} must have the keys {known}, got the unknown key {key!r}{_near(key, known)}")
    for key in required:
        if key not in value:
            raise ValueError(f"{where} must have the key {key!r}, got {sorted(value)}")


def _near(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
