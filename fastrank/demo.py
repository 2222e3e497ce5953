"""`fastrank demo`: NRMF end to end on real data, in minutes on a CPU.

Trains the NRMF README's modified LeNet-5 on scikit-learn's 1,797 handwritten digits with and without the regulariser,
takes ranks by energy and by EVBMF, converts to `FusedTucker2Conv`, fine-tunes, and measures every row.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrank import _atomic, complexity, convert, data, decompose, io, latency, models, ranks, report, train
from fastrank._version import __version__
from fastrank.methods import make_plan, nrmf
from fastrank.plan import Plan

LAYER = "conv3"  # the inserted 128→256 convolution that the README's figure is about
IMAGE_SIZE = 16
LATENCY_BATCH = 64
# What chooses the ranks: the share p of the energy kept, or EVBMF.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "92 %": ("nrmf", {"energy": 0.92}),
    "95 %": ("nrmf", {"energy": 0.95}),
    "98 %": ("nrmf", {"energy": 0.98}),
    "EVBMF": ("vbmf", {}),
}
SAVED = ("NRMF", "95 %")


@dataclass(frozen=True)
class Settings:
    """How long and how hard; the README gives α, the batch size and the schedule's shape, the rest is ours."""

    epochs: int = 60
    finetune_epochs: int = 10
    batch_size: int = 64
    lr: float = 0.05
    finetune_lr: float = 0.01
    alpha: float = 1e-2
    shift: int = 1
    seed: int = 0
    rounds: int = 40

    @classmethod
    def quick(cls) -> Settings:
        """For tests: everything once, nothing converged."""
        return cls(epochs=3, finetune_epochs=1, rounds=5)

    def training(self) -> train.TrainConfig:
        """Of the dense networks."""
        return train.TrainConfig(self.epochs, self.batch_size, self.lr, shift=self.shift, seed=self.seed)

    def tuning(self) -> train.TrainConfig:
        """Of the factored ones."""
        return train.TrainConfig(
            self.finetune_epochs, self.batch_size, self.finetune_lr, shift=self.shift, seed=self.seed
        )


