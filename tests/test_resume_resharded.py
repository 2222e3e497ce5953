"""Checkpoints of several processes: resumed on more, fewer and one, whole or refused, and never a pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import process_groups
import pytest
import torch
from process_groups import apart, leave, left, network, penalties, train
from torch import nn

from fastrank.distributed import Parallel
from fastrank.regularize.base import Regularizer
from fastrank.train import _sharded

TOLERANCE = 1e-6
LR = {"sgd": 0.05, "adam": 0.001}
"""Adam makes steps of this size of gradients that are hardly more than rounding."""
EVERY, STOP = 5, 7
"""Steps between two checkpoints, and the step in which a run is broken off; a run has twelve."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks have, since rounding depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stop(Regularizer):
    """Breaks a run off, on all ranks alike."""

    def __init__(self, after: int | None) -> None:
        self._left = after

    def add_gradients(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise RuntimeError("broken off")

    def value(self) -> torch.Tensor:
        return torch.zeros(())


def system_of(optimizer: str) -> str:
    return "funnel" if optimizer == "adam" else "nrmf"


def go(
    kind: str | None,
    folder: Path,
    out: Path | None,
    *,
    stop: bool = False,
    optimizer: str = "sgd",
    dropout: float = 0.0,
) -> None:
    """A run with a checkpoint every few steps: broken off in the middle of an epoch, or to its end."""
    system = system_of(optimizer)
    model = network(system)
    model.insert(8, nn.Dropout(dropout))
    own = [*penalties(system, model), Stop(STOP if stop else None)]
    options: dict[str, Any] = {"parallel": kind, "optimizer": optimizer, "checkpoint_steps": EVERY, "lr": LR[optimizer]}
    try:
        history = train(model, own, folder, **options)
    except RuntimeError as error:
        if not stop or str(error) != "broken off":
            raise
        return
    assert not stop
    if out is not None and Parallel(kind).main:
        leave(model, history, system, out)


# Folder -> what breaks off there and what goes on, a kind each on a number of ranks.
PATHS = {
    "2-4 sharded": ("fsdp", 2, "fsdp", 4),
    "4-1 sharded": ("fsdp", 4, None, 1),
    "1-2 sharded": (None, 1, "fsdp", 2),
    "4-2 sharded to whole": ("fsdp", 4, "ddp", 2),
    "2-2": ("fsdp", 2, "fsdp", 2),
}
ADAM = {"2-4 sharded", "4-2 sharded to whole"}


def runs(stop: bool, world: int, root: Path) -> None:
    """Every run of `PATHS` whose first half, or whose second, has that many ranks."""
    for name, (before, first, after, second) in PATHS.items():
        kind, ranks = (before, first) if stop else (after, second)
        if ranks == world:
            optimizer = "adam" if name in ADAM else "sgd"
            dropout = 0.3 if name == "2-2" else 0.0
            go(kind, root / name, root / f"{name}.safetensors", stop=stop, optimizer=optimizer, dropout=dropout)


def begin(rank: int, world: int, folder: Path) -> None:
    """The first halves; and one run that is never broken off."""
    runs(True, world, folder.parent)
    if world == 2:
        go("fsdp", folder.parent / "whole", folder.parent / "whole.safetensors", dropout=0.3)


def finish(rank: int, world: int, folder: Path) -> None:
    """The second halves; and what is refused."""
    runs(False, world, folder.parent)
    if world == 2:
        refusals(rank, folder.parent)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, carried through."""
    root = tmp_path_factory.mktemp("resharded")
    runs(True, 1, root)
    for world in (2, 4):
        process_groups.run(begin, world, root / f"begin{world}")
    shutil.copytree(root / "2-2", root / "damaged")
    for world in (2, 4):
        process_groups.run(finish, world, root / f"finish{world}")
    runs(False, 1, root)
    return root


def refusals(rank: int, root: Path) -> None:
    """Damage and other runs, on both ranks; and a write that fails on one of them."""
    damaged = root / "damaged"
    go_on = partial(go, "fsdp", damaged, None, dropout=0.3)
    pointer = json.loads((damaged / "checkpoint.json").read_text())
    folder = damaged / pointer["folder"]
    header, ranks = folder / "header.json", Parallel("fsdp")
    shard = sorted(folder.glob("shard-*"))[1]
    cases: list[tuple[Path, Any, str]] = [
        (
            shard,
            lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
            f"{shard.name} does not match",
        ),
        (shard, lambda data: None, f"{shard.name} is amiss"),
        (header, lambda data: data.replace(b'"lr": 0.05', b'"lr": 0.06'), "with lr 0.06 where this run has 0.05"),
        (header, lambda data: data[:-9], "unusable in its part 'header'"),
        (header, lambda data: None, "unusable in its part 'header.json'"),
        (header, lambda data: data.replace(b'"files"', b'"filed"'), "unusable in its part 'files'"),
        (damaged / "checkpoint.json", lambda data: b'{"folder": "../elsewhere"}', "unusable in its part 'folder'"),
    ]
    for path, change, message in cases:
        before = path.read_bytes()
        ranks.wait()
        if rank == 0:
            path.unlink()
            if (after := change(before)) is not None:
                path.write_bytes(after)
        ranks.wait()
        try:
            go_on()
        except ValueError as error:
            assert message in str(error), (message, str(error))  # noqa: PT017
        else:
            raise AssertionError(f"{message}: taken")
        ranks.wait()
        if rank == 0:
            path.write_bytes(before)
        ranks.wait()
    before, digest = (damaged / "checkpoint.json").read_bytes(), _sharded._digest

    def full(path: Path) -> str:
        raise OSError("no space left")

    restore = _sharded._require_undamaged
    _sharded._digest, _sharded._require_undamaged = full, lambda *_: None
    try:
        go_on()
    except OSError as error:
        assert str(error) == "no space left"  # noqa: PT017
    else:
        raise AssertionError("a checkpoint was written on a full disk")
    finally:
        _sharded._digest, _sharded._require_undamaged = digest, restore
    assert (damaged / "checkpoint.json").read_bytes() == before, "what is half written does not count"
    ranks.wait()
    go_on()


def alone(system: str, optimizer: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = network(system)
    model.insert(8, nn.Dropout(0.0))
    train(model, penalties(system, model), optimizer=optimizer, lr=LR[optimizer])
    return model.state_dict(), process_groups.ranks(model, system)


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    """What one process comes to that is never broken off."""
    return {optimizer: alone(system_of(optimizer), optimizer) for optimizer in ("sgd", "adam")}


@pytest.mark.parametrize("name", [name for name in PATHS if name != "2-2"])
def test_resume_resharded(root: Path, wanted: dict[str, Any], name: str) -> None:
    found, rows, ranks = left(root / f"{name}.safetensors")
    weights, their_ranks = wanted["adam" if name in ADAM else "sgd"]
    assert apart(found, weights) <= TOLERANCE
    assert {layer: tuple(own) for layer, own in ranks.items()} == their_ranks
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_as_many_ranks_resume_bit_for_bit(root: Path) -> None:
    found, rows, _ = left(root / "2-2.safetensors")
    whole, their_rows, _ = left(root / "whole.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert rows == their_rows


def test_nothing_is_left_but_the_newest_and_no_pickle(root: Path) -> None:
    for name, (_, _, _, world) in PATHS.items():
        files = sorted(path.relative_to(root / name) for path in (root / name).rglob("*") if path.is_file())
        if world == 1:
            assert [str(path) for path in files] == ["checkpoint.safetensors"]
            continue
        pointer = json.loads((root / name / "checkpoint.json").read_text())
        assert pointer["step"] == 12
        shards = [f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors" for rank in range(world)]
        inside = [Path(pointer["folder"]) / file for file in ("header.json", *shards)]
        assert files == sorted([Path("checkpoint.json"), *inside])
