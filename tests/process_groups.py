"""Processes of one process group for tests: forked from a server that has imported torch once, so that many are cheap.

A job is a function of (rank, world, folder) at the top of a test module. It leaves what it found as files.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrank import _files, methods
from fastrank.data import ImageSet
from fastrank.nn import GatedTucker2Conv
from fastrank.regularize import Exponential, Funnel, LowRankProjection, NuclearNorm
from fastrank.regularize.base import Regularizer
from fastrank.train import History, TrainConfig, fit

Job = Callable[[int, int, Path], None]
LONGEST = 120.0
"""Seconds that all ranks of a job have."""
FAILURES = (AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, OSError)


def start(job: Job, world: int, folder: Path) -> Any:
    """Begin a job on `world` ranks, which end without being waited for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["process_groups", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
    )
    processes = [context.Process(target=_rank, args=(job, rank, world, str(folder))) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def run(job: Job, world: int, folder: Path) -> None:
    """A job on `world` ranks; AssertionError with its traceback where one fails. No process is left on return."""
    folder.mkdir(exist_ok=True)
    processes, deadline = start(job, world, folder), time.monotonic() + LONGEST
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    for process in processes:
        process.kill()
        process.join()
    for rank in range(world):
        note = folder / f"ended.{rank}"
        assert note.exists(), f"rank {rank} did not come to an end"
        assert note.read_text() == "passed", note.read_text()


def _rank(job: Job, rank: int, world: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store.{job.__name__}", world)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
    outcome = "passed"
    try:
        job(rank, world, Path(folder))
    except FAILURES:
        outcome = traceback.format_exc()
    Path(folder, f"ended.{rank}").write_text(outcome)
    # At the end of a process that used FSDP on gloo, torch's threads now and then abort it ("terminate called").
    os._exit(0)


IMAGES = 93
"""In batches of 30: the last batch has 3, and of four ranks one gets none of them."""


def images(count: int = IMAGES) -> ImageSet:
    """Four classes of noise, told apart by their brightness."""
    numbers = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    return ImageSet(torch.randn(count, 1, 8, 8, generator=numbers) + labels.view(-1, 1, 1, 1) / 2, labels, classes=4)


def network(system: str) -> nn.Sequential:
    """With batch statistics; a kernel of 96 rows, from which on decompositions start warm; for Funnel, with gates."""
    torch.manual_seed(1)
    # No biases before batch statistics, which take them out: their gradients are nothing but rounding.
    wide = nn.Conv2d(12, 96, 3, 2, bias=False)
    model = nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(wide, nn.BatchNorm2d(96), nn.ReLU()),
        *(nn.Conv2d(96, 7, 3), nn.Flatten(), nn.Linear(7, 4)),
    )
    if system == "funnel":
        model[3] = GatedTucker2Conv.from_conv(wide)
    if system == "trp":
        # 20 equal singular values above the noise: without a gap at its cut, a truncation amplifies rounding.
        left, right = (torch.linalg.qr(torch.randn(rows, 20)).Q for rows in (96, 108))
        with torch.no_grad():
            wide.weight.mul_(0.01).add_((left @ right.T).view_as(wide.weight))
    return model


def penalties(system: str, model: nn.Module, share: bool = True) -> list[Regularizer]:
    """Those of the published systems."""
    if system == "nrmf":
        return [NuclearNorm(model, 3e-3, share=share)]
    if system == "trp":
        return [LowRankProjection(model, every=3, energy=0.98, share=share), NuclearNorm(model, 3e-4, share=share)]
    return [Funnel(model, 0.3, schedule=Exponential(0.5, 0.7, 1))]


SYSTEMS = ("nrmf", "trp", "funnel")


def train(model: nn.Module, regularizers: list[Regularizer], folder: Path | None = None, **options: Any) -> History:
    """Three epochs of four steps with augmentation, momentum and clipping; options of `fit` and TrainConfig."""
    known = ("parallel", "sync_batchnorm", "on_epoch", "resume")
    loop = {name: options.pop(name) for name in known if name in options}
    data = options.pop("data", None) or images()
    settings = {"epochs": 3, "batch_size": 30, "lr": 0.05, "shift": 1, "flip": True, "clip_norm": 2.0, **options}
    config = TrainConfig(**settings)
    return fit(model, data, images(41), config, regularizers=regularizers, run_dir=folder, progress=False, **loop)


def ranks(model: nn.Module, system: str) -> dict[str, tuple[int, ...]]:
    """The ranks that a plan finds, or for gates, how many are open."""
    if system == "funnel":
        return {name: (int((gate != 0).sum()),) for name, gate in penalties(system, model)[0].governed().items()}
    plan = methods.make_plan(model, "nrmf", example_input=torch.zeros(1, 1, 8, 8), energy=0.5)
    return {name: tuple(layer.ranks) for name, layer in plan.layers.items()}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The relative distance (Frobenius norm) of two networks' states."""
    assert found.keys() == wanted.keys()
    one, other = (torch.cat([state[name].double().flatten() for name in sorted(wanted)]) for state in (found, wanted))
    return float((one - other).norm() / other.norm())


def leave(model: nn.Module, history: History, system: str, path: Path) -> None:
    """Note how a training ended."""
    rows = [{**asdict(row), "seconds": 0.0} for row in history]
    found = {"history": rows, "ranks": ranks(model, system)}
    _files.save_tensors(path, model.state_dict(), {"found": json.dumps(found)})


def left(path: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, list[int]]]:
    """Weights and buffers, rows and ranks that `leave` noted."""
    tensors, metadata = _files.load_tensors(path)
    found = json.loads(metadata["found"])
    return tensors, found["history"], found["ranks"]
