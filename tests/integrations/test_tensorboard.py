"""What is in the event files, read by TensorBoard itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tensorboard", reason="TensorBoard logging needs tensorboard")

import integration_loops as loops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrank import report, train
from fastrank.data import ImageSet
from fastrank.integrations.tensorboard import Writer, epoch_logger
from fastrank.methods import funnel


def events(folder: Path) -> Any:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def data() -> ImageSet:
    x, y = loops.images()
    return ImageSet(x, y, classes=3)


def test_tensorboard_holds_every_epoch_of_a_training(tmp_path: Path) -> None:
    model = loops.Net()
    config = train.TrainConfig(2, 4, 0.1)
    with Writer(tmp_path / "tb", model, energy=0.9) as writer:
        history = train.fit(model, data(), data(), config, on_epoch=writer, progress=False)
    found = events(tmp_path / "tb")
    wanted = {"loss", "penalty", "train_top1", "test_top1", "test_top5", "lr", "seconds"}
    ranks = {f"rank/{layer}.{mode}" for layer in ("0", "2") for mode in ("mode3", "mode4")}
    assert set(found.Tags()["scalars"]) == wanted | ranks
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (row.epoch, pytest.approx(row.loss, rel=1e-6)) for row in history
    ]
    last = report.spectra(model, energy=0.9)["2"]["mode4"].rank
    assert [event.value for event in found.Scalars("rank/2.mode4")][-1] == last


def test_tensorboard_holds_gates_and_the_metrics_of_other_tasks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    row = train.EpochRow(
        epoch=3, loss=1.0, penalty=0.0, train_top1=None, lr=0.1, seconds=1.0, metrics={"bbox_ap": 0.25}
    )
    writer = epoch_logger(tmp_path, funnel.factorize(loops.Net()))
    writer(row)
    writer.close()
    found = events(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("bbox_ap")] == [(3, 0.25)]
    assert "train_top1" not in found.Tags()["scalars"]
    assert set(found.Tags()["histograms"]) == {"gate/2.gate_in", "gate/2.gate_core", "gate/2.gate_out"}


def test_tensorboard_refuses_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        Writer(tmp_path, 3)
    with pytest.raises(ValueError, match=r"energy must be a finite number in \(0, 1\], got 0"):
        Writer(tmp_path, energy=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        Writer(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    wanted = r"^TensorBoard logging needs tensorboard, which is absent: pip install 'fastrank\[tensorboard\]'$"
    with pytest.raises(ImportError, match=wanted):
        Writer(tmp_path)
