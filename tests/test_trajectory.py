"""What is recorded of a network while it trains, and what becomes of the file when a run goes on or breaks off."""

from __future__ import annotations

import json
from pathlib import Path

import process_groups
import pytest
import torch
from torch import nn

from fastrank import decompose, ranks, report, train
from fastrank.data import ImageSet
from fastrank.methods import funnel
from fastrank.report._trajectory import BINS, HIGH, LOW, histogram, places


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Conv2d(6, 60, 3), nn.Conv2d(60, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def epochs(folder: Path) -> list[int]:
    return [moment.epoch for moment in report.read_trajectory(folder / report.TRAJECTORY_FILE).moments]


def test_spectra_and_ranks_are_those_of_the_kernels(tmp_path: Path) -> None:
    model = net()
    data = ImageSet(torch.randn(8, 1, 8, 8), torch.randint(4, (8,)), classes=4)
    recorder = report.Recorder(model, tmp_path, energy=0.8, points=5)
    history = train.fit(model, data, None, train.TrainConfig(2, 4, 0.1), on_epoch=recorder, progress=False)
    found = report.read_trajectory(tmp_path / report.TRAJECTORY_FILE)
    assert found.energy == 0.8
    assert [moment.epoch for moment in found.moments] == [0, 1, 2]
    assert found.moments[2].row["loss"] == history[1].loss
    assert "test_top1" not in found.moments[2].row
    spectra = found.moments[2].spectra
    assert {name: set(group) for name, group in spectra.items()} == {n: {"mode3", "mode4"} for n in ("0", "1")}
    values = ranks.singular_values(decompose.unfold(model.get_parameter("1.weight"), "mode4"))
    assert (spectra["1"]["mode4"].full, spectra["1"]["mode4"].rank) == (54, ranks.energy_rank(values, 0.8))
    wanted = (values / values[0])[places(54, 5)].tolist()
    assert spectra["1"]["mode4"].sigma == pytest.approx(wanted, abs=5e-6)  # written to five digits
    assert spectra["0"]["mode3"].sigma == (1.0,)


@pytest.mark.parametrize(("full", "points"), [(1, 2), (5, 5), (6, 5), (100, 48), (49, 48), (3, 2)])
def test_places_hold_both_ends_once(full: int, points: int) -> None:
    found = places(full, points)
    assert found == sorted(set(found))
    assert (found[0], found[-1], len(found)) == (0, full - 1, min(full, points))


def test_gates_are_counted_where_they_lie() -> None:
    width = (HIGH - LOW) / BINS
    inside = [10 ** (LOW + (i + 0.5) * width) for i in range(BINS)]
    found = histogram(torch.tensor([0.0, 0.0, 1e-30, -1e30, *inside, *(-x for x in inside)], dtype=torch.float64))
    assert (found.total, found.zero) == (2 * BINS + 4, 2)
    assert found.counts == (3, *[2] * (BINS - 2), 3)
    assert histogram(torch.tensor([float("nan"), float("inf")])).total == 2


def test_gates_of_a_factorised_network_are_recorded(tmp_path: Path) -> None:
    model = funnel.factorize(net())
    with torch.no_grad():
        model.get_parameter("1.gate_in")[:4] = 0
    report.Recorder(model, tmp_path)
    gates = report.read_trajectory(tmp_path / report.TRAJECTORY_FILE).moments[0].gates
    assert (gates["1.gate_in"].total, gates["1.gate_in"].zero, gates["1.gate_in"].penalized) == (6, 4, True)
    assert not gates["1.gate_out"].penalized
    assert sum(gates["1.gate_core"].counts) == gates["1.gate_core"].total


def test_kernels_that_are_not_finite_and_networks_without_kernels(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0, 0, 0] = float("nan")
        model.get_parameter("1.weight").zero_()
    report.Recorder(model, tmp_path / "a")(1, {"loss": float("nan"), "top1": 3})
    moment = report.read_trajectory(tmp_path / "a" / report.TRAJECTORY_FILE).moments[1]
    assert moment.spectra["0"] == {}
    assert set(moment.spectra["1"]["mode3"].sigma) == {0.0}
    assert moment.row == {"top1": 3.0}
    report.Recorder(nn.Linear(2, 2), tmp_path / "b")
    assert report.read_trajectory(tmp_path / "b" / report.TRAJECTORY_FILE).moments[0].spectra == {}


def test_a_run_goes_on_and_starts_over(tmp_path: Path) -> None:
    model, path = net(), tmp_path / report.TRAJECTORY_FILE
    recorder = report.Recorder(model, tmp_path)
    for epoch in (1, 2, 3):
        recorder(epoch)
    again = report.Recorder(model, tmp_path)
    assert epochs(tmp_path) == [0, 1, 2, 3]
    again(2)  # the checkpoint was of epoch 1
    assert epochs(tmp_path) == [0, 1, 2]
    again(3)
    with open(path, "a") as file:
        file.write('{"epoch":4,"ro')  # a writer that was killed
    assert epochs(tmp_path) == [0, 1, 2, 3]
    torn = report.Recorder(model, tmp_path)
    torn(4)
    assert epochs(tmp_path) == [0, 1, 2, 3, 4]
    report.Recorder(model, tmp_path, energy=0.5)
    assert epochs(tmp_path) == [0]
    recorder(7)
    report.Recorder(model, tmp_path, resume=False)
    assert epochs(tmp_path) == [0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "damaged in line 1"),
        ("[]\n", "damaged in line 1"),
        ("{}\n", "damaged in line 1"),
        (
            '{"format":"fastrank-trajectory","version":2}\n',
            "version 1, the newest that is known here, got .* version 2",
        ),
        ('{"format":"fastrank-trajectory","version":1,"energy":"x"}\n', "damaged in line 1"),
        ("HEADER{}\n", "damaged in line 2"),
        ('HEADER{"epoch":-1,"row":{},"spectra":{},"gates":{}}\n', "damaged in line 2"),
        ('HEADER{"epoch":1,"row":{"loss":NaN},"spectra":{},"gates":{}}\n', "damaged in line 2"),
        (
            'HEADER{"epoch":1,"row":{},"spectra":{"a":{"mode3":{"full":1,"rank":1,"sigma":[1,2]}}},"gates":{}}\n',
            "line 2",
        ),
        ('HEADER{"epoch":1,"row":{},"spectra":{},"gates":{"g":{"total":1,"zero":0,"counts":[1]}}}\n', "line 2"),
        ("HEADER" + "[" * 100_000 + "\n", "damaged in line 2"),
    ],
)
def test_damaged_trajectories_are_named(tmp_path: Path, text: str, expected: str) -> None:
    header = json.dumps({"format": "fastrank-trajectory", "version": 1, "energy": 0.9}) + "\n"
    (tmp_path / report.TRAJECTORY_FILE).write_text(text.replace("HEADER", header))
    with pytest.raises(ValueError, match=f"run must be a folder with .*{expected}"):
        report.read_run(tmp_path)


