"""The tables that the polar factor's kernels read, and how many launches a list of matrices takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randn

from fastrank import _backends, _native
from fastrank.ops import _polar_plan
from fastrank.ops.polar import polar_factors
from fastrank.reference.polar import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]


def test_a_plan_covers_every_tile_once() -> None:
    sizes = [(3, 5), (130, 200), (64, 640), (700, 128)]
    tensors = [torch.empty(size) for size in sizes]
    plan = _polar_plan.plan(tuple(_polar_plan.layout(each, each) for each in tensors), 128, 64, torch.device("cpu"))
    table = plan.table.tolist()
    assert [row[:4] for row in table] == [[3, 5, 128, 128], [130, 200, 256, 256], [64, 640, 128, 640],
                                          [128, 700, 128, 768]]  # fmt: skip
    assert [row[6:10] for row in table][::3] == [[5, 1, 5, 1], [1, 128, 1, 128]]
    for tasks, edge, lower in (
        (plan.pack_tasks, 64, False),
        (plan.wide_tasks, 128, False),
        (plan.square_tasks, 0, True),
    ):
        wanted = {
            (index, i, j)
            for index, row in enumerate(table)
            for i in range(row[2] // (edge or 128))
            for j in range(i + 1 if lower else row[3] // edge)
        }
        assert len(tasks) == len(wanted)
        assert set(map(tuple, tasks.tolist())) == wanted
    for index, row in enumerate(table):  # the partial sums of a matrix stand together
        assert plan.pack_tasks[row[10] : row[10] + row[11], 0].tolist() == [index] * row[11]
        assert plan.square_tasks[row[12] : row[12] + row[13], 0].tolist() == [index] * row[13]
    for offset, area, total in ((4, lambda r: r[2] * r[3], plan.wide_size), (5, lambda r: r[2] ** 2, plan.square_size)):
        spans = sorted((row[offset], row[offset] + area(row)) for row in table)
        assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == total
    assert [table[i][1] for i in dict.fromkeys(plan.square_tasks[:, 0].tolist())] == [700, 640, 200, 5]
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements in whole tiles, got a matrix of 40000×60000"):
        _polar_plan.plan(((40000, 60000, 60000, 1, 60000, 1),), 128, 64, torch.device("cpu"))


def test_tables_are_made_once() -> None:
    layouts = tuple(_polar_plan.layout(each, each) for each in (torch.empty(3, 5), torch.empty(5, 3)))
    one, other = (_polar_plan.plan(layouts, 64, 64, torch.device("cpu")) for _ in range(2))
    assert one is other


@pytest.mark.parametrize("count", [1, 17])
def test_launches_do_not_depend_on_the_matrices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """3 b + 1 for a block of b iterations, norm, packing, and one for the addresses of 16 matrices."""
    verdict = _backends.explain(_backends.facts("polar_factors", torch.empty(0)))["triton"]
    if not verdict:
        pytest.skip(verdict.reason)
    kernels, launched = _native.triton_kernels("polar"), []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: launched.append(self.name)

    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(kernels, name, Counting(name))
    for plan in SCHEDULES:
        launched.clear()
        polar_factors([randn(3 + i, 9) for i in range(count)], tolerance=plan.tolerance, backend="triton")
        assert len(launched) == sum(3 * b + 1 for b in plan.blocks) + 2 + -(-count // 16)
        assert set(launched) == set(names)
        if count == 1 and plan is SCHEDULES[1]:
            page = (ROOT / "docs" / "kernels" / "polar.md").read_text(encoding="utf-8")
            assert re.search(r"the default is (\d+) launches", page)[1] == str(len(launched))
