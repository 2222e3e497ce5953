"""FSDP2: sharded over two and four processes, a training has the result of one; afterwards the model is whole again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import process_groups
import pytest
import torch
from process_groups import SYSTEMS, apart, images, leave, left, network, penalties, train
from torch import Tensor, nn

from fastrank.distributed import Parallel, Traffic, cost
from fastrank.distributed._parallel import blocks, twin_of
from fastrank.regularize import LowRankProjection, NuclearNorm
from fastrank.regularize.base import Regularizer

WORLDS = (2, 4)
TOLERANCE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks have, since rounding depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=WORLDS, ids="{} processes".format)
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The number of ranks, and the folder in which they left what they found."""
    folder = tmp_path_factory.mktemp("several")
    process_groups.run(job, request.param, folder)
    return request.param, folder


class Watcher(Regularizer):
    """Notes how many entries of the model's parameters, gradients and momenta this rank holds."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.held = model, 0

    def add_gradients(self) -> None:
        tensors = [t for p in self._model.parameters() for t in (p, p.grad) if t is not None]
        self.held = sum(part(t).numel() for t in tensors)

    def value(self) -> Tensor:
        return torch.zeros(())


def part(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def job(rank: int, world: int, folder: Path) -> None:
    """Everything that the tests below look at."""
    for system in SYSTEMS:
        model = network(system)
        watcher = Watcher(model)
        kept, own = dict(model.named_parameters()), [*penalties(system, model), watcher]
        history = train(model, own, parallel="fsdp")
        after = dict(model.named_parameters())
        assert all(after[name] is kept[name] for name in kept)
        assert [type(module) for module in model] == [type(module) for module in network(system)]
        whole = sum(p.numel() for p in kept.values())
        gates = sum(p.numel() for p in own[0].governed().values()) if system == "funnel" else 0
        # Each tensor is cut along its first dimension, into parts that differ by a row at most.
        rows = sum(p[0].numel() for p in kept.values())
        assert watcher.held <= 2 * (whole / world + rows + gates)
        if rank == 0:
            leave(model, history, system, folder / f"{system}.safetensors")
    assert len(blocks(network("nrmf"))) == 2
    found = []
    for count in (120, 180):
        model = network("nrmf")
        own = [NuclearNorm(model, 1e-3), LowRankProjection(model, every=1, energy=0.9)]
        with Traffic() as counted:
            train(model, own, parallel="fsdp", data=images(count), epochs=2, clip_norm=None)
        found.append(counted.payload)
    a_step = {kind: (found[1][kind] - found[0][kind]) / 4 for kind in found[1]}
    wanted = cost(network("nrmf"), own, world=world, parallel="fsdp").by_collective()
    (folder / f"traffic.{rank}").write_text(json.dumps([a_step, wanted]))
    if world > 2:
        return
    again = network("nrmf")
    for _ in range(2):  # the same modules once more
        train(again, [], parallel="fsdp", epochs=1, amp="bf16", clip_norm=1e-3)
    try:
        train(network("nrmf"), [], parallel="fsdp", amp="fp16")
    except ValueError as error:
        assert str(error) == "amp must be False or 'bf16' where parallel is 'fsdp', got 'fp16'"  # noqa: PT017
    else:
        raise AssertionError("fp16 was taken")
    assert Parallel("fsdp").world == world


@pytest.mark.parametrize("system", SYSTEMS)
def test_fsdp2_trains_to_the_result_of_one_process(several: tuple[int, Path], system: str) -> None:
    model = network(system)
    history = train(model, penalties(system, model))
    found, rows, ranks = left(several[1] / f"{system}.safetensors")
    assert apart(found, model.state_dict()) <= TOLERANCE
    assert {name: tuple(own) for name, own in ranks.items()} == process_groups.ranks(model, system)
    for row, other in zip(rows, history, strict=True):
        assert (row["train_top1"], row["test_top1"]) == (other.train_top1, other.test_top1)
        assert row["loss"] == pytest.approx(other.loss, rel=TOLERANCE)
        assert row["penalty"] == pytest.approx(other.penalty, rel=1e-5)


def test_bytes_are_those_of_the_cost_model(several: tuple[int, Path]) -> None:
    world, folder = several
    for rank in range(world):
        found, wanted = json.loads((folder / f"traffic.{rank}").read_text())
        assert found == wanted


def test_a_twin_shares_parameters_and_buffers() -> None:
    model = network("funnel")
    twin = twin_of(model)
    for own, other in zip(model.modules(), twin.modules(), strict=True):
        assert own is not other
        assert own._parameters is other._parameters
        assert own._buffers is other._buffers
    twin.eval()
    assert model.training


def test_blocks_are_large_modules_and_then_the_rest() -> None:
    stage = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(64, 64, 3))
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "stage": stage, "head": nn.Linear(512, 64)})
    assert blocks(model) == [stage[1], model["head"], model]
