"""Test cases that run in two and three processes of one process group, and what they compare."""

from __future__ import annotations

import datetime
import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import randn
from torch import Tensor, nn

WORLDS = (2, 3)
LONGEST = 90.0
"""Seconds for all cases of one world size; a collective that some rank does not join gives up after 20."""
FAILURES = (AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Case = Callable[[int, int], None]


class Block(nn.Module):
    """A small residual network.

    Matrices of one of its kernels have 96 rows, from which on there are warm starts; another has 7, which no number of
    ranks divides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 96, 3, 2, 1)
        self.wide, self.point = nn.Conv2d(96, 96, 3, padding=1), nn.Conv2d(96, 8, 1)
        self.twice = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.norm = nn.BatchNorm2d(96)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x).relu())
        out: Tensor = self.twice(self.point(self.norm(self.wide(x).relu()) + x))
        return out


def network(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def same_bits(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    mine = torch.cat([t.detach().reshape(-1) for t in tensors])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    same_bits([mine] * len(others), others)


def total(counts: dict[str, int]) -> dict[str, int]:
    """The sums over the ranks."""
    found = torch.tensor([counts[name] for name in sorted(counts)])
    dist.all_reduce(found)
    return dict(zip(sorted(counts), found.tolist(), strict=True))


def drift(model: nn.Module, step: int, size: float = 1e-5) -> None:
    """What a training step does to weights, the same on every rank."""
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p.add_(randn(*p.shape, seed=100 * step + n), alpha=size)


def refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    """`pytest.raises`, where pytest is not at hand to explain an assertion."""
    got = "nothing"
    try:
        call()
    except error as found:
        got = str(found)
    assert message in got, f"raised {got!r}, wanted {message!r}"


def run(cases: dict[str, Case], world: int, folder: Path) -> None:
    """Run every case in `world` processes; each notes in `folder` how its cases ended. All are gone on return."""
    running = torch.multiprocessing.spawn(_rank, (world, str(folder), cases), nprocs=world, join=False)
    deadline = time.monotonic() + LONGEST
    while not running.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in running.processes:
                process.kill()
            break


def check(name: str, world: int, folder: Path) -> None:
    """Whether the case passed in all of them."""
    for rank in range(world):
        note = folder / f"{name}.{rank}"
        assert note.exists(), f"rank {rank} did not come to an end"
        assert note.read_text() == "passed", note.read_text()


def _rank(rank: int, world: int, folder: str, cases: dict[str, Case]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for name, function in cases.items():
        store = dist.FileStore(f"{folder}/{name}", world)
        wait = datetime.timedelta(seconds=20)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
        outcome = "passed"
        try:
            function(rank, world)
        except FAILURES:
            outcome = traceback.format_exc()
        finally:
            dist.destroy_process_group()
        Path(folder, f"{name}.{rank}").write_text(outcome)
    # At the end of a process that used FSDP on gloo, torch's threads now and then abort it ("terminate called").
    os._exit(0)