def run(
    out: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the demo into the folder `out` and return what `summary.json` holds.

    Writes summary.json, singular_values.png, ranks.png, plan.json and model.safetensors (the NRMF, 95 % row), the
    trajectories of the trainings of both dense networks and of that row, and report.html. `say` receives one line a
    stage.
    """
    settings = Settings() if settings is None else settings
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    training_set = data.load("digits", split="train", size=IMAGE_SIZE)
    held_out = data.load("digits", split="test", size=IMAGE_SIZE)
    assert isinstance(held_out, data.ImageSet)
    batch = held_out.images[:LATENCY_BATCH]
    say(f"Digits: {len(training_set):,} images to train on, {len(held_out):,} held out.")

    dense: dict[str, nn.Module] = {}
    for name in ("plain", "NRMF"):
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            dense[name] = models.build("lenet5_nrmf")
        penalty = [nrmf.regularizer(dense[name], settings.alpha)] if name == "NRMF" else []
        say(f"Training {'with the NRMF regulariser' if penalty else 'without a regulariser'}.")
        train.fit(
            dense[name],
            training_set,
            held_out,
            settings.training(),
            regularizers=penalty,
            label=f"train {name}",
            progress=progress,
            on_epoch=report.Recorder(dense[name], out / f"train-{name}", resume=False),
        )

    rows, tuned = [], {}
    say("Choosing ranks, converting, fine-tuning.")
    for name, network in dense.items():
        before = train.evaluate(network, held_out).top1
        for rule, (method, options) in RULES.items():
            plan = make_plan(network, method, example_input=batch[:1], **options)
            compressed = convert.compress(network, plan)
            converted = train.evaluate(compressed, held_out).top1
            label = f"tune {name} {rule}"
            recorder = None
            if (name, rule) == SAVED:
                recorder = report.Recorder(compressed, out / f"tune-{name}", resume=False)
            train.fit(
                compressed,
                training_set,
                held_out,
                settings.tuning(),
                label=label,
                progress=progress,
                on_epoch=recorder,
            )
            tuned[name, rule] = compressed
            rows.append(
                {
                    "training": name,
                    "rule": rule,
                    "accuracy_before": before,
                    "accuracy_converted": converted,
                    "accuracy_finetuned": train.evaluate(compressed, held_out).top1,
                    **_cost(compressed),
                    "ranks": {layer: list(entry.ranks) for layer, entry in plan.compressed.items()},
                    "kept_dense": {k: v.reason for k, v in plan.layers.items() if v.method == "dense"},
                }
            )

    say(f"Timing the networks in turn, {settings.rounds} rounds of batches of {LATENCY_BATCH}.")
    times = _times(dense["plain"], tuned, batch, settings.rounds)
    baseline = times["dense"].p50_us
    for row in rows:
        time_us = times[f"{row['training']} {row['rule']}"]
        row.update(latency=asdict(time_us), speedup=baseline / time_us.p50_us)
    summary: dict[str, Any] = {
        "fastrank": __version__,
        "model": {"name": "lenet5_nrmf"},
        "input_size": [1, IMAGE_SIZE, IMAGE_SIZE],
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "settings": asdict(settings),
        "data": {"train": len(training_set), "held_out": len(held_out), "image_size": IMAGE_SIZE},
        "dense": {
            name: {"accuracy": train.evaluate(network, held_out).top1, **_cost(network)}
            for name, network in dense.items()
        },
        "dense_latency": {"batch": LATENCY_BATCH, **asdict(times["dense"])},
        "rows": rows,
    }
    io.save(tuned[SAVED], out / "model.safetensors", input_size=(1, IMAGE_SIZE, IMAGE_SIZE))
    saved_plan = tuned[SAVED].fastrank_plan
    assert isinstance(saved_plan, Plan)
    saved_plan.save(out / "plan.json")
    _plots(out, dense, rows)
    summary["seconds"] = time.perf_counter() - started
    _atomic.write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    report.write_html(out)
    return summary


def _cost(network: nn.Module) -> dict[str, int]:
    found = complexity.count(network, (1, IMAGE_SIZE, IMAGE_SIZE))
    return {"params": found.params, "macs": found.macs}


def _times(
    dense: nn.Module, tuned: dict[tuple[str, str], nn.Module], batch: Tensor, rounds: int
) -> dict[str, latency.Latency]:
    contenders = {"dense": dense, **{f"{name} {rule}": network for (name, rule), network in tuned.items()}}
    return latency.compare(contenders, batch, rounds=rounds)


def _plots(out: Path, dense: dict[str, nn.Module], rows: list[dict[str, Any]]) -> None:
    labels = {"plain": "without regulariser", "NRMF": "with NRMF"}
    sides = {"mode3": "input side (mode 3)", "mode4": "output side (mode 4)"}
    kernels = {name: network.get_submodule(LAYER).weight for name, network in dense.items()}
    spectra = {
        f"{LAYER}, {side}": {
            labels[name]: ranks.singular_values(decompose.unfold(kernel.detach(), mode)).tolist()
            for name, kernel in kernels.items()
            if isinstance(kernel, Tensor)
        }
        for mode, side in sides.items()
    }
    report.plot_spectra(
        out / "singular_values.png", spectra, title="Singular values of the inserted 128→256 convolution"
    )
    layers = sorted({layer for row in rows for layer in row["ranks"]})
    panels: dict[str, dict[str, list[int]]] = {}
    limits: dict[str, int] = {}
    for layer in layers:
        kernel = dense["plain"].get_submodule(layer).weight
        assert isinstance(kernel, Tensor)
        full = decompose.tucker.max_ranks(tuple(kernel.shape))
        for index, side in enumerate(("R_in", "R_out")):
            if full[index] == 1:
                continue
            panel = f"{layer} {side} (full rank {full[index]})"
            limits[panel] = full[index]
            # A layer that stays dense keeps its full rank.
            panels[panel] = {
                labels[name]: [row["ranks"].get(layer, full)[index] for row in rows if row["training"] == name]
                for name in dense
            }
    report.plot_ranks(out / "ranks.png", panels, list(RULES), limits, title="Ranks chosen a layer")


def tables(summary: dict[str, Any]) -> list[Any]:
    """The summary as two terminal tables: what every network costs and reaches, and its ranks a layer."""
    dense, base = summary["dense"], summary["dense"]["plain"]
    costs: list[list[object]] = []
    chosen: list[list[object]] = []
    for name, row in dense.items():
        time_ms = f"{summary['dense_latency']['p50_us'] / 1000:.2f}" if name == "plain" else ""
        costs.append([f"{name} dense", *_costs(row, base), f"{row['accuracy']:.2f}", "", "", time_ms, ""])
    layers = sorted({layer for row in summary["rows"] for layer in (*row["ranks"], *row["kept_dense"])})
    for row in summary["rows"]:
        network = f"{row['training']} {row['rule']}"
        accuracy = [f"{row[f'accuracy_{stage}']:.2f}" for stage in ("before", "converted", "finetuned")]
        time_ms = f"{row['latency']['p50_us'] / 1000:.2f}"
        costs.append([network, *_costs(row, base), *accuracy, time_ms, f"{row['speedup']:.2f}×"])
        chosen.append([network, *(report.ranks_text(row["ranks"].get(layer, ())) for layer in layers)])
    held_out, batch = summary["data"]["held_out"], summary["dense_latency"]["batch"]
    title = f"lenet5_nrmf: accuracy on {held_out} held-out digits, time of a batch of {batch}"
    columns = ["network", "params", "MACs", "dense %", "converted %", "tuned %", "ms", "speed"]
    return [
        report.table(columns, costs, title=title),
        report.table(["network", *layers], chosen, title="Ranks a layer, input × output side"),
    ]


def _costs(row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    same = row["params"] == base["params"]
    return [
        report.short(row[kind]) + ("" if same else f" ÷{base[kind] / row[kind]:.1f}") for kind in ("params", "macs")
    ]


def reading(summary: dict[str, Any]) -> list[str]:
    """What the table says, in words, for someone who sees it for the first time."""
    row = next(row for row in summary["rows"] if (row["training"], row["rule"]) == SAVED)
    twin = next(row for row in summary["rows"] if (row["training"], row["rule"]) == ("plain", SAVED[1]))
    base = summary["dense"]["plain"]
    if not row["ranks"]:
        return [f"Saved network ({' '.join(SAVED)}): nothing was compressed, since no factored layer would be cheaper."]
    lost = row["accuracy_before"] - row["accuracy_finetuned"]
    return [
        f"Saved network ({' '.join(SAVED)}): {base['params'] / row['params']:.1f}× fewer parameters and "
        f"{base['macs'] / row['macs']:.1f}× fewer multiply-adds than dense, {row['speedup']:.2f}× its speed here, "
        f"{'loses' if lost >= 0 else 'gains'} {abs(lost):.2f} points.",
        "The same rule on the network trained without the regulariser keeps "
        f"{twin['params'] / row['params']:.1f}× as many parameters.",
    ]