def test_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        report.Recorder(3, tmp_path)
    with pytest.raises(ValueError, match=r"matricization must be one of .* got 'mode5' \(did you mean"):
        report.Recorder(net(), tmp_path, matricization=["mode5"])
    with pytest.raises(ValueError, match="points must be an int at least 2, got 1"):
        report.Recorder(net(), tmp_path, points=1)
    with pytest.raises(TypeError, match="epoch must be an int, got str"):
        report.Recorder(net(), tmp_path)("1")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        report.Recorder(net(), tmp_path / "file")


def sharded(rank: int, world: int, folder: Path) -> None:
    """Every rank makes and calls a recorder of a sharded network; one of them writes what one process would."""
    from torch.distributed.fsdp import fully_shard

    alone, model = net(), net()
    fully_shard(model)
    recorder = report.Recorder(model, folder / "run")
    recorder(1)
    again = report.Recorder(model, folder / "run")
    again(2)
    if rank == 0:
        moments = report.read_trajectory(folder / "run" / report.TRAJECTORY_FILE).moments
        assert [moment.epoch for moment in moments] == [0, 1, 2]
        assert moments[2].spectra == report.spectra(alone)


def test_a_sharded_network_is_recorded_by_all_ranks(tmp_path: Path) -> None:
    process_groups.run(sharded, 2, tmp_path)
