"""What breaks around a run, full disks above all: nothing is lost that was there, and the error is one sentence."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import process_groups
import pytest
import runs
import torch
import yaml
from checkpoint_files import same, step_of

from fastrank import cli

POINTS = ("open", "write", "fsync", "replace", "fsync")
"""Of one checkpoint of one process; the last one is that of its folder."""


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    """Bits depend on the number of threads."""


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("point", range(len(POINTS)))
def test_a_full_disk_at_every_step_of_saving(tmp_path: Path, point: int) -> None:
    runs.train("norton", tmp_path / "whole", epochs=1)
    folder = tmp_path / "full"
    at = runs.At(1 + len(POINTS) + point + 1, no_space)  # the folder is made first; the second checkpoint is hit
    with runs.points(at), pytest.raises(OSError, match="No space left on device") as caught:
        runs.train("norton", folder, epochs=1)
    assert at.seen[1:] == [*POINTS, *POINTS[: point + 1]]
    assert Path(caught.value.filename) == folder / "checkpoint.safetensors"
    assert step_of(folder) == (2 if point == len(POINTS) - 1 else 1), "only the last point comes after the new name"
    assert leftovers(folder) == []
    runs.train("norton", folder, epochs=1)
    assert same(folder, tmp_path / "whole")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a quota does. Python has SIGXFSZ ignored, so that a write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


RECIPE: dict[str, Any] = {
    "model": {"name": "lenet5_nrmf"},
    "data": {"name": "digits", "held_out": 0.9},
    "train": {"epochs": 1, "batch_size": 64, "lr": 0.01},
}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastrank", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_a_quota_ends_a_command_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(RECIPE))
    with files_of_at_most(40_000):
        assert command(monkeypatch, "train", str(recipe), "--out", str(out)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"fastrank: File too large: {out}/train/checkpoint.safetensors"
    assert leftovers(out) == []
    assert command(monkeypatch, "train", str(recipe), "--out", str(out)) == 0
    assert (out / "summary.json").exists()


# Each rank makes the folder and writes its shard; then rank 0 writes a header, and the pointer that names the folder.
OF_A_RANK = ("mkdir", "write", "fsync")
OF_RANK_0 = (*OF_A_RANK, *POINTS, *POINTS)
# Rank -> at which of its points the disk is full: shard, header, its name, pointer, its name, and after all of it.
FULL = {0: (1, 4, 6, 9, 11, 12), 1: (1, 2)}


def full_for_a_rank(rank: int, world: int, folder: Path) -> None:
    """The second checkpoint of two ranks meets a full disk on one of them."""
    runs.train("norton", folder / "whole", epochs=1, parallel="ddp")
    for victim, point in ((victim, point) for victim, points in FULL.items() for point in points):
        own, kinds = folder / f"{victim}-{point}", OF_RANK_0 if victim == 0 else OF_A_RANK
        first = len(kinds) + (victim == 0)  # rank 0 makes the run's folder before the first checkpoint
        at = runs.At(first + point + 1 if rank == victim else 0, no_space)
        said = ""
        try:
            with runs.points(at):
                runs.train("norton", own, epochs=1, parallel="ddp")
        except OSError as error:
            said = str(error)
        assert "No space left on device" in said, (rank, victim, point, said)
        assert str(own) in said, (rank, victim, point, said)
        if rank == victim:
            assert tuple(at.seen[first:]) == kinds[: point + 1], at.seen
        torch.distributed.barrier()
        if rank == 0:
            published = point == len(OF_RANK_0) - 1
            assert step_of(own) == 1 + published, (victim, point)
            assert len(list(own.glob("checkpoint-*"))) == 1, "nothing is left of what could not be written"
            assert leftovers(own) == []
        torch.distributed.barrier()
        runs.train("norton", own, epochs=1, parallel="ddp")
        assert rank or same(own, folder / "whole")


def test_a_full_disk_of_one_rank_of_two(tmp_path: Path) -> None:
    process_groups.run(full_for_a_rank, 2, tmp_path)


READ_ONLY = """
import os, sys
from pathlib import Path
import runs
from fastrank import _atomic
folder = Path(sys.argv[1])
runs.train("norton", folder / "done", epochs=1)
for place in (folder / "closed", folder / "done"):
    place.mkdir(exist_ok=True)
    place.chmod(0o555)
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)  # nobody: for root no folder is read-only
steps = []
for place in ("closed", "closed/new"):
    try:
        runs.train("norton", folder / place, epochs=1, on_epoch=steps.append)
    except PermissionError as error:
        print(error)
try:
    _atomic.write_atomically(folder / "done" / "checkpoint.safetensors", b"")
except PermissionError as error:
    print(error)
print(len(steps), len(runs.train("norton", folder / "done", epochs=1)[1]))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can look into; those of pytest belong to their user alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_read_only_folder_is_refused_before_the_training(open_folder: Path) -> None:
    folder = open_folder
    done = python(READ_ONLY, str(folder))
    first, second, third, last = done.splitlines()
    assert first.endswith(f"a folder that may be written to, got {folder}/closed/checkpoint.safetensors")
    assert second == f"[Errno 13] Permission denied: '{folder}/closed/new'"
    assert third.startswith("path must lie in a folder that may be written to")
    assert last == "0 1", "no epoch was trained for nothing, and a finished run is read where it lies"


def python(program: str, *arguments: str) -> str:
    """What a program prints, run by a new interpreter that finds the modules of the tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
