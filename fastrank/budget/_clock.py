"""Measured times of layers on the user's device, remembered between calls and between processes."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import latency
from fastrank._atomic import write_atomically
from fastrank._tables import cache_folder, device_name
from fastrank.budget._choices import DENSE, Place
from fastrank.convert import Call, skeleton
from fastrank.plan import LayerPlan

FORMAT, VERSION = "fastrank-layer-times", 1
ROUNDS = 9


class Clock:
    """Times of convolutions in eval mode without gradients, as medians of interleaved rounds.

    remember: keep them in a file of the cache folder, by device, and take from there what was measured under the same
    torch version, number of threads and dtype.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, remember: bool = True) -> None:
        self.device, self.dtype, self.remember = device, dtype, remember
        self.environment = [torch.__version__, 0 if device.type == "cuda" else torch.get_num_threads(), str(dtype)]
        self.measured = 0
        self.file = cache_folder() / f"layers-{device_name(device.type, device.index)}.json"
        self.known: dict[str, float] = _read(self.file) if remember else {}

    def times(self, place: Place, layers: Sequence[LayerPlan]) -> list[float]:
        """Microseconds that all calls of the layer take, as it is and as each of `layers`: first the dense one."""
        total = [0.0] * (1 + len(layers))
        for call, often in Counter(place.calls).items():
            for index, us in enumerate(self._call(place.conv, call, [DENSE, *layers])):
                total[index] += often * us
        return total

    def save(self) -> None:
        """Add what was measured to the file; what another process has added meanwhile stays."""
        if not self.remember or not self.measured:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        known = {**_read(self.file), **self.known}
        document = {"format": FORMAT, "version": VERSION, "us": known}
        write_atomically(self.file, (json.dumps(document, indent=0) + "\n").encode())

    def _call(self, conv: nn.Conv2d, call: Call, layers: Sequence[LayerPlan]) -> list[float]:
        keys = [self._key(conv, call, layer) for layer in layers]
        missing = [index for index, key in enumerate(keys) if key not in self.known]
        if missing:
            # The dense layer runs beside them again: what the machine did meanwhile cancels in the ratio.
            found = self._measure(conv, call, [layers[index] for index in sorted({0, *missing})])
            scale = self.known.get(keys[0], found[0]) / found[0]
            for index, us in zip(sorted({0, *missing}), found, strict=True):
                self.known.setdefault(keys[index], us * scale)
            self.measured += len(missing)
        return [self.known[key] for key in keys]

    def _key(self, conv: nn.Conv2d, call: Call, layer: LayerPlan) -> str:
        where = [conv.stride, conv.padding, conv.dilation, conv.padding_mode, conv.bias is not None]
        facts = [layer.method, layer.ranks, tuple(conv.weight.shape), where, call.shape, call.channels_last]
        return json.dumps([*facts, *self.environment])

    def _measure(self, conv: nn.Conv2d, call: Call, layers: Sequence[LayerPlan]) -> list[float]:
        kind: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        x = torch.randn(call.shape, **kind)
        contenders: dict[str, nn.Module] = {}
        for index, layer in enumerate(layers):
            module: nn.Module
            if layer.method == "dense":
                module = nn.Conv2d(
                    conv.in_channels,
                    conv.out_channels,
                    conv.kernel_size,  # type: ignore[arg-type]
                    conv.stride,  # type: ignore[arg-type]
                    conv.padding,  # type: ignore[arg-type]
                    conv.dilation,  # type: ignore[arg-type]
                    1,
                    conv.bias is not None,
                    conv.padding_mode,
                    **kind,
                )
            else:
                module = skeleton(conv, layer, self.device).to(self.dtype)
            contenders[str(index)] = module
        if call.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
            for module in contenders.values():
                _channels_last(module)
        found = latency.compare(contenders, x, rounds=ROUNDS)
        return [found[str(index)].p20_us for index in range(len(layers))]


def ratio(dense: nn.Module, planned: nn.Module, x: Tensor, *, rounds: int = 15) -> tuple[float, float]:
    """Microseconds of the dense and of the planned network on x, measured in turns: medians."""
    found = latency.compare({"dense": dense, "planned": planned}, x, rounds=rounds)
    return found["dense"].p20_us, found["planned"].p20_us


def _channels_last(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


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
