"""Data that goes missing, workers that die, numbers that overflow: the last checkpoint stays, and a run goes on."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from checkpoint_files import contents, same, step_of
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

from fastrank.data import TarSet, batches
from fastrank.data._sets import FolderSet
from fastrank.regularize import NuclearNorm
from fastrank.regularize.base import Regularizer
from fastrank.train import EpochRow, History, TrainConfig, fit

IMAGES = 12


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    """Bits depend on the number of threads."""


def picture(number: int) -> bytes:
    """A PPM file of 8×8 pixels."""
    noise = torch.randint(0, 256, (192,), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return b"P6 8 8 255\n" + bytes(noise.tolist())


def pixels(image: Any) -> Tensor:
    return torch.tensor(list(image.tobytes()), dtype=torch.float32).view(8, 8, 3).permute(2, 0, 1) / 255


def in_folders(root: Path) -> tuple[Dataset[Any], list[Path]]:
    files = [root / f"class{n % 2}" / f"{n}.ppm" for n in range(IMAGES)]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    pytest.importorskip("torchvision", reason="folders of images are read by torchvision")
    return FolderSet(root, pixels, (3, 8, 8)), files


def in_shards(root: Path) -> tuple[Dataset[Any], list[Path]]:
    files = [root / f"{n}.tar" for n in range(3)]
    root.mkdir(parents=True)
    for number, file in enumerate(files):
        with tarfile.open(file, "w") as tar:
            for image in range(4 * number, 4 * number + 4):
                for name, content in ((f"{image}.cls", str(image % 2).encode()), (f"{image}.ppm", picture(image))):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return TarSet(files, pixels, (3, 8, 8)), files


def go(
    data: Dataset[Any], folder: Path, after: Callable[[EpochRow], object] | None = None, workers: int = 0
) -> History:
    """Three epochs of three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 2))
    config = TrainConfig(3, 4, 0.05, shift=1, workers=workers)
    return fit(model, data, None, config, run_dir=folder, progress=False, on_epoch=after)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def sentence(error: BaseException) -> str:
    """What a command would print."""
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("make", "damage", "kind"),
    [
        pytest.param(in_folders, Path.unlink, FileNotFoundError, id="image gone"),
        pytest.param(in_folders, cut, ValueError, id="image cut"),
        pytest.param(in_shards, Path.unlink, FileNotFoundError, id="shard gone"),
        pytest.param(in_shards, cut, ValueError, id="shard cut"),
    ],
)
def test_data_lost_in_mid_run(
    tmp_path: Path,
    make: Callable[[Path], tuple[Dataset[Any], list[Path]]],
    damage: Callable[[Path], None],
    kind: type[Exception],
    workers: int,
) -> None:
    data, files = make(tmp_path / "data")
    go(data, tmp_path / "whole")
    if make is in_shards:
        data = TarSet(files, pixels, (3, 8, 8))  # one whose shards are not open yet
    before = files[-1].read_bytes()

    def after(row: EpochRow) -> None:
        if row.epoch == 1:
            damage(files[-1])

    if make is in_shards and damage is Path.unlink and not workers:
        # A file that is open stays until it is closed.
        go(data, tmp_path / "cut", after)
    else:
        with pytest.raises(kind) as caught:
            go(data, tmp_path / "cut", after, workers)
        assert str(files[-1]) in sentence(caught.value)
        assert step_of(tmp_path / "cut") == 3
        files[-1].write_bytes(before)
        go(make(tmp_path / "again")[0] if make is in_shards else data, tmp_path / "cut", workers=workers)
    assert same(tmp_path / "cut", tmp_path / "whole")


class Deadly(Dataset[Any]):
    """Images of which one kills the process that reads it, once a file says so."""

    def __init__(self, order: Path) -> None:
        self.order = order

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 7 and self.order.exists() and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 8, 8, generator=generator), index % 2


def test_a_worker_that_dies(tmp_path: Path) -> None:
    data = Deadly(tmp_path / "order")
    go(data, tmp_path / "whole")
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid(\(s\))? \d+\) ") as caught:
        go(data, tmp_path / "cut", lambda row: data.order.touch(), workers=1)
    sentence(caught.value)
    assert step_of(tmp_path / "cut") == 3
    data.order.unlink()
    go(data, tmp_path / "cut", workers=1)
    assert same(tmp_path / "cut", tmp_path / "whole")


class Odd(Exception):
    """Not of those that a data set raises for what lies on disk."""


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_a_data_set_come_as_they_are(workers: int) -> None:
    class Broken(Deadly):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise Odd("odd")

    with pytest.raises(Odd, match="odd"):
        list(batches(Broken(Path("none")), 4, workers=workers))


class Poison(Regularizer):
    """Spoils a kernel after the gradients of a step, before the regularisers that follow look at it."""

    def __init__(self, kernel: nn.Parameter, step: int) -> None:
        self._kernel, self._left = kernel, step

    def add_gradients(self) -> None:
        self._left -= 1
        if not self._left:
            with torch.no_grad():
                self._kernel[0, 0, 0, 0] = torch.nan

    def value(self) -> Tensor:
        return torch.zeros(())


def test_a_kernel_that_is_not_finite_is_named(tmp_path: Path) -> None:
    runs.train("nrmf", tmp_path / "whole", epochs=2)
    model = runs.network("nrmf")
    penalties = [Poison(model.get_parameter("3.weight"), 6), *runs.penalties("nrmf", model)]
    with pytest.raises(ValueError, match=r"^the kernel of layer '3' must be finite, got") as caught:
        runs.process_groups.train(model, penalties, tmp_path / "spoilt", checkpoint_steps=1, epochs=2, lr=0.02)
    sentence(caught.value)
    assert step_of(tmp_path / "spoilt") == 5
    found = contents(tmp_path / "spoilt")
    assert found is not None
    assert all(tensor.isfinite().all() for tensor in found[0].values() if tensor.is_floating_point())


def test_gradients_that_overflow_in_half_precision_are_no_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        model[3].weight.mul_(300)  # the scale of 2^16 takes the first gradients out of float16's range
    config = TrainConfig(2, 2, 1e-3, amp="fp16")
    data, _ = in_shards(tmp_path / "data")
    history = fit(
        model, data, None, config, regularizers=[NuclearNorm(model, 1e-3)], run_dir=tmp_path / "run", progress=False
    )
    assert [row.epoch for row in history] == [1, 2]
    found = contents(tmp_path / "run")
    assert found is not None
    assert found[1]["scaler"]["scale"] < 2.0**16, "steps were skipped"
    assert found[1]["step"] == 12
    assert all(parameter.isfinite().all() for parameter in model.parameters())
