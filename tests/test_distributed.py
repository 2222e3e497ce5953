"""Ranks that fail end the others with their error; several ranks through the command; the cost model by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import process_groups
import pytest
import torch
import torch.distributed as dist
from process_groups import network, train
from torch import Tensor, nn

from fastrank.distributed import Cost, cost, joined, table, watched
from fastrank.regularize import Funnel, LowRankProjection, NuclearNorm
from fastrank.regularize.base import Regularizer
from fastrank.train import TrainConfig, fit

SECONDS = 15.0
"""Within which all ranks have to be gone."""


class Bad(Regularizer):
    """Fails, or makes a weight NaN, in the third step of rank 1."""

    def __init__(self, model: nn.Module, how: str) -> None:
        self._weight, self._how, self._step = model.get_parameter("8.weight"), how, 0

    def add_gradients(self) -> None:
        self._step += 1
        if self._step == 3 and dist.get_rank() == 1:
            if self._how == "raise":
                raise ValueError("the disk is on fire")
            if self._how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            with torch.no_grad():
                self._weight.fill_(torch.nan)

    def value(self) -> Tensor:
        return torch.zeros(())


def failing(how: str, rank: int, folder: Path) -> None:
    """Trains until rank 1 fails; what each rank got is left in the folder."""
    (folder / f"began.{rank}").touch()
    try:
        with watched():
            model = network("nrmf")
            train(model, [Bad(model, how)], parallel="ddp")
    except (RuntimeError, ValueError) as error:
        (folder / f"error.{rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def raises(rank: int, world: int, folder: Path) -> None:
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"torchelastic.{rank}")
    failing("raise", rank, folder)


def diverges(rank: int, world: int, folder: Path) -> None:
    failing("nan", rank, folder)


def is_killed(rank: int, world: int, folder: Path) -> None:
    failing("killed", rank, folder)


def never_arrives(rank: int, world: int, folder: Path) -> None:
    """Rank 0 waits for a message that rank 1, which failed, will never send."""
    (folder / f"began.{rank}").touch()
    os.dup2(os.open(folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    store = dist.distributed_c10d._get_default_store()
    with watched():
        if rank == 1:
            raise LookupError("the disk is on fire")
        store.wait(["a key that nobody sets"])


@pytest.mark.parametrize(
    ("job", "texts"),
    [
        (
            raises,
            [
                "RuntimeError: rank 1 of 3: ValueError: the disk is on fire",
                "ValueError: rank 1 of 3: the disk is on fire",
            ],
        ),
        (diverges, ["diverged: loss or gradients were not finite at step 4 of epoch 1 on rank 1"] * 2),
        (is_killed, ["RuntimeError: rank ", None]),
    ],
)
def test_a_failing_rank_ends_all(job: process_groups.Job, texts: list[str | None], tmp_path: Path) -> None:
    world = 3
    processes = process_groups.start(job, world, tmp_path)
    while len(list(tmp_path.glob("began.*"))) < world:
        time.sleep(0.05)
    begin = time.monotonic()
    for process in processes:
        process.join(max(begin + SECONDS - time.monotonic(), 0))
    gone = [process.exitcode is not None for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert all(gone), f"after {SECONDS} seconds"
    others, own = texts
    for rank in (0, 2):
        assert others is not None
        assert others in (tmp_path / f"error.{rank}").read_text()
    if own is not None:
        assert own in (tmp_path / "error.1").read_text()
    if job is raises:  # what torchrun shows in its summary
        shown = json.loads((tmp_path / "torchelastic.1").read_text())
        assert shown["message"]["message"] == "ValueError: the disk is on fire"
        assert not (tmp_path / "torchelastic.0").exists()


def test_a_rank_that_waits_is_ended(tmp_path: Path) -> None:
    processes = process_groups.start(never_arrives, 2, tmp_path)
    while len(list(tmp_path.glob("began.*"))) < 2:
        time.sleep(0.05)
    processes[0].join(SECONDS)
    code = processes[0].exitcode
    for process in processes:
        process.kill()
        process.join()
    assert code == 1
    text = (tmp_path / "stderr.0").read_text()
    assert "fastrank: rank 0 of 2 ends: rank 1 of 2: LookupError: the disk is on fire" in text


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launch, "-m", "fastrank", "train", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


RECIPE = """
model: {name: lenet5_nrmf}
data: {name: digits, size: 16}
train: {epochs: 1, batch_size: 400, lr: 0.05}
regularize: {method: nrmf, alpha: 0.01, mode: nuclear}
compress: {method: nrmf, energy: 0.5}
finetune: {epochs: 1, batch_size: 400, lr: 0.01}
"""


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    done = torchrun(str(recipe), "--out", str(tmp_path / "run"), "--parallel", "fsdp", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # of one rank
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["speed_up"] > 1
    assert done.stderr.count("train: epoch 1/1") == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"train", "finetune", "recipe.json", "plan.json", "model.safetensors", "summary.json"}


def test_parallel_is_for_several_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined():
        assert not dist.is_initialized()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "fastrank", "train", str(recipe), "--parallel", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "--parallel must be left out where torchrun has not started several ranks, got 'ddp'" in done.stderr


def hand() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10), nn.Conv2d(10, 6, 3))


def test_cost_by_hand() -> None:
    model = hand()
    params = 270 + 20 + 540 + 6
    alone = cost(model, world=1)
    assert (alone.payload, alone.bytes_sent, alone.training_flops) == ({}, 0.0, None)
    found = cost(model, world=4, batch_size=10, input_size=(3, 6, 6))
    assert found.payload == {
        ("all_reduce", "status"): 40,
        ("all_reduce", "gradients"): 4 * params,
        ("all_gather", "batch statistics"): 4 * 4 * 21,
        ("all_reduce", "batch statistics"): 4 * 20,
    }
    assert found.bytes_sent == 2 * 3 / 4 * (40 + 4 * params + 80) + 3 / 4 * 336
    assert found.training_flops == 6 * (270 * 16 + 540 * 4) * 3
    sharded = cost(model, world=4, parallel="fsdp", sync_batchnorm=False)
    padded = 12 * 27 + 2 * 12 + 8 * 90 + 8
    assert sharded.payload == {
        ("all_reduce", "status"): 40,
        ("all_reduce", "gradients"): 0,
        ("all_gather", "weights"): 2 * 4 * padded,
        ("reduce_scatter", "gradients"): 4 * padded,
    }


def test_cost_of_regularizers() -> None:
    model = hand()
    own = [NuclearNorm(model, 0.1, matricization="channel"), LowRankProjection(model, every=4, keep_first=False)]
    # Channel matrices of 10 × 27 and 6 × 90: 4n²m + 9n³.
    flops = [4 * 100 * 27 + 9 * 1000, 4 * 36 * 90 + 9 * 216]
    found = cost(model, own, world=2)
    assert found.regularizer_flops_alone == pytest.approx(1.25 * sum(flops))
    assert found.regularizer_flops == pytest.approx(1.25 * max(flops))
    assert found.payload["broadcast", "regularizers"] == pytest.approx(1.25 * 4 * (270 + 540))
    assert found.payload["all_reduce", "regularizers"] == pytest.approx(48 + (48 + 16) / 4)
    whole = cost(model, [NuclearNorm(model, 0.1, share=False)], world=2)
    assert whole.regularizer_flops == whole.regularizer_flops_alone
    assert ("broadcast", "regularizers") not in whole.payload
    gated = network("funnel")
    kept = cost(gated, [Funnel(gated)], world=2, parallel="fsdp")
    gates = sum(p.numel() for p in Funnel(gated).governed().values())
    assert kept.payload["all_reduce", "gradients"] == 4 * gates


def test_cost_as_table_and_json() -> None:
    model = hand()
    costs = [cost(model, [NuclearNorm(model, 0.1)], world=world, input_size=(3, 6, 6)) for world in (1, 2)]
    lines = table(costs).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| 1 | ddp |")
    assert lines[2].endswith("| 0 | none |")
    assert json.loads(json.dumps(costs[1].as_dict()))["payload"]["all_reduce: gradients"] == 4 * 836
    assert isinstance(costs[0], Cost)


def test_cost_refuses() -> None:
    with pytest.raises(ValueError, match="world must be an int at least 1, got 0"):
        cost(hand(), world=0)
    with pytest.raises(ValueError, match=r"parallel must be one of \['ddp', 'fsdp'\], got 'tp'"):
        cost(hand(), world=2, parallel="tp")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        cost(3, world=2)  # type: ignore[arg-type]
    odd = nn.Sequential(nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match="sync_batchnorm must be False for a model with batch normalisations of other"):
        cost(odd, world=2)
    assert cost(odd, world=2, sync_batchnorm=False).payload["all_reduce", "gradients"] == 24


def test_without_a_group_nothing_changes(tmp_path: Path) -> None:
    """The file of one process, in the format it always had."""
    model = network("nrmf")
    fit(model, process_groups.images(), None, TrainConfig(1, 30, 0.1), run_dir=tmp_path, progress=False)
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]
