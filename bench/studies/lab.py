"""What every study works with: the digits, trained networks kept on disk, and cells that are computed once.

A cell is one JSON file under OUT/cells, so that a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrank import complexity, data, latency, methods, models, train
from fastrank.regularize import Regularizer

NETWORK, SIZE, CHANNELS = "resnet_20", 16, 3
BATCH = 64


@dataclass(frozen=True)
class Length:
    """Epochs of the trainings."""

    dense: int = 20
    tune: int = 6
    close: int = 12
    rounds: int = 30
    curve: int = 60

    @classmethod
    def quick(cls) -> Length:
        """To see that everything runs."""
        return cls(dense=1, tune=1, close=1, rounds=2, curve=2)


# How the dense networks were trained: the regularisers of each, by name.
TRAININGS: dict[str, Callable[[nn.Module], list[Regularizer]]] = {
    "plain": lambda model: [],
    "NRMF": lambda model: [methods.nrmf.regularizer(model, 1e-2)],
    "TRP channel": lambda model: methods.trp.regularizers(model, scheme="channel", every=5),
    "TRP+Nu channel": lambda model: methods.trp.regularizers(model, scheme="channel", every=5, nuclear=3e-4),
    "TRP spatial": lambda model: methods.trp.regularizers(model, scheme="spatial", every=5),
    "TRP+Nu spatial": lambda model: methods.trp.regularizers(model, scheme="spatial", every=5, nuclear=3e-4),
}


class Lab:
    """The data, the folder, and the trainings."""

    def __init__(self, out: Path, length: Length) -> None:
        self.out, self.length = out, length
        self.train_set: Any = data.load("digits", split="train", size=SIZE, channels=CHANNELS)
        self.test_set: Any = data.load("digits", split="test", size=SIZE, channels=CHANNELS)
        self.example = torch.zeros(1, CHANNELS, SIZE, SIZE)
        self.shape = (CHANNELS, SIZE, SIZE)
        (out / "cells").mkdir(parents=True, exist_ok=True)

    def cell(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The kept result of this name, or a fresh one."""
        path = self.out / "cells" / f"{key.replace(' ', '_').replace('/', '_')}.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        print(key, flush=True)
        result = compute()
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(path)
        return result

    def dense(self, training: str, seed: int) -> nn.Module:
        """A dense network trained in the named way; trained once, then read from its checkpoint."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = models.build(NETWORK)
        folder = self.out / "dense" / f"{training.replace(' ', '_')}_{seed}"
        config = train.TrainConfig(self.length.dense, BATCH, 0.05, shift=1, seed=seed)
        self.fit(model, config, TRAININGS[training](model), run_dir=folder)
        return model

    def fit(
        self,
        model: nn.Module,
        config: train.TrainConfig,
        penalties: Sequence[Regularizer] = (),
        run_dir: Path | None = None,
    ) -> train.History:
        """Train in place."""
        return train.fit(
            model, self.train_set, None, config, regularizers=penalties, run_dir=run_dir, progress=False
        )

    def tuned(self, model: nn.Module, seed: int) -> nn.Module:
        """Fine-tune in place, all methods alike."""
        self.fit(model, train.TrainConfig(self.length.tune, BATCH, 0.01, shift=1, seed=seed))
        return model

    def top1(self, model: nn.Module) -> float:
        """Accuracy on the held-out digits, in percent."""
        return train.evaluate(model, self.test_set).top1

    def cost(self, model: nn.Module) -> dict[str, int]:
        """Multiply-adds of convolutions and linear layers, and parameters."""
        found = complexity.count(model, self.shape)
        return {"macs": found.macs, "params": found.params}

    def times(self, contenders: dict[str, nn.Module]) -> dict[str, float]:
        """Median milliseconds of a batch, all in turn in one process."""
        batch = self.test_set.images[:BATCH]
        found = latency.compare(contenders, batch, rounds=self.length.rounds)
        return {name: time.p50_us / 1000 for name, time in found.items()}

    def both(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Cost, and accuracy before and after fine-tuning (which happens in place)."""
        converted = self.top1(model)
        return {**self.cost(model), "converted": converted, "tuned": self.top1(self.tuned(model, seed))}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
