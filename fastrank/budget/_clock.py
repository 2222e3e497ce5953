"""Measured times of layers on the user's device, remembered between calls and between processes."""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import latency
from fastrank._atomic import locked, write_atomically
from fastrank._memory import in_parts
from fastrank._tables import cache_folder, device_name
from fastrank.budget._choices import DENSE, Place
from fastrank.convert import copy_with, skeleton
from fastrank.plan import LayerPlan

FORMAT, VERSION = "fastrank-layer-times", 1
SECONDS = 8.0
"""About how long the candidates of a network run, all together; each runs at least 5 times and at most 25."""
PASSES = 15
Row = list[float]


class Clock:
    """Times of convolutions in their places: in the network, in eval mode without gradients, on its own maps.

    A layer that runs alone, over and over, finds its weights and maps in the caches, and in a network it does not. So
    one network holds all candidates of all layers, and every pass runs another one of each, in turns.
    remember: keep the times in a file of the cache folder, by device, and take from there what was measured for the
    same layer and maps under the same torch version, number of threads and dtype.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, remember: bool = True) -> None:
        self.device, self.remember = device, remember
        self.environment = [torch.__version__, 0 if device.type == "cuda" else torch.get_num_threads(), str(dtype)]
        self.measured = 0
        self.file = cache_folder() / f"layers-{device_name(device.type, device.index)}.json"
        self.known: dict[str, float] = _read(self.file) if remember else {}

    def times(
        self, model: nn.Module, x: Tensor, places: Sequence[Place], layers: Sequence[Sequence[LayerPlan]]
    ) -> list[Row]:
        """Microseconds that all calls of each layer take in one pass of `model` on x: the dense one's first, then those
        of its `layers`. `model` and x are on this clock's device; places are of the same names there."""
        keys = [
            [self._key(place, layer) for layer in (DENSE, *mine)] for place, mine in zip(places, layers, strict=True)
        ]
        fresh = [i for i, mine in enumerate(keys) if any(key not in self.known for key in mine)]
        if fresh:

            def act(some: Sequence[int]) -> list[Row]:
                return measure(model, x, [places[i] for i in some], [layers[i] for i in some])

            found = in_parts(act, fresh, lambda i: f"the candidates of layer {places[i].name!r}")
            samples: dict[str, Row] = {}
            for i, row in zip(fresh, found, strict=True):
                # What the machine does otherwise than at an earlier measurement meets the dense layer too.
                scale = self.known.get(keys[i][0], row[0]) / row[0]
                for key, us in zip(keys[i], row, strict=True):
                    samples.setdefault(key, []).append(us * scale)
            for key, row in samples.items():  # layers alike stand at several places
                self.known.setdefault(key, statistics.median(row))
            self.measured += len(samples)
        return [[self.known[key] for key in mine] for mine in keys]

    def save(self) -> None:
        """Add what was measured to the file; what another process has added meanwhile stays."""
        if not self.remember or not self.measured:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.file):
            known = {**_read(self.file), **self.known}
            document = {"format": FORMAT, "version": VERSION, "us": known}
            write_atomically(self.file, (json.dumps(document, indent=0) + "\n").encode())

    def _key(self, place: Place, layer: LayerPlan) -> str:
        conv = place.conv
        where = [conv.stride, conv.padding, conv.dilation, conv.padding_mode, conv.bias is not None]
        maps = [(call.shape, call.channels_last) for call in place.calls]
        return json.dumps([layer.method, layer.ranks, tuple(conv.weight.shape), where, maps, *self.environment])


class Switch(nn.Module):
    """Stands for a convolution and runs one of several layers, with a note of when."""

    def __init__(self, options: Sequence[nn.Module]) -> None:
        super().__init__()
        self.options, self.index = list(options), 0  # a plain list: none of them is a part of the network
        self.spans: list[tuple[Any, Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        """What the chosen layer makes of x."""
        before = _now(x)
        out: Tensor = self.options[self.index](x)
        self.spans.append((before, _now(x)))
        return out

    def microseconds(self) -> float:
        """What the calls since the last question took; on a GPU to be asked when it is through."""
        total = 0.0
        for before, after in self.spans:
            total += 1e6 * (after - before) if isinstance(before, float) else 1e3 * before.elapsed_time(after)
        self.spans.clear()
        return total


def measure(
    model: nn.Module, x: Tensor, places: Sequence[Place], layers: Sequence[Sequence[LayerPlan]]
) -> list[Row]:
    """As `Clock.times`, measured anew: 20th percentiles over passes in turns."""
    by_name = dict(model.named_modules())
    switches = []
    for place, mine in zip(places, layers, strict=True):
        factored: list[nn.Module] = [
            skeleton(place.conv, layer, x.device).to(place.conv.weight.dtype).eval() for layer in mine
        ]
        switches.append(Switch([by_name[place.name], *factored]))
    originals = {by_name[place.name]: switch for place, switch in zip(places, switches, strict=True)}
    network = copy_with(model, dict(originals)).eval()
    rows = [[list[float]() for _ in switch.options] for switch in switches]
    most = max(len(switch.options) for switch in switches)
    with torch.inference_mode():
        started = time.perf_counter()
        for variant in range(most):  # packs weights, and tells how long a pass takes
            _run(network, x, switches, variant)
        each = time.perf_counter() - started
        for number in range(max(5, min(25, round(SECONDS / each)))):
            for step in range(most):
                variant = (step + number) % most
                _run(network, x, switches, variant)
                for switch, row in zip(switches, rows, strict=True):
                    row[switch.index].append(switch.microseconds())
    return [[statistics.quantiles(samples, n=5, method="inclusive")[0] for samples in row] for row in rows]


def share_of(model: nn.Module, x: Tensor, places: Sequence[Place]) -> float:
    """The share of the time of one pass of `model` on x that its convolutions at `places` take, a median."""
    by_name = dict(model.named_modules())
    originals = {by_name[place.name]: Switch([by_name[place.name]]) for place in places}
    network = copy_with(model, dict(originals)).eval()
    found = []
    with torch.inference_mode():
        for _ in range(PASSES + 2):
            before = _now(x)
            _run(network, x, list(originals.values()), 0)
            whole = Switch([])
            whole.spans.append((before, _now(x)))
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            found.append(sum(switch.microseconds() for switch in originals.values()) / whole.microseconds())
    return statistics.median(found[2:])


def _run(network: nn.Module, x: Tensor, switches: Sequence[Switch], variant: int) -> None:
    for place, switch in enumerate(switches):
        # Shifted from layer to layer, so that no network consists of the cheapest candidates alone.
        switch.index = (variant + place) % len(switch.options)
        switch.spans.clear()
    network(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _now(x: Tensor) -> Any:
    if not x.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def ratio(dense: nn.Module, planned: nn.Module, x: Tensor) -> tuple[float, float]:
    """Microseconds of the dense and of the planned network on x, measured in turns: 20th percentiles."""
    once = latency.compare({"dense": dense}, x, rounds=1, warmup=1)["dense"].p50_us
    rounds = max(9, min(25, round(SECONDS * 1e6 / (2 * once))))
    found = latency.compare({"dense": dense, "planned": planned}, x, rounds=rounds, warmup=1)
    return found["dense"].p20_us, found["planned"].p20_us


def _read(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["version"] != VERSION:
            raise ValueError("is of another version")
        known = {str(key): float(us) for key, us in found["us"].items()}
        if not all(0 < us < math.inf for us in known.values()):
            raise ValueError("holds a time that is none")
        return known
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        warnings.warn(f"the measured times in {path} cannot be read: they are taken anew", stacklevel=2)
        return {}
